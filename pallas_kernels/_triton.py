"""The GPU back-end, for compute capability 8.0 and up: split-K with a log-sum-exp combine.

A program takes a block of query rows of one KV head and one split of its live blocks, and keeps its
running softmax in registers; the first split takes the new tokens too. Programs of neighbouring row
blocks read the same keys at the same time, so that these come from the second-level cache.

Apart from reading weights, a round waits for the start of small kernels. So queries, new keys and values are
read where the layer's product leaves them, and the output is written as the next product reads it: two
kernels a layer, and one where the prefix is not split.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import _rows, tuning
from pallas_kernels._rows import LOWEST, Array, power_of_two, precision_of

DTYPES = ("bfloat16", "float16", "float32")
SMALLEST_TILE = 16  # of a tensor core's operands
# Splits that are combined at a time.
TOGETHER = 32


def reason_against(
    q: _rows.Shaped, ancestors: Array | None, *, new_tokens: bool, anywhere: bool = False
) -> str | None:
    """Why this back-end cannot serve a call here (or `anywhere`), or None if it can."""
    if not anywhere:
        here = tuning.device()
        if here.platform != "gpu":
            return f"needs a GPU, and this is {here.platform}: interpret=True runs it anywhere"
        if not tuning.has_tensor_cores(here):
            return f"needs compute capability 8.0 or more, which {here.kind} has not"
    return _rows.reason_against(q, ancestors, DTYPES, new_tokens=new_tokens)


def attend(
    q: Array,  # [B, T, N, D]
    k_new: Array | None,  # [B, T, K, D]
    v_new: Array | None,
    k_cache: Array,  # [B, K, S, D] or [L, B, K, S, D]
    v_cache: Array,
    length: Array,  # int32[B]
    ancestors: Array | None,  # int32[B, T, W]
    *,
    layer: int | Array | None,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    visible: Array | None,  # int32[B, T]
    k_scale: Array | None,  # float32[K]
    v_scale: Array | None,
    return_lse: bool,
    config: tuning.GpuConfig | None = None,
    splits: int | None = None,
    interpret: object = False,
) -> tuple[Array, Array | None]:
    """See `pallas_kernels.tree_attention`; returns the output and, if asked for, the log-sum-exp."""
    b, t, n, d = q.shape
    if layer is None:
        k_cache, v_cache, layer = k_cache[None], v_cache[None], 0
    k, slots = k_cache.shape[2:4]
    groups = n // k
    if config is None:
        config = tuning.gpu(q.dtype, d, t * groups)
    row_block = min(config.rows, max(SMALLEST_TILE, power_of_two(t * groups)))
    row_blocks = -(-t * groups // row_block)
    if splits is None:
        wanted = -(-tuning.multiprocessors() * config.waves // (b * k * row_blocks))
        splits = min(wanted, -(-slots // config.keys))

    # By token: the heads of a group see the same.
    seen = _rows.what_rows_see(
        1, t, length, ancestors, visible, window, new_tokens=k_new is not None
    )
    operands = [
        jnp.asarray(layer, jnp.int32).reshape(1),
        seen.blocks(config.keys),
        length,
        seen.low,
        seen.high,
        q,
    ]
    if seen.new is not None:
        assert k_new is not None and v_new is not None
        operands += [seen.new, k_new, v_new]
    operands += [k_cache, v_cache]
    scales = []
    if k_scale is not None and v_scale is not None:
        scales.append(jnp.stack([k_scale, v_scale]))

    whole = pl.BlockSpec()  # a pointer to the array; the kernel reads what it needs
    answer = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((b, t, n), jnp.float32),
    ]
    parts = [
        jax.ShapeDtypeStruct((splits, *q.shape), jnp.float32),
        jax.ShapeDtypeStruct((splits, b, t, n), jnp.float32),
        jax.ShapeDtypeStruct((splits, b, t, n), jnp.float32),
    ]
    kernel = functools.partial(
        _kernel,
        scale=scale,
        soft_cap=soft_cap,
        keys=config.keys,
        row_block=row_block,
        kv_heads=k,
        new_tokens=k_new is not None,
        bits=seen.bits,
        quantised=bool(scales),
        is_split=splits > 1,
    )
    found = pl.pallas_call(
        kernel,
        grid=(row_blocks, splits, b * k),
        in_specs=[whole] * (len(operands) + len(scales)),
        out_specs=[whole] * len(parts if splits > 1 else answer),
        out_shape=parts if splits > 1 else answer,
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        name="tree_attention",
        interpret=interpret,
    )(*operands, *scales)
    if splits > 1:
        found = pl.pallas_call(
            functools.partial(_combine, groups=groups, quantised=bool(scales)),
            grid=(t * n, b),
            in_specs=[whole] * (3 + len(scales)),
            out_specs=[whole] * 2,
            out_shape=answer,
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
            name="tree_attention_combine",
            interpret=interpret,
        )(*found, *scales)
    out, lse = found
    return out, lse if return_lse else None


def _kernel(
    layer_ref,  # int32[1]
    blocks_ref,  # int32[4, B]
    length_ref,  # int32[B]
    low_ref,  # int32[B, T]
    high_ref,  # int32[B, T]
    q_ref,  # [B, T, N, D]
    *refs,
    scale,
    soft_cap,
    keys,
    row_block,
    kv_heads,
    new_tokens,
    bits,
    quantised,
    is_split,
):
    refs = list(refs)
    new_ref = refs.pop(0) if new_tokens else None  # int32[B, T, W], or [B, T, 2]
    k_new_ref = refs.pop(0) if new_tokens else None  # [B, T, K, D]
    v_new_ref = refs.pop(0) if new_tokens else None
    k_ref, v_ref = refs.pop(0), refs.pop(0)  # [L, B, K, S, D]
    scale_ref = refs.pop(0) if quantised else None  # float32[2, K]

    split, splits = pl.program_id(1), pl.num_programs(1)
    row, head = pl.program_id(2) // kv_heads, pl.program_id(2) % kv_heads
    tokens, heads, dim = q_ref.shape[1:]
    groups = heads // kv_heads
    place = pl.program_id(0) * row_block + jnp.arange(row_block)
    some = place < tokens * groups  # the last block may be longer than what is left
    token, q_head = place // groups, head * groups + place % groups
    width = power_of_two(dim)
    columns = jnp.arange(width)[None, :]

    def tile(ref, at, mask=None):
        """The tile [X, D] of ref[at], filled up with zeros to a power of two of columns."""
        (size,) = next(x.shape for x in at if getattr(x, "ndim", 0))
        at = tuple(x[:, None] if getattr(x, "ndim", 0) else x for x in at)
        if width != dim:
            mask = columns < dim if mask is None else mask & (columns < dim)
        if mask is None:
            return plgpu.load(ref.at[(*at, columns)])
        mask = jnp.broadcast_to(mask, (size, width))
        return plgpu.load(ref.at[(*at, columns)], mask=mask, other=0)

    q = tile(q_ref, (row, token, q_head), some[:, None])
    k_scale = scale
    if scale_ref is not None:
        k_scale = scale * plgpu.load(scale_ref.at[jnp.int32(0), head])

    def add(carry, k, v, keep, factor):
        """Takes keys and values [X, D] into the running softmax; keep is bool[R, X], or None."""
        old, total, acc = carry
        scores = _dot(q, k.T) * factor
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if keep is not None:
            scores = jnp.where(keep, scores, LOWEST)
        top = jnp.maximum(old, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - top[:, None])
        if keep is not None:  # where nothing has been seen yet, LOWEST - LOWEST is 0
            weights = jnp.where(keep, weights, 0.0)
        shrink = jnp.exp(old - top)
        total = total * shrink + jnp.sum(weights, axis=1)
        acc = acc * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return top, total, acc

    carry = (
        jnp.full((row_block,), LOWEST, jnp.float32),
        jnp.zeros((row_block,), jnp.float32),
        jnp.zeros((row_block, width), jnp.float32),
    )
    if new_tokens:
        assert new_ref is not None and k_new_ref is not None and v_new_ref is not None
        size = min(keys, max(SMALLEST_TILE, power_of_two(tokens)))

        def among_new(i, carry):
            node = i * size + jnp.arange(size)
            there = node < tokens
            k, v = (tile(x, (row, node, head), there[:, None]) for x in (k_new_ref, v_new_ref))
            keep = _new_seen(new_ref, (row, token, some), node, bits) & there[None, :]
            return add(carry, k, v, keep, scale)

        # Only the first split reads them.
        count = jnp.where(split == 0, jnp.int32(-(-tokens // size)), jnp.int32(0))
        carry = lax.fori_loop(0, count, among_new, carry)
        if scale_ref is not None:  # sums are kept in units of the cache's values
            top, total, acc = carry
            carry = top, total, acc / plgpu.load(scale_ref.at[jnp.int32(1), head])

    layer = plgpu.load(layer_ref.at[jnp.int32(0)])
    first, end, inner, outer = (plgpu.load(blocks_ref.at[jnp.int32(i), row]) for i in range(4))
    share = pl.cdiv(end - first, splits)
    first = first + split * share
    end = jnp.minimum(first + share, end)
    inner = jnp.clip(inner, first, jnp.maximum(first, end))
    outer = jnp.clip(outer, inner, jnp.maximum(inner, end))
    length = plgpu.load(length_ref.at[row])
    low, high = (plgpu.load(x.at[row, token], mask=some, other=0) for x in (low_ref, high_ref))

    def prefix(masked):
        def body(block, carry):
            slot = block * keys + jnp.arange(keys)
            # Dead values must not be read: 0 * NaN is NaN.
            live = (slot < length)[:, None] if masked else None
            keep = None
            if masked:
                keep = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])
            k, v = (tile(x, (layer, row, head, slot), live) for x in (k_ref, v_ref))
            if quantised:
                k, v = (x.astype(jnp.float32).astype(q.dtype) for x in (k, v))
            return add(carry, k, v, keep, k_scale)

        return body

    carry = lax.fori_loop(first, inner, prefix(masked=True), carry)
    carry = lax.fori_loop(inner, outer, prefix(masked=False), carry)
    carry = lax.fori_loop(outer, end, prefix(masked=True), carry)

    top, total, acc = carry
    mask = jnp.broadcast_to(some[:, None] & (columns < dim), acc.shape)
    if is_split:
        out_ref, top_ref, total_ref = refs  # float32 [P, B, T, N, D], [P, B, T, N], [P, B, T, N]
        at = (split, row, token, q_head)
        plgpu.store(
            out_ref.at[split, row, token[:, None], q_head[:, None], columns], acc, mask=mask
        )
        plgpu.store(top_ref.at[at], top, mask=some)
        plgpu.store(total_ref.at[at], total, mask=some)
        return
    out_ref, lse_ref = refs  # [B, T, N, D], float32[B, T, N]
    v_scale = 1.0 if scale_ref is None else plgpu.load(scale_ref.at[jnp.int32(1), head])
    out, lse = _answer(top, total, acc, v_scale)
    target = out_ref.at[row, token[:, None], q_head[:, None], columns]
    plgpu.store(target, out.astype(out_ref.dtype), mask=mask)
    plgpu.store(lse_ref.at[row, token, q_head], lse, mask=some)


def _answer(top: Array, total: Array, acc: Array, v_scale: Array | float) -> tuple[Array, Array]:
    """The output and the log-sum-exp of a softmax that has seen all keys: [...], [...], [..., D]."""
    some = total > 0
    out = acc * (v_scale / jnp.where(some, total, 1.0))[..., None]
    return out, jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)


def _combine(
    part_ref,  # float32[P, B, T, N, D], values weighted by exp(score - top)
    top_ref,  # float32[P, B, T, N], each split's largest score
    total_ref,  # float32[P, B, T, N], the sum of its weights
    *refs,
    groups,
    quantised,
):
    """One query's softmaxes over P splits of the keys -> the softmax over all."""
    refs = list(refs)
    scale_ref = refs.pop(0) if quantised else None  # float32[2, K]
    out_ref, lse_ref = refs  # [B, T, N, D], float32[B, T, N]
    splits, _, _, heads, dim = part_ref.shape
    row, token, head = pl.program_id(1), pl.program_id(0) // heads, pl.program_id(0) % heads
    columns = jnp.arange(power_of_two(dim))

    best, weight = jnp.float32(LOWEST), jnp.float32(0)
    acc = jnp.zeros(columns.shape, jnp.float32)
    size = min(power_of_two(splits), TOGETHER)
    for first in range(0, splits, size):
        split = first + jnp.arange(size)
        there = split < splits
        tops = plgpu.load(top_ref.at[split, row, token, head], mask=there, other=LOWEST)
        totals = plgpu.load(total_ref.at[split, row, token, head], mask=there, other=0)
        mask = there[:, None] & (columns < dim)[None, :]
        at = (split[:, None], row, token, head, columns[None, :])
        parts = plgpu.load(part_ref.at[at], mask=mask, other=0)
        top = jnp.maximum(best, jnp.max(tops))
        factors, shrink = jnp.exp(tops - top), jnp.exp(best - top)
        weight = weight * shrink + jnp.sum(totals * factors)
        acc = acc * shrink + jnp.sum(parts * factors[:, None], axis=0)
        best = top

    v_scale = 1.0
    if scale_ref is not None:
        v_scale = plgpu.load(scale_ref.at[jnp.int32(1), head // groups])
    out, lse = _answer(best, weight, acc, v_scale)
    plgpu.store(
        out_ref.at[row, token, head, columns], out.astype(out_ref.dtype), mask=columns < dim
    )
    plgpu.store(lse_ref.at[row, token, head], lse)


def _new_seen(new_ref, rows: tuple[Array, Array, Array], node: Array, bits: bool) -> Array:
    """bool[R, X]: which of the new tokens `node [X]` each row sees."""
    row, token, some = rows  # token int32[R], some bool[R]

    def of_rows(i: int) -> Array:
        return plgpu.load(new_ref.at[row, token, jnp.int32(i)], mask=some, other=0)[:, None]

    if not bits:
        return (node[None, :] >= of_rows(0)) & (node[None, :] <= of_rows(1))
    word = None
    for w in range(new_ref.shape[-1]):
        here = jnp.broadcast_to(of_rows(w), (token.shape[0], node.shape[0]))
        word = here if word is None else jnp.where((node // 32 == w)[None, :], here, word)
    assert word is not None
    shift = jnp.broadcast_to((node % 32)[None, :], word.shape)
    return (lax.shift_right_logical(word, shift) & 1) == 1


def _dot(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
