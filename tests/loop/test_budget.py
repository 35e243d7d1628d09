"""Rounds of several widths, and the budget that chooses depth and width: no text changes, and nothing is wasted."""

import dataclasses
import itertools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import compiled, large_copies
from loop_runs import MIXED, RAGGED, TREE, check_stats

from jax_specdec import DecodeLoop
from jax_specdec.core import budget as policy
from jax_specdec.core.acceptance import Reject
from jax_specdec.core.budget import Budget, RoundCosts, usual_widths
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.errors import UserError

LM = LmDrafter(h.TARGET, 6)


def costs_of(loop, verify=1.0, draft=0.1):
    """A wider verification costs `verify` more for every doubling, a drafted token `draft`."""
    v = [1 + verify * np.log2(w) for w in loop.widths]
    c = [draft * n for n in range(loop.window)]
    return RoundCosts(jnp.asarray(v, jnp.float32), jnp.asarray([c], jnp.float32))


def loop_of(drafter, **fields):
    return DecodeLoop(h.TARGET, drafter, **fields).budgeted()


def cases(answer):
    tree = h.Oracle(TREE)
    return {
        "lm": (LM, {"lm": h.close_params()}),
        "max-gram": (MaxGram(5), {}),
        "siblings": (h.Siblings(LmDrafter(h.TARGET, 3)), {"lm": h.close_params()}),
        "tree with holes": (tree, h.Oracle.params(answer, holes=0.3)),
    }


# Wide rounds that cost nothing, rounds that pay now and then, and drafting that never does.
TABLES = ((0.0, 0.0), (0.2, 0.05), (5.0, 0.3))


@pytest.mark.parametrize("name", ("lm", "max-gram", "siblings", "tree with holes"))
def test_no_text_changes(name, plain):
    drafter, params = cases(plain.text)[name]
    loop = loop_of(drafter)
    widths, seen = set(), []
    for verify, draft in TABLES:
        got = h.decode(
            loop,
            h.all_params(**params),
            h.prompts_of(RAGGED),
            h.sampling_of(4, **MIXED),
            costs=costs_of(loop, verify, draft),
        )
        h.assert_identical(got, plain)
        check_stats(got, loop)
        rounds = got.stats.widths
        assert (rounds.sum(axis=1) == got.stats.rounds).all()
        widths |= {loop.widths[i] for i in np.flatnonzero(rounds.sum(axis=0))}
        seen.append(int(got.stats.rounds.sum()))
    assert len(widths) > 1, "all rounds had one width"
    assert seen[0] < seen[-1], "dear rounds were as long as free ones"


def test_dear_drafts_are_plain_rounds():
    """Of a drafter that is right half of the time and costs too much, next to nothing is left."""
    loop = loop_of(LM)
    args = (
        h.all_params(lm=h.close_params()),
        h.prompts_of([9]),
        h.sampling_of(1, max_new_tokens=200),
    )
    costs = costs_of(loop, verify=2.0, draft=1.0)
    got = h.decode(loop, *args, capacity=256, costs=costs)
    assert (got.stats.widths[0, 1:] == 0).all(), "a wide round"
    drafts = int(got.stats.depths[0, 1:].sum())
    assert drafts <= 1 + 200 / policy._RAREST_PROBE * 4


def test_useless_drafters_cost_little_and_others_are_found_again():
    """By the costs themselves: a drafter that is always wrong, then always right, then wrong again."""
    loop = loop_of(h.chain_oracle(5))
    length, new = 9, 240
    plain = h.decode(
        h.plain_loop(),
        h.all_params(),
        h.prompts_of([length]),
        h.sampling_of(1, max_new_tokens=new),
        capacity=256,
    )
    answer = np.array(plain.text)
    wrong = (answer + 1) % h.VOCAB
    middle = slice(length + 100, length + 170)
    turning = wrong.copy()
    turning[:, middle] = answer[:, middle]
    costs = costs_of(loop, 0.2, 0.1)
    v, c = np.asarray(costs.verify), np.asarray(costs.draft)[0]
    tokens, lengths = h.pad(h.prompts_of([length]))
    args = (tokens, lengths, h.sampling_of(1, max_new_tokens=new), jnp.arange(1))
    for text, useless in ((wrong, True), (turning, False)):
        params = h.all_params(oracle=h.Oracle.params(text, certain=True)["oracle"])
        state = h.start(loop, params, *args, capacity=256, costs=costs_of(loop, 0.2, 0.1))
        spent, places = 0.0, []
        while not int(state.stats.finish[0]):
            widths, depths = np.array(state.stats.widths[0]), np.array(state.stats.depths[0])
            state = h.run(loop, params, state, 1)
            width = int(np.argmax(np.asarray(state.stats.widths[0]) - widths))
            spent += v[width] + c[np.argmax(np.asarray(state.stats.depths[0]) - depths)]
            places.append((int(state.text.length[0]), width))
        assert state.text.tokens[0, : length + new].tolist() == answer[0, : length + new].tolist()
        if useless:
            assert spent / new <= 1.05, spent / new
        else:
            start = next(i for i, (at, _) in enumerate(places) if at >= middle.start)
            wide = next(i for i, (at, width) in enumerate(places) if at >= middle.start and width)
            assert wide - start <= 30
            assert spent / new < 0.95


def search(v, c, widths, hits, tries, active, nodes):
    """The best depth and width by trying all of them, row by row, and how fast any of them is."""
    weight, prior = policy._PRIOR_WEIGHT, policy._PRIOR
    rows, depth = hits.shape
    first = (hits[:, 0] + weight * prior) / (tries[:, 0] + weight)
    expected = np.ones((rows, depth + 1))
    for row in range(rows):
        reach = 1.0
        for d in range(depth):
            own = (hits[row, d] + weight * first[row]) / (tries[row, d] + weight)
            reach *= first[row] if d == 0 else own
            expected[row, d + 1] = expected[row, d] + max(reach, policy._LEAST)

    depths = []
    for d in range(depth + 1):
        width = next(i for i, w in enumerate(widths) if w >= d + 1)
        depths.append(expected[active, d].sum() / (v[width] + c[d]))
    speeds = []
    for i, width in enumerate(widths):
        within = np.minimum(nodes, width - 1)
        speeds.append(expected[np.arange(rows), within][active].sum() / v[i])
    return depths, speeds


def test_arithmetic_against_a_search():
    rng = np.random.default_rng(0)
    widths, depth, rows = (1, 4, 8), 7, 3
    for _ in range(60):
        v = np.sort(rng.uniform(1, 3, len(widths))).astype(np.float32)
        c = np.concatenate([[0], np.cumsum(rng.uniform(0.05, 0.2, depth))]).astype(np.float32)
        state = Budget.empty(RoundCosts(jnp.asarray(v), jnp.asarray(c)[None]), rows)
        tries = rng.integers(0, 9, (rows, depth)).astype(np.float32)
        hits = np.floor(tries * rng.uniform(size=tries.shape)).astype(np.float32)
        state = state.replace(hits=jnp.asarray(hits)[:, None], tries=jnp.asarray(tries)[:, None])
        active = np.asarray([True, *(rng.uniform(size=rows - 1) < 0.7)])
        nodes = rng.integers(0, depth + 1, rows).astype(np.int32)
        depths, speeds = search(v, c, widths, hits, tries, active, nodes)
        got = int(state.plan(jnp.asarray(active), widths, True).depth)
        assert depths[got] >= max(depths) * (1 - 1e-5)
        sizes = [jnp.asarray(nodes)] * 2
        index = int(state.width(jnp.asarray(active), *sizes, jnp.int32(0), widths, True))
        assert speeds[index] >= max(speeds) * (1 - 1e-5)


def test_forced_rounds_are_for_measuring():
    """Each depth and width can be had from the one program, whatever the policy would take."""
    loop = loop_of(LM)
    params = h.all_params(lm=h.close_params())
    tokens, lengths = h.pad(h.prompts_of(RAGGED))
    args = (tokens, lengths, h.sampling_of(4, **MIXED), jnp.arange(4))
    for depth, index in itertools.product((0, 3), range(len(loop.widths))):
        state = h.start(loop, params, *args, capacity=48, costs=costs_of(loop))
        state = state.replace(budget=state.budget.force(depth=depth, width=index))
        state = h.run(loop, params, state, 2)
        assert (state.stats.widths[:, index] == 2).all() and (state.stats.depths[:, depth] == 2).all()


def test_the_rejection_rule_keeps_its_law():
    """What is emitted depends on widths through chance alone: enumerated elsewhere, here the counts agree."""
    loop = loop_of(LM, rule=Reject())
    got = h.decode(
        loop,
        h.all_params(lm=h.close_params()),
        h.prompts_of(RAGGED),
        h.sampling_of(4, **MIXED),
        costs=costs_of(loop, 0.2, 0.05),
    )
    check_stats(got, loop)


@pytest.mark.parametrize("name", ("lm", "siblings"))
def test_no_cache_is_copied(name):
    drafter, params = cases(jnp.zeros((4, 48), jnp.int32))[name]
    loop = loop_of(drafter)
    params, capacity = h.all_params(**params), 300
    tokens, lengths = jnp.zeros((2, 16), jnp.int32), jnp.full((2,), 9, jnp.int32)
    args = (params, tokens, lengths, h.sampling_of(2, temperature=1.0), jnp.arange(2))
    costs = costs_of(loop)
    state = jax.eval_shape(lambda *a: loop.start(*a, capacity=capacity, costs=costs), *args)
    lowered = jax.jit(loop.run, donate_argnums=1).lower(params, state, jnp.int32(1))
    assert not large_copies(compiled(lowered).as_text(), state.view.cache.k[0].size)


@pytest.mark.parametrize("widths", [(1, 8, 4, 7), (2, 7), (1, 4), (1, 4, 8)])
def test_widths_that_do_not_rise_to_the_draft(widths):
    with pytest.raises(
        UserError, match="widths of a round must rise from 1 to the draft's 7 nodes"
    ):
        DecodeLoop(h.TARGET, LM, widths=widths)
