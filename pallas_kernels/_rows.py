"""What back-ends share: the precision of products, queries folded into rows, and what each row sees.

In Pallas the T * G queries of a KV head are one block of rows, t-major, so that every key is read once for all
of them. What a row sees is a range of cache slots and, of the new tokens, a range (chains) or a set of
bits (trees).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import masks

Array = jax.Array
Shaped = Array | jax.ShapeDtypeStruct  # nothing but its shape and dtype is read

# Below every score, and finite, so that a row that has seen nothing yet rescales by exp(0).
LOWEST = -0.7 * float(np.finfo(np.float32).max)

# Limits of the Pallas back-ends: a tree's bits are compared with every row, and the new keys are held
# at once.
MAX_NODES = 128
MAX_CHAIN = 1024
MAX_HEAD_DIM = 256


def reason_against(
    q: Shaped, ancestors: Array | None, dtypes: tuple[str, ...], *, new_tokens: bool
) -> str | None:
    """Why a Pallas back-end for `dtypes` cannot serve a call, or None if it can."""
    t, d = q.shape[1], q.shape[3]
    if q.dtype.name not in dtypes:
        return f"has no {q.dtype.name}, only {', '.join(dtypes)}"
    if d > MAX_HEAD_DIM or d % 8:
        return f"takes head_dim up to {MAX_HEAD_DIM} in steps of 8, not {d}"
    limit = MAX_CHAIN if ancestors is None else MAX_NODES
    if new_tokens and t > limit:
        what = "new tokens" if ancestors is None else "tree nodes"
        return f"takes up to {limit} {what}, not {t}"
    return None


@dataclasses.dataclass(frozen=True)
class Seen:
    """What each row sees.

    Attributes:
      low, high: `int32[B, R]`, cache slots in [low, high).
      new: `int32[B, R, 2]`, new tokens in [first, last]; or `int32[B, R, W]`, ancestor bits; None
        without new tokens.
      bits: whether `new` holds bits.
      length: `int32[B]`, slots from here on hold garbage.
    """

    low: Array
    high: Array
    new: Array | None
    bits: bool
    length: Array

    def blocks(self, size: int) -> Array:
        """`int32[4, B]`: which blocks of `size` slots a batch row reads: [first, end), and which of
        these every query sees in full: [inner, outer)."""
        first = jnp.min(self.low, axis=1) // size
        end = -(-jnp.max(self.high, axis=1) // size)
        inner = -(-jnp.max(self.low, axis=1) // size)
        outer = jnp.min(self.high, axis=1) // size
        inner, outer = jnp.minimum(inner, end), jnp.minimum(outer, end)
        return jnp.stack([jnp.minimum(first, end), end, inner, jnp.maximum(outer, inner)])


def what_rows_see(
    groups: int,
    nodes: int,
    length: Array,  # int32[B]
    ancestors: Array | None,  # int32[B, T, W]
    visible: Array | None,  # int32[B, T]
    window: int | None,
    *,
    new_tokens: bool,
) -> Seen:
    """The masks of `tree_attention`, by row: a query's `groups` heads are neighbours."""
    batch = length.shape[0]
    ends = jnp.broadcast_to(length[:, None], (batch, nodes))
    low, high, new = jnp.zeros_like(ends), ends, None
    if not new_tokens:
        if visible is not None:
            high = jnp.clip(visible, 0, ends)
            if window is not None:
                low = visible - window
    elif ancestors is None:
        node = jnp.arange(nodes, dtype=jnp.int32)
        first = jnp.zeros_like(node)
        if window is not None:
            low = ends + node[None] - (window - 1)
            first = jnp.maximum(node - (window - 1), 0)
        new = jnp.broadcast_to(jnp.stack([first, node], axis=-1)[None], (batch, nodes, 2))
    else:
        new = ancestors
        if window is not None:
            depth = masks.popcount(ancestors) - 1
            low = ends + depth - (window - 1)
            near = depth[:, None, :] > depth[:, :, None] - window
            new = masks.pack(masks.unpack(ancestors, nodes) & near)
    low = jnp.clip(low, 0, high)

    def rows(x: Array) -> Array:
        return jnp.repeat(x, groups, axis=1)

    return Seen(
        low=rows(low),
        high=rows(high),
        new=None if new is None else rows(new),
        bits=ancestors is not None,
        length=length,
    )


def fold(q: Array, kv_heads: int) -> Array:
    """`[B, T, N, D]` -> rows `[B, K, T * G, D]`."""
    b, t, n, d = q.shape
    rows = q.reshape(b, t, kv_heads, n // kv_heads, d).transpose(0, 2, 1, 3, 4)
    return rows.reshape(b, kv_heads, t * (n // kv_heads), d)


def unfold(rows: Array, nodes: int) -> Array:
    """`[B, K, T * G, ...]` -> `[B, T, N, ...]`."""
    b, k, r = rows.shape[:3]
    out = jnp.moveaxis(rows.reshape(b, k, nodes, r // nodes, *rows.shape[3:]), 1, 2)
    return out.reshape(b, nodes, k * (r // nodes), *rows.shape[3:])


def precision_of(dtype: Any) -> lax.Precision:
    """The precision at which products of this dtype lose nothing before they are summed."""
    # Narrow operands are exact in one pass; float32 would fall to passes in bfloat16 or TF32.
    wide = jnp.dtype(dtype).itemsize >= 4
    return lax.Precision.HIGHEST if wide else lax.Precision.DEFAULT


def pad(x: Array, axis: int, size: int, value: int = 0) -> Array:
    """`x` with `axis` filled up to `size`."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def power_of_two(x: int) -> int:
    """The smallest power of two that is at least `x`."""
    return 1 << max(x - 1, 0).bit_length()
