"""Search for an earlier occurrence of the text's end, on the device."""

from typing import Literal

import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Float, Int
from jax_specdec.core.draft import Text

Ties = Literal["earliest", "latest"]
_AT_ONCE = 16


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
      count stops, at a multiple of `_AT_ONCE`, once a single candidate is left and `min_match` is reached.

    The candidates are kept as a mask that shrinks, by `_AT_ONCE` tokens in each pass over the text: where a text
    repeats itself a match is as long as the text, and passes take as long as a layer of a small model.
    """
    tokens, length = text.tokens, text.length
    batch, capacity = tokens.shape
    limit = capacity if max_match is None else max_match
    place = jnp.arange(capacity, dtype=jnp.int32)[None]
    # No token is below 0: nothing matches before the start of the text.
    before = jnp.full((batch, capacity + _AT_ONCE - 1), -1, tokens.dtype)
    padded = jnp.concatenate([before, tokens], axis=1)

    def going(carry):
        i, _, _, searching = carry
        return jnp.any(searching) & (i < limit)

    def grow(carry):
        i, alive, match, searching = carry
        at = (jnp.int32(0), capacity - i)
        part = lax.dynamic_slice(padded, at, (batch, capacity + _AT_ONCE - 1))
        longer, count = alive, jnp.zeros((batch, capacity), jnp.int32)
        for k in range(_AT_ONCE):
            last = jnp.maximum(length - 1 - i - k, 0)[:, None]
            # earlier[j] = tokens[j - i - k]
            earlier = lax.slice_in_dim(part, _AT_ONCE - 1 - k, _AT_ONCE - 1 - k + capacity, axis=1)
            longer = longer & (earlier == jnp.take_along_axis(tokens, last, axis=1))
            longer = longer & (i + k < jnp.minimum(length - 1, limit))[:, None]
            count = count + longer.astype(jnp.int32)
        best = jnp.max(count, axis=1)
        found = searching & (best > 0)
        alive = jnp.where(found[:, None], alive & (count == best[:, None]), alive)
        match = match + jnp.where(found, best, 0)
        several = jnp.sum(alive, axis=1, dtype=jnp.int32) > 1
        more = found & (best == _AT_ONCE) & (several | (match < min_match))
        return i + _AT_ONCE, alive, match, more

    alive = place < length[:, None] - 1
    start = (jnp.int32(0), alive, jnp.zeros_like(length), jnp.ones((batch,), bool))
    _, alive, match, _ = lax.while_loop(going, grow, start)
    if ties == "latest":
        end = jnp.max(jnp.where(alive, place, -1), axis=1)
    else:
        end = jnp.min(jnp.where(alive, place, capacity), axis=1)
    found = match >= min_match
    return jnp.where(found, match, 0), jnp.where(found, end, 0)


def copied(match: Int[Array, " B"], length: int) -> Float[Array, "B P"]:
    """How likely each of `length` tokens is right that a copy goes on with, behind a match of so many tokens; 0 without one.

    m tokens in a row were right, and the next is in (m - 1/2) / (m + 1) of all cases; then they are m + 1. Of SmolLM2's
    answers .22, .54, .65, .70, .79 and .88 of the first tokens behind matches of 1, 2, 3, 4, 6 and 8 to 12 are right, and .54,
    .65, .69 and .75 of the first four behind matches of 2 (`docs/decisions.md`). `longest_suffix_match` counts no further than it
    must, so that a long match may pass for one of 16 tokens.
    """
    so_far = match[:, None].astype(jnp.float32) + jnp.arange(length, dtype=jnp.float32)[None]
    return jnp.where(match[:, None] > 0, (so_far - 0.5) / (so_far + 1), 0)
