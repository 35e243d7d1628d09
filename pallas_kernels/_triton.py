"""The GPU back-end, for compute capability 8.0 and up: split-K with a log-sum-exp combine.

A program takes a block of query rows of one KV head and one split of its live blocks, and keeps its
running softmax in registers; the first split takes the new tokens too. Programs of neighbouring row
blocks read the same keys at the same time, so that these come from the second-level cache.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import _rows, tuning
from pallas_kernels._rows import LOWEST, Array, exact, pad, power_of_two, round_up

DTYPES = ("bfloat16", "float16", "float32")
SMALLEST_TILE = 16  # of a tensor core's operands


def reason_against(
    q: Array, ancestors: Array | None, *, new_tokens: bool, anywhere: bool = False
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
    num_rows = round_up(t * groups, row_block)
    row_blocks = num_rows // row_block
    if splits is None:
        wanted = -(-tuning.multiprocessors() * config.waves // (b * k * row_blocks))
        splits = min(wanted, -(-slots // config.keys))

    seen = _rows.what_rows_see(
        groups, t, length, ancestors, visible, window, new_tokens=k_new is not None
    )
    rows = pad(_rows.fold(q, k), 2, num_rows)
    low, high = (pad(x, 1, num_rows) for x in (seen.low, seen.high))
    operands = [
        jnp.asarray(layer, jnp.int32).reshape(1),
        seen.blocks(config.keys),
        length,
        low,
        high,
        rows,
    ]
    if seen.new is not None:
        assert k_new is not None and v_new is not None
        operands += [pad(seen.new, 1, num_rows), k_new.swapaxes(1, 2), v_new.swapaxes(1, 2)]
    operands += [k_cache, v_cache]
    if k_scale is not None and v_scale is not None:
        operands.append(jnp.stack([k_scale, v_scale]))

    whole = pl.BlockSpec()  # a pointer to the array; the kernel reads what it needs
    parts = [
        jax.ShapeDtypeStruct((splits, b, k, num_rows, d), jnp.float32),
        jax.ShapeDtypeStruct((splits, b, k, num_rows), jnp.float32),
        jax.ShapeDtypeStruct((splits, b, k, num_rows), jnp.float32),
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
        quantised=k_scale is not None,
    )
    out, top, total = pl.pallas_call(
        kernel,
        grid=(row_blocks, splits, b * k),
        in_specs=[whole] * len(operands),
        out_specs=[whole] * 3,
        out_shape=parts,
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        name="tree_attention",
        interpret=interpret,
    )(*operands)

    out, lse = combine(out, top, total)
    if v_scale is not None:
        out = out * v_scale[None, :, None, None]
    out = _rows.unfold(out[:, :, : t * groups], t).astype(q.dtype)
    return out, _rows.unfold(lse[:, :, : t * groups], t) if return_lse else None


def combine(out: Array, top: Array, total: Array) -> tuple[Array, Array]:
    """Softmaxes over P parts of the keys -> the softmax over all, and its log-sum-exp.

    Args:
        out: float32[P, ..., D], sums of values weighted by exp(score - top). top, total:
            float32[P, ...], each part's largest score and the sum of its weights.
    """
    best = jnp.max(top, axis=0)
    factor = jnp.exp(top - best[None])
    weight = jnp.sum(total * factor, axis=0)
    summed = jnp.sum(out * factor[..., None], axis=0)
    some = weight > 0
    summed = summed / jnp.where(some, weight, 1.0)[..., None]
    return summed, jnp.where(some, best + jnp.log(weight), -jnp.inf)


def _kernel(
    layer_ref,  # int32[1]
    blocks_ref,  # int32[4, B]
    length_ref,  # int32[B]
    low_ref,  # int32[B, R]
    high_ref,  # int32[B, R]
    q_ref,  # [B, K, R, D]
    *refs,
    scale,
    soft_cap,
    keys,
    row_block,
    kv_heads,
    new_tokens,
    bits,
    quantised,
):
    refs = list(refs)
    new_ref = refs.pop(0) if new_tokens else None  # int32[B, R, W], or [B, R, 2]
    k_new_ref = refs.pop(0) if new_tokens else None  # [B, K, T, D]
    v_new_ref = refs.pop(0) if new_tokens else None
    k_ref, v_ref = refs.pop(0), refs.pop(0)  # [L, B, K, S, D]
    scale_ref = refs.pop(0) if quantised else None  # float32[2, K]
    out_ref, top_ref, total_ref = refs  # [P, B, K, R, D], [P, B, K, R], [P, B, K, R]

    split, splits = pl.program_id(1), pl.num_programs(1)
    row, head = pl.program_id(2) // kv_heads, pl.program_id(2) % kv_heads
    rows = pl.program_id(0) * row_block + jnp.arange(row_block)
    dim = q_ref.shape[-1]
    width = power_of_two(dim)
    columns = jnp.arange(width)[None, :]

    def tile(ref, index, at, mask=None):
        """The tile [X, D] of slots `at`, filled up with zeros to a power of two of columns."""
        ref = ref.at[(*index, at[:, None], columns)]
        if width != dim:
            mask = columns < dim if mask is None else mask & (columns < dim)
        if mask is None:
            return plgpu.load(ref)
        return plgpu.load(ref, mask=jnp.broadcast_to(mask, (at.shape[0], width)), other=0)

    q = tile(q_ref, (row, head), rows)
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
        nodes = k_new_ref.shape[2]
        size = min(keys, max(SMALLEST_TILE, power_of_two(nodes)))

        def among_new(i, carry):
            node = i * size + jnp.arange(size)
            there = node < nodes
            k, v = (tile(x, (row, head), node, there[:, None]) for x in (k_new_ref, v_new_ref))
            keep = _new_seen(new_ref, row, rows, node, bits) & there[None, :]
            return add(carry, k, v, keep, scale)

        # Only the first split reads them.
        count = jnp.where(split == 0, jnp.int32(-(-nodes // size)), jnp.int32(0))
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
    low, high = (plgpu.load(x.at[row, rows]) for x in (low_ref, high_ref))

    def prefix(masked):
        def body(block, carry):
            slot = block * keys + jnp.arange(keys)
            # Dead values must not be read: 0 * NaN is NaN.
            live = (slot < length)[:, None] if masked else None
            keep = None
            if masked:
                keep = (slot[None, :] >= low[:, None]) & (slot[None, :] < high[:, None])
            k, v = (tile(x, (layer, row, head), slot, live) for x in (k_ref, v_ref))
            if quantised:
                k, v = (x.astype(jnp.float32).astype(q.dtype) for x in (k, v))
            return add(carry, k, v, keep, k_scale)

        return body

    carry = lax.fori_loop(first, inner, prefix(masked=True), carry)
    carry = lax.fori_loop(inner, outer, prefix(masked=False), carry)
    carry = lax.fori_loop(outer, end, prefix(masked=True), carry)

    top, total, acc = carry
    target = out_ref.at[split, row, head, rows[:, None], columns]
    mask = None if width == dim else jnp.broadcast_to(columns < dim, acc.shape)
    plgpu.store(target, acc, mask=mask)
    plgpu.store(top_ref.at[split, row, head, rows], top)
    plgpu.store(total_ref.at[split, row, head, rows], total)


def _new_seen(new_ref, row, rows, node: Array, bits: bool) -> Array:
    """bool[R, X]: which of the new tokens `node [X]` each row sees."""
    if not bits:
        first, last = (plgpu.load(new_ref.at[row, rows, jnp.int32(i)]) for i in range(2))
        return (node[None, :] >= first[:, None]) & (node[None, :] <= last[:, None])
    word = None
    for w in range(new_ref.shape[-1]):
        here = plgpu.load(new_ref.at[row, rows, jnp.int32(w)])[:, None]
        here = jnp.broadcast_to(here, (here.shape[0], node.shape[0]))
        word = here if word is None else jnp.where((node // 32 == w)[None, :], here, word)
    assert word is not None
    shift = jnp.broadcast_to((node % 32)[None, :], word.shape)
    return (lax.shift_right_logical(word, shift) & 1) == 1


def _dot(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, precision=exact(x.dtype), preferred_element_type=jnp.float32)
