"""Search for an earlier occurrence of the text's end, on the device."""

from typing import Literal

import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Bool, Int
from jax_specdec.core.draft import Text

Ties = Literal["earliest", "latest"]


def longest_suffix_match(
    text: Text, *, min_match: int, max_match: int | None, ties: Ties
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Finds the earlier place where the longest match with the end of the text ends.

    Place j of `0 .. length - 2` matches m tokens when `tokens[j-m+1 .. j]` are the last m tokens.

    Args:
      min_match: fewer matching tokens count as none. max_match: longer matches tie; None: unbounded.
      ties: which of the equally long ones.

    Returns:
      `(match, end)`, `int32[B]` each: tokens matched, 0 for none, and the place j where they end. The
      count stops once a single candidate is left and `min_match` is reached.

    One pass over the text per matched token: the candidates are kept as a mask that shrinks.
    """
    tokens, length = text.tokens, text.length
    batch, capacity = tokens.shape
    limit = capacity if max_match is None else max_match
    place = jnp.arange(capacity, dtype=jnp.int32)[None]
    nothing = jnp.zeros((batch, capacity), bool)

    def going(carry):
        i, _, _, searching = carry
        return jnp.any(searching) & (i < limit)

    def grow(carry):
        i, alive, match, searching = carry
        last = jnp.maximum(length - 1 - i, 0)[:, None]
        equal = tokens == jnp.take_along_axis(tokens, last, axis=1)
        # here[j] = equal[j - i], False before the start of the text
        padded = jnp.concatenate([nothing, equal], axis=1)
        here = lax.dynamic_slice(padded, (jnp.int32(0), capacity - i), (batch, capacity))
        longer = alive & here & (i < length - 1)[:, None]
        found = searching & jnp.any(longer, axis=1)
        alive = jnp.where(found[:, None], longer, alive)
        match = match + found.astype(jnp.int32)
        several = jnp.sum(alive, axis=1, dtype=jnp.int32) > 1
        return i + 1, alive, match, found & (several | (match < min_match))

    alive = place < length[:, None] - 1
    start = (jnp.int32(0), alive, jnp.zeros_like(length), jnp.ones((batch,), bool))
    _, alive, match, _ = lax.while_loop(going, grow, start)
    if ties == "latest":
        end = jnp.max(jnp.where(alive, place, -1), axis=1)
    else:
        end = jnp.min(jnp.where(alive, place, capacity), axis=1)
    found = match >= min_match
    return jnp.where(found, match, 0), jnp.where(found, end, 0)


def occurs_before(text: Text, count: int) -> Bool[Array, " B"]:
    """Whether the last `count` tokens of each row stand somewhere before, too: whether `longest_suffix_match` finds them."""
    tokens, length = text.tokens, text.length
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    here = (place < length[:, None] - 1) & (place >= count - 1)
    for i in range(count):
        last = jnp.maximum(length - 1 - i, 0)[:, None]
        here = here & (jnp.roll(tokens, i, axis=1) == jnp.take_along_axis(tokens, last, axis=1))
    return jnp.any(here, axis=1)
