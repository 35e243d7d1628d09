"""A conversation with a target that is divided over devices."""

import meshes as m
import pytest

from jax_specdec import ShardingRules, SpeculativeDecoder, load_drafter, load_target

pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers")


@pytest.mark.slow
def test_turns(tiny_checkpoints):
    rules = ShardingRules(vocab=None)
    target = load_target(tiny_checkpoints / "target", mesh=m.mesh_of(1, 2), rules=rules)
    decoder = SpeculativeDecoder(target, load_drafter("lm:3", target))
    chat, held = decoder.chat(max_new_tokens=8), 1
    for message in ("The cat saw", "a big dog.", "And then?"):
        answer = chat(message)
        assert answer.stats.num_cached_tokens == held - 1
        assert answer.token_ids == decoder(answer.prompt, max_new_tokens=8).token_ids
        held = len(answer.prompt) + len(answer.token_ids)
