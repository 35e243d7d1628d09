"""What a budget makes of a drafter, by playing the rounds of greedy decoding again with its own policy."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Array
from jax_specdec.core.budget import Budget, RoundCosts, Told, told_as, worth
from jax_specdec.tuning.replay import Record


def budgeted_speedup(
    found: Sequence[Record],
    costs: RoundCosts,
    widths: tuple[int, ...],
    batch: int = 1,
    told: tuple[Told, ...] = (),
) -> float:
    """Speed against plain decoding where each round drafts and verifies what pays, in batches of some texts.

    Args:
      found: rounds of chains from everywhere in the same texts: of a drafter, or of each of some `alternatives`
        (`core.drafter.ways_of`). costs: of them alone, for so many rows; what is infinite is not drafted.
      widths: from 1 to the longest chain's. told: of each way, see `DecodeLoop.told`; default: none says how likely its tokens
        are.
    """
    seconds = rounds = 0.0
    first, told = found[0], told or (None,) * len(found)
    rows = [np.flatnonzero(first.row == row) for row in np.unique(first.row)]
    most = max(map(len, rows))
    for begin in range(0, len(rows), batch):
        matched, proposed = (np.zeros((len(found), batch, most), np.int32) for _ in range(2))
        chance = np.ones((len(found), batch, most, costs.draft.shape[1] - 1), np.float32)
        tokens = np.zeros(batch, np.int32)
        for row, mine in enumerate(rows[begin : begin + batch]):
            mine = mine[np.argsort(first.length[mine])]
            tokens[row] = len(mine)
            for way, record in enumerate(found):
                if told[way] is not None:
                    said = record.chance[mine, : chance.shape[3]]
                    chance[way, row, : len(mine), : said.shape[1]] = said
                matched[way, row, : len(mine)] = record.matched[mine]
                proposed[way, row, : len(mine)] = record.proposed[mine]
        arrays = map(jnp.asarray, (matched, proposed, chance, tokens))
        seconds += float(_seconds(widths, told, costs, *arrays))
        rounds += int(tokens.max())
    return rounds * float(costs.verify[0]) / seconds


@functools.partial(jax.jit, static_argnums=(0, 1))
def _seconds(
    widths: tuple[int, ...],
    told: tuple[Told, ...],
    costs: RoundCosts,
    matched: Array,
    proposed: Array,
    chance: Array,
    tokens: Array,
) -> Array:
    """Seconds for one batch: `matched`, `proposed` `int32[W, B, N]` of a round at each token, by way, `chance`
    `float32[W, B, N, P]`; `tokens` `int32[B]`."""
    ways, depths = costs.draft.shape[0], costs.draft.shape[1] - 1
    batch, most = matched.shape[1:]
    place = jnp.arange(depths, dtype=jnp.int32)[None]
    behind = jnp.arange(depths + 1, dtype=jnp.int32)[None]
    row = jnp.arange(batch, dtype=jnp.int32)

    def step(carry):
        at, budget, seconds = carry
        left, here = tokens - at, jnp.minimum(at, most - 1)
        active = left > 0
        weights = worth(active, left)
        foreseen: list[Array | None] = []
        for way in range(ways):
            there = place < proposed[way, row, here][:, None]
            said = jnp.where(there, chance[way, row, here], 0)
            foreseen.append(said if told[way] == "before" else None)
        plan = budget.plan(weights, widths, True, told, foreseen)
        right = matched[plan.way, row, here]
        drafted = jnp.minimum(jnp.minimum(plan.depth, proposed[plan.way, row, here]), left)
        said = chance[plan.way, row, here]
        if "after" in told:  # as `core.round` has it: such a way ends itself
            late = told_as("after", told, plan.way)
            deep = budget.thrift(weights, plan, widths, told).depth(said)
            drafted = jnp.where(active, jnp.minimum(drafted, jnp.where(late, deep, depths)), 0)
            deep = jnp.clip(jnp.max(drafted), 1, jnp.maximum(plan.depth, 1))
            plan = plan._replace(depth=jnp.where(late & (plan.depth > 0), deep, plan.depth))
        drafted = jnp.where(active, drafted, 0)
        options = (widths, True, told)
        index, expected = budget.width(weights, drafted, drafted, plan.way, *options, said)
        verified = jnp.minimum(drafted, jnp.asarray(widths, jnp.int32)[index] - 1)
        count = jnp.where(active, jnp.minimum(jnp.minimum(right, verified) + 1, left), 0)
        accepted = jnp.minimum(jnp.minimum(right, verified), count)
        # Tokens stand for whether they are right: a drafted 0 where the text has 0.
        emitted = (behind >= right[:, None]).astype(jnp.int32)
        chain = (place < drafted[:, None], jnp.zeros((batch, depths), jnp.int32))
        seen = (emitted, count, accepted, plan, index, expected, told, said)
        budget = budget.observe(active, *chain, *seen)
        seconds = seconds + costs.draft[plan.way, plan.depth] + costs.verify[index]
        return at + count, budget, seconds

    begun = (jnp.zeros_like(tokens), Budget.empty(costs, batch), jnp.float32(0))
    return lax.while_loop(lambda carry: jnp.any(carry[0] < tokens), step, begun)[2]
