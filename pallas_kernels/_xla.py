"""The XLA back-end: the live prefix in a few static sizes, and beside it the new tokens.

The prefix is read in one of a few static sizes by `lax.switch`; or, where scores over the whole
cache would be too large, block by block with a running softmax, and the remainder in one of these sizes. The
new tokens are attended to separately. Each part gives a `Partial` softmax, and these are merged.

On CPU, wide queries and large caches take the batch a row at a time, and a row block by block: each row
then pays for its own length, and scores, keys and values stay in the core's cache between two uses. In
small caches the number of small operations matters: there, two or more new tokens are copied behind the
copy of the prefix, and one softmax goes over both.

The switch also keeps XLA from moving the read of a cache behind the commit's write by fusion, which would
need a copy of the whole cache.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import masks
from pallas_kernels._read import Read, buckets, dequantised, read_slots
from pallas_kernels._softmax import Partial, Spec, each_row, merge, nothing, softmax

# Above this many bytes of scores the keys are taken block by block.
MAX_SCORE_BYTES = 64 << 20
SMALLEST_BLOCK = 64
# On CPU, the most keys of a block: the scores of more would leave the core's cache.
CPU_BLOCK = 1024
# From this many bytes of keys per row on, keys and values leave the core's cache on CPU.
LARGE_ROW = 1 << 20
# In smaller caches on CPU, a loop over batch rows beats one batched product from this many queries of a
# KV head (T * G) on.
MIN_QUERIES_BY_ROW = 16


# Traced and lowered once for all layers of one shape: a model of twenty layers starts in half the time.
@functools.partial(jax.jit, static_argnames=("scale", "soft_cap", "window", "return_lse"))
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
    k = k_cache.shape[-3]
    spec = Spec(scale, soft_cap, window)
    slots = k_cache.shape[-2]
    q_bktgd = q.reshape(b, t, k, n // k, d).transpose(0, 2, 1, 3, 4)

    # Query t of row b sees the slots in [low, high).
    low = high = None
    if k_new is None:
        high = visible
        if visible is not None and window is not None:
            low = visible - window
    elif window is not None:
        depth = _depth(ancestors, t)
        low = length[:, None] + depth - (window - 1)

    read = functools.partial(read_slots, k_cache, v_cache, layer)
    if k_scale is not None and v_scale is not None:
        read = functools.partial(dequantised, read, k_scale, v_scale, q.dtype)

    def apart(q):
        part = _prefix(spec, q, read, slots, length, low, high)
        if k_new is not None:
            assert v_new is not None
            part = merge(part, _new_tokens(spec, q, k_new, v_new, ancestors))
        return part

    def joined(q):
        assert k_new is not None and v_new is not None
        return _joined(spec, q, k_new, v_new, read, slots, length, ancestors, low)

    keys = slots + t
    at_once = not _large(q_bktgd, slots) and _block_size(q_bktgd[:1], keys) == keys
    if k_new is None or t == 1 or not at_once or not _by_row(q_bktgd, slots):
        part = apart(q_bktgd)
    else:
        # Resolved when lowered, so that a program compiled for another platform gets that one's form.
        part = lax.platform_dependent(q_bktgd, cpu=joined, default=apart)

    out = part.out / jnp.where(part.total > 0, part.total, 1)
    out = out.transpose(0, 2, 1, 3, 4).reshape(b, t, n, d).astype(q.dtype)
    if not return_lse:
        return out, None
    lse = (part.top + jnp.log(part.total)).astype(jnp.float32)
    return out, lse.transpose(0, 2, 1, 3, 4).reshape(b, t, n)


def _large(q: jax.Array, slots: int) -> bool:
    """Whether the keys of a row leave the core's cache on CPU."""
    _, k, _, _, d = q.shape
    return k * slots * d * q.dtype.itemsize >= LARGE_ROW


def _by_row(q: jax.Array, slots: int) -> bool:
    """Whether a CPU takes the batch a row at a time."""
    b, _, t, g, _ = q.shape
    return b == 1 or t * g >= MIN_QUERIES_BY_ROW or _large(q, slots)


def _block_size(q: jax.Array, keys: int) -> int:
    """Keys that fit under MAX_SCORE_BYTES of scores; `keys` if all do."""
    b, k, t, g, _ = q.shape
    itemsize = np.promote_types(q.dtype, np.float32).itemsize
    fit = MAX_SCORE_BYTES // (b * k * t * g * itemsize)
    if fit >= keys:
        return keys
    return min(keys, max(SMALLEST_BLOCK, fit // SMALLEST_BLOCK * SMALLEST_BLOCK))


# --- The new tokens -----------------------------------------------------------------------------


def _depth(ancestors: jax.Array | None, t: int) -> jax.Array:
    """int32[B or 1, T]: how many proper ancestors each new token has."""
    if ancestors is None:
        return jnp.arange(t, dtype=jnp.int32)[None, :]
    return masks.popcount(ancestors) - 1


def _seen_new(spec: Spec, ancestors: jax.Array | None, t: int) -> jax.Array:
    """bool[B or 1, T, T]: which new tokens each new token sees."""
    if ancestors is None:
        node, other = (lax.broadcasted_iota(jnp.int32, (1, t, t), axis) for axis in (1, 2))
        seen = other <= node
    else:
        seen = masks.unpack(ancestors, t)
    if spec.window is not None:
        depth = _depth(ancestors, t)
        seen &= depth[:, None, :] > depth[:, :, None] - spec.window
    return seen


def _new_tokens(
    spec: Spec,
    q: jax.Array,  # [B, K, T, G, D]
    k_new: jax.Array,  # [B, T, K, D]
    v_new: jax.Array,
    ancestors: jax.Array | None,
) -> Partial:
    t = q.shape[2]
    keys, values = k_new.swapaxes(1, 2), v_new.swapaxes(1, 2)
    seen = _seen_new(spec, ancestors, t)
    size = _block_size(q, t)
    part = None
    for start in range(0, t, size):
        block = slice(start, min(start + size, t))
        mask = seen[:, None, :, None, block]
        here = softmax(spec, q, keys[:, :, block], values[:, :, block], mask)
        part = here if part is None else merge(part, here)
    assert part is not None
    return part


# --- The new tokens behind a copy of the prefix --------------------------------------------------


def _joined(
    spec: Spec,
    q: jax.Array,  # [B, K, T, G, D]
    k_new: jax.Array,  # [B, T, K, D]
    v_new: jax.Array,
    read: Read,
    slots: int,
    length: jax.Array,  # int32[B]
    ancestors: jax.Array | None,
    low: jax.Array | None,  # int32[B, T]: the first slot that each query sees, or None for 0
) -> Partial:
    """One softmax a batch row, over a copy of its prefix with the new tokens behind it."""
    b, t = q.shape[0], q.shape[2]
    seen = _seen_new(spec, ancestors, t)  # [B or 1, T, T]

    def row_of(row, q, k_row, v_row, end, low, seen):
        """q [1, K, T, G, D]; k_row, v_row [1, K, T, D]; end [1]; low [1, T]; seen [1, T, T]."""

        def some(size):
            keys, values = read(row, 1, 0, size)
            slot = lax.iota(jnp.int32, size)[None, None]
            live = slot < end[:, None, None]  # [1, 1, size]
            # 0 * NaN is NaN: dead slots must be zeroed, not only masked.
            values = jnp.where(live[..., None], values, 0)
            mask = jnp.broadcast_to(live, (1, t, size))
            if low is not None:
                mask &= slot >= low[..., None]
            parts = (keys, k_row), (values, v_row), (mask, seen)
            if size == slots:  # read where it lies: a copy of a whole layer costs more than a merge
                old, new = (
                    softmax(spec, q, k, v, m[:, None, :, None])
                    for k, v, m in zip(*parts, strict=True)
                )
                return merge(old, new)
            keys, values, mask = (jnp.concatenate(pair, axis=2) for pair in parts)
            return softmax(spec, q, keys, values, mask[:, None, :, None])

        sizes = buckets(slots)
        index = sum((end[0] > size).astype(jnp.int32) for size in sizes[:-1])
        return lax.switch(index, [functools.partial(some, size) for size in sizes])

    k_rows, v_rows = k_new.swapaxes(1, 2), v_new.swapaxes(1, 2)
    seen = jnp.broadcast_to(seen, (b, t, t))
    return each_row(row_of, q, k_rows, v_rows, length, low, seen)


# --- The prefix ---------------------------------------------------------------------------------


def _prefix(
    spec: Spec,
    q: jax.Array,  # [B, K, T, G, D]
    read: Read,
    slots: int,
    length: jax.Array,  # int32[B]
    low: jax.Array | None,  # int32[B, T]: the first slot that each query sees, or None for 0
    high: jax.Array | None,  # int32[B, T]: the end of the slots that it sees, or None for `length`
) -> Partial:

    def whole_batch(q, length, low, high):
        # One switch: every row pays for the longest.
        return _slots(spec, q, read, slots, 0, length, low, high, block=slots)

    def by_row(q, length, low, high):
        def of(row, q, *bounds):
            return _slots(spec, q, read, slots, row, *bounds, block=min(CPU_BLOCK, slots))

        return each_row(of, q, length, low, high)

    if not _by_row(q, slots):
        return whole_batch(q, length, low, high)
    # Resolved when lowered, so that a program compiled for another platform gets that one's form.
    return lax.platform_dependent(q, length, low, high, cpu=by_row, default=whole_batch)


def _slots(
    spec: Spec,
    q: jax.Array,  # [B, K, T, G, D]
    read: Read,
    slots: int,
    row: int | jax.Array,  # the cache's batch row of q's first
    length: jax.Array,  # int32[B]
    low: jax.Array | None,
    high: jax.Array | None,
    *,
    block: int,
) -> Partial:
    """The softmax over the live slots, in blocks of at most `block`."""
    block = min(block, _block_size(q, slots))
    sizes = buckets(block)
    longest = jnp.max(length)

    def some(start, size, first=None, *, all_live=False):
        """Over slots [start, start + size), less those before `first`."""
        keys, values = read(row, q.shape[0], start, size)
        slot = start + lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, size), 4)
        end = length.reshape(-1, 1, 1, 1, 1)
        live = slot < end
        mask = live
        if low is not None:
            mask &= slot >= low[:, None, :, None, None]
        if high is not None:
            mask &= slot < high[:, None, :, None, None]
        if first is not None:
            mask &= slot >= first
        if not all_live:  # 0 * NaN is NaN: dead slots must be zeroed, not only masked
            values = jnp.where(live.reshape(-1, 1, size, 1), values, 0)
        return softmax(spec, q, keys, values, mask)

    def in_one(read: Callable[[int], Partial], live: jax.Array) -> Partial:
        """Over the smallest of `sizes` that holds `live` slots."""
        if len(sizes) == 1:
            return read(sizes[0])
        index = sum((live > size).astype(jnp.int32) for size in sizes[:-1])
        return lax.switch(index, [functools.partial(read, size) for size in sizes])

    if block == slots:
        return in_one(functools.partial(some, 0), longest)

    def body(i, part):
        return merge(part, some(i * block, block, all_live=q.shape[0] == 1))

    def rest(part):
        # A read that would reach past the cache is moved back to end with it; repeated slots are masked.
        def last(size):
            return some(jnp.minimum(whole * block, slots - size), size, whole * block)

        return merge(part, in_one(last, longest - whole * block))

    whole = longest // block
    first = 0 if low is None else jnp.maximum(jnp.min(low), 0) // block
    part = lax.fori_loop(first, whole, body, nothing(q))
    return lax.cond(longest > whole * block, rest, lambda part: part, part)
