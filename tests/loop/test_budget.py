"""Rounds of several widths, and the budget that chooses depth and width: no text changes, and nothing is wasted."""

import dataclasses
import itertools
import re

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budget_cases import (
    CASES,
    GRAM,
    LM,
    TABLES,
    UNTRAINED,
    close,
    costs_of,
    decode,
    loop_of,
    params_of,
)
from hlo import compiled, large_copies
from loop_runs import MIXED, RAGGED, check_stats

from jax_specdec import DecodeLoop, make_generate
from jax_specdec.core import budget as policy
from jax_specdec.core import round as rounds
from jax_specdec.core.acceptance import Reject
from jax_specdec.core.budget import Budget, Plan, RoundCosts, Thrift
from jax_specdec.core.context import TargetView, make_context
from jax_specdec.core.draft import Text, chain
from jax_specdec.drafters.cascade import Cascade
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.errors import UserError


@pytest.fixture(scope="module")
def plain():
    return decode(h.plain_loop(target=h.SMALL), {})


@pytest.mark.parametrize("name", CASES)
def test_no_text_changes(name, plain):
    """Nor does a rerun change anything, and one program serves all costs."""
    drafter, params = CASES[name]
    loop, params = loop_of(drafter), params(plain.text)
    widths, seen, programs = set(), [], h._decode._cache_size()
    for verify, draft in TABLES:
        costs = costs_of(loop, verify, draft)
        got, again = (decode(loop, params, costs=costs) for _ in range(2))
        h.assert_identical(got, plain)
        check_stats(got, loop)
        jax.tree.map(np.testing.assert_array_equal, got.state, again.state)
        by_width = got.stats.widths
        assert (by_width.sum(axis=1) == got.stats.rounds).all()
        widths |= {loop.widths[i] for i in np.flatnonzero(by_width.sum(axis=0))}
        seen.append(int(got.stats.rounds.sum()))
    assert h._decode._cache_size() <= programs + 1
    assert len(widths) > 1, "all rounds had one width"
    if name not in UNTRAINED:
        assert seen[0] < seen[-1], "dear rounds were as long as free ones"


def test_dear_drafts_are_plain_rounds():
    """Of a drafter that is right half of the time and costs too much, next to nothing is left."""
    loop = loop_of(LM)
    costs = costs_of(loop, verify=2.0, draft=1.0)
    sampling = h.sampling_of(1, max_new_tokens=200)
    got = decode(loop, {"lm": close()}, [9], sampling, capacity=256, costs=costs)
    assert (got.stats.widths[0, 1:] == 0).all(), "a wide round"
    drafts = int(got.stats.depths[0, 1:].sum())
    assert drafts <= 1 + 200 / policy._RAREST_PROBE * 4


def seconds(stats, costs):
    """Of all rounds of one row, by the costs."""
    return stats.widths[0] @ np.asarray(costs.verify) + stats.depths[0] @ np.asarray(costs.draft)[0]


@pytest.fixture(scope="module")
def long():
    """A long text, of rounds without a draft: all in one program."""
    got, _ = decoded_with(jnp.zeros((1, 2054), jnp.int32), verify=9.0, draft=9.0)
    assert got.stats.rounds[0] > 1950
    return np.array(got.text)


def decoded_with(text, **costs):
    """With a drafter that knows this text."""
    loop = loop_of(h.chain_oracle(5))
    costs, sampling = costs_of(loop, **costs), h.sampling_of(1, max_new_tokens=2000)
    params = h.Oracle.params(text, certain=True)
    return decode(loop, params, [9], sampling, capacity=2048, costs=costs), costs


@pytest.mark.parametrize(("verify", "draft"), [(0.2, 0.1), (0.2, 0.005), (0.05, 0.4)])
def test_useless_drafters_cost_little(long, verify, draft):
    """By the costs themselves, of a drafter that is always wrong, over 2,000 tokens."""
    got, costs = decoded_with((long + 1) % h.VOCAB, verify=verify, draft=draft)
    assert (got.text[0, :2009] == long[0, :2009]).all()
    assert seconds(got.stats, costs) / 2000 <= 1.03


def test_a_text_that_changes_is_followed(long):
    """A drafter that is always wrong, and in the middle always right."""
    text = (long + 1) % h.VOCAB
    middle = slice(1000, 1400)
    text[:, middle] = long[:, middle]
    got, costs = decoded_with(text, verify=0.2, draft=0.1)
    assert (got.text[0, :2009] == long[0, :2009]).all()
    first = int(np.flatnonzero(got.stats.source[0, middle])[0])
    assert first <= 30, "rounds before it, each of one token"
    assert seconds(got.stats, costs) / 2000 < 0.93
    tail = got.stats.source[0, middle.stop + 30 : 2000]
    assert np.count_nonzero(tail) == 0


def expectation(hits, tries, prior):
    """Tokens of a round with each number of drafted ones verified, row by row."""
    weight = policy._PRIOR_WEIGHT
    first = (hits[:, :1] + weight * prior) / (tries[:, :1] + weight)
    own = (hits[:, 1:] + weight * first) / (tries[:, 1:] + weight)
    return promised(np.concatenate([first, own], axis=1))


def promised(acceptance):
    expected = np.ones((len(acceptance), acceptance.shape[1] + 1))
    for row, chances in enumerate(acceptance):
        reach = 1.0
        for d, chance in enumerate(chances):
            reach *= chance
            expected[row, d + 1] = expected[row, d] + max(reach, policy._LEAST)
    return expected


def believed(chance, shift):
    """In odds."""
    odds = np.exp(shift)[:, None] * chance / (1 - chance)
    return odds / (1 + odds)


def margin(v, c, worth):
    """What the policy reckons with, and how hopeful it begins."""
    count = worth.sum() ** 2 / (worth**2).sum()
    one, many = policy._MARGIN
    more = many - (many - one) / np.sqrt(count)
    hope = policy._SOBER + policy._HOPE / np.sqrt(count)
    return [x0 + more * (x - x0) for x, x0 in ((v, v[0]), (c, 0))], hope


def search(v, c, widths, hits, tries, worth, nodes, shift, told, chance):
    """How fast each depth and each width is, by trying all of them."""
    (v, c), hope = margin(v, c, worth)
    hopeful, sober = (expectation(hits, tries, x) for x in (hope, policy._SOBER))
    if told is not None:
        thought = policy._UNDERSTATED if told == "after" else 0
        hopeful = sober = promised(believed(chance, shift + thought))
    if told == "before":
        hopeful = np.where(chance[:, :1] == 0, 1, hopeful)
    depths, speeds, rows = [], [], len(hits)
    for d in range(hits.shape[1] + 1):
        width = next(i for i, w in enumerate(widths) if w >= d + 1)
        depths.append((worth * hopeful[:, d]).sum() / (v[width] + c[d]))
    for i, width in enumerate(widths):
        within = np.minimum(nodes, width - 1)
        speeds.append((worth * sober[np.arange(rows), within]).sum() / v[i])
    return depths, speeds, sober


def asking(v, c, widths, asked, brought, spent, worth):
    """How fast rounds are in which a drafter is asked that says only behind its draft what it is worth."""
    (v, c), hope = margin(v, c, worth)
    hoped, weight = [], policy._PRIOR_ASKED
    for d in range(1, len(c)):
        width = next(i for i, w in enumerate(widths) if w >= d + 1)
        tokens = sum(hope**i for i in range(1, d + 1))
        hoped.append((tokens, v[width] + c[d] - v[0]))
    tokens, took = max(hoped, key=lambda one: (1 + one[0]) / (v[0] + one[1]))
    one, many = policy._MARGIN
    more = (worth.sum() ** 2 / (worth**2).sum()) ** -0.5
    took = took / (many - (many - one) * more) / v[0]
    brought = (brought + weight * tokens) / (asked + weight)
    took = (worth * (spent + weight * took) / (asked + weight)).sum() / worth.sum()
    return (worth * (1 + brought)).sum() / (v[0] * (1 + (many - (many - one) * more) * took))


@pytest.mark.parametrize("told", (None, "before", "after"))
def test_arithmetic_against_a_search(told):
    rng = np.random.default_rng(0)
    widths, depth, rows = (1, 2, 4, 8), 7, 3

    @jax.jit
    def plan(state, worth, chance):
        foreseen = (chance if told == "before" else None,)
        return state.plan(worth, widths, True, (told,), foreseen).depth

    @jax.jit
    def width(state, worth, nodes, chance):
        way = jnp.int32(0)
        return state.width(worth, nodes, nodes, way, widths, True, (told,), chance)

    idle = 0
    for _ in range(60):
        v = np.sort(rng.uniform(1, 3, len(widths))).astype(np.float32)
        c = np.concatenate([[0], np.cumsum(rng.uniform(0.05, 0.2, depth))]).astype(np.float32)
        state = Budget.empty(RoundCosts(jnp.asarray(v), jnp.asarray(c)[None]), rows)
        tries = rng.integers(0, 9, (rows, depth)).astype(np.float32)
        hits = np.floor(tries * rng.uniform(size=tries.shape)).astype(np.float32)
        asked = rng.integers(0, 9, rows).astype(np.float32)
        brought, spent = (asked * rng.uniform(size=rows).astype(np.float32) for _ in range(2))
        state = state.replace(hits=jnp.asarray(hits)[:, None], tries=jnp.asarray(tries)[:, None])
        shift = rng.normal(size=rows).astype(np.float32)
        by_way = {"asked": asked, "brought": brought, "spent": spent, "shift": shift}
        state = state.replace(**{name: jnp.asarray(x)[:, None] for name, x in by_way.items()})
        active = np.asarray([True, *(rng.uniform(size=rows - 1) < 0.7)])
        worth = np.where(active, rng.uniform(0.01, 1, rows), 0).astype(np.float32)
        nodes = rng.integers(0, depth + 1, rows).astype(np.int32)
        chance = rng.uniform(0.2, 0.99, (rows, depth)).astype(np.float32)
        if told == "before":
            chance[rng.uniform(size=rows) < 0.3] = 0
        args = (v, c, widths, hits, tries, worth, nodes, shift, told, chance)
        depths, speeds, sober = search(*args)
        if told == "after":
            most = asking(v, c, widths, asked, brought, spent, worth)
            depths = [depths[0], *[0.0] * (depth - 1), most]
        got = int(plan(state, jnp.asarray(worth), jnp.asarray(chance)))
        idle += got == 0
        assert depths[got] >= max(depths) * (1 - 1e-5)
        index, expected = width(state, *map(jnp.asarray, (worth, nodes, chance)))
        assert speeds[int(index)] >= max(speeds) * (1 - 1e-5)
        within = np.minimum(nodes, widths[int(index)] - 1)
        np.testing.assert_allclose(expected, sober[np.arange(rows), within], rtol=1e-5)
    assert 0 < idle < 60 or told is None


def test_a_draft_ends_where_more_would_not_pay():
    """Against a walk along the chain; a forced depth is drafted whole."""
    rng, rows, depth, widths = np.random.default_rng(0), 2, 6, (1, 2, 4, 7)
    ends = jax.jit(lambda thrift, chance: thrift.depth(chance))
    for _ in range(40):
        v = np.sort(rng.uniform(1, 2, len(widths))).astype(np.float32)
        c = np.concatenate([[0], np.cumsum(rng.uniform(0.02, 0.1, depth))]).astype(np.float32)
        state = Budget.empty(RoundCosts(jnp.asarray(v), jnp.asarray(c)[None]), rows)
        worth, chance = rng.uniform(0.1, 1, rows), rng.uniform(0.3, 1, (rows, depth))
        args = (jnp.asarray(worth, jnp.float32), Plan(jnp.int32(0), jnp.int32(depth)), widths)
        state = state.replace(shift=jnp.asarray(rng.normal(size=(rows, 1)), jnp.float32))
        tries = rng.uniform(0, 20, (rows, 1, depth)).astype(np.float32)
        hits = tries * rng.uniform(size=tries.shape).astype(np.float32)
        state = state.replace(hits=jnp.asarray(hits), tries=jnp.asarray(tries))
        usual = np.asarray(state.acceptance(policy._FURTHER))[:, 0]
        usual = (worth[:, None] * usual).sum(0) / worth.sum()
        thrift = state.thrift(*args, ("after",))
        true = believed(chance, np.asarray(state.shift)[:, 0] + policy._UNDERSTATED)
        drafted, reach = 1, true[:, 0].copy()
        while drafted < depth:
            cost = (c[drafted + 1] - c[drafted] + (v[-1] - v[0]) / (widths[-1] - 1)) / v[0]
            if (worth * reach).sum() / worth.sum() * usual[drafted] < cost:
                break
            reach *= true[:, drafted]
            drafted += 1
        assert int(ends(thrift, jnp.asarray(chance, jnp.float32))) == drafted
        forced = state.force(depth=depth).thrift(*args, ("after",))
        assert int(ends(forced, jnp.zeros((rows, depth)))) == depth


def test_a_model_drafts_as_far_as_it_is_sure():
    """The tokens are those of a whole draft, with the softmax of its scores as their chances, and the loop ends behind them."""
    text, weights = Text(*h.pad(h.prompts_of([9, 9]), 24)), h.weights(h.SMALL, 11)
    drafter = LmDrafter(h.SMALL, 6)
    ctx = make_context(text, TargetView(None), h.sampling_of(2), h.VOCAB)
    ctx = ctx.replace(return_chance=True)

    @jax.jit
    def draft(ctx):
        return drafter.draft({"lm": weights}, drafter.init(2, 24), ctx)[0]

    whole = draft(ctx)
    chance = np.asarray(whole.probability)[:, 1:]
    assert (chance > 0).all() and (chance < 1).all() and whole.valid.all()
    first = h.SMALL.apply(
        weights,
        text.tokens[:, :9],
        jnp.broadcast_to(jnp.arange(9)[None], (2, 9)),
        h.SMALL.init_cache(2, 9),
    )
    want = jax.nn.softmax(first.logits[:, -1]).max(axis=-1)
    np.testing.assert_allclose(chance[:, 0], want, rtol=1e-4)
    reach = np.cumprod(chance, axis=1).mean(axis=0)
    for depth in range(1, 6):
        least = jnp.asarray([0.0, *[1.001 * reach[depth - 1]] * 5], jnp.float32)
        least = least.at[1:depth].set(0)
        thrift = Thrift(jnp.full((2,), 0.5), jnp.zeros((2,)), least)
        got = draft(ctx.replace(thrift=thrift))
        assert (got.valid.sum(axis=1) == 1 + depth).all()
        assert (got.tokens[:, : 1 + depth] == whole.tokens[:, : 1 + depth]).all()
        assert int(thrift.depth(whole.probability[:, 1:])) == depth
    # A row that is not asked, or has ended where its drafter is unsure, keeps no draft going.
    least = jnp.asarray([0.0, *[1e-6] * 5], jnp.float32)
    thrift = Thrift(jnp.asarray([0.0, 1.0]), jnp.zeros((2,)), least)
    one = ctx.replace(thrift=thrift, active=jnp.asarray([False, True]))
    assert (draft(one).valid.sum(axis=1) == 7).all()
    drafter = LmDrafter(h.SMALL, 6, stop=Stop("confidence", 0.999))
    ended = jax.jit(lambda ctx: drafter.draft({"lm": weights}, drafter.init(2, 24), ctx)[0])(one)
    assert ended.valid[1].sum() == 2


def test_a_model_that_can_never_pay_is_never_asked():
    """Nor one of two ways, beside a copy that has something to propose, or nothing."""
    verify = jnp.asarray([1.0, 1.2, 1.5, 2.0])
    draft = jnp.asarray([[0, 0.01, 0.01, 0.01], [0, 9.0, 9.5, jnp.inf]])
    state = Budget.empty(RoundCosts(verify, draft), 1)

    @jax.jit
    def plan(state, chance):
        told = ("before", "after")
        return state.plan(jnp.ones(1), (1, 2, 3, 4), True, told, (chance, None))

    for waited in (0, 1000):
        late = state.replace(waited=jnp.full_like(state.waited, waited))
        sure = plan(late, jnp.full((1, 3), 0.9))
        assert int(sure.way) == 0 and int(sure.depth) > 0
        assert int(plan(late, jnp.zeros((1, 3))).depth) == 0


@pytest.mark.parametrize("told", ("before", "after"))
@pytest.mark.parametrize(("said", "true"), [(0.9, 0.0), (0.9, 0.5), (0.1, 0.8), (0.5, 1.0)])
def test_what_a_drafter_says_is_corrected_by_what_holds(said, true, told):
    """It is too sure, or not sure enough, and after some rounds believed accordingly."""
    loop, active = loop_of(LM), jnp.ones((1,), bool)
    costs, plan = costs_of(loop, 0.2, 0.01), Plan(jnp.int32(0), jnp.int32(6))
    chance, six = jnp.full((1, 6), said), jnp.full((1,), 6)
    rng, one, thought, seen = np.random.default_rng(0), jnp.ones((1,)), [], []

    @jax.jit
    def more(state, emitted, count):
        args = (active, jnp.ones((1, 6), bool), jnp.ones((1, 6), jnp.int32), emitted, count)
        return state.observe(*args, count - 1, plan, jnp.int32(0), one, (told,), chance)

    state = Budget.empty(costs, 1)
    for step in range(200):
        right = int(np.cumprod(rng.uniform(size=6) < true).sum())
        emitted = jnp.asarray([[1] * right + [0] * (7 - right)], jnp.int32)
        state = more(state, emitted, jnp.asarray([right + 1]))
        if step >= 40:
            seen += [1] * right + [0] * (right < 6)
            likely = policy.believed(chance[0], state.understated((told,))[0])
            thought.append(float(likely[0]))
    assert abs(np.mean(thought) - np.mean(seen)) < 0.08
    index, _ = state.width(one, six, six, plan.way, loop.widths, True, (told,), chance)
    assert (loop.widths[int(index)] == 1) == (true == 0)


def test_a_batch_waits_for_its_last_row():
    """A row that is ahead counts less and less, one that has ended nothing; where rows are replaced all alike."""
    active, left = jnp.asarray([True, True, True, False]), jnp.asarray([50, 46, 3, 90])
    assert policy.worth(active).tolist() == [1, 1, 1, 0]
    weights = policy.worth(active, left)
    least = policy._LEAST_WORTH
    np.testing.assert_allclose(weights, [1, np.exp(-4 / policy._AHEAD), least, 0], rtol=1e-6)


@pytest.mark.parametrize(("replaced", "enough"), [(True, 2), (False, 3)])
def test_most_of_a_batch_must_be_due(replaced, enough):
    """A draft that does not pay is asked for again when so many rows of four have waited."""
    costs = RoundCosts(jnp.asarray([1.0, 2.5, 3.0]), 0.2 * jnp.arange(8, dtype=jnp.float32)[None])
    state = Budget.empty(costs, 4)
    state = state.replace(
        tries=jnp.full_like(state.tries, 9.0), asked=jnp.full_like(state.asked, 9.0)
    )

    @jax.jit
    def plan(state):
        return state.plan(jnp.ones(4), (1, 4, 8), True, (None,), replaced=replaced).depth

    for rows in range(5):
        waited = jnp.where(jnp.arange(4) < rows, policy._RAREST_PROBE, 0)[:, None]
        assert int(plan(state.replace(waited=waited))) == (rows >= enough)


@pytest.mark.parametrize("replaced", (False, True))
def test_no_row_runs_ahead_at_the_cost_of_others(replaced):
    """Of two rows a drafter knows one: wide rounds of both bring the batch nothing, unless the row is replaced."""
    sampling = h.sampling_of(2, max_new_tokens=200)
    plain = decode(h.plain_loop(target=h.SMALL), {}, [9, 9], sampling, capacity=256)
    text = np.array(plain.text)
    text[1] = (text[1] + 1) % h.VOCAB
    loop = loop_of(h.chain_oracle(5))
    costs = costs_of(loop, verify=0.25, draft=0.01)
    params = params_of(**h.Oracle.params(text, certain=True))
    tokens, lengths = h.pad(h.prompts_of([9, 9]))
    args = (tokens, lengths, sampling, jnp.arange(2))
    state = h.start(loop, params, *args, capacity=256, costs=costs)
    state = jax.jit(loop.run)(params, state, jnp.int32(1000), jnp.int32(2) if replaced else None)
    assert (np.asarray(state.text.tokens)[:, :209] == np.asarray(plain.text)[:, :209]).all()
    took = np.asarray(state.stats.widths)[1] @ np.asarray(costs.verify)
    assert took > 220 if replaced else took <= 206
    assert state.stats.rounds[0] < 60 if replaced else state.stats.rounds[0] > 180


def cascade_costs(loop, dear=0.4):
    """The verifier's way costs `dear`, what it verifies next to nothing."""
    costs = costs_of(loop, 0.1, 0.0)
    own, inner = np.array(costs.draft)
    own[1:] = dear
    inner[1:] = np.where(np.isfinite(inner[1:]), 0.01, np.inf)
    return costs.replace(draft=jnp.asarray(np.stack([own, inner]), jnp.float32))


@pytest.mark.parametrize("useful", ("what it verifies", "verifier", "nothing"))
def test_a_cascade_leaves_out_what_does_not_pay(useful):
    """A verifier that throws away what was right, one that is right where nothing else is, and none of that."""
    sampling, right = h.sampling_of(1, max_new_tokens=200), useful == "what it verifies"
    plain = decode(h.plain_loop(target=h.SMALL), {}, [9], sampling, capacity=256)
    answer = plain.text if right else (plain.text + 1) % h.VOCAB
    drafter = Cascade(LmDrafter(h.SMALL, 3), (h.chain_oracle(4),), (4,))
    weights = h.small_params() if useful == "verifier" else h.weights(h.SMALL, 11)
    loop = loop_of(drafter)
    params = {"lm": weights, **h.Oracle.params(answer, certain=True)}
    got = decode(loop, params, [9], sampling, capacity=256, costs=cascade_costs(loop))
    h.assert_identical(got, plain)
    accepted = dict(zip(loop.sources, got.stats.accepted[0, 1:].tolist(), strict=True))
    if right:
        assert accepted["even"] + accepted["odd"] > 120
        assert got.stats.rounds[0] < 70
    elif useful == "nothing":
        # What it verifies costs next to nothing to ask, and is asked often; hardly any of it is verified.
        assert got.stats.rounds[0] > 190 and got.stats.widths[0, 1:].sum() < 40
        assert got.stats.depths[0, 2:].sum() < 30
    else:
        assert accepted["lm"] > 80 and accepted["even"] + accepted["odd"] == 0
        assert got.stats.rounds[0] < 120


def begun(loop):
    """Arguments of a ragged mixed batch, and its state."""
    tokens, lengths = h.pad(h.prompts_of(RAGGED))
    args = (tokens, lengths, h.sampling_of(4, **MIXED), jnp.arange(4))
    params = params_of(lm=close())
    return params, args, h.start(loop, params, *args, capacity=48, costs=costs_of(loop, 0.2, 0.05))


def test_a_new_request_begins_without_memory():
    loop = loop_of(LM)
    params, (tokens, lengths, sampling, ids), state = begun(loop)
    state = h.run(loop, params, state, 6)
    one = jax.tree.map(lambda x: x[1:2] if x.ndim and len(x) == 4 else x, sampling)
    insert = jax.jit(loop.insert)
    after = insert(params, state, jnp.int32(2), tokens[1:2], lengths[1:2], one, ids[1:2]).budget
    names = [field.name for field in dataclasses.fields(after)]
    for name in set(names) - {"costs", "forced"}:
        old, new = np.asarray(getattr(state.budget, name)), np.asarray(getattr(after, name))
        assert old[2].any() or name == "waited"
        assert not new[2].any() and (np.delete(new, 2, 0) == np.delete(old, 2, 0)).all()
    assert (after.costs.verify == state.budget.costs.verify).all()


@pytest.mark.parametrize("name", ("siblings", "grown"))
def test_rounds_do_not_depend_on_where_a_run_is_cut(name):
    """Nothing of earlier rounds lies in what a slice begins with or finds."""
    drafter, params = CASES[name]
    loop = loop_of(drafter)
    tokens, lengths = h.pad(h.prompts_of(RAGGED))
    args = (tokens, lengths, h.sampling_of(4, temperature=1.3, max_new_tokens=24), jnp.arange(4))
    costs, params = costs_of(loop, 0.7, 0.1), params_of(**params(None))
    states = []
    for slices in ([100], [1] * 30):
        state = h.start(loop, params, *args, capacity=48, costs=costs)
        for count in slices:
            state = h.run(loop, params, state, count)
        states.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, states[0].stats, states[1].stats)
    np.testing.assert_array_equal(states[0].text.tokens, states[1].text.tokens)
    depths = states[0].stats.depths
    assert depths[:, 1:-1].any(), "no draft was cut"


def test_without_costs_all_is_drafted():
    """Only width is saved: rounds and what they accept are those of one width."""
    want, loop = decode(DecodeLoop(h.SMALL, GRAM), {}), loop_of(GRAM)
    got = decode(loop, {}, costs=loop.unknown_costs())
    assert got.tokens == want.tokens
    for name in ("rounds", "drafted", "accepted", "accepted_per_pos", "depths"):
        assert (getattr(got.stats, name) == getattr(want.stats, name)).all(), name
    assert got.stats.widths[:, 0].any() and got.stats.widths[:, 1:].any()


def test_a_pure_function_takes_costs(plain):
    """And is exported with them."""
    loop = loop_of(GRAM)
    generate = make_generate(h.SMALL, GRAM, max_new_tokens=24, costs=costs_of(loop, 0.2, 0.05))
    tokens, lengths = h.pad(h.prompts_of(RAGGED))
    args = (params_of(), tokens, lengths, h.sampling_of(4, **MIXED), jnp.arange(4))
    short = RoundCosts([1.0, 2.0], [[0.0, 1.0]])
    with pytest.raises(UserError, match="must have the shapes"):
        make_generate(h.SMALL, GRAM, max_new_tokens=24, costs=short)
    data = jax.export.export(jax.jit(generate))(*args).serialize()
    text, stats = jax.device_get(jax.export.deserialize(data).call(*args))
    for row, want in enumerate(plain.tokens):
        assert text.tokens[row, lengths[row] : text.length[row]].tolist() == want
    assert (
        stats.widths.shape == (4, len(loop.widths))
        and (stats.widths.sum(axis=1) == stats.rounds).all()
    )


def test_forced_rounds_are_for_measuring():
    """Each depth and width can be had from the one program, whatever the policy would take."""
    loop = loop_of(LM)
    for depth, index in itertools.product((0, 3), range(len(loop.widths))):
        params, _, state = begun(loop)
        state = state.replace(budget=state.budget.force(depth=depth, width=index))
        state = h.run(loop, params, state, 2)
        assert (state.stats.widths[:, index] == 2).all() and (
            state.stats.depths[:, depth] == 2
        ).all()


def test_the_rejection_rule_keeps_its_law():
    """What is emitted depends on widths through chance alone: enumerated elsewhere, here the counts agree."""
    loop = loop_of(LM, rule=Reject())
    check_stats(decode(loop, {"lm": close()}, costs=costs_of(loop, 0.2, 0.05)), loop)


@pytest.mark.parametrize("name", ("lm", "siblings", "cascade"))
def test_no_cache_is_copied(name):
    drafter, params = CASES[name]
    loop, capacity = loop_of(drafter), 3000  # larger than the scores of a block
    tokens, lengths = jnp.zeros((2, 16), jnp.int32), jnp.full((2,), 9, jnp.int32)
    rows = (tokens, lengths, h.sampling_of(2, temperature=1.0), jnp.arange(2))
    args, costs = (params_of(**params(None)), *rows), costs_of(loop)
    state = jax.eval_shape(lambda *a: loop.start(*a, capacity=capacity, costs=costs), *args)
    lowered = jax.jit(loop.run, donate_argnums=1).lower(args[0], state, jnp.int32(1))
    cache = state.view.cache.k[0]
    copies = large_copies(compiled(lowered).as_text(), cache.size)
    # Scores of attention may be as large, and are in the order of products.
    shapes = [re.search(r"\[([\d,]+)\]", line)[1].split(",") for line in copies]
    assert not [s for s in shapes if str(cache.shape[2]) in s and str(cache.shape[-1]) in s]


def test_whether_tokens_are_verified_does_not_depend_on_them():
    """Under the rejection rule a draft that ended early counts as whole."""
    text = Text(jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))
    proposed = jnp.asarray([[True, True, False, False]])
    plan, four = Plan(jnp.int32(0), jnp.int32(3)), jnp.zeros((1, 3), jnp.int32)
    size_of = jax.jit(lambda q: rounds._size(chain(text, four, q=q), proposed, plan))
    for q, size in ((None, 1), (np.ones((1, 3, h.VOCAB), np.float32), 3)):
        nodes, reached = size_of(q)
        assert nodes.tolist() == reached.tolist() == [size]


@pytest.mark.parametrize("widths", [(1, 8, 4, 7), (2, 7), (1, 4), (1, 4, 8)])
def test_widths_that_do_not_rise_to_the_draft(widths):
    with pytest.raises(
        UserError, match="widths of a round must rise from 1 to the draft's 7 nodes"
    ):
        DecodeLoop(h.SMALL, LM, widths=widths)


def test_costs_that_are_not_of_the_loop():
    loop = loop_of(LM)
    good = costs_of(loop)
    for costs, sentence in (
        (
            good.replace(verify=good.verify[1:]),
            r"shapes \(5,\) \(one for each width\) .* got \(4,\)",
        ),
        (good.replace(draft=good.draft[:, 1:]), "0 to 6 drafted tokens"),
        (good.replace(verify=good.verify * jnp.nan), "above 0 and finite"),
        (good.replace(draft=good.draft - 1), "at least 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            loop.check_costs(costs)
    with pytest.raises(UserError, match="All rounds of this decoder are alike"):
        DecodeLoop(h.SMALL, LM).check_costs(good)
