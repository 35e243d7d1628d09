"""What a budget makes of a drafter, by playing the rounds of greedy decoding again with its own policy."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Array
from jax_specdec.core.budget import Budget, RoundCosts, worth
from jax_specdec.tuning.replay import Record


def budgeted_speedup(
    found: Sequence[Record], costs: RoundCosts, widths: tuple[int, ...], batch: int = 1
) -> float:
    """Speed against plain decoding where each round drafts and verifies what pays, in batches of some texts.

    Args:
      found: rounds of chains from everywhere in the same texts: of a drafter, or of each of some `alternatives`
        (`core.drafter.ways_of`). costs: of them alone, for so many rows; what is infinite is not drafted.
      widths: from 1 to the longest chain's.
    """
    seconds = rounds = 0.0
    first = found[0]
    rows = [np.flatnonzero(first.row == row) for row in np.unique(first.row)]
    most = max(map(len, rows))
    for begin in range(0, len(rows), batch):
        matched, proposed = (np.zeros((len(found), batch, most), np.int32) for _ in range(2))
        tokens = np.zeros(batch, np.int32)
        for row, mine in enumerate(rows[begin : begin + batch]):
            mine = mine[np.argsort(first.length[mine])]
            tokens[row] = len(mine)
            for way, record in enumerate(found):
                matched[way, row, : len(mine)] = record.matched[mine]
                proposed[way, row, : len(mine)] = record.proposed[mine]
        seconds += float(_seconds(widths, costs, *map(jnp.asarray, (matched, proposed, tokens))))
        rounds += int(tokens.max())
    return rounds * float(costs.verify[0]) / seconds


@functools.partial(jax.jit, static_argnums=0)
def _seconds(
    widths: tuple[int, ...], costs: RoundCosts, matched: Array, proposed: Array, tokens: Array
) -> Array:
    """Seconds for one batch: `matched`, `proposed` `int32[W, B, N]` of a round at each token, by way; `tokens` `int32[B]`."""
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
        available = (proposed[:, row, here] > 0).T if ways > 1 else None
        plan = budget.plan(weights, widths, True, available)
        right = matched[plan.way, row, here]
        drafted = jnp.minimum(jnp.minimum(plan.depth, proposed[plan.way, row, here]), left)
        drafted = jnp.where(active, drafted, 0)
        index = budget.width(weights, drafted, drafted, plan.way, widths, True)
        verified = jnp.minimum(drafted, jnp.asarray(widths, jnp.int32)[index] - 1)
        count = jnp.where(active, jnp.minimum(jnp.minimum(right, verified) + 1, left), 0)
        accepted = jnp.minimum(jnp.minimum(right, verified), count)
        # Tokens stand for whether they are right: a drafted 0 where the text has 0.
        emitted = (behind >= right[:, None]).astype(jnp.int32)
        chain = (place < drafted[:, None], jnp.zeros((batch, depths), jnp.int32))
        budget = budget.observe(active, *chain, emitted, count, accepted, plan)
        seconds = seconds + costs.draft[plan.way, plan.depth] + costs.verify[index]
        return at + count, budget, seconds

    begun = (jnp.zeros_like(tokens), Budget.empty(costs, batch), jnp.float32(0))
    return lax.while_loop(lambda carry: jnp.any(carry[0] < tokens), step, begun)[2]
