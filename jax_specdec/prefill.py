"""Reading text into a cache, in chunks of a fixed width and by any lag."""

from typing import Protocol

import jax.numpy as jnp
from jax import lax

from jax_specdec import cache as kv
from jax_specdec._types import Array, Int
from jax_specdec.models.decoder import Output, Params

CHUNK = 256


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

    def head(self, params: Params, hidden: Array) -> Array: ...


def read_text(
    decoder: Reader,
    params: Params,
    cache: kv.KVCache,
    tokens: Int[Array, "B C"],
    upto: Int[Array, " B"],
    chunk: int = CHUNK,
) -> kv.KVCache:
    """Feeds `tokens[b, cache.length[b] : upto[b]]` of every row, `chunk` tokens at a time.

    A row that is further along already is left as it is. Costs nothing where no row lags. A row's last
    chunk is moved back to end inside the cache, so the cache needs no spare slots for it.
    """
    width = min(chunk, cache.slots, tokens.shape[1])
    line = jnp.arange(width, dtype=jnp.int32)[None]

    def lags(cache: kv.KVCache) -> Array:
        return jnp.any(cache.length < upto)

    def step(cache: kv.KVCache) -> kv.KVCache:
        # Writing clamps at the end of the buffer; reading a few tokens again is harmless.
        start = jnp.minimum(cache.length, cache.slots - width)
        position = start[:, None] + line
        read = jnp.take_along_axis(tokens, jnp.minimum(position, tokens.shape[1] - 1), axis=1)
        old = cache.replace(length=start)
        out = decoder.apply(params, read, position, old, logits=False)
        # The row's own length decides what counts; a row that does not lag has garbage written behind it.
        after = jnp.maximum(cache.length, jnp.minimum(start + width, upto))
        return kv.commit(old, out.new_kv, after - start, after=out.hidden)

    return lax.while_loop(lags, step, cache)
