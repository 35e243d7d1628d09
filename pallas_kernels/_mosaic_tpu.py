"""The TPU back-end: one pass over the live blocks of the cache, each read once.

The grid is (batch row, group of KV heads, block of query rows, block of slots). Lengths, the layer and
the range of blocks that a row reads are prefetched to scalar memory, where the index map of the cache
clamps to that range: a block index that repeats costs no copy. The last grid dimension is dynamic, as
long as the longest row. Blocks that every query sees in full take a path without a mask.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _rows, tuning
from pallas_kernels._rows import LOWEST, Array, pad, precision_of, round_up

DTYPES = ("bfloat16", "float32")
SUBLANES = 8
# Scores are kept in units of log 2: the exponential then has base 2, and the change of units is part of the
# product with the scale.
LOG2_E = float(np.log2(np.e))


def reason_against(
    q: _rows.Shaped, ancestors: Array | None, *, new_tokens: bool, anywhere: bool = False
) -> str | None:
    """Why this back-end cannot serve a call here (or `anywhere`), or None if it can."""
    here = tuning.device()
    if not anywhere and here.platform != "tpu":
        return f"needs a TPU, and this is {here.platform}: interpret=True runs it anywhere"
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
    config: tuning.TpuConfig | None = None,
    interpret: object = False,
) -> tuple[Array, Array | None]:
    """See `pallas_kernels.tree_attention`; returns the output and, if asked for, the log-sum-exp."""
    b, t, n, d = q.shape
    if layer is None:
        k_cache, v_cache, layer = k_cache[None], v_cache[None], 0
    k, slots = k_cache.shape[2:4]
    groups = n // k
    if config is None:
        config = tuning.tpu(q.dtype, d, t * groups)
    heads = max(x for x in range(1, k + 1) if k % x == 0 and x <= config.heads)
    keys = min(config.keys, round_up(slots, 32 // k_cache.dtype.itemsize))
    row_block = min(config.rows, _filled(t * groups))
    num_rows = round_up(t * groups, row_block)

    seen = _rows.what_rows_see(
        groups, t, length, ancestors, visible, window, new_tokens=k_new is not None
    )
    blocks = seen.blocks(keys)
    steps = jnp.maximum(jnp.max(blocks[1] - blocks[0]), 1)
    columns = [seen.low[..., None], seen.high[..., None]]
    if seen.new is not None:
        columns.append(seen.new)
    sees = pad(jnp.concatenate(columns, axis=-1), 1, num_rows)

    def row_map(b, kh, r, j, *_):
        return b, kh, r, 0

    def new_map(b, kh, r, j, *_):
        return b, kh, 0, 0

    def cache_map(b, kh, r, j, layer, blocks, *_):
        last = jnp.maximum(blocks[1, b] - 1, 0)
        return layer[0], b, kh, jnp.minimum(blocks[0, b] + j, last), 0

    operands = [pad(_rows.fold(q, k), 2, num_rows), sees]
    specs = [
        pl.BlockSpec((None, heads, row_block, d), row_map),
        pl.BlockSpec((None, row_block, sees.shape[-1]), lambda b, kh, r, j, *_: (b, r, 0)),
    ]
    if k_new is not None:
        assert v_new is not None
        # Mosaic has no product with a single packed key.
        new_block = max(_filled(t), 2)
        operands += [pad(x.swapaxes(1, 2), 2, new_block) for x in (k_new, v_new)]
        specs += [pl.BlockSpec((None, heads, new_block, d), new_map)] * 2
    operands += [k_cache, v_cache]
    specs += [pl.BlockSpec((None, None, heads, keys, d), cache_map)] * 2

    out_shape = [jax.ShapeDtypeStruct((b, k, num_rows, d), q.dtype)]
    out_specs = [pl.BlockSpec((None, heads, row_block, d), row_map)]
    if return_lse:
        out_shape.append(jax.ShapeDtypeStruct((b, k, num_rows, 1), jnp.float32))
        out_specs.append(pl.BlockSpec((None, heads, row_block, 1), row_map))
    scalars = [jnp.asarray(layer, jnp.int32).reshape(1), blocks, length]
    if k_scale is not None and v_scale is not None:
        scalars.append(jnp.stack([k_scale, v_scale]))

    kernel = functools.partial(
        _kernel,
        scale=scale,
        soft_cap=soft_cap,
        new_tokens=k_new is not None,
        bits=seen.bits,
        quantised=k_scale is not None,
        return_lse=return_lse,
        chunk=min(config.chunk, keys),
    )
    results = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, k // heads, num_rows // row_block, steps),
            in_specs=specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((heads, row_block, 1), jnp.float32),
                pltpu.VMEM((heads, row_block, 1), jnp.float32),
                pltpu.VMEM((heads, row_block, d), jnp.float32),
            ],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        name="tree_attention",
        interpret=interpret,
    )(*scalars, *operands)
    out = _rows.unfold(results[0][:, :, : t * groups], t)
    lse = None
    if return_lse:
        lse = _rows.unfold(results[1][:, :, : t * groups, 0], t)
    return out, lse


def _filled(rows: int) -> int:
    """Rows of a block: whole tiles, or just the rows there are if they fill less than one tile."""
    return rows if rows < SUBLANES else round_up(rows, SUBLANES)


def _kernel(*refs, scale, soft_cap, new_tokens, bits, quantised, return_lse, chunk):
    refs = list(refs)
    layer_ref, blocks_ref, length_ref = refs[:3]  # int32[1], int32[4, B], int32[B], all in SMEM
    del layer_ref, refs[:3]
    scale_ref = refs.pop(0) if quantised else None  # float32[2, K], in SMEM
    q_ref = refs.pop(0)  # [H, R, D]
    sees_ref = refs.pop(0)  # int32[R, C]: low, high, and what is seen of the new tokens
    k_new_ref = refs.pop(0) if new_tokens else None  # [H, T, D]
    v_new_ref = refs.pop(0) if new_tokens else None
    k_ref, v_ref = refs.pop(0), refs.pop(0)  # [H, Sb, D]
    out_ref = refs.pop(0)  # [H, R, D]
    lse_ref = refs.pop(0) if return_lse else None  # [H, R, 1]
    top_ref, total_ref, acc_ref = refs  # float32 [H, R, 1], [H, R, 1], [H, R, D]

    row, step, steps = pl.program_id(0), pl.program_id(3), pl.num_programs(3)
    first_head = pl.program_id(1) * q_ref.shape[0]
    heads, keys = q_ref.shape[0], k_ref.shape[1]
    first, end, inner, outer = (blocks_ref[i, row] for i in range(4))
    block = first + step

    def of_head(what: int, h: int) -> Array:
        assert scale_ref is not None
        return scale_ref[what, first_head + h]

    def add(h: int, scores: Array, factor: Any, values: Array, keep: Array | None) -> None:
        """Takes products q k [R, X], times `factor`, and values [X, D], into head h's running softmax."""
        scores = scores * (factor if soft_cap is not None else factor * LOG2_E)
        if soft_cap is not None:
            scores = (soft_cap * LOG2_E) * jnp.tanh(scores / soft_cap)
        if keep is not None:
            scores = jnp.where(keep, scores, LOWEST)
        old = top_ref[h]
        top = jnp.maximum(old, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp2(scores - top)
        if keep is not None:  # where nothing has been seen yet, LOWEST - LOWEST is 0
            weights = jnp.where(keep, weights, 0.0)
        shrink = jnp.exp2(old - top)
        top_ref[h] = top
        total_ref[h] = total_ref[h] * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        acc_ref[h] = acc_ref[h] * shrink + _dot(weights.astype(values.dtype), values, (1, 0))

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        if not new_tokens:
            return
        assert k_new_ref is not None and v_new_ref is not None
        shape = (q_ref.shape[1], k_new_ref.shape[1])
        keep = _new_seen(sees_ref, shape, bits)
        for h in range(heads):
            scores = _dot(q_ref[h], k_new_ref[h], (1, 1))
            add(h, scores, scale, v_new_ref[h], keep)
            if quantised:  # the sum is kept in units of the cache's values
                acc_ref[h] = acc_ref[h] / of_head(1, h)

    def prefix(masked: bool) -> None:
        for start in range(0, keys, chunk):
            size = min(chunk, keys - start)
            at = block * keys + start
            keep = live = None
            if masked:
                slot = at + lax.broadcasted_iota(jnp.int32, (q_ref.shape[1], size), 1)
                keep = (slot >= sees_ref[:, 0:1]) & (slot < sees_ref[:, 1:2])
                slot = at + lax.broadcasted_iota(jnp.int32, (size, v_ref.shape[2]), 0)
                live = slot < length_ref[row]
            for h in range(heads):
                k, v = k_ref[h, start : start + size], v_ref[h, start : start + size]
                if quantised:
                    k, v = (x.astype(jnp.float32).astype(q_ref.dtype) for x in (k, v))
                if live is not None:  # 0 * NaN is NaN: dead values must be zeroed, not only masked
                    v = jnp.where(live, v, jnp.zeros_like(v))
                factor = scale * of_head(0, h) if quantised else scale
                add(h, _dot(q_ref[h], k, (1, 1)), factor, v, keep)

    whole = (block >= inner) & (block < outer)
    pl.when(whole)(lambda: prefix(masked=False))
    pl.when((block < end) & jnp.logical_not(whole))(lambda: prefix(masked=True))

    @pl.when(step == steps - 1)
    def _():
        for h in range(heads):
            total = total_ref[h]
            out = acc_ref[h] / jnp.where(total > 0, total, 1.0)
            if quantised:
                out = out * of_head(1, h)
            out_ref[h] = out.astype(out_ref.dtype)
            if lse_ref is not None:
                lse_ref[h] = jnp.where(
                    total > 0, top_ref[h] * (1 / LOG2_E) + jnp.log(total), -jnp.inf
                )


def _new_seen(sees_ref, shape: tuple[int, int], bits: bool) -> Array:
    """bool[R, T]: which new tokens each row sees."""
    node = lax.broadcasted_iota(jnp.int32, shape, 1)
    if not bits:
        return (node >= sees_ref[:, 2:3]) & (node <= sees_ref[:, 3:4])
    word = jnp.zeros(shape, jnp.int32)
    for w in range(sees_ref.shape[1] - 2):
        word = jnp.where(node // 32 == w, sees_ref[:, 2 + w : 3 + w], word)
    return (lax.shift_right_logical(word, node % 32) & 1) == 1


def _dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(
        x, y, dims, precision=precision_of(x.dtype), preferred_element_type=jnp.float32
    )
