"""Attention of whole sequences and of tree nodes beside a cache."""

from typing import Any

import jax
import jax.numpy as jnp

from jax_specdec._types import Array
from pallas_kernels import Partition, masks, precision_of, tree_attention


def scores(q: Array, k: Array, product: str, scale: float | None, soft_cap: float | None) -> Array:
    """An einsum of queries and keys in float32, scaled (None: D ** -0.5) and, if so, capped by a tanh."""
    score = jnp.einsum(
        product, q, k, precision=precision_of(q.dtype), preferred_element_type=jnp.float32
    ) * jnp.float32(q.shape[-1] ** -0.5 if scale is None else scale)
    return capped(score, soft_cap)


def capped(x: Array, cap: float | None) -> Array:
    """`cap * tanh(x / cap)`; None leaves it as it is."""
    return x if cap is None else jnp.tanh(x / x.dtype.type(cap)) * x.dtype.type(cap)


def causal_attention(
    q: Array,
    k: Array,
    v: Array,
    window: int | None,
    ancestors: Array | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Array:
    """Attention of whole sequences with nothing cached, for training.

    Args:
      q: `[B, T, N, D]`. k, v: `[B, T, K, D]`. window: sliding window in tokens, or None.
      ancestors: `int32[B, T, ceil(T/32)]`, who sees whom in a tree; not with a window.
      scale, soft_cap: see `scores`.
    """
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap}
    if ancestors is not None:
        if window is not None:
            raise ValueError("a tree without a cache cannot be read by layers with a window")
        return masked_attention(q, k, v, masks.unpack(ancestors, q.shape[1]), **options)
    i = jnp.arange(q.shape[1], dtype=jnp.int32)
    keep = i[:, None] >= i[None, :]
    if window is not None:
        keep = keep & (i[:, None] - i[None, :] < window)
    return masked_attention(q, k, v, keep[None], **options)


def masked_attention(
    q: Array,
    k: Array,
    v: Array,
    keep: Array,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Array:
    """Dense attention under any mask, for training.

    Args:
      q: `[B, T, N, D]`. k, v: `[B, S, K, D]`. keep: `bool[B or 1, T, S]`; a query must see a key.
      scale, soft_cap: see `scores`.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    precision = precision_of(q.dtype)
    score = scores(q, k, "BTKGD,BSKD->BKGTS", scale, soft_cap)
    score = jnp.where(keep[:, None, None], score, jnp.finfo(jnp.float32).min)
    weight = jax.nn.softmax(score, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKD->BTKGD", weight, v, precision=precision)
    return out.reshape(batch, length, heads, dim)


def grown_attention(
    q: Array,
    k_new: Array,
    v_new: Array,
    k_drafted: Array,
    v_drafted: Array,
    cached: dict[str, Any],
    ancestors: Array,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    partition: Partition | None = None,
) -> Array:
    """Attention of new tree nodes over the cache, over nodes drafted before them, and over themselves.

    Two softmaxes, the prefix's and the tree's, merged by their log-sum-exp: the tree stays outside of
    the cache, where its nodes would need a mask.

    Args:
      q: `[B, T, N, D]`. k_new, v_new: `[B, T, K, D]`. k_drafted, v_drafted: `[B, M, K, D]`.
      cached: a layer of a cache, see `KVCache.layer`.
      scale, soft_cap, partition: as in `tree_attention`.
      ancestors: `int32[B, T, ceil((M+T)/32)]`; bit j < M is drafted node j, bit M + i new node i.

    Returns:
      `[B, T, N, D]`.
    """
    batch, nodes, heads, dim = q.shape
    keys = jnp.concatenate([k_drafted, k_new], axis=1)
    values = jnp.concatenate([v_drafted, v_new], axis=1)
    kv_heads = keys.shape[2]
    visible = jnp.broadcast_to(cached["length"][:, None], (batch, nodes))
    prefix, lse = tree_attention(
        q,
        None,
        None,
        **cached,
        scale=scale,
        soft_cap=soft_cap,
        visible=visible,
        return_lse=True,
        partition=partition,
    )
    precision = precision_of(q.dtype)
    grouped = q.reshape(batch, nodes, kv_heads, heads // kv_heads, dim)
    score = scores(grouped, keys, "BTKGD,BSKD->BTKGS", scale, soft_cap)
    seen = masks.unpack(ancestors, keys.shape[1])[:, :, None, None]
    score = jnp.where(seen, score, -jnp.inf)
    lse = lse.reshape(*score.shape[:-1], 1)
    # A node sees itself, so that the maximum is finite even where the prefix is empty.
    top = jnp.maximum(jnp.max(score, axis=-1, keepdims=True), lse)
    weight, old = jnp.exp(score - top), jnp.exp(lse - top)
    out = jnp.einsum(
        "BTKGS,BSKD->BTKGD",
        weight.astype(values.dtype),
        values,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    total = jnp.sum(weight, axis=-1, keepdims=True) + old
    prefix = prefix.reshape(out.shape).astype(jnp.float32)
    out = (out + prefix * old) / total
    return out.astype(q.dtype).reshape(q.shape)
