"""The XLA back-end: the live prefix in a few static sizes, the new tokens as a small block beside it."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import masks

# Prefix sizes that are compiled: powers of two from here up to the cache's own size.
SMALLEST_BUCKET = 64
# Above this many bytes of scores the keys are taken block by block with a running softmax.
MAX_SCORE_BYTES = 64 << 20


def attend(
    q: jax.Array,  # [B, T, N, D]
    k_new: jax.Array | None,  # [B, T, K, D]
    v_new: jax.Array | None,  # [B, T, K, D]
    k_cache: jax.Array,  # [B, K, S, D] or [L, B, K, S, D]
    v_cache: jax.Array,
    length: jax.Array,  # int32[B]
    ancestors: jax.Array | None,  # int32[B, T, ceil(T/32)]
    *,
    layer: int | jax.Array | None,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    visible: jax.Array | None,  # int32[B, T]
) -> tuple[jax.Array, jax.Array]:
    """See `pallas_kernels.tree_attention`; returns the output and the log-sum-exp."""
    b, t, n, d = q.shape
    k, s = k_cache.shape[-3:-1]
    g = n // k
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # Narrow operands are exact in one pass; float32 would fall to bfloat16 or TF32 passes.
    precision = lax.Precision.HIGHEST if q.dtype == wide else lax.Precision.DEFAULT
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=wide)
    rows = q.reshape(b, t, k, g, d).transpose(0, 2, 1, 3, 4).reshape(b, k, t * g, d)

    def scores(keys, mask):  # [B, K, P, D], bool[B or 1, 1, T or 1, 1, P] -> [B, K, T, G, P]
        x = dot(rows, keys, (((3,), (3,)), ((0, 1), (0, 1)))) * scale
        if soft_cap is not None:
            x = soft_cap * jnp.tanh(x / soft_cap)
        return jnp.where(mask, x.reshape(b, k, t, g, keys.shape[2]), -jnp.inf)

    def weigh(weights, values):  # [B, K, T, G, P], [B, K, P, D] -> [B, K, T * G, D]
        weights = weights.astype(values.dtype).reshape(b, k, t * g, values.shape[2])
        return dot(weights, values, (((3,), (2,)), ((0, 1), (0, 1))))

    if k_new is not None:
        depth = (
            jnp.arange(t, dtype=jnp.int32)[None, :]
            if ancestors is None
            else masks.popcount(ancestors) - 1
        )
        tree = masks.unpack(masks.chain(t)[None] if ancestors is None else ancestors, t)
        if window is not None:
            tree &= depth[:, None, :] > depth[:, :, None] - window
        tree_scores = scores(k_new.swapaxes(1, 2), tree[:, None, :, None, :])

    def prefix(size):
        def branch():
            start = (0, 0, 0, 0)
            shape = (b, k, size, d)
            if layer is None:
                keys = lax.slice(k_cache, start, shape)
                values = lax.slice(v_cache, start, shape)
            else:
                zero = jnp.zeros((), jnp.int32)
                at = (jnp.asarray(layer, jnp.int32), zero, zero, zero, zero)
                keys = lax.dynamic_slice(k_cache, at, (1, *shape)).reshape(shape)
                values = lax.dynamic_slice(v_cache, at, (1, *shape)).reshape(shape)
            slot = jnp.arange(size, dtype=jnp.int32)
            live = slot[None, :] < length[:, None]
            mask = live[:, None, None, None, :]
            wide_slot = slot[None, None, None, None, :]
            if visible is not None:
                mask &= wide_slot < visible[:, None, :, None, None]
            if window is not None:
                position = length[:, None] + depth
                mask &= wide_slot > position[:, None, :, None, None] - window
            x = scores(keys, mask)
            # 0 * NaN is NaN: dead slots must be zeroed, not only masked.
            values = jnp.where(live[:, None, :, None], values, 0)
            # A finite floor under the maximum keeps a query that sees nothing at exp(-inf) = 0.
            top = jnp.max(x, axis=-1, keepdims=True, initial=jnp.finfo(wide).min)
            if k_new is not None:
                top = jnp.maximum(top, jnp.max(tree_scores, axis=-1, keepdims=True))
            weights = jnp.exp(x - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = weigh(weights, values)
            if k_new is not None:
                weights = jnp.exp(tree_scores - top)
                total += jnp.sum(weights, axis=-1, keepdims=True)
                out += weigh(weights, v_new.swapaxes(1, 2))
            return out, top, total

        return branch

    sizes = buckets(s)
    index = sum((jnp.max(length) > size).astype(jnp.int32) for size in sizes[:-1])
    if len(sizes) == 1:
        out, top, total = prefix(s)()
    else:
        out, top, total = lax.switch(index, [prefix(size) for size in sizes])
    out = out.reshape(b, k, t, g, d) / jnp.where(total > 0, total, 1)
    out = out.transpose(0, 2, 1, 3, 4).reshape(b, t, n, d).astype(q.dtype)
    lse = (top + jnp.log(total)).astype(jnp.float32)
    return out, lse.transpose(0, 2, 1, 3, 4).reshape(b, t, n)


def buckets(slots: int) -> tuple[int, ...]:
    """Static prefix sizes for a cache of `slots` slots, smallest first; the last is `slots`."""
    sizes = []
    size = SMALLEST_BUCKET
    while size < slots:
        sizes.append(size)
        size *= 2
    return (*sizes, slots)
