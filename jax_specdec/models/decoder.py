"""The target: a stateless decoder in Flax Linen, of the parts that its configuration names.

Axis letters: `B` batch, `T` new tokens or tree nodes, `S` cache slots, `L` layers, `N` query heads,
`K` key/value heads, `D` head dim, `E` embed, `F` mlp, `V` vocabulary.

Parameters are one tree for both layer loops:

    {"embed": [V, E], "layers": (block, ...) or a stacked block, "norm": [E], "head": [E, V]}

with `head` absent where it is tied, or a transposed copy of `embed` where that is faster (CPU, not in bfloat16); `parameters`
lists the rest.
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
from jax_specdec.models.config import ModelConfig, RopeConfig
from jax_specdec.models.layers import Block, embed, head, norm
from jax_specdec.models.parameters import layer_parameters, model_parameters
from jax_specdec.models.quantized import quantize, quantized_axes
from jax_specdec.models.rope import rope_angles
from jax_specdec.models.tensor_parallel import divided_config
from pallas_kernels import tree_attention


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
        if self.layer_loop == "scan" and not self.config.uniform:
            raise ValueError(
                "layers that differ, as in their sliding windows, cannot be scanned: use unroll"
            )

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
            "layers": tuple(self.init_layer(k, i) for i, k in enumerate(keys[: c.num_layers])),
        }
        for name, (shape, _) in model_parameters(c).items():
            if name in ("head", "positions"):
                params[name] = normal(keys[-2], shape, self.dtype)
            elif name != "embed":
                fill = float(name == "norm" and c.norm != "rms1")
                params[name] = jnp.full(shape, fill, self.dtype)
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

    def init_layer(self, key: Array, layer: int = 0) -> Params:
        """Fresh parameters of one layer."""
        c = self.config
        x = jnp.zeros((1, 1, c.hidden_size), self.dtype)
        block = Block(c, self.dtype, experts=c.has_experts(layer))
        return dict(block.init(key, x, None, lambda q, k, v: q)["params"])

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
        x = embed(self.config, params, tokens, positions)
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
        angles: dict[RopeConfig | None, Any] = {None: None}
        for rope in {c.rope_of(i) for i in range(c.num_layers)}:
            if rope is not None:
                angles[rope] = rope_angles(rope, c.head_dim, positions, c.context)
        partition = partition_of(self.sharding)
        scores: dict[str, Any] = {"scale": c.scale, "soft_cap": c.attention_cap}

        def layer(
            weights: Params,
            x: Array,
            index: Any,
            place: int,
            cache: KVCache | None,
            drafted: tuple[Any, Any] | None,
        ) -> Any:
            """A layer like the one at `place`; `index` is where its keys are."""
            window = c.windows[place]
            block = Block(c, self.dtype, self.sharding, c.has_experts(place))

            def attend(q: Array, k: Array, v: Array) -> Array:
                if cache is None:
                    return causal_attention(q, k, v, window, ancestors, **scores)
                k, v = cache.seen(k, v, index)
                if drafted is not None:
                    if window is not None or ancestors is None:
                        raise ValueError(
                            "drafted nodes need ancestors, and layers without a window"
                        )
                    before = cache.seen(drafted[0][index], drafted[1][index], index)
                    old = cache.layer(index)
                    return grown_attention(
                        q, k, v, *before, old, ancestors, partition=partition, **scores
                    )
                out = tree_attention(
                    q,
                    k,
                    v,
                    ancestors=ancestors,
                    window=window,
                    partition=partition,
                    **scores,
                    **cache.layer(index),
                )
                return cast(Array, out)  # a pair only with return_lse

            branch = None
            if between is not None:
                branch = functools.partial(between, weights, index=index)
            return block.apply({"params": weights}, x, angles[c.rope_of(place)], attend, branch)

        scan = self.layer_loop == "scan"
        if remat:
            layer = jax.checkpoint(layer, static_argnums=(3,) if scan else (2, 3))
        # Layers that differ in their arrays alone are traced once.
        shared = self.sharding is None and not (scan or remat or self.stacked_cache)
        once = jax.jit(layer, static_argnums=(2, 3)) if shared and between is None else None
        kinds = [(c.windows[i], c.rope_of(i), c.has_experts(i)) for i in range(c.num_layers)]
        if scan:

            def step(carry, item):
                x, tapped = carry
                index, weights = item
                x, new = layer(weights, x, index, 0, cache, drafted)
                tapped = {t: jnp.where(index == t, x, old) for t, old in tapped.items()}
                return (x, tapped), new

            index = jnp.arange(c.num_layers, dtype=jnp.int32)
            (x, tapped), new_kv = lax.scan(step, (x, tapped), (index, params["layers"]))
        else:
            collected = []
            for index, weights in enumerate(params["layers"]):
                if once is None:
                    x, new = layer(weights, x, index, index, cache, drafted)
                else:
                    own = None if cache is None else cache.only(index)
                    nodes = None if drafted is None else tuple((kv[index],) for kv in drafted)
                    x, new = once(weights, x, 0, kinds.index(kinds[index]), own, nodes)
                collected.append(new)
                if index in tapped:
                    tapped[index] = x
            new_kv = (tuple(k for k, _ in collected), tuple(v for _, v in collected))
            if self.stacked_cache:
                new_kv = (jnp.stack(new_kv[0]), jnp.stack(new_kv[1]))
        return x, new_kv, tapped

    def axes(self) -> tuple[Params, KVCache]:
        """Logical axis names of parameters and cache, see `core.model.Model`."""
        c = self.config

        def of_layer(layer: int) -> Params:
            return {name: p.axes for name, p in layer_parameters(c, c.has_experts(layer)).items()}

        params: Params = {name: p.axes for name, p in model_parameters(c).items()}
        slot = ("batch", "kv_heads", "slots", None)
        cached: Any = (slot,) * c.num_layers
        if self.stacked_cache:
            cached = ("layer", *slot)
        if self.layer_loop == "scan":
            params["layers"] = {name: ("layer", *names) for name, names in of_layer(0).items()}
        else:
            params["layers"] = tuple(of_layer(layer) for layer in range(c.num_layers))
        if self.quantized:
            params = quantized_axes(params)
        scales: Any = None if self.kv_scales is None else (None, "kv_heads")
        return params, KVCache(cached, cached, ("batch",), scales, scales)  # type: ignore[arg-type]

    def head(self, params: Params, hidden: Array) -> Array:
        """`hidden [B, T, E]` before the final norm -> `float32[B, T, V]`."""
        logits = head(self.config, params, norm(self.config, params, "norm", hidden))
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
