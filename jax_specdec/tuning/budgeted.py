"""What a budget makes of a drafter, by playing the rounds of greedy decoding again with its own policy."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Array
from jax_specdec.core.budget import Budget, RoundCosts
from jax_specdec.tuning.replay import Record


def budgeted_speedup(found: Sequence[Record], costs: RoundCosts, widths: tuple[int, ...]) -> float:
    """Speed against plain decoding where each round drafts and verifies what pays, in a batch of one text.

    Args:
      found: rounds of chains from everywhere in the same texts: of a drafter, or of each of some `alternatives`
        (`core.drafter.ways_of`). costs: of them alone; what is infinite is not drafted.
      widths: from 1 to the longest chain's.
    """
    seconds = tokens = 0.0
    first = found[0]
    rows = [np.flatnonzero(first.row == row) for row in np.unique(first.row)]
    most = max(map(len, rows))
    for mine in rows:
        mine = mine[np.argsort(first.length[mine])]
        padded = [np.zeros((len(found), most), np.int32) for _ in range(2)]
        for way, record in enumerate(found):
            for array, values in zip(padded, (record.matched, record.proposed), strict=True):
                array[way, : len(mine)] = values[mine]
        count = jnp.int32(len(mine))
        seconds += float(_seconds(widths, costs, *map(jnp.asarray, padded), count))
        tokens += len(mine)
    return tokens * float(costs.verify[0]) / seconds


@functools.partial(jax.jit, static_argnums=0)
def _seconds(
    widths: tuple[int, ...], costs: RoundCosts, matched: Array, proposed: Array, tokens: Array
) -> Array:
    """Seconds for one text: `matched`, `proposed` `int32[W, N]` of a round at each of its tokens, by way."""
    ways, depths = costs.draft.shape[0], costs.draft.shape[1] - 1
    place, active = jnp.arange(depths, dtype=jnp.int32)[None], jnp.ones((1,), bool)
    behind = jnp.arange(depths + 1, dtype=jnp.int32)[None]

    def step(carry):
        at, budget, seconds = carry
        left = tokens - at
        available = (proposed[:, at] > 0)[None] if ways > 1 else None
        plan = budget.plan(active, widths, True, available)
        right = matched[plan.way, at]
        drafted = jnp.minimum(jnp.minimum(plan.depth, proposed[plan.way, at]), left)[None]
        index = budget.width(active, drafted, drafted, plan.way, widths, True)
        verified = jnp.minimum(drafted, jnp.asarray(widths, jnp.int32)[index] - 1)
        count = jnp.minimum(jnp.minimum(right, verified) + 1, left)
        accepted = jnp.minimum(jnp.minimum(right, verified), count)
        # Tokens stand for whether they are right: a drafted 0 where the text has 0.
        emitted = (behind >= right).astype(jnp.int32)
        chain = (place < drafted[:, None], jnp.zeros_like(place))
        budget = budget.observe(active, *chain, emitted, count, accepted, plan)
        seconds = seconds + costs.draft[plan.way, plan.depth] + costs.verify[index]
        return at + count[0], budget, seconds

    begun = (jnp.int32(0), Budget.empty(costs, 1), jnp.float32(0))
    return lax.while_loop(lambda carry: carry[0] < tokens, step, begun)[2]
