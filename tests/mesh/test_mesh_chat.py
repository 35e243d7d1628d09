"""A conversation with a target that is divided over devices."""

import jax
import pytest

from jax_specdec import SpeculativeDecoder, load_drafter, load_target

pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers")


@pytest.mark.slow
def test_turns(tiny_checkpoints):
    mesh = jax.make_mesh((1, 2), ("data", "tensor"))
    target = load_target(tiny_checkpoints / "target", mesh=mesh)
    decoder = SpeculativeDecoder(target, load_drafter("lm:3", target))
    chat, held = decoder.chat(max_new_tokens=8), 1
    for message in ("The cat saw", "a big dog.", "And then?"):
        answer = chat(message)
        assert answer.stats.num_cached_tokens == held - 1
        assert answer.token_ids == decoder(answer.prompt, max_new_tokens=8).token_ids
        held = len(answer.prompt) + len(answer.token_ids)
