"""The dense reference: one score array over every slot and every new key, written to be read."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import masks


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
    k_scale: jax.Array | None,  # float32[K]
    v_scale: jax.Array | None,
    return_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """See `pallas_kernels.tree_attention`; returns the output and the log-sum-exp."""
    b, t, n, d = q.shape
    if layer is not None:
        k_cache = lax.dynamic_index_in_dim(k_cache, layer, keepdims=False)
        v_cache = lax.dynamic_index_in_dim(v_cache, layer, keepdims=False)
    k, s = k_cache.shape[1:3]
    wide = np.promote_types(q.dtype, np.float32)
    if k_scale is not None and v_scale is not None:
        k_cache = k_cache.astype(wide) * k_scale.astype(wide)[None, :, None, None]
        v_cache = v_cache.astype(wide) * v_scale.astype(wide)[None, :, None, None]

    # Which slots each query sees: bool[B, T, S].
    slot = jnp.arange(s, dtype=jnp.int32)[None, None, :]
    live = slot < length[:, None, None]
    mask = jnp.broadcast_to(live, (b, t, s))
    if visible is not None:
        mask &= slot < visible[:, :, None]
        if window is not None:
            mask &= slot >= visible[:, :, None] - window
    # 0 * NaN is NaN: dead slots must be zeroed, not only masked.
    values = jnp.where(live[:, :, :, None], v_cache, 0)
    keys = k_cache

    if k_new is not None:
        assert v_new is not None
        if ancestors is None:
            ancestors = jnp.broadcast_to(masks.chain(t)[None], (b, t, masks.num_words(t)))
        mask = jnp.concatenate([mask, masks.unpack(ancestors, t)], axis=-1)
        k_rows, v_rows = (x.swapaxes(1, 2).astype(keys.dtype) for x in (k_new, v_new))
        keys = jnp.concatenate([keys, k_rows], axis=2)
        values = jnp.concatenate([values, v_rows], axis=2)
        if window is not None:
            position = length[:, None] + masks.popcount(ancestors) - 1  # [B, T]
            slots = jnp.broadcast_to(slot[0], (b, s))
            key_position = jnp.concatenate([slots, position], axis=1)
            mask &= key_position[:, None, :] > position[:, :, None] - window

    # Products of narrow operands are exact in the wide type.
    grouped = q.astype(wide).reshape(b, t, k, n // k, d)
    scores = scale * jnp.einsum(
        "btkgd,bksd->btkgs", grouped, keys.astype(wide), precision="highest"
    )
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(mask[:, :, None, None, :], scores, -jnp.inf)
    # A finite floor under the maximum keeps a query that sees nothing at exp(-inf) = 0.
    top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(wide).min)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # The weights are rounded to the values' type, as an accelerator multiplies them.
    weights = weights.astype(q.dtype).astype(wide)
    out = jnp.einsum("btkgs,bksd->btkgd", weights, values.astype(wide), precision="highest")
    out = out / jnp.where(total > 0, total, 1)
    lse = (top + jnp.log(total))[..., 0].astype(jnp.float32)
    out = out.reshape(b, t, n, d).astype(q.dtype)
    return out, lse.reshape(b, t, n) if return_lse else None
