"""Drafters of another tokenizer: which tokens are the same, and that decoding stays plain decoding."""

import dataclasses
import json

import helpers as h
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jax_specdec as sd
from jax_specdec.checkpoints.vocabulary import PAYS, Shared, match_vocabulary, share
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.errors import UserError
from jax_specdec.models.fitted import Translated
from jax_specdec.specs.build import Drafters, load_drafter

SPACE = "\u2581"
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def wrapped(backend, bos, eos, added=()):
    backend.add_special_tokens([bos, eos])
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def byte_level(words, added=(), merges=(), bos="<s>", eos="</s>"):
    """The bytes a to e and the space, then words that are merged from them."""
    level = [LEVEL.pre_tokenize_str(word)[0][0] for word in ("a", "b", "c", "d", "e", " ", *words)]
    names = dict.fromkeys([bos, eos, *level])
    pairs = [(LEVEL.pre_tokenize_str(a)[0][0], b) for a, b in merges]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, pairs))
    backend.pre_tokenizer, backend.decoder = LEVEL, decoders.ByteLevel()
    return wrapped(backend, bos, eos, added)


def sentencepiece():
    """Bytes as <0x61>, pieces with U+2581, ends of text of another name."""
    names = ["<begin>", "<end>", "<0x61>", "<0x7A>", "a", "b", SPACE, f"{SPACE}a", "ab", "ba"]
    pairs = [(SPACE, "a"), ("a", "b"), ("b", "a")]
    vocab = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, pairs, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    return wrapped(backend, "<begin>", "<end>", ["<tool>"])


def test_tokens_are_the_same_by_their_bytes():
    ours, theirs = (
        byte_level([" a", "ab", "abc"], ["<tool>"], [(" ", "a"), ("a", "b")]),
        sentencepiece(),
    )
    found = share(ours, 20, theirs, 16)
    names = ours.convert_ids_to_tokens(list(range(len(ours))))
    into = {
        name: theirs.convert_ids_to_tokens(int(found.ids[i]))
        for i, name in enumerate(names)
        if found.shared[i]
    }
    space = "\u0120"
    assert into == {
        "<s>": "<begin>",
        "</s>": "<end>",
        "a": "a",
        "b": "b",
        space: SPACE,
        f"{space}a": f"{SPACE}a",
        "ab": "ab",
        "<tool>": "<tool>",
    }
    # What it lacks is read as the last token that spells it.
    missing = names.index("abc")
    assert not found.shared[missing] and not found.shared[len(ours) :].any()
    assert found.tokens == 12
    assert "it can draft 8 of the target's 12 tokens (66.7%), with so few" in found.sentence("lm")
    many = Shared(np.zeros(10, np.int32), np.arange(10) > 0, 10)
    assert PAYS <= 0.9 and many.sentence("lm").endswith("(90.0%).")


def test_added_tokens_at_the_same_ids_are_translated():
    """One tokenizer, with other tokens added behind it: it was refused."""
    ours, theirs = byte_level([], ["<tool>", "<end>"]), byte_level([], ["<pad>", "<tool>"])
    found = match_vocabulary(ours, 16, theirs, 16)
    assert found is not None
    at = ours.convert_tokens_to_ids("<tool>")
    assert found.shared[at] and found.ids[at] == theirs.convert_tokens_to_ids("<tool>") != at
    assert not found.shared[ours.convert_tokens_to_ids("<end>")]
    assert found.shared.sum() == 9
    for more in ([], ["<tool>"], ["<tool>", "<end>", "<more>"]):
        assert match_vocabulary(ours, 16, byte_level([], more), 12) is None


def test_an_overlap_of_nothing():
    ours = byte_level([])
    words = Tokenizer(models.WordLevel({"x": 0, "y": 1}, unk_token="x"))
    words.decoder = decoders.ByteLevel()
    theirs = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(UserError, match="no token in common with the target's"):
        match_vocabulary(ours, 16, theirs, 2)
    with pytest.raises(UserError, match="without tokenizers nothing tells"):
        match_vocabulary(ours, 16, None, 2)


@pytest.fixture(scope="module")
def translated():
    """A draft model of 12 tokens for half of the target's, the rest never drafted; its parameters."""
    rows, rng = 12, np.random.default_rng(0)
    small = sd.Decoder(dataclasses.replace(h.SMALL_CONFIG, vocab_size=rows))
    ids = jnp.asarray(rng.integers(0, rows, h.VOCAB), jnp.int32)
    shared = jnp.asarray(np.arange(h.VOCAB) % 2 == 0)
    return Translated(small, h.VOCAB), {"model": h.weights(small, 3), "ids": ids, "shared": shared}


def test_logits_are_those_of_the_shared_tokens(translated):
    body, own = translated
    assert isinstance(body, sd.Model)
    tokens = jnp.asarray([[1, 5, h.VOCAB - 1]], jnp.int32)
    places = jnp.arange(3, dtype=jnp.int32)[None]
    got = body.apply(own, tokens, places, body.init_cache(1, 8)).logits
    small, ids = body.model, own["ids"]
    plain = small.apply(own["model"], ids[tokens], places, small.init_cache(1, 8)).logits
    want = np.where(own["shared"], np.asarray(plain)[..., np.asarray(ids)], -np.inf)
    np.testing.assert_array_equal(got, want)


def test_decoding_with_another_vocabulary_is_plain_decoding(translated):
    """Greedy and sampled, ragged rows."""
    body, own = translated
    prompts, sampling = h.prompts_of((5, 9)), h.sampling_of(2, temperature=np.array([0.0, 0.9]))
    params = h.all_params(lm=own)
    loop = sd.DecodeLoop(h.TARGET, LmDrafter(body, 3))
    plain = h.decode(h.plain_loop(), h.all_params(), prompts, sampling)
    h.assert_identical(h.decode(loop, params, prompts, sampling), plain)


def test_a_draft_model_of_another_tokenizer_loads(tiny_checkpoints, tmp_path):
    """Its ids in the opposite order: every token is shared, and drafts are what they were."""
    target = sd.load_target(tiny_checkpoints / "target", dtype="float32")
    small = sd.load_target(tiny_checkpoints / "lm", dtype="float32")
    small.tokenizer.save_pretrained(tmp_path / "t")
    written = json.loads((tmp_path / "t/tokenizer.json").read_text())
    count = small.vocab_size
    vocab = written["model"]["vocab"]
    vocab.update({token: count - 1 - i for token, i in vocab.items()})
    for token in written["added_tokens"]:
        token["id"] = count - 1 - token["id"]
    (tmp_path / "t/tokenizer.json").write_text(json.dumps(written))
    params = {
        **small.params,
        "embed": small.params["embed"][::-1],
        "head": small.params["head"][:, ::-1],
    }
    folder = tmp_path / "lm"
    sd.save_pretrained(folder, small.config, params, dtype="float32", tokenizer=tmp_path / "t")
    with pytest.warns(
        UserWarning, match=rf"another tokenizer: it can draft {count} .* \(100.0%\)\.$"
    ):
        loaded = load_drafter("lm:2+tree:9", target, tmp_path)
    assert isinstance(loaded.drafter.drafter.body, Translated)
    own = loaded.params["lm"]
    assert bool(own["shared"].all())
    np.testing.assert_array_equal(own["ids"], np.arange(count)[::-1])
    with pytest.warns(UserWarning, match="another tokenizer"):
        Drafters(target, tmp_path).outline("lm:2")
