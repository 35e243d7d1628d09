"""Choosing the best few of a draft's candidates, in order."""

import jax.numpy as jnp

from jax_specdec._types import Array, Bool, Float, Int


def select(
    priority: Float[Array, "B N"], count: int
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """The `count <= N` places of highest priority, in rising order, and whether each is above -inf.

    Of equal ones the first wins. By counting pairs: for the few places of a draft that is cheaper than
    a sort, and comes out in order.
    """
    size = priority.shape[1]
    line = jnp.arange(size, dtype=jnp.int32)
    mine, other = priority[:, :, None], priority[:, None, :]
    first = (line[None, :] < line[:, None])[None]
    ahead = (other > mine) | ((other == mine) & first)
    taken = jnp.sum(ahead, axis=2, dtype=jnp.int32) < count
    slot = jnp.sum(taken[:, None, :] & first, axis=2, dtype=jnp.int32)
    here = taken[:, None, :] & (
        slot[:, None, :] == jnp.arange(count, dtype=jnp.int32)[None, :, None]
    )
    places = jnp.sum(jnp.where(here, line[None, None], 0), axis=2, dtype=jnp.int32)
    return places, jnp.take_along_axis(priority, places, axis=1) > -jnp.inf
