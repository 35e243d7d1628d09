"""Cascades: the contract, what each level drafts, lenience, origins and expansion."""

import dataclasses
import functools
import time

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cascades import CASCADES, LM, MIXED, PROMPTS, all_logits, params, reviewed, three_levels
from test_glide import pair

from jax_specdec import DecodeLoop
from jax_specdec.core.context import make_context
from jax_specdec.core.drafter import Drafter
from jax_specdec.drafters.cascade import Cascade, Horizontal
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.expand import Expand
from jax_specdec.expansions.siblings import Fixed
from jax_specdec.testing import check_drafter

# The contract


# Not those whose shape another has.
@pytest.mark.parametrize("name", sorted(CASCADES.keys() - {"vicuna", "three levels"}))
def test_contract(name):
    drafter = CASCADES[name]
    assert isinstance(drafter, Drafter)
    given = {k: v for k, v in params().items() if k in str(drafter)}
    check_drafter(drafter, given, h.TARGET, h.target_params())


# What each level drafts


def rounds(loop, params, prompts, sampling, capacity=64):
    """The states before each round, as long as any row runs."""
    tokens, lengths = h.pad(prompts)
    ids = jnp.arange(len(prompts), dtype=jnp.int32)
    state = h.start(loop, params, tokens, lengths, sampling, ids, capacity=capacity)
    while True:
        running = np.asarray(state.stats.finish == 0)
        if not running.any():
            return
        yield state, running
        state = h.run(loop, params, copied(state), 1)


@jax.jit
def copied(state):
    """`h.run` takes its state for good."""
    return jax.tree.map(jnp.copy, state)


all_laws = jax.jit(jax.nn.softmax)


@functools.partial(jax.jit, static_argnums=(0, 1))
def drafted(drafter, alone, params, state, running):
    """A round's draft, and that of a reviewer alone which has just read the text."""
    text, steps = state.text, drafter.info.depth + 1
    budget = jnp.full_like(text.length, steps)
    fields = {"keys": state.keys, "active": running, "budget": budget}
    ctx = make_context(text, state.view, state.sampling, h.VOCAB, **fields)
    draft, _ = drafter.draft(params, state.drafts, ctx)
    fresh = alone.init(text.length.shape[0], text.tokens.shape[1])
    fresh = alone.extend(params, fresh, ctx)
    return draft, alone.draft(params, fresh, ctx)[0]


def assert_drafts_as_alone(level, alone, outer, target, target_params, given, prompts):
    """Round by round, with the states that the whole cascade left behind."""
    sampling = h.sampling_of(len(prompts), max_new_tokens=24, **MIXED)
    loop = DecodeLoop(target, outer)
    tokens = 0
    for state, running in rounds(
        loop, {"target": target_params, "drafters": given}, prompts, sampling
    ):
        got, want = jax.device_get(drafted(level, alone, given, state, jnp.asarray(running)))
        valid = got.valid[:, 1:] & running[:, None]
        assert valid[running, 0].all()
        width = valid.shape[1]
        np.testing.assert_array_equal(
            np.where(valid, got.tokens[:, 1:], 0), np.where(valid, want.tokens[:, 1 : width + 1], 0)
        )
        tokens += valid.sum()
    return tokens


@pytest.mark.parametrize("level", ["outer", "inner"])
def test_a_cascade_drafts_what_its_reviewer_would(level):
    """Greedy and sampled rows of one ragged batch, at both reviewing levels of three."""
    whole = three_levels()
    outer, inner, _ = whole.drafters
    assert isinstance(outer, Cascade) and isinstance(inner, Cascade)
    level = {"outer": outer, "inner": inner}[level]
    alone = dataclasses.replace(level.verifier, length=level.info.depth)
    args = (h.TARGET, h.target_params(), params(), PROMPTS)
    assert assert_drafts_as_alone(level, alone, whole, *args) > 50


@pytest.mark.parametrize("layers", [1, 2])
def test_glide_as_a_reviewer(layers):
    """With one layer drafted keys are kept, with two they are read again."""
    target, target_params, model, weights = pair(layers)
    level = Cascade(GliDeDrafter(model, 1), (MaxGram(2),), (2,))
    alone = GliDeDrafter(model, level.info.depth)
    given = {"glide": weights}
    whole = Horizontal((level, MaxGram(2)), (2, 2))
    args = (target, target_params, given, PROMPTS)
    assert assert_drafts_as_alone(level, alone, whole, *args) > 50
    if layers == 2:
        check_drafter(whole, given, target, target_params)


@pytest.mark.parametrize("stop", [Stop("confidence", 0.2), Stop("entropy", 0.3)], ids=str)
def test_an_unsure_drafter_ends_its_draft(stop):
    """It drafts the same tokens as without, as far as its own law says."""
    alone = dataclasses.replace(LM, length=5)
    wary = dataclasses.replace(alone, stop=stop)
    sampling = h.sampling_of(len(PROMPTS), max_new_tokens=16, **MIXED)
    all_params = {"target": h.target_params(), "drafters": params()}
    ends = []
    for state, running in rounds(DecodeLoop(h.TARGET, wary), all_params, PROMPTS, sampling):
        got, want = jax.device_get(drafted(wary, alone, params(), state, jnp.asarray(running)))
        texts, lengths = jax.device_get((state.text.tokens, state.text.length))
        for row in np.flatnonzero(running):
            count = got.valid[row, 1:].sum()
            assert got.valid[row, 1 : count + 1].all()
            np.testing.assert_array_equal(
                got.tokens[row, 1 : count + 1], want.tokens[row, 1 : count + 1]
            )
            ends.append(count)
            if MIXED["temperature"][row]:
                continue
            text = texts[row, : lengths[row]]
            place = [*text, *want.tokens[row, 1:]]
            padded = np.pad(place, (0, 96 - len(place)))[None].astype(np.int32)
            logits = all_logits(h.TARGET, params()["lm"], jnp.asarray(padded))
            p = np.asarray(all_laws(logits), np.float64)[len(text) - 1 :][:5]
            figure = p.max(-1)
            if stop.rule == "entropy":
                figure = 1 - np.sqrt(-0.2 * (p * np.log(p)).sum(-1))
            unsure = np.flatnonzero(figure < stop.threshold)
            assert count == (unsure[0] + 1 if len(unsure) else 5)
    assert {1, 5} <= set(ends) or len(set(ends)) > 1


# Lenience


def test_the_ratio_form_is_not_exact():
    """Algorithm 1 as printed hands the target the reviewer's law for tokens that lenience let pass.

    The law of the first token, enumerated: q proposes, the reviewer p accepts with chance
    min(1, l p/q) and else draws from the residual, the target does the same with l = 1.
    """

    def step(p, q, lenience):
        accept = np.minimum(1, lenience * p / q)
        left = np.maximum(p - q, 0)
        return q * accept + (1 - (q * accept).sum()) * left / left.sum()

    q, p, target = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.2, 0.3, 0.5]])

    def output(lenience, exact):
        effective = step(p, q, lenience)
        said = effective if exact else p  # what the target is told that the token was drawn from
        accept = np.minimum(1, target / said)
        left = np.maximum(target - said, 0)
        return effective * accept + (1 - (effective * accept).sum()) * left / left.sum()

    np.testing.assert_allclose(output(1, False), target, atol=1e-12)
    np.testing.assert_allclose(output(2, False), [0.350, 0.171, 0.479], atol=5e-4)
    np.testing.assert_allclose(output(2, True), target, atol=1e-12)


def test_lenience_changes_drafts_and_not_the_text():
    sampling = h.sampling_of(5, **MIXED)
    want = h.decode(h.plain_loop(), h.all_params(), PROMPTS, sampling)
    accepted = []
    for lenience in (1.0, 20.0):
        drafter = Horizontal((reviewed(3, lenience=lenience), MaxGram(3)), (2, 3))
        loop = DecodeLoop(h.TARGET, drafter)
        got = h.decode(loop, h.all_params(lm=params()["lm"]), PROMPTS, sampling)
        h.assert_identical(got, want)
        accepted.append(got.stats.drafted[:, drafter.info.sources.index("lm[max-gram]") + 1].sum())
    assert accepted[1] > accepted[0]


def test_lenience_is_for_drafters():
    """A token that no distribution is behind is reviewed strictly, unless that is asked for."""
    strict, asked = three_levels(lenience=20.0), three_levels(lenience=20.0, copies=True)
    prompts, sampling = h.prompts_of((9, 7, 5)), h.sampling_of(3)
    given = h.all_params(lm=params()["lm"], lm2=params()["lm2"])
    drafted = [
        h.decode(DecodeLoop(h.TARGET, d), given, prompts, sampling).stats.drafted
        for d in (strict, asked)
    ]
    place = strict.info.sources.index("lm[max-gram]") + 1
    assert drafted[1][:, place].sum() > drafted[0][:, place].sum()


# Origins and expansion


def test_origins():
    drafter = three_levels()
    assert drafter.info.sources == (
        *("lm", "lm[lm2]", "lm[lm2[max-gram]]", "lm[max-gram]"),
        *("lm2", "lm2[max-gram]", "max-gram"),
    )
    given = {"target": h.target_params(), "drafters": params()}
    loop, sampling = DecodeLoop(h.TARGET, drafter), h.sampling_of(5, **MIXED)
    (*_, (last, _)) = rounds(loop, given, PROMPTS, sampling)  # the programs of the drafts above
    got = h.result(h.run(loop, given, copied(last), 1))
    stats = got.stats
    emitted = sum(map(len, got.tokens))
    # Each round ends with a token of the target's, which the length limit may cut off.
    assert 0 <= stats.accepted.sum() + stats.rounds.sum() - emitted <= 5
    assert (stats.accepted <= stats.drafted).all() and (stats.drafted.sum(0)[1:] > 0).all()
    for row, start in enumerate(got.state.prompt_length):
        origin = stats.source[row, start : start + len(got.tokens[row])]
        assert np.bincount(origin, minlength=8)[1:].tolist() == stats.accepted[row, 1:].tolist()


@pytest.mark.parametrize("rule", [Fixed(20), Cape(23)])
def test_expansion(rule):
    """The paper's tree: K = [[1, 3], [0, 1]], 8 children of each node that a distribution is behind."""
    cascade = Horizontal((Cascade(LM, (MaxGram(1),), (1,)), MaxGram(3)), (1, 3))
    assert cascade.info.depth == 5
    drafter = Expand(cascade, rule)
    given = {"lm": params()["lm"]}
    check_drafter(drafter, given, h.TARGET, h.target_params())
    sampling = h.sampling_of(5, **MIXED)
    got = h.decode(DecodeLoop(h.TARGET, drafter), h.all_params(**given), PROMPTS, sampling)
    h.assert_identical(got, h.decode(h.plain_loop(), h.all_params(), PROMPTS, sampling))
    sibling = len(drafter.info.sources)
    assert got.stats.accepted[:, sibling].sum() > 0
    if isinstance(rule, Fixed):
        # Siblings of the reviewer's own token and of each it accepted, none of what it did not see.
        reviewed = got.stats.drafted[:, 1:3].sum(1)
        many = np.asarray(MIXED["top_k"]) == 0  # the others leave 2 tokens
        assert (got.stats.drafted[:, sibling] == reviewed * np.where(many, 7, 1)).all()


def test_compilation_is_quick():
    """A loop with a cascade of three levels, in seconds of this process."""
    given = h.all_params(lm=params()["lm"], lm2=params()["lm2"])
    tokens, lengths = h.pad(PROMPTS)
    loop = DecodeLoop(h.TARGET, dataclasses.replace(three_levels(), cut=True))
    args = (given, tokens, lengths, h.sampling_of(5), jnp.arange(5, dtype=jnp.int32))
    state = h.start(loop, *args, capacity=48)
    before = time.process_time()
    jax.jit(loop.run).lower(given, state, 4).compile()
    assert time.process_time() - before < 60
