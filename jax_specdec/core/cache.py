"""The KV cache: committed keys and values only, one ragged length per row.

Drafts are not written here. Verification receives their keys and values beside the cache, and
`commit` writes the accepted path once, so rejecting a draft costs nothing.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import lax

import pallas_kernels
from jax_specdec._types import Array, Int
from pallas_kernels import Partition, tuning

TILE = 32  # slots; a multiple of the sublanes of every dtype


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of the committed tokens.

    Attributes:
      k, v: a tuple of L arrays `[B, K, S, D]`, or one stacked array `[L, B, K, S, D]` where layers
        are scanned.
      length: `int32[B]`, committed slots of each row; what lies behind them is garbage.
    """

    k: Any
    v: Any
    length: Int[Array, " B"]

    @property
    def stacked(self) -> bool:
        return not isinstance(self.k, tuple)

    @property
    def slots(self) -> int:
        return (self.k if self.stacked else self.k[0]).shape[-2]

    def layer(self, index: Any) -> tuple[Array, Array, Any]:
        """Keys and values of one layer as `tree_attention` reads them: `(k, v, layer)`.

        `[B, K, S, D]` and None, or, where layers are stacked, all of them and the index.
        """
        if self.stacked:
            return self.k, self.v, index
        return self.k[index], self.v[index], None


def init_cache(
    num_layers: int,
    batch: int,
    num_kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: Any,
    *,
    stacked: bool = False,
) -> KVCache:
    """An empty cache.

    Args:
      slots: the capacity plus the widest draft, see `commit`. On accelerators they are rounded up to whole
        tiles: otherwise XLA keeps the cache with the heads innermost between programs, and every program
        begins and ends with copies of it.
    """
    if tuning.device().platform != "cpu":
        slots += -slots % TILE
    shape = (batch, num_kv_heads, slots, head_dim)
    if stacked:
        k, v = (jnp.zeros((num_layers, *shape), dtype) for _ in range(2))
    else:
        k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)) for _ in range(2))
    return KVCache(k=k, v=v, length=jnp.zeros((batch,), jnp.int32))


def _wait_for(start: Array, after: Array) -> Array:
    """`start` unchanged, but not known to the compiler before `after` is."""
    bits = lax.bitcast_convert_type(after.astype(jnp.float32), jnp.int32)
    positive = lax.shift_right_logical(bits, jnp.ones_like(bits))
    return start + jnp.minimum(positive, 0)


def commit(
    cache: KVCache,
    new_kv: tuple[Any, Any],
    count: Int[Array, " B"],
    path: Int[Array, "B Q"] | None = None,
    *,
    after: Array | None = None,
    partition: Partition | None = None,
) -> KVCache:
    """Appends the accepted path of a verified draft to every layer.

    Args:
      cache: its buffers should be donated or carried by a loop, so that the write is in place.
      new_kv: keys and values of the T verified nodes, per layer `[B, T, K, D]` (or stacked
        `[L, B, T, K, D]`).
      count: `int32[B]`, how many nodes of the path are accepted, root included; 0 leaves a row as
        it is.
      path: `int32[B, P]`, node index at each depth, or None where the draft is a chain, whose path is
        contiguous already.
      after: the forward's hidden states `[B, T, E]`. Inside a loop the write must wait for the last
        layer: a layer's new keys are known before its old ones are read, and XLA, free to write first,
        would copy every cache twice a round.
      partition: how a mesh divides the cache.

    The slots behind the accepted ones are overwritten with garbage, so a cache needs as many spare
    slots as the draft is wide: `dynamic_update_slice` would clamp, and move the write onto live keys.
    """

    start = cache.length if after is None else _wait_for(cache.length, after[:, -1, 0])

    def write(k: Array, v: Array, new_k: Array, new_v: Array) -> tuple[Array, Array]:
        new_k, new_v = new_k.astype(k.dtype), new_v.astype(v.dtype)
        return pallas_kernels.commit(k, v, new_k, new_v, start, count, path, partition=partition)

    if cache.stacked:
        new_k, new_v = write(cache.k, cache.v, *new_kv)
    else:
        layers = [write(*layer) for layer in zip(cache.k, cache.v, *new_kv, strict=True)]
        new_k, new_v = (tuple(x) for x in zip(*layers, strict=True))
    return cache.replace(k=new_k, v=new_v, length=cache.length + count)
