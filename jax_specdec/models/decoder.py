"""The target: a stateless Llama-family decoder in Flax Linen.

Axis letters: `B` batch, `T` new tokens or tree nodes, `S` cache slots, `L` layers, `N` query heads,
`K` key/value heads, `D` head dim, `E` embed, `F` mlp, `V` vocabulary.

Parameters are one tree for both layer loops:

    {"embed": [V, E], "layers": (block, ...) or a stacked block, "norm": [E], "head": [E, V]}

with `head` absent where it is tied, or a transposed copy of `embed` where that is faster (CPU).
Projections that read the same input are stored and multiplied as
one matrix (`qkv`, `gate_up`).
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Int, Params
from jax_specdec.core import cache as kv
from jax_specdec.core.cache import KVCache, KVScales
from jax_specdec.core.model import Output
from jax_specdec.core.sharding import Sharding, constrain, partition_of
from jax_specdec.models.attention import causal_attention, grown_attention
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.layers import Block, rms_norm, unembed
from jax_specdec.models.quantized import quantize, quantized_axes
from jax_specdec.models.rope import rope_angles
from jax_specdec.models.tensor_parallel import divided_config
from pallas_kernels import tree_attention

# Logical axes of a layer's parameters; `Block` says what each of them is.
LAYER_AXES: dict[str, tuple[str | None, ...]] = {
    "attention_norm": ("embed",),
    "qkv": ("embed", "heads"),
    "qkv_bias": ("heads",),
    "q_norm": (None,),
    "k_norm": (None,),
    "out": ("heads", "embed"),
    "out_bias": ("embed",),
    "mlp_norm": ("embed",),
    "gate_up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}


class Between(Protocol):
    """A further residual branch of each layer, see `Decoder.layers`."""

    def __call__(self, weights: Params, x: Array, *, index: Any) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The decoder of a `ModelConfig`, a `core.model.Model`: pure functions, no state.

    `Output.new` is `(k, v)` of the new tokens, each a tuple of L arrays `[B, T, K, D]` or one stacked array
    `[L, B, T, K, D]`.

    Attributes:
      dtype: of parameters, activations and cache.
      layer_loop: `unroll` (parameters are a tuple of per-layer trees) or `scan` (stacked trees,
        stacked cache). `stack_layers` and `unstack_layers` convert.
      stacked_cache: whether the cache is one array over all layers under `unroll`, too: kernels then
        commit every layer in one call.
      quantized: matrices that are multiplied are int8, see `quantized.Quantized`.
      kv_scales: makes the cache int8; None keeps it in `dtype`.
      sharding: where parameters, activations and cache lie on a mesh, or None for one device. `config` may
        then have more KV heads than it was given, and fused parameters are in groups, see
        `tensor_parallel.divide`.

    Raises:
      UserError: a model that cannot be divided so.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    layer_loop: Literal["unroll", "scan"] = "unroll"
    stacked_cache: bool = False
    sharding: Sharding | None = None
    quantized: bool = False
    kv_scales: KVScales | None = None

    def __post_init__(self):
        if self.sharding is not None:
            object.__setattr__(self, "config", divided_config(self.config, self.sharding))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.layer_loop == "scan":
            object.__setattr__(self, "stacked_cache", True)
        if self.layer_loop == "scan" and len(set(self.windows)) > 1:
            raise ValueError("layers with different sliding windows cannot be scanned: use unroll")

    rewinds: ClassVar[bool] = True  # slots behind a cache's length are garbage

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, the sliding window in tokens, or None."""
        return self.config.windows

    def init(self, key: Array) -> Params:
        """Fresh parameters: normal(0.02), residual outputs scaled down with depth."""
        c = self.config
        keys = jax.random.split(key, c.num_layers + 2)
        normal = nn.initializers.normal(0.02)
        params = {
            "embed": normal(keys[-1], (c.vocab_size, c.hidden_size), self.dtype),
            "layers": tuple(self.init_layer(k) for k in keys[: c.num_layers]),
            "norm": jnp.ones((c.hidden_size,), self.dtype),
        }
        if not c.tied_head:
            params["head"] = normal(keys[-2], (c.hidden_size, c.vocab_size), self.dtype)
        params = stack_layers(params) if self.layer_loop == "scan" else params
        return quantize(params) if self.quantized else params

    def init_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache in the form that `apply` reads; `slots` as in `cache.init_cache`."""
        c = self.config
        cache = kv.init_cache(
            c.num_layers,
            batch,
            c.num_kv_heads,
            slots,
            c.head_dim,
            self.dtype,
            stacked=self.stacked_cache,
            scales=self.kv_scales,
        )
        return jax.tree.map(
            lambda x, names: constrain(self.sharding, x, *names), cache, self.axes()[1]
        )

    def commit(
        self,
        cache: KVCache,
        output: Output,
        count: Int[Array, " B"],
        path: Int[Array, "B Q"] | None = None,
    ) -> KVCache:
        """Appends the accepted path of new tokens to the cache, see `cache.commit`."""
        partition = partition_of(self.sharding)
        return kv.commit(cache, output.new, count, path, after=output.hidden, partition=partition)

    def rollback(self, cache: KVCache, length: Int[Array, " B"]) -> KVCache:
        """What lies behind a length is garbage: nothing is moved."""
        return cache.replace(length=length)

    def blank(self, batch: int, nodes: int) -> tuple[Any, Any]:
        """Keys and values of `nodes` tree nodes, all 0, in the form of `Output.new`."""
        c = self.config
        shape = (batch, nodes, c.num_kv_heads, c.head_dim)
        zeros: Any = (jnp.zeros(shape, self.dtype),) * c.num_layers
        if self.stacked_cache:
            zeros = jnp.stack(zeros)
        return zeros, zeros

    def init_layer(self, key: Array) -> Params:
        """Fresh parameters of one layer."""
        c = self.config
        x = jnp.zeros((1, 1, c.hidden_size), self.dtype)
        angles = rope_angles(c.rope, c.head_dim, jnp.zeros((1, 1), jnp.int32))
        return dict(Block(c, self.dtype).init(key, x, angles, lambda q, k, v: q)["params"])

    def apply(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        cache: KVCache | None = None,
        ancestors: Array | None = None,
        *,
        drafted: tuple[Any, Any] | None = None,
        taps: tuple[int, ...] = (),
        logits: bool = True,
        remat: bool = False,
    ) -> Output:
        """One forward pass over new tokens.

        Args:
          tokens: `int32[B, T]`. positions: `int32[B, T]`, absolute.
          cache: committed keys and values, or None to attend among the new tokens alone (training).
          ancestors: `int32[B, T, ceil(T/32)]`, bit j of row i set iff node j is node i or above it;
            None where the new tokens are a chain.
          drafted: keys and values of M tree nodes that were read before and are in no cache, in the
            form of `Output.new`. `ancestors` is then `int32[B, T, ceil((M+T)/32)]`, over these
            nodes and the new ones. Not for layers with a sliding window.
          taps: hidden states to return, see `core.model.Model`.
          logits: False skips the head (prefill). remat: recompute layers in the backward pass.
        """
        x = jnp.take(params["embed"], tokens, axis=0)
        x = constrain(self.sharding, x, "batch", None, "embed")
        x, new_kv, tapped = self.layers(
            params, x, positions, cache, ancestors, drafted=drafted, taps=taps, remat=remat
        )
        return Output(self.head(params, x) if logits else None, x, new_kv, tapped)

    def layers(
        self,
        params: Params,
        x: Array,
        positions: Array,
        cache: KVCache | None = None,
        ancestors: Array | None = None,
        *,
        drafted: tuple[Any, Any] | None = None,
        between: Between | None = None,
        taps: tuple[int, ...] = (),
        remat: bool = False,
    ) -> tuple[Array, tuple[Any, Any], dict[int, Array]]:
        """All layers: `x [B, T, E]` -> the hidden states before the final norm, `Output.new`, the taps.

        Args:
          drafted, taps: see `apply`.
          between: a branch between attention and MLP of each layer, given the layer's weights.
        """
        c = self.config
        if any(not -1 <= tap < c.num_layers for tap in taps):
            raise ValueError(f"taps {taps} are not among -1 to {c.num_layers - 1}")
        tapped = {tap: x for tap in taps}
        angles = rope_angles(c.rope, c.head_dim, positions)
        block, partition = Block(c, self.dtype, self.sharding), partition_of(self.sharding)

        def layer(
            weights: Params,
            x: Array,
            index: Any,
            window: int | None,
            cache: KVCache | None,
            drafted: tuple[Any, Any] | None,
        ) -> Any:
            def attend(q: Array, k: Array, v: Array) -> Array:
                if cache is None:
                    return causal_attention(q, k, v, window, ancestors)
                k, v = cache.seen(k, v, index)
                if drafted is not None:
                    if window is not None or ancestors is None:
                        raise ValueError(
                            "drafted nodes need ancestors, and layers without a window"
                        )
                    before = cache.seen(drafted[0][index], drafted[1][index], index)
                    old = cache.layer(index)
                    return grown_attention(q, k, v, *before, old, ancestors, partition=partition)
                out = tree_attention(
                    q,
                    k,
                    v,
                    ancestors=ancestors,
                    window=window,
                    partition=partition,
                    **cache.layer(index),
                )
                return cast(Array, out)  # a pair only with return_lse

            branch = None
            if between is not None:
                branch = functools.partial(between, weights, index=index)
            return block.apply({"params": weights}, x, angles, attend, branch)

        scan = self.layer_loop == "scan"
        if remat:
            layer = jax.checkpoint(layer, static_argnums=(3,) if scan else (2, 3))
        # Layers that differ in their arrays alone are traced once.
        shared = self.sharding is None and not (scan or remat or self.stacked_cache)
        once = jax.jit(layer, static_argnums=(2, 3)) if shared and between is None else None
        if scan:

            def step(carry, item):
                x, tapped = carry
                index, weights = item
                x, new = layer(weights, x, index, c.windows[0], cache, drafted)
                tapped = {t: jnp.where(index == t, x, old) for t, old in tapped.items()}
                return (x, tapped), new

            index = jnp.arange(c.num_layers, dtype=jnp.int32)
            (x, tapped), new_kv = lax.scan(step, (x, tapped), (index, params["layers"]))
        else:
            collected = []
            for index, weights in enumerate(params["layers"]):
                if once is None:
                    x, new = layer(weights, x, index, c.windows[index], cache, drafted)
                else:
                    own = None if cache is None else cache.only(index)
                    nodes = (
                        None if drafted is None else ((drafted[0][index],), (drafted[1][index],))
                    )
                    x, new = once(weights, x, 0, c.windows[index], own, nodes)
                collected.append(new)
                if index in tapped:
                    tapped[index] = x
            new_kv = (tuple(k for k, _ in collected), tuple(v for _, v in collected))
            if self.stacked_cache:
                new_kv = (jnp.stack(new_kv[0]), jnp.stack(new_kv[1]))
        return x, new_kv, tapped

    def axes(self) -> tuple[Params, KVCache]:
        """Logical axis names of parameters and cache, see `core.model.Model`."""
        layer = {name: names for name, names in LAYER_AXES.items() if self._has(name)}
        vector = ("embed",)
        params: Params = {"embed": ("vocab", "embed"), "norm": vector}
        if not self.config.tied_head:
            params["head"] = ("embed", "vocab")
        slot = ("batch", "kv_heads", "slots", None)
        cached: Any = (slot,) * self.config.num_layers
        if self.stacked_cache:
            cached = ("layer", *slot)
        if self.layer_loop == "scan":
            params["layers"] = {name: ("layer", *names) for name, names in layer.items()}
        else:
            params["layers"] = (layer,) * self.config.num_layers
        if self.quantized:
            params = quantized_axes(params)
        scales: Any = None if self.kv_scales is None else (None, "kv_heads")
        return params, KVCache(cached, cached, ("batch",), scales, scales)  # type: ignore[arg-type]

    def _has(self, name: str) -> bool:
        c = self.config
        flags = {
            "qkv_bias": c.qkv_bias,
            "out_bias": c.out_bias,
            "q_norm": c.qk_norm,
            "k_norm": c.qk_norm,
        }
        return flags.get(name, True)

    def head(self, params: Params, hidden: Array) -> Array:
        """`hidden [B, T, E]` before the final norm -> `float32[B, T, V]`."""
        logits = unembed(params, rms_norm(hidden, params["norm"], self.config.norm_eps))
        return constrain(self.sharding, logits, "batch", None, "vocab")


def stack_layers(params: Params) -> Params:
    """A tuple of per-layer trees -> one tree whose leaves have a leading axis L."""
    layers = params["layers"]
    if not isinstance(layers, tuple):
        return params
    return {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    count = jax.tree.leaves(layers)[0].shape[0]
    split = tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count))
    return {**params, "layers": split}
