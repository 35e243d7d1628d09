"""Text piece by piece adds up to the text of the whole."""

import numpy as np
import pytest

from jax_specdec.checkpoints.targets import load_tokenizer
from jax_specdec.text.detokenize import TextStream
from jax_specdec.text.stop_strings import truncate


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoints):
    return load_tokenizer(tiny_checkpoints / "tokenizer")


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("stops", [(), ("\n\n",), ("cat ran", "dog"), ("é\u2713x", "zzz")])
@pytest.mark.parametrize(
    "text", ["One day, the cat ran.\n\nDog \u2713\u2713x é\u2713xy \U0001f600!", "the d"]
)
def test_pieces_add_up(tokenizer, text, stops, size):
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer, stops)
    pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert not any("\ufffd" in piece for piece in pieces)
    pieces.append(stream.finish())
    whole = truncate(tokenizer.decode(ids, skip_special_tokens=True), stops)
    assert "".join(pieces) == whole
    assert not any(stop in "".join(pieces) for stop in stops)


def test_random_bytes(tokenizer):
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(0, len(tokenizer), 40).tolist()
        stream = TextStream(tokenizer, ("a",))
        shown = "".join(stream.push([i]) for i in ids) + stream.finish()
        assert shown == truncate(tokenizer.decode(ids, skip_special_tokens=True), ("a",))
