"""Reading text into a cache, in chunks of a fixed width and by any lag."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Int
from jax_specdec.core import cache as kv
from jax_specdec.core.draft import Text
from jax_specdec.models.decoder import Output, Params
from pallas_kernels import tuning


def default_chunk() -> int:
    """Tokens of a prompt read at a time: enough to be bound by arithmetic, little to waste on padding."""
    return 64 if tuning.device().platform == "cpu" else 256


@runtime_checkable
class Reader(Protocol):
    """Anything that reads tokens as `models.Decoder` does."""

    def apply(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        cache: kv.KVCache,
        *,
        logits: bool = True,
    ) -> Output: ...


def read_text(
    reader: Reader,
    params: Params,
    cache: kv.KVCache,
    tokens: Int[Array, "B C"],
    upto: Int[Array, " B"],
    chunk: int | None = None,
) -> kv.KVCache:
    """Feeds `tokens[b, cache.length[b] : upto[b]]` of every row, `chunk` tokens at a time.

    A row that is further along already is left as it is. Costs nothing where no row lags. A row's last
    chunk is moved back to end inside the cache, so the cache needs no spare slots for it.
    """
    width = min(chunk or default_chunk(), cache.slots, tokens.shape[1])
    line = jnp.arange(width, dtype=jnp.int32)[None]

    def lags(cache: kv.KVCache) -> Array:
        return jnp.any(cache.length < upto)

    def step(cache: kv.KVCache) -> kv.KVCache:
        # Writing clamps at the end of the buffer; reading a few tokens again is harmless.
        start = jnp.minimum(cache.length, cache.slots - width)
        position = start[:, None] + line
        read = jnp.take_along_axis(tokens, jnp.minimum(position, tokens.shape[1] - 1), axis=1)
        old = cache.replace(length=start)
        out = reader.apply(params, read, position, old, logits=False)
        # The row's own length decides what counts; a row that does not lag has garbage written behind it.
        after = jnp.maximum(cache.length, jnp.minimum(start + width, upto))
        return kv.commit(old, out.new_kv, after - start, after=out.hidden)

    return lax.while_loop(lags, step, cache)


def read_ending(
    reader: Reader, params: Params, cache: kv.KVCache, text: Text, width: int
) -> tuple[kv.KVCache, Array]:
    """Feeds the last `width` tokens of every row, whether they were read before or not.

    Args:
      cache: has read the text before them, and has `width` slots behind the longest row.

    Returns:
      The cache of the whole text, and the hidden state of the root, `[B, 1, E]`.
    """
    # A row that is shorter reads its root several times and keeps the first answer, which sees its own
    # key and those before it alone.
    start = jnp.maximum(text.length - width, 0)
    cache = cache.replace(length=start)
    position = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    position = jnp.minimum(position, text.length[:, None] - 1)
    tokens = jnp.take_along_axis(text.tokens, position, axis=1)
    out = reader.apply(params, tokens, position, cache, logits=False)
    last = (text.length - 1 - start)[:, None, None]
    hidden = jnp.take_along_axis(out.hidden, last, axis=1)
    return kv.commit(cache, out.new_kv, text.length - start, after=out.hidden), hidden
