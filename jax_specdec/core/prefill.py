"""Reading text into a cache in chunks of a fixed width, however much of it is unread."""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Float, Int, Params
from jax_specdec.core.draft import Text
from jax_specdec.core.model import Output
from pallas_kernels import tuning


def default_chunk() -> int:
    """Tokens of a prompt read at a time: enough to be bound by arithmetic, little to waste on padding."""
    return 64 if tuning.device().platform == "cpu" else 256


@runtime_checkable
class Reader(Protocol):
    """The part of a `Model` that reading text needs."""

    def apply(
        self, params: Any, tokens: Any, positions: Any, cache: Any, *, logits: bool = True
    ) -> Output: ...

    def commit(self, cache: Any, output: Output, count: Any) -> Any: ...

    def rollback(self, cache: Any, length: Any) -> Any: ...


def read_text(
    reader: Reader,
    params: Params,
    cache: Any,
    tokens: Int[Array, "B C"],
    upto: Int[Array, " B"],
    chunk: int | None = None,
) -> Any:
    """Feeds `tokens[b, cache.length[b] : upto[b]]` of every row, `chunk` tokens at a time.

    A row that is further along already is left as it is. Costs nothing where no row lags. A row's last
    chunk is moved back to end inside the text buffer, so the cache needs no spare slots for it.
    """
    capacity = tokens.shape[1]
    width = min(chunk or default_chunk(), capacity)
    line = jnp.arange(width, dtype=jnp.int32)[None]

    def lags(cache: Any) -> Array:
        return jnp.any(cache.length < upto)

    def step(cache: Any) -> Any:
        # Writing clamps at the end of the buffer; reading a few tokens again is harmless.
        start = jnp.minimum(cache.length, capacity - width)
        position = start[:, None] + line
        read = jnp.take_along_axis(tokens, position, axis=1)
        old = reader.rollback(cache, start)
        out = reader.apply(params, read, position, old, logits=False)
        # The row's own length decides what counts; a row that does not lag has garbage written behind it.
        after = jnp.maximum(cache.length, jnp.minimum(start + width, upto))
        return reader.commit(old, out, after - start)

    return lax.while_loop(lags, step, cache)


def read_ending(
    reader: Reader, params: Params, cache: Any, text: Text, width: int
) -> tuple[Any, Float[Array, "B 1 E"]]:
    """Feeds the last `width` tokens of every row, whether they were read before or not.

    Args:
      cache: has read the text before them, and has `width` slots behind the longest row.

    Returns:
      The cache of the whole text, and the hidden state of the root.
    """
    # A shorter row reads its root several times and keeps the first result, which sees only its own key
    # and those before it.
    start = jnp.maximum(text.length - width, 0)
    cache = reader.rollback(cache, start)
    position = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    position = jnp.minimum(position, text.length[:, None] - 1)
    tokens = jnp.take_along_axis(text.tokens, position, axis=1)
    out = reader.apply(params, tokens, position, cache, logits=False)
    last = (text.length - 1 - start)[:, None, None]
    hidden = jnp.take_along_axis(out.hidden, last, axis=1)
    return reader.commit(cache, out, text.length - start), hidden
