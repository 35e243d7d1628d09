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
from typing import Any, Literal, NamedTuple, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Params
from jax_specdec.core.cache import KVCache, init_cache
from jax_specdec.models.attention import causal_attention, grown_attention
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.layers import Block, rms_norm, unembed
from jax_specdec.models.rope import rope_angles
from pallas_kernels import tree_attention


class Between(Protocol):
    """A further residual branch of each layer, see `Decoder.layers`."""

    def __call__(self, weights: Params, x: Array, *, index: Any) -> Array: ...


class Output(NamedTuple):
    """What one forward pass returns.

    Attributes:
      logits: `float32[B, T, V]`, or None where they were not asked for.
      hidden: `[B, T, E]`, the last hidden state before the final norm.
      new_kv: keys and values of the T new tokens, `(k, v)`, each a tuple of L arrays `[B, T, K, D]` or
        one stacked array `[L, B, T, K, D]`.
    """

    logits: Array | None
    hidden: Array
    new_kv: tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The decoder of a `ModelConfig`: `init` and `apply`, no state.

    Attributes:
      dtype: of parameters, activations and cache.
      layer_loop: `unroll` (parameters are a tuple of per-layer trees) or `scan` (stacked trees,
        stacked cache). `stack_layers` and `unstack_layers` convert.
      stacked_cache: whether the cache is one array over all layers under `unroll`, too: kernels then
        commit every layer in one call.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    layer_loop: Literal["unroll", "scan"] = "unroll"
    stacked_cache: bool = False

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if self.layer_loop == "scan":
            object.__setattr__(self, "stacked_cache", True)
        if self.layer_loop == "scan" and len(set(self.config.windows)) > 1:
            raise ValueError("layers with different sliding windows cannot be scanned: use unroll")

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
        return stack_layers(params) if self.layer_loop == "scan" else params

    def init_cache(self, batch: int, slots: int, *, hidden: bool = False) -> KVCache:
        """An empty cache in the form that `apply` reads; `slots` as in `cache.init_cache`.

        Args:
          hidden: whether it holds hidden states, too.
        """
        c = self.config
        return init_cache(
            c.num_layers,
            batch,
            c.num_kv_heads,
            slots,
            c.head_dim,
            self.dtype,
            stacked=self.stacked_cache,
            hidden_size=c.hidden_size if hidden else None,
        )

    def blank(self, batch: int, nodes: int) -> tuple[Any, Any]:
        """Keys and values of `nodes` tree nodes, all 0, in the form of `Output.new_kv`."""
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
            form of `Output.new_kv`. `ancestors` is then `int32[B, T, ceil((M+T)/32)]`, over these
            nodes and the new ones. Not for layers with a sliding window.
          logits: False skips the head (prefill). remat: recompute layers in the backward pass.
        """
        x = jnp.take(params["embed"], tokens, axis=0)
        x, new_kv = self.layers(
            params, x, positions, cache, ancestors, drafted=drafted, remat=remat
        )
        return Output(self.head(params, x) if logits else None, x, new_kv)

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
        remat: bool = False,
    ) -> tuple[Array, tuple[Any, Any]]:
        """All layers: `x [B, T, E]` -> the hidden states before the final norm, and `Output.new_kv`.

        Args:
          drafted: see `apply`.
          between: a branch between attention and MLP of each layer, given the layer's weights.
        """
        c = self.config
        angles = rope_angles(c.rope, c.head_dim, positions)
        block = Block(c, self.dtype)

        def layer(weights: Params, x: Array, index: Any, window: int | None) -> Any:
            def attend(q: Array, k: Array, v: Array) -> Array:
                if cache is None:
                    return causal_attention(q, k, v, window)
                old_k, old_v = (
                    (cache.k, cache.v) if cache.stacked else (cache.k[index], cache.v[index])
                )
                if drafted is not None:
                    if window is not None or ancestors is None:
                        raise ValueError(
                            "drafted nodes need ancestors, and layers without a window"
                        )
                    k_drafted, v_drafted = drafted[0][index], drafted[1][index]
                    at = index if cache.stacked else None
                    return grown_attention(
                        q, k, v, k_drafted, v_drafted, old_k, old_v, cache.length, ancestors, at
                    )
                out = tree_attention(
                    q,
                    k,
                    v,
                    old_k,
                    old_v,
                    cache.length,
                    ancestors,
                    layer=index if cache.stacked else None,
                    window=window,
                )
                return cast(Array, out)  # a pair only with return_lse

            branch = None
            if between is not None:
                branch = functools.partial(between, weights, index=index)
            return block.apply({"params": weights}, x, angles, attend, branch)

        scan = self.layer_loop == "scan"
        if remat:
            layer = jax.checkpoint(layer, static_argnums=(3,) if scan else (2, 3))
        if scan:

            def step(x, item):
                index, weights = item
                return layer(weights, x, index, c.windows[0])

            index = jnp.arange(c.num_layers, dtype=jnp.int32)
            x, new_kv = lax.scan(step, x, (index, params["layers"]))
        else:
            collected = []
            for index, weights in enumerate(params["layers"]):
                x, kv = layer(weights, x, index, c.windows[index])
                collected.append(kv)
            new_kv = (tuple(k for k, _ in collected), tuple(v for _, v in collected))
            if self.stacked_cache:
                new_kv = (jnp.stack(new_kv[0]), jnp.stack(new_kv[1]))
        return x, new_kv

    def head(self, params: Params, hidden: Array) -> Array:
        """`hidden [B, T, E]` before the final norm -> `float32[B, T, V]`."""
        return unembed(params, rms_norm(hidden, params["norm"], self.config.norm_eps))


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
