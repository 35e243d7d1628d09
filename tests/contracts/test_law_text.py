"""Texts under penalties, bias and forbidden words: plain decoding's, of the right law, drafted no worse."""

import dataclasses
import math

import drafters as d
import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_law import reference
from test_sampling import LEVEL, chi_square, reference_law

from jax_specdec import DecodeLoop, make_generate, make_sampling
from jax_specdec.core.acceptance import RULES
from jax_specdec.drafters.lm import LmDrafter

ROWS, NEW = 8, 24
PROMPTS = h.prompts_of([5, 1, 9, 12, 7, 3, 6, 4], seed=2)
HEAT = [1.0, 0.7, 1.2, 1.0, 1.5, 1.0, 0.8, 1.0]
OFF = np.full((ROWS, 2), -1, np.int32)


def decode(loop, params, hot, **fields):
    fields = {"stop_ids": OFF, "temperature": HEAT if hot else 0.0, "seed": 4, **fields}
    return h.decode(loop, params, PROMPTS, h.sampling_of(ROWS, max_new_tokens=NEW, **fields))


@pytest.fixture(scope="module")
def free():
    """Texts with every processor off, greedy and sampled."""
    return [decode(h.plain_loop(), h.all_params(), hot) for hot in (False, True)]


@pytest.fixture(scope="module")
def law(free):
    """One processor a row, and all at once in the last; each forbids what would have been said."""
    said = [[run.tokens[row] for run in free] for row in range(ROWS)]
    stops = np.full((ROWS, 2), -1, np.int32)
    for row in (4, 7):
        stops[row] = said[row][0][2], said[row][1][3]
    liked = {said[3][0][1]: -float("inf"), said[3][1][2]: -5.0, 7: 3.0}
    words = [[] for _ in range(ROWS)]
    words[5] = [[said[5][0][2]], [said[5][1][4]]]
    words[6] = [said[6][0][3:5], said[6][1][1:3], said[6][0][8:11]]
    words[7] = [said[7][0][5:6], said[7][1][6:8]]
    return {
        "repetition_penalty": [2.5, 1, 1, 1, 1, 1, 1, 1.5],
        "presence_penalty": [0, 6.0, 0, 0, 0, 0, 0, 2.0],
        "frequency_penalty": [0, 0, 4.0, 0, 0, 0, 0, 1.0],
        "logit_bias": [{}, {}, {}, liked, {}, {}, {}, {said[7][0][0]: -3.0}],
        "min_new_tokens": [0, 0, 0, 0, 10, 0, 0, 12],
        "stop_ids": stops,
        "bad_words": words,
    }


@pytest.fixture(scope="module")
def plain(law):
    return [decode(h.plain_loop(), h.all_params(), hot, **law) for hot in (False, True)]


def test_every_processor_changes_the_text(free, plain, law):
    for before, after in zip(free, plain, strict=True):
        assert all(a != b for a, b in zip(before.tokens, after.tokens, strict=True))
        for row in (4, 7):
            least = law["min_new_tokens"][row]
            assert len(after.tokens[row]) >= least
            assert not set(after.tokens[row][:least]) & set(law["stop_ids"][row].tolist())
        for row in (5, 6, 7):
            text = PROMPTS[row] + after.tokens[row]
            for word in law["bad_words"][row]:
                places = range(len(PROMPTS[row]) - len(word) + 1, len(text) - len(word) + 1)
                assert all(text[i : i + len(word)] != word for i in places)
    assert all(len(run.tokens[4]) < NEW for run in plain)  # the stop token comes after all


@pytest.mark.parametrize(
    "name", ["lm", "max-gram", "glide+cape", "medusa", "lm+tree", "lm[max-gram]"]
)
def test_speculative_text_is_plain_text(name, plain, law):
    drafter, params = d.made(name)
    loop = DecodeLoop(h.TARGET, drafter)
    for hot in (False, True):
        got = decode(loop, h.all_params(**params), hot, **law)
        h.assert_identical(got, plain[hot], ties=0)
        assert got.stats.accepted.sum() > 0


# Acceptance


@dataclasses.dataclass(frozen=True)
class Deaf(LmDrafter):
    """A drafter that does not know of the penalties."""

    def draft(self, params, states, ctx):
        law = ctx.law.replace(sampling=ctx.law.sampling.replace(processing=None))
        return super().draft(params, states, ctx.replace(law=law))


@pytest.mark.parametrize("kind", [LmDrafter, Deaf])
def test_the_target_as_its_own_drafter(kind, plain, law):
    """Everything is accepted, except by a drafter that ignores the law: the negative control."""
    loop = DecodeLoop(h.TARGET, kind(h.TARGET, 3))
    for hot in (False, True):
        got = decode(loop, h.all_params(lm=h.target_params()), hot, **law)
        h.assert_identical(got, plain[hot], ties=0)
        least = [math.ceil(len(text) / 4) for text in got.tokens]
        if kind is Deaf:
            assert (got.stats.rounds > least).sum() >= 6
        else:
            assert got.stats.rounds.tolist() == least


# The law of the first two tokens, by counting

BATCH, RANGES = 512, 30
PROMPT = [3, 1, 4, 1, 5]
CASES = {
    "repetition_penalty": [0.3, 1.0, 1.0, 0.6],
    "presence_penalty": [0.0, -4.0, 0.0, -1.0],
    "frequency_penalty": [0.0, 0.0, 0.0, -1.0],
    "min_new_tokens": [0, 0, 0, 0],
}
BIAS = [{}, {}, {13: 2.0}, {}]
WORDS = [[], [], [[8], [13, 28], [16, 16, 16]], [[28]]]
HOT = [1.0, 1.0, 0.8, 1.3]


def exact_law(case: int, *, penalties: bool = True) -> np.ndarray:
    """P(first, second token), `[V, V]`, in float64 from the model's logits."""
    after = np.tile(np.asarray([*PROMPT, 0], np.int32), (h.VOCAB, 1))
    after[:, -1] = np.arange(h.VOCAB)
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None], (h.VOCAB, 6))
    apply = jax.jit(h.TARGET.apply)
    logits = np.asarray(apply(h.target_params(), jnp.asarray(after), positions).logits)

    def law(x, text):
        if penalties:
            stops = np.full((4, 1), -1)
            x = reference(x, text, 5, case, rows=CASES, bias=BIAS, words=WORDS, stops=stops)
        return reference_law(x, HOT[case])

    first = law(logits[0, -2], PROMPT)
    second = np.stack([law(logits[token, -1], [*PROMPT, token]) for token in range(h.VOCAB)])
    return first[:, None] * second


@pytest.mark.parametrize("rule", ["match", "reject"])
def test_chi_square(rule):
    """Thousands of generations a case; the law without the penalties is the negative control."""
    drafter = LmDrafter(h.TARGET, 2)
    generate = jax.jit(make_generate(h.TARGET, drafter, max_new_tokens=3, rule=RULES[rule]()))
    times = BATCH // 4
    sampling = make_sampling(
        BATCH,
        max_new_tokens=3,
        stop_ids=(-1,),
        seed=11,
        temperature=HOT * times,
        logit_bias=BIAS * times,
        bad_words=WORDS * times,
        **{name: values * times for name, values in CASES.items()},
    )
    tokens, lengths = h.pad([PROMPT] * BATCH, len(PROMPT))
    params = h.all_params(lm=h.close_params())
    counts = np.zeros((4, h.VOCAB, h.VOCAB), np.int64)
    for i in range(RANGES):
        ids = jnp.arange(i * BATCH, (i + 1) * BATCH, dtype=jnp.int32)
        text, _ = generate(params, tokens, lengths, sampling, ids)
        pair = np.asarray(text.tokens)[:, 5:7]
        np.add.at(counts, (np.arange(BATCH) % 4, pair[:, 0], pair[:, 1]), 1)
    for case in range(4):
        assert chi_square(counts[case], exact_law(case)) > LEVEL
        assert chi_square(counts[case], exact_law(case, penalties=False)) < LEVEL
