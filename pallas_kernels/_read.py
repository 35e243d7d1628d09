"""Reading a part of the caches: a few static sizes, of one layer, as the dtype of the queries."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Prefix sizes that are compiled: powers of two from here up to the cache's own size. Each costs
# about 30 ms of compilation a layer on CPU.
SMALLEST_BUCKET = 128

# Keys and values [rows, K, size, D] of batch rows from `row` and slots from `start`, by
# (row, rows, start, size).
Read = Callable[[int | jax.Array, int, int | jax.Array, int], tuple[jax.Array, jax.Array]]


def buckets(slots: int) -> tuple[int, ...]:
    """Static prefix sizes for a cache of `slots` slots, smallest first; the last is `slots`."""
    sizes = []
    size = SMALLEST_BUCKET
    while size < slots:
        sizes.append(size)
        size *= 2
    return (*sizes, slots)


def read_slots(
    k_cache: jax.Array,
    v_cache: jax.Array,
    layer: int | jax.Array | None,
    row: int | jax.Array,
    rows: int,
    start: int | jax.Array,
    size: int,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [rows, K, size, D] of slots from `start`, of batch rows from `row`."""
    k, _, d = k_cache.shape[-3:]
    shape = (rows, k, size, d)
    at = (row, 0, start, 0)
    if layer is not None:
        at, shape = (layer, *at), (1, *shape)
    static = [i for i in at if isinstance(i, int)]
    if len(static) == len(at):
        end = [i + n for i, n in zip(static, shape, strict=True)]
        keys, values = lax.slice(k_cache, static, end), lax.slice(v_cache, static, end)
    else:
        at = [jnp.asarray(i, jnp.int32) for i in at]
        keys, values = (
            lax.dynamic_slice(x, at, shape, allow_negative_indices=False)
            for x in (k_cache, v_cache)
        )
    return keys.reshape(shape[-4:]), values.reshape(shape[-4:])


def dequantised(
    read: Read,
    k_scale: jax.Array,  # float32[K]
    v_scale: jax.Array,
    dtype: np.dtype,
    *where,
) -> tuple[jax.Array, jax.Array]:
    """What `read` reads of int8 caches, as `dtype`."""
    wide = np.promote_types(dtype, np.float32)
    keys, values = (
        (x.astype(wide) * scale.astype(wide)[None, :, None, None]).astype(dtype)
        for x, scale in zip(read(*where), (k_scale, v_scale), strict=True)
    )
    return keys, values
