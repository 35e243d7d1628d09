"""Text in, text out: batches, padding, streaming, stops, statistics and every refusal."""

import dataclasses
from pathlib import Path

import helpers as h
import numpy as np
import pytest
import tokenizers

from jax_specdec import SpeculativeDecoder, Target, UserError
from jax_specdec.core.plain import NoDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.models import Decoder
from jax_specdec.specs.build import LoadedDrafter

LETTERS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd", "é", "\n"]
EOS = 1


class Letters:
    """As much of a tokenizer as the pipeline uses: one token a letter, longest first."""

    def __init__(self):
        names = {" ": "Ġ", "\n": "Ċ", "é": "Ã©"}
        vocab = {names.get(letter, letter): i for i, letter in enumerate(LETTERS)}
        self.backend_tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
        self.backend_tokenizer.decoder = tokenizers.decoders.ByteLevel()
        self.backend_tokenizer.add_special_tokens(LETTERS[:2])

    def __call__(self, text, verbose=False):
        return {"input_ids": [LETTERS.index(c) for c in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(LETTERS[i] for i in ids if i > 1)


CONFIG = dataclasses.replace(h.CONFIG, eos_ids=(EOS,), context=128)
PROMPTS = ["abc", "zebra", "q", "hello", "lossless"]


def decoder_of(drafter=None, params=None, tokenizer=True, **fields):
    target = Target(Decoder(CONFIG), h.target_params(), Letters() if tokenizer else None, Path())
    loaded = LoadedDrafter(drafter or NoDrafter(), params or {}, "test")
    fields = {"logprobs": True, "margins": True, **fields}
    return SpeculativeDecoder(target, loaded, **fields)


@pytest.fixture(scope="module")
def plain():
    return decoder_of()


@pytest.fixture(scope="module")
def speculative():
    return decoder_of(LmDrafter(h.TARGET, 3), {"lm": h.close_params()})


OPTIONS = {
    "max_new_tokens": 20,
    "temperature": [0.0, 1.0, 1.7, 0.3, 1.0],
    "top_k": [0, 0, 9, 0, 0],
    "top_p": [1.0, 0.9, 1.0, 1.0, 0.8],
    "seed": 3,
}


def answers(decoder, prompts=PROMPTS, **fields):
    return list(decoder.generate(prompts, **{**OPTIONS, **fields}))


@pytest.fixture(scope="module")
def expected(plain):
    return answers(plain, ignore_eos=True)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_do_not_depend_on_drafter_and_batch(batch_size, speculative, expected):
    """In order, with a short last batch, and each row with the parameters of its own prompt."""
    got = answers(speculative, batch_size=batch_size, ignore_eos=True)
    assert [a.token_ids for a in got] == [a.token_ids for a in expected]
    assert [a.text for a in got] == [Letters().decode(a.token_ids) for a in expected]
    assert [a.id for a in got] == list(range(5)) and [a.prompt for a in got] == PROMPTS
    assert sum(a.stats.num_accepted_tokens for a in got) > 20
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3)
        np.testing.assert_allclose(a.margins, b.margins, atol=1e-2, rtol=1e-3)


def test_statistics(speculative, expected):
    for answer, plainly in zip(answers(speculative, ignore_eos=True), expected, strict=True):
        stats = answer.stats
        n = len(answer.token_ids)
        assert n == stats.num_tokens == len(answer.logprobs) == len(answer.sources) == 20
        by_lm = answer.sources.count("lm")
        assert set(answer.sources) <= {"lm", None}
        assert by_lm == stats.num_accepted_tokens == sum(stats.accepted_per_pos)
        assert stats.per_drafter == {
            "lm": {
                "calls": stats.num_spec_steps,
                "drafted": stats.num_draft_tokens,
                "accepted": by_lm,
            }
        }
        assert stats.draft_acceptance_rate == by_lm / stats.num_draft_tokens
        assert stats.mean_acceptance_length == n / stats.num_spec_steps
        assert 0 < stats.prefill_time_s <= stats.wall_time_s
        assert stats.tokens_per_second == n / stats.wall_time_s
        assert stats.near_ties == sum(m < 1e-3 for m in answer.margins)
        assert plainly.stats.num_spec_steps == 20 and plainly.stats.per_drafter == {}
        assert plainly.stats.draft_acceptance_rate == 0.0
        assert plainly.finish_reason == "length"


def test_end_of_text(plain, speculative, expected):
    """The token that ends a row is among its ids and not in its text."""
    ended = 0
    for decoder in (plain, speculative):
        for got, full in zip(answers(decoder, batch_size=2), expected, strict=True):
            ids = full.token_ids
            if EOS in ids:
                ids = ids[: ids.index(EOS) + 1]
                ended += 1
            assert got.token_ids == ids
            assert got.finish_reason == ("stop" if EOS in ids else "length")
            assert "</s>" not in got.text
    assert ended, "no text ends by itself: choose another seed"


def test_stop_strings(speculative, expected):
    """One tuple for all, or one a prompt; the text ends before the string."""
    stops = [(a.text[5:8],) for a in expected]
    stops[2] = ()
    for got, full, stop in zip(
        answers(speculative, stop=stops, ignore_eos=True, batch_size=2),
        expected,
        stops,
        strict=True,
    ):
        if not stop:
            assert got.text == full.text and got.finish_reason == "length"
            continue
        assert got.text == full.text[: full.text.index(stop[0])]
        assert got.finish_reason == "stop"
        assert got.token_ids == full.token_ids[: len(got.token_ids)]
        assert len(got.token_ids) < 20
    single = answers(speculative, stop=stops[0], ignore_eos=True)[0]
    assert single.text == expected[0].text[: expected[0].text.index(stops[0][0])]


def test_streaming(speculative, expected):
    """Chunks add up to the answers, with the same proposers."""
    chunks = []
    got = answers(
        speculative, batch_size=1, ignore_eos=True, on_chunk=chunks.append, rounds_per_chunk=2
    )
    assert [a.token_ids for a in got] == [a.token_ids for a in expected]
    assert {c.index for c in chunks} == set(range(len(PROMPTS))) and len(chunks) > 10
    assert [x for c in chunks for x in c.token_ids] == [x for a in got for x in a.token_ids]
    assert [x for c in chunks for x in c.sources] == [x for a in got for x in a.sources]


def test_seeds(plain, expected):
    other = answers(plain, seed=4, ignore_eos=True)
    assert other[0].token_ids == expected[0].token_ids, "greedy"
    assert other[1].token_ids != expected[1].token_ids
    own = {"seed": 9, "own_seed": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    twice = answers(plain, ["abc", "abc"], ignore_eos=True, **own)
    assert twice[0].token_ids == twice[1].token_ids
    own["own_seed"] = False
    twice = answers(plain, ["abc", "abc"], ignore_eos=True, **own)
    assert twice[0].token_ids != twice[1].token_ids


def test_limits(plain, expected):
    """A limit a row, and the context as the limit of all."""
    limits = [1, 2, 20, 3, 7]
    got = answers(plain, max_new_tokens=limits, ignore_eos=True)
    assert [a.token_ids for a in got] == [
        a.token_ids[:n] for a, n in zip(expected, limits, strict=True)
    ]
    long = next(plain.generate([[3] * 120], max_new_tokens=500, ignore_eos=True))
    assert len(long.token_ids) == 8 and long.finish_reason == "length"
    last = next(plain.generate([[3] * 127], max_new_tokens=500, ignore_eos=True))
    assert len(last.token_ids) == 1


def test_ids_and_token_prompts(plain, expected):
    tokens = [Letters()(p)["input_ids"] for p in PROMPTS]
    got = answers(plain, tokens, ids=list("vwxyz"), ignore_eos=True)
    assert [a.id for a in got] == list("vwxyz") and got[0].prompt == tokens[0]
    assert [a.token_ids for a in got] == [a.token_ids for a in expected]


def test_short_last_batch_needs_no_program():
    decoder = decoder_of()
    list(decoder.generate(PROMPTS[:3], max_new_tokens=2, batch_size=2))
    assert decoder.compilations == 2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [""]}, "prompt is empty"),
        ({"prompts": [[]]}, "prompt is empty"),
        ({"prompts": ["abc", ""]}, "Prompt 1: The prompt is empty"),
        ({"prompts": [[3] * 128]}, "128 tokens, but the context of 128"),
        ({"prompts": [[32]]}, "outside the vocabulary of 32"),
        ({"prompts": [[-1]]}, "outside the vocabulary of 32"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": [0.0, 1.0]}, "2 values for 1 prompts"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"stop": ["a"]}, "tuple"),
        ({"stop": [("a",), ("b",)]}, "stop strings for 2 of 1 prompts"),
        ({"stop": ("a", "")}, "must not be empty"),
    ],
)
def test_refusals_come_before_anything_runs(plain, fields, sentence):
    compiled = plain.compilations
    with pytest.raises(UserError, match=sentence):
        plain.generate(**{"prompts": ["abc"], **fields})
    assert plain.compilations == compiled


def test_no_tokenizer():
    decoder = decoder_of(tokenizer=False)
    with pytest.raises(UserError, match="needs a tokenizer"):
        decoder.generate(["abc"])
    with pytest.raises(UserError, match="need a tokenizer"):
        decoder.generate([[3]], stop=("a",))
