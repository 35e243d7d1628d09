"""What a budget makes of a drafter, by playing the rounds of greedy decoding again with its own policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Array
from jax_specdec.core.budget import Budget, RoundCosts
from jax_specdec.tuning.replay import Record


def budgeted_speedup(found: Record, costs: RoundCosts, widths: tuple[int, ...]) -> float:
    """Speed against plain decoding where each round drafts and verifies what pays, in a batch of one text.

    Args:
      found: rounds of chains from everywhere. costs: of the drafter alone; what is infinite is not drafted.
      widths: from 1 to the whole chain's.
    """
    seconds = tokens = 0.0
    rows = [np.flatnonzero(found.row == row) for row in np.unique(found.row)]
    most = max(map(len, rows))
    for mine in rows:
        mine = mine[np.argsort(found.length[mine])]
        padded = [np.zeros(most, np.int32) for _ in range(2)]
        for array, values in zip(padded, (found.matched, found.proposed), strict=True):
            array[: len(mine)] = values[mine]
        count = jnp.int32(len(mine))
        seconds += float(_seconds(widths, costs, *map(jnp.asarray, padded), count))
        tokens += len(mine)
    return tokens * float(costs.verify[0]) / seconds


@functools.partial(jax.jit, static_argnums=0)
def _seconds(
    widths: tuple[int, ...], costs: RoundCosts, matched: Array, proposed: Array, tokens: Array
) -> Array:
    """Seconds for one text: `matched`, `proposed` `int32[N]` of a round at each of its tokens."""
    depths = costs.draft.shape[1] - 1
    place, active = jnp.arange(depths, dtype=jnp.int32)[None], jnp.ones((1,), bool)
    behind = jnp.arange(depths + 1, dtype=jnp.int32)[None]

    def step(carry):
        at, budget, seconds = carry
        left = tokens - at
        plan = budget.plan(active, widths, True)
        drafted = jnp.minimum(jnp.minimum(plan.depth, proposed[at]), left)[None]
        index = budget.width(active, drafted, drafted, plan.way, widths, True)
        verified = jnp.minimum(drafted, jnp.asarray(widths, jnp.int32)[index] - 1)
        count = jnp.minimum(jnp.minimum(matched[at], verified) + 1, left)
        accepted = jnp.minimum(jnp.minimum(matched[at], verified), count)
        # Tokens stand for whether they are right: a drafted 0 where the text has 0.
        emitted = (behind >= matched[at]).astype(jnp.int32)
        chain = (place < drafted[:, None], jnp.zeros_like(place))
        budget = budget.observe(active, *chain, emitted, count, accepted, plan)
        seconds = seconds + costs.draft[plan.way, plan.depth] + costs.verify[index]
        return at + count[0], budget, seconds

    begun = (jnp.int32(0), Budget.empty(costs, 1), jnp.float32(0))
    return lax.while_loop(lambda carry: carry[0] < tokens, step, begun)[2]
