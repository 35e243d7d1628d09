"""The KV cache: committed keys and values only, one ragged length per row.

Drafts are not written here. Verification receives their keys and values beside the cache, and
`commit` writes the accepted path once, so rejecting a draft costs nothing.
"""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels
from jax_specdec._types import Array, Int
from pallas_kernels import Partition, tuning

TILE = 32  # slots; a multiple of the sublanes of every dtype


@dataclasses.dataclass(frozen=True, eq=False)
class KVScales:
    """What a unit of an int8 cache stands for, by layer and KV head: static, so that a model can hold it.

    Attributes:
      k, v: `float32[L, K]`, above 0.
    """

    k: np.ndarray
    v: np.ndarray

    def _key(self) -> tuple[Any, ...]:
        return self.k.shape, self.k.tobytes(), self.v.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KVScales) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of the committed tokens.

    Attributes:
      k, v: a tuple of L arrays `[B, K, S, D]`, or one stacked array `[L, B, K, S, D]` where layers
        are scanned.
      length: `int32[B]`, committed slots of each row; what lies behind them is garbage.
      k_scale, v_scale: `float32[L, K]` where keys and values are int8, otherwise None.
    """

    k: Any
    v: Any
    length: Int[Array, " B"]
    k_scale: Any = None
    v_scale: Any = None

    @property
    def stacked(self) -> bool:
        return not isinstance(self.k, tuple)

    @property
    def slots(self) -> int:
        return (self.k if self.stacked else self.k[0]).shape[-2]

    def layer(self, index: Any) -> dict[str, Any]:
        """One layer as arguments of `tree_attention`: its keys and values, or those of all layers and the index."""
        at = {"length": self.length, "k_scale": self.k_scale, "v_scale": self.v_scale}
        if self.stacked:
            return {"k_cache": self.k, "v_cache": self.v, "layer": index, **at}
        if self.k_scale is not None:
            at |= {"k_scale": self.k_scale[index], "v_scale": self.v_scale[index]}
        return {"k_cache": self.k[index], "v_cache": self.v[index], **at}

    def only(self, index: int) -> "KVCache":
        """The cache of one layer, where they are not stacked."""
        one = slice(index, index + 1)
        scales = {name: getattr(self, name) for name in ("k_scale", "v_scale")}
        scales = {name: None if x is None else x[one] for name, x in scales.items()}
        return self.replace(k=self.k[one], v=self.v[one], **scales)

    def seen(self, k: Array, v: Array, index: Any) -> tuple[Array, Array]:
        """New keys and values `[B, T, K, D]` of a layer, as this cache will give them back.

        A token sees itself, its draft and its cache through the same rounding: then what it sees does not
        depend on which of it is committed yet, and speculative text is plain text with int8, too, but for near
        ties: a value between two units may be rounded to either where sums have another order.
        """
        if self.k_scale is None:
            return k, v

        def rounded(x: Array, scale: Array) -> Array:
            scale = scale[index][None, None, :, None]
            return (to_int8(x, scale).astype(jnp.float32) * scale).astype(x.dtype)

        return rounded(k, self.k_scale), rounded(v, self.v_scale)


def init_cache(
    num_layers: int,
    batch: int,
    num_kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: Any,
    *,
    stacked: bool = False,
    scales: KVScales | None = None,
) -> KVCache:
    """An empty cache.

    Args:
      scales: of an int8 cache, whatever `dtype`.
      slots: the capacity plus the widest draft, see `commit`. On accelerators they are rounded up to whole
        tiles: otherwise XLA keeps the cache with the heads innermost between programs, and every program
        begins and ends with copies of it.
    """
    if tuning.device().platform != "cpu":
        slots += -slots % TILE
    shape = (batch, num_kv_heads, slots, head_dim)
    at: dict[str, Any] = {"length": jnp.zeros((batch,), jnp.int32)}
    if scales is not None:
        dtype = jnp.int8
        at |= {"k_scale": jnp.asarray(scales.k), "v_scale": jnp.asarray(scales.v)}
    if stacked:
        k, v = (jnp.zeros((num_layers, *shape), dtype) for _ in range(2))
    else:
        k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)) for _ in range(2))
    return KVCache(k=k, v=v, **at)


def to_int8(x: Array, scale: Array) -> Array:
    """`x / scale`, rounded and cut to -127 .. 127."""
    units = jnp.round(x.astype(jnp.float32) / scale)
    return jnp.clip(units, -127, 127).astype(jnp.int8)


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
    if cache.k_scale is not None:
        new_kv = (_units(new_kv[0], cache.k_scale), _units(new_kv[1], cache.v_scale))

    def write(k: Array, v: Array, new_k: Array, new_v: Array) -> tuple[Array, Array]:
        new_k, new_v = new_k.astype(k.dtype), new_v.astype(v.dtype)
        return pallas_kernels.commit(k, v, new_k, new_v, start, count, path, partition=partition)

    if cache.stacked:
        new_k, new_v = write(cache.k, cache.v, *new_kv)
    else:
        layers = [write(*layer) for layer in zip(cache.k, cache.v, *new_kv, strict=True)]
        new_k, new_v = (tuple(x) for x in zip(*layers, strict=True))
    return cache.replace(k=new_k, v=new_v, length=cache.length + count)


def _units(new: Any, scale: Array) -> Any:
    """Keys or values of all layers as int8."""
    if not isinstance(new, tuple):
        return to_int8(new, scale[:, None, None, :, None])
    return tuple(to_int8(x, scale[index][None, None, :, None]) for index, x in enumerate(new))
