"""Rows that fail, drafts of no depth, limits, early exit and trees without a cache."""

import dataclasses
import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_specdec import DecodeLoop, Decoder, UserError, make_generate
from jax_specdec.core.acceptance import LossyTypical, Match, Reject
from jax_specdec.core.plain import NoDrafter
from jax_specdec.core.stats import FAILED, LENGTH
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.expansions.beam_search import BeamSearch
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.dynamic_tree import DynamicTree
from jax_specdec.expansions.expand import Expand
from jax_specdec.models import stack_layers

RULES = {"match": Match(), "reject": Reject(), "lossy-typical": LossyTypical()}
PROMPTS = h.prompts_of([5, 7, 3, 9, 6, 4], seed=4)
MARKS = {1: 31, 2: 30, 4: 29, 5: 28}  # row -> first token, which says what goes wrong
WRITTEN = 5  # tokens that a row writes before it does
HEAT = [0.0, 1.0, 0.7, 1.0, 0.0, 1.3]


@dataclasses.dataclass(frozen=True)
class Poison:
    """Rows that begin with a mark get logits that are NaN, inf, forbidden, or NaN in one place."""

    def __call__(self, logits, history):
        written = (history.length - history.prompt_length)[:, None] + history.depth()
        late, first = written[..., None] >= WRITTEN, history.tokens[:, 0][:, None, None]
        place = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None]
        for mark, value, where in (
            (31, jnp.nan, True),
            (30, jnp.inf, place == 7),
            (29, -jnp.inf, True),
            (28, jnp.nan, place == 7),
        ):
            bad = late & (first == mark) & where
            logits = jnp.where(bad, jnp.float32(value), logits)
        return logits


def marked(marks):
    return [[marks.get(row, 1), *prompt[1:]] for row, prompt in enumerate(PROMPTS)]


def decode(loop, prompts, temperature, limit=24):
    params = h.all_params(lm=h.close_params())
    sampling = h.sampling_of(len(PROMPTS), temperature=temperature, seed=5, max_new_tokens=limit)
    return h.decode(loop, params, prompts, sampling)


@pytest.fixture(scope="module")
def plain():
    """Without anything going wrong, greedy and mixed."""
    loop = h.plain_loop()
    return [decode(loop, marked(MARKS), t) for t in (0.0, HEAT)]


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("rule", RULES)
def test_a_row_without_a_law_fails_alone(rule, length, plain):
    """It ends with what came before, whatever the temperature; other rows are as without it."""
    drafter = LmDrafter(h.TARGET, length) if length else NoDrafter()
    loop = DecodeLoop(h.TARGET, drafter, RULES[rule], (Poison(),))
    for temperature, right in zip((0.0, HEAT), plain, strict=True):
        got = decode(loop, marked(MARKS), temperature)
        healthy = decode(loop, marked({}), temperature)
        for row in range(len(PROMPTS)):
            text = got.tokens[row]
            if row not in MARKS:
                assert got.stats.finish[row] == LENGTH and len(text) == 24
                assert text == healthy.tokens[row]
            else:
                assert got.stats.finish[row] == FAILED and healthy.stats.finish[row] == LENGTH
                assert len(text) == WRITTEN
            greedy = row in (0, 4) or not np.any(temperature)
            if RULES[rule].coupled or (greedy and RULES[rule].exact):
                assert text == right.tokens[row][: len(text)]
        # A row whose text ends before it does not fail.
        short = decode(loop, marked(MARKS), temperature, WRITTEN)
        assert (short.stats.finish == LENGTH).all()
        assert [len(text) for text in short.tokens] == [WRITTEN] * len(PROMPTS)
        if RULES[rule].coupled:
            assert short.tokens == [text[:WRITTEN] for text in got.tokens]


@pytest.mark.parametrize("length", [0, 3])
def test_a_target_that_is_not_finite(length, plain):
    """NaN weights of one token: rows that read it fail, at once where the prompt holds it.

    A row that drafts it may fail, too: in attention 0 * NaN is NaN.
    """
    params = dict(h.target_params())
    params["embed"] = params["embed"].at[31].set(jnp.nan)
    params = {"target": params, "drafters": {"lm": h.close_params()}}
    sampling = h.sampling_of(len(PROMPTS), temperature=HEAT, seed=5)
    drafter = LmDrafter(h.TARGET, length) if length else NoDrafter()
    got = h.decode(DecodeLoop(h.TARGET, drafter), params, marked(MARKS), sampling)
    finished = 0
    for row, prompt in enumerate(marked(MARKS)):
        text, want = got.tokens[row], plain[1].tokens[row]
        sound = want[: want.index(31) + 1] if 31 in want[:-1] else want
        sound = [] if 31 in prompt else sound
        assert text == sound[: len(text)] and (length or text == sound)
        assert got.stats.finish[row] == (LENGTH if len(text) == 24 else FAILED)
        finished += len(text) == 24
    assert got.tokens[1] == [] and (length or finished > 0)


# Depth 0, and both limits


@pytest.mark.parametrize("rule", RULES)
def test_plain_decoding_under_every_rule(rule):
    """`make_generate` obeys the smaller of both limits; zeros lie behind the text."""
    generate = jax.jit(make_generate(h.TARGET, max_new_tokens=8, rule=RULES[rule]))
    tokens, lengths = h.pad(PROMPTS, 11)
    sampling = h.sampling_of(6, max_new_tokens=[3, 20, 8, 1, 7, 9], temperature=HEAT)
    ids = jnp.arange(6, dtype=jnp.int32)
    text, stats = jax.device_get(generate(h.all_params(), tokens, lengths, sampling, ids))
    emitted = [3, 8, 8, 1, 7, 8]
    assert text.tokens.shape == (6, 19)
    assert (text.length - lengths).tolist() == emitted == stats.rounds.tolist()
    assert (stats.finish == LENGTH).all()
    for row, prompt in enumerate(PROMPTS):
        assert text.tokens[row, : len(prompt)].tolist() == prompt
        assert not text.tokens[row, text.length[row] :].any()
    want = h.decode(h.plain_loop(), h.all_params(), PROMPTS, sampling, capacity=48)
    for row in range(6):
        if RULES[rule].coupled or rule == "lossy-typical" or HEAT[row] == 0:
            got = text.tokens[row, lengths[row] : text.length[row]].tolist()
            assert got == want.tokens[row][: emitted[row]]


# Early exit

STOPPING = LmDrafter(h.TARGET, 4, stop=Stop("confidence", 0.5))


@pytest.mark.parametrize("rule", [DynamicTree(12), BeamSearch(9)], ids=["tree", "beam"])
def test_early_exit_with_a_grown_tree_is_refused(rule):
    with pytest.raises(UserError) as error:
        Expand(STOPPING, rule)
    assert str(error.value) == (
        "The drafter 'lm' ends drafts early, and a tree grows to its full depth: expand it by cape, "
        "fixed or path, or leave out its threshold."
    )


@functools.partial(jax.jit, static_argnums=0)
def first_draft(loop, params, tokens, lengths, sampling, ids):
    state = loop.start(params, tokens, lengths, sampling, ids, capacity=48)
    ctx = loop.context(state)
    return loop.drafter.draft(params["drafters"], state.drafts, ctx)[0]


def test_early_exit_with_cape_alone_is_its_row_in_a_batch():
    """How far others go on does not matter: neither to a draft nor to what is counted."""
    loop = DecodeLoop(h.TARGET, Expand(STOPPING, Cape(14)))
    params = h.all_params(lm=h.close_params())
    tokens, lengths = h.pad(PROMPTS)
    ids = jnp.arange(6, dtype=jnp.int32)

    def sampling(rows):
        return h.sampling_of(len(rows), temperature=[HEAT[row] for row in rows], seed=5)

    every = range(6)
    drafts = jax.device_get(first_draft(loop, params, tokens, lengths, sampling(every), ids))
    whole = h.decode(loop, params, PROMPTS, sampling(every))
    lengths_drafted = drafts.valid[:, 1:5].sum(axis=1)
    assert len(set(lengths_drafted.tolist())) > 1  # some end early
    for row in every:
        at = slice(row, row + 1)
        draft = first_draft(loop, params, tokens[at], lengths[at], sampling([row]), ids[at])
        valid = drafts.valid[row]
        np.testing.assert_array_equal(draft.valid[0], valid)
        for name in ("tokens", "source", "parent", "depth"):
            np.testing.assert_array_equal(
                getattr(draft, name)[0][valid], getattr(drafts, name)[row][valid]
            )
        np.testing.assert_allclose(
            draft.probability[0][valid], drafts.probability[row][valid], atol=1e-4
        )
        alone = h.decode(loop, params, [PROMPTS[row]], sampling([row]), ids=[row])
        assert alone.tokens[0] == whole.tokens[row]
        for name in ("rounds", "drafted", "accepted", "calls", "accepted_per_pos"):
            got, want = getattr(alone.stats, name)[0], getattr(whole.stats, name)[row]
            assert got.tolist() == want.tolist(), name


# A tree without a cache


@pytest.mark.parametrize("layer_loop", ["unroll", "scan"])
def test_a_tree_without_a_cache(layer_loop):
    """Each node's logits are those of a forward over its path alone."""
    target = Decoder(h.CONFIG, layer_loop=layer_loop)
    params = h.target_params()
    if layer_loop == "scan":
        params = stack_layers(params)
    rng = np.random.default_rng(0)
    parent = np.asarray([h.random_parents(rng, 3, 5) for _ in range(2)], np.int32)
    tokens = rng.integers(0, h.VOCAB, parent.shape).astype(np.int32)
    paths = [[[0] for _ in range(9)] for _ in range(2)]
    for b in range(2):
        for node in range(1, 9):
            paths[b][node] = [*paths[b][parent[b, node]], node]
    depth = np.asarray([[len(path) - 1 for path in row] for row in paths], np.int32)

    @jax.jit
    def forward(tokens, positions, ancestors=None):
        return target.apply(params, tokens, positions, None, ancestors).logits

    got = forward(jnp.asarray(tokens), jnp.asarray(depth), h.ancestor_bits(parent))
    chains = np.zeros((18, 4), np.int32)
    for i in range(18):
        path = paths[i // 9][i % 9]
        chains[i, : len(path)] = tokens[i // 9, path]
    line = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32)[None], chains.shape)
    want = np.asarray(forward(jnp.asarray(chains), line))[np.arange(18), depth.ravel()]
    np.testing.assert_allclose(got.reshape(18, -1), want, rtol=2e-4, atol=2e-4)
    as_chain = forward(jnp.asarray(tokens), jnp.asarray(depth))
    assert not np.allclose(got, as_chain, atol=1e-2)  # the negative control
