"""Writing the accepted path of a draft behind the live prefix of every layer, in one call, in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import tuning
from pallas_kernels._rows import Array, pad, power_of_two, precision_of, round_up
from pallas_kernels.partition import Partition

COMMIT_BACKENDS = ("xla", "mosaic_tpu", "triton")

# Up to this many rows XLA is given one dynamic_update_slice per row, which it keeps in place; beyond it
# one dropping scatter, so that the program does not grow with the batch.
_MAX_UPDATE_SLICES = 16
# Slots of a block that is read, changed and written back: whole tiles of any dtype.
_WINDOW = 32
# Bytes of a block of the cache over all its layers, and of all blocks that are held at once: a kernel has 16 MiB
# on the smallest generation.
_MAX_BLOCK_BYTES = 1 << 20
_MAX_HELD_BYTES = 12 << 20


def commit(
    k_cache: Array,
    v_cache: Array,
    k_new: Array,
    v_new: Array,
    start: Array,
    count: Array,
    path: Array | None = None,
    *,
    backend: str | None = None,
    interpret: Any = False,
    partition: Partition | None = None,
) -> tuple[Array, Array]:
    """Writes the first `count` nodes of a path into slots `start`, `start + 1`, ... of each row.

    Letters as in `tree_attention`; P is the longest path. The caches should be donated, or carried by a
    loop: then nothing but these slots is written. On TPU whole tiles are read and written back.

    Args:
        k_cache: [L, B, K, S, D], or [B, K, S, D] for a single layer.
        v_cache: same shape and dtype as `k_cache`.
        k_new: [L, B, T, K, D] (or [B, T, K, D]), the nodes' keys, in the caches' dtype.
        v_new: the same for the values.
        start: int32[B], the first slot to write; start + P <= S.
        count: int32[B], how many nodes of the path are written, 0 <= count <= P.
        path: int32[B, P], node at each depth; None is 0, 1, ..., T - 1.
        backend: "xla", "mosaic_tpu" or "triton"; None picks by platform. "xla" may leave garbage in
            slots from start + count to start + P, the others write nothing there.
        interpret: run a Pallas back-end in an interpreter, as in `tree_attention`.
        partition: how a mesh divides rows and heads; shapes are those of the whole arrays.

    Returns:
        The two caches.

    Raises:
        ValueError: at trace time, for shapes or dtypes that do not fit together, or a back-end that
            does not exist or cannot serve here.
    """
    _validate(k_cache, v_cache, k_new, v_new, start, count, path)
    if partition is not None:
        layers = "L" * (k_cache.ndim - 4)
        cache, new = f"{layers}BKSD", f"{layers}BTKD"
        axes = {"k_cache": cache, "v_cache": cache, "k_new": new, "v_new": new}
        axes |= {"start": "B", "count": "B", "path": "BP"}
        values = (k_cache, v_cache, k_new, v_new, start, count, path)
        local = functools.partial(commit, backend=backend, interpret=interpret)
        args = dict(zip(axes, values, strict=True))
        return partition.call(local, args, axes, (cache, cache), len(start))
    name = _choose(backend, interpret)
    if name == "xla":  # as it lies: XLA would copy a cache whose rank is changed
        return _xla((k_cache, v_cache), (k_new, v_new), start, path)
    single = k_cache.ndim == 4
    if single:
        k_cache, v_cache, k_new, v_new = (x[None] for x in (k_cache, v_cache, k_new, v_new))
    write = _mosaic_tpu if name == "mosaic_tpu" else _triton
    caches, new = (k_cache, v_cache), (k_new, v_new)
    k_cache, v_cache = write(caches, new, start, count, path, interpret=interpret)
    return (k_cache[0], v_cache[0]) if single else (k_cache, v_cache)


def _choose(backend: str | None, interpret: Any) -> str:
    here = tuning.device()
    natural = tuning.NATIVE.get(here.platform, "xla")
    if backend is None:
        if natural == "triton" and not tuning.has_tensor_cores(here):
            return "xla"
        return natural
    tuning.check_exists(backend, COMMIT_BACKENDS)
    if backend not in ("xla", natural) and not interpret:
        raise ValueError(
            f"backend {backend!r} does not run on {here.platform}: interpret=True runs it anywhere"
        )
    return backend


def _validate(k_cache, v_cache, k_new, v_new, start, count, path):
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"k_cache {k_cache.shape} and v_cache {v_cache.shape} differ in shape")
    if k_cache.ndim not in (4, 5):
        raise ValueError(f"the caches must be [L, B, K, S, D] or [B, K, S, D], got {k_cache.shape}")
    *layers, b, k, s, d = k_cache.shape
    for name, x in (("k_new", k_new), ("v_new", v_new)):
        nodes = x.shape[-3] if x.ndim >= 3 else 0
        if x.shape != (*layers, b, nodes, k, d):
            wanted = ", ".join(str(n) for n in (*layers, b, "T", k, d))
            raise ValueError(f"{name} must be ({wanted}) for cache {k_cache.shape}, got {x.shape}")
        if x.dtype != k_cache.dtype or x.dtype != v_cache.dtype:
            raise ValueError(
                f"{name} must have the caches' dtype {k_cache.dtype}, got {x.dtype} "
                f"(v_cache {v_cache.dtype})"
            )
    if k_new.shape != v_new.shape:
        raise ValueError(f"k_new {k_new.shape} and v_new {v_new.shape} differ in shape")
    for name, x in (("start", start), ("count", count)):
        if x.shape != (b,) or x.dtype != jnp.int32:
            raise ValueError(f"{name} must be int32{(b,)}, got {x.dtype}{x.shape}")
    if path is not None and (path.ndim != 2 or path.shape[0] != b or path.dtype != jnp.int32):
        raise ValueError(f"path must be int32({b}, P), got {path.dtype}{path.shape}")
    longest = k_new.shape[-3] if path is None else path.shape[1]
    if longest > s:
        raise ValueError(f"a path of {longest} nodes does not fit in a cache {k_cache.shape}")


# --- XLA ------------------------------------------------------------------------------------------


def _xla(caches, new, start, path):
    def write(cache: Array, rows: Array) -> Array:
        if path is not None:
            index = path[..., None, None]
            rows = jnp.take_along_axis(rows, index[None] if rows.ndim == 5 else index, axis=-3)
        return write_rows(cache, jnp.swapaxes(rows, -3, -2), start)

    k_cache, v_cache = (write(cache, rows) for cache, rows in zip(caches, new, strict=True))
    return k_cache, v_cache


def write_rows(cache: Array, new: Array, start: Array) -> Array:
    """Writes `new [..., B, K, P, D]` into `cache [..., B, K, S, D]` at slot `start[b]` of row b."""
    batch = start.shape[0]
    if tuning.on_mesh():
        # Rows may lie on several devices: XLA divides a scatter of batched rows, and no slice of one row.
        axis = cache.ndim - 4
        one = functools.partial(lax.dynamic_update_slice_in_dim, axis=-2)
        return jax.vmap(one, in_axes=(axis, axis, 0), out_axes=axis)(cache, new, start)
    if batch <= _MAX_UPDATE_SLICES:
        axis = cache.ndim - 4
        zero = jnp.zeros((), jnp.int32)
        for b in range(batch):
            row = lax.slice_in_dim(new, b, b + 1, axis=axis)
            index = [zero] * cache.ndim
            index[axis], index[-2] = jnp.int32(b), start[b]
            # Three operations less for each dimension, row and layer: a fifth of a round's program.
            cache = lax.dynamic_update_slice(cache, row, index, allow_negative_indices=False)
        return cache
    slot = start[:, None] + jnp.arange(new.shape[-2], dtype=jnp.int32)[None]  # [B, P]
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    if cache.ndim == 4:
        value = jnp.transpose(new, (0, 2, 1, 3))  # [B, P, K, D]: advanced indices come first
        return cache.at[row, :, slot, :].set(value, mode="drop")
    value = jnp.transpose(new, (1, 3, 0, 2, 4))
    return cache.at[:, row, :, slot, :].set(value, mode="drop")


# --- TPU ------------------------------------------------------------------------------------------


def _mosaic_tpu(caches, new, start, count, path, *, interpret):
    layers, b, k, slots, d = caches[0].shape
    nodes = new[0].shape[2]
    longest = nodes if path is None else path.shape[1]
    # Rows move to their slots by a product with a 0-1 matrix: the only move of any alignment that
    # packed rows allow. Products with 1 and sums with 0 are exact.
    width = round_up(nodes, 32 // caches[0].dtype.itemsize)
    new = [pad(jnp.swapaxes(x, 2, 3), 3, width) for x in new]  # [L, B, K, T, D]
    together, heads = _tpu_block(layers, k, d, width, caches[0].dtype.itemsize)
    windows = -(-(longest + _WINDOW - 1) // _WINDOW)
    last = -(-slots // _WINDOW) - 1

    def new_map(b, layer, head, j, *_):
        return layer, b, head, 0, 0

    def window(b, j, start, count):
        # If fewer windows are needed, the last is repeated and computed again from the same input.
        needed = (start[b] + jnp.maximum(count[b], 1) - 1) // _WINDOW
        return jnp.minimum(jnp.minimum(start[b] // _WINDOW + j, needed), last)

    def cache_map(b, layer, head, j, start, count, *_):
        return layer, b, head, window(b, j, start, count), 0

    scalars = [start, count] + ([] if path is None else [path])
    new_spec = pl.BlockSpec((together, None, heads, width, d), new_map)
    cache_spec = pl.BlockSpec((together, None, heads, _WINDOW, d), cache_map)
    first = len(scalars) + 2
    k_cache, v_cache = pl.pallas_call(
        functools.partial(_tpu_kernel, longest=longest, window=window, has_path=path is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b, layers // together, k // heads, windows),
            in_specs=[new_spec] * 2 + [cache_spec] * 2,
            out_specs=[cache_spec] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches],
        input_output_aliases={first: 0, first + 1: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        name="commit",
        interpret=interpret,
    )(*scalars, *new, *caches)
    return k_cache, v_cache


def _tpu_block(layers: int, heads: int, dim: int, width: int, itemsize: int) -> tuple[int, int]:
    """Layers and heads of a block: as many as fit, all heads before a second layer."""

    def fits(layers: int, heads: int) -> bool:
        row = layers * heads * round_up(dim, 128) * itemsize
        # New rows, old and changed slots, of keys and of values, each twice: one is moved, one worked on.
        return 4 * row * (width + 2 * _WINDOW) <= _MAX_HELD_BYTES and (
            layers == 1 or row * _WINDOW <= _MAX_BLOCK_BYTES
        )

    heads_together = max(
        x for x in range(1, heads + 1) if heads % x == 0 and (x == 1 or fits(1, x))
    )
    if heads_together < heads:
        return 1, heads_together
    return max(
        x for x in range(1, layers + 1) if layers % x == 0 and (x == 1 or fits(x, heads))
    ), heads


def _tpu_kernel(start_ref, count_ref, *refs, longest, window, has_path):
    refs = list(refs)
    path_ref = refs.pop(0) if has_path else None  # int32[B, P], in SMEM as start and count
    new_refs, old_refs, out_refs = (
        refs[:2],
        refs[2:4],
        refs[4:],
    )  # [X, K, T, D], [X, K, Sb, D] twice
    row, step = pl.program_id(0), pl.program_id(3)
    start, count = start_ref[row], count_ref[row]
    layers, heads, width, dim = new_refs[0].shape

    base = window(row, step, start_ref, count_ref) * _WINDOW
    depth = base - start + lax.broadcasted_iota(jnp.int32, (_WINDOW, width), 0)
    node = depth
    if path_ref is not None:
        node = jnp.full_like(depth, -1)
        for p in range(longest):
            node = jnp.where(depth == p, path_ref[row, p], node)
    takes = (node == lax.broadcasted_iota(jnp.int32, node.shape, 1)) & (depth < count)
    depth = base - start + lax.broadcasted_iota(jnp.int32, (_WINDOW, dim), 0)
    written = (depth >= 0) & (depth < count)
    for new_ref, old_ref, out_ref in zip(new_refs, old_refs, out_refs, strict=True):
        wide = jnp.float32 if new_ref.dtype == jnp.float32 else jnp.bfloat16
        move = takes.astype(jnp.float32).astype(wide)
        for layer in range(layers):
            for head in range(heads):
                rows = new_ref[layer, head]
                if rows.dtype != wide:
                    rows = rows.astype(jnp.float32).astype(wide)
                rows = lax.dot_general(
                    move,
                    rows,
                    (((1,), (0,)), ((), ())),
                    precision=precision_of(wide),
                    preferred_element_type=jnp.float32,
                )
                old = old_ref[layer, head]
                out_ref[layer, head] = jnp.where(written, rows, old.astype(jnp.float32)).astype(
                    out_ref.dtype
                )


# --- GPU ------------------------------------------------------------------------------------------


def _triton(caches, new, start, count, path, *, interpret):
    layers, b, k = caches[0].shape[:3]
    nodes = new[0].shape[2]
    longest = nodes if path is None else path.shape[1]
    operands = [start, count] + ([] if path is None else [path]) + [*new, *caches]
    first = len(operands) - 2
    k_cache, v_cache = pl.pallas_call(
        functools.partial(_gpu_kernel, longest=longest, batch=b, has_path=path is not None),
        grid=(k, layers * b),
        in_specs=[pl.BlockSpec()] * len(operands),
        out_specs=[pl.BlockSpec()] * 2,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches],
        input_output_aliases={first: 0, first + 1: 1},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        name="commit",
        interpret=interpret,
    )(*operands)
    return k_cache, v_cache


def _gpu_kernel(start_ref, count_ref, *refs, longest, batch, has_path):
    refs = list(refs)
    path_ref = refs.pop(0) if has_path else None  # int32[B, P]
    new_refs, out_refs = refs[:2], refs[4:]  # [L, B, T, K, D], [L, B, K, S, D]
    head = pl.program_id(0)
    layer, row = pl.program_id(1) // batch, pl.program_id(1) % batch
    dim = new_refs[0].shape[-1]
    width, size = power_of_two(dim), min(power_of_two(longest), 32)
    start, count = (plgpu.load(x.at[row]) for x in (start_ref, count_ref))
    columns = jnp.arange(width)
    for first in range(0, longest, size):
        depth = first + jnp.arange(size)
        there = (depth < count) & (depth < longest)
        node = depth
        if path_ref is not None:
            node = plgpu.load(path_ref.at[row, depth], mask=there, other=0)
        keep = there[:, None] & (columns < dim)[None, :]
        for new_ref, out_ref in zip(new_refs, out_refs, strict=True):
            source = new_ref.at[layer, row, node[:, None], head, columns[None, :]]
            rows = plgpu.load(source, mask=keep, other=0)
            target = out_ref.at[layer, row, head, (start + depth)[:, None], columns[None, :]]
            plgpu.store(target, rows, mask=keep)
