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
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec.core.cache import KVCache, init_cache
from jax_specdec.models.config import ModelConfig, RopeConfig
from pallas_kernels import masks, tree_attention, tuning

Array = jax.Array
Params = dict[str, Any]
Attend = Callable[[Array, Array, Array], Array]


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


def precision_of(dtype: Any) -> lax.Precision:
    """float32 means float32: accelerators otherwise multiply it in bfloat16 passes or TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def matmul(x: Array, w: Array) -> Array:
    """`x [..., E] @ w [E, F]`, in the dtype of both."""
    rows = x.size // x.shape[-1]
    # XLA's CPU backend multiplies a single bfloat16 row element by element; two rows take the fast path.
    if rows == 1 and x.dtype == jnp.bfloat16 and tuning.device().platform == "cpu":
        row = x.reshape(1, x.shape[-1])
        return jnp.dot(jnp.concatenate([row, row]), w)[:1].reshape(*x.shape[:-1], w.shape[-1])
    return jnp.dot(x, w, precision=precision_of(x.dtype))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMS norm (arXiv 1910.07467) with float32 statistics, over the last axis."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + jnp.float32(eps))
    return y.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Array:
    """Inverse frequencies `float32[D/2]` in radians per position."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / jnp.float32(head_dim)
    frequency = jnp.float32(1.0) / jnp.float32(rope.theta) ** exponent
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        return frequency / jnp.float32(rope.factor)
    wavelength = jnp.float32(2 * jnp.pi) / frequency
    ratio = jnp.float32(rope.original_context) / wavelength
    ramp = (ratio - jnp.float32(rope.low_freq_factor)) / jnp.float32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    ramp = jnp.clip(ramp, 0.0, 1.0)  # 0: long wavelengths, fully scaled; 1: short ones, untouched
    return frequency * (ramp + (jnp.float32(1.0) - ramp) / jnp.float32(rope.factor))


def rope_angles(rope: RopeConfig, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """`cos, sin: float32[B, T, 1, D]` of the positions `int32[B, T]`, the two halves repeated."""
    angle = positions[..., None].astype(jnp.float32) * rope_frequencies(rope, head_dim)[None, None]
    angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates `x [B, T, N, D]`; pairs are (i, i + D/2), as Hugging Face stores them."""
    y = x.astype(jnp.float32)
    a, b = jnp.split(y, 2, axis=-1)
    return (y * cos + jnp.concatenate([-b, a], axis=-1) * sin).astype(x.dtype)


def causal_attention(q: Array, k: Array, v: Array, window: int | None) -> Array:
    """Attention of whole sequences with nothing cached, for training.

    Args:
      q: `[B, T, N, D]`. k, v: `[B, T, K, D]`. window: sliding window in tokens, or None.
    """
    i = jnp.arange(q.shape[1], dtype=jnp.int32)
    keep = i[:, None] >= i[None, :]
    if window is not None:
        keep = keep & (i[:, None] - i[None, :] < window)
    return masked_attention(q, k, v, keep[None])


def masked_attention(q: Array, k: Array, v: Array, keep: Array) -> Array:
    """Dense attention under any mask, for training.

    Args:
      q: `[B, T, N, D]`. k, v: `[B, S, K, D]`. keep: `bool[B or 1, T, S]`; a query must see a key.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    precision = precision_of(q.dtype)
    score = jnp.einsum(
        "BTKGD,BSKD->BKGTS", q, k, precision=precision, preferred_element_type=jnp.float32
    ) * jnp.float32(dim**-0.5)
    score = jnp.where(keep[:, None, None], score, jnp.finfo(jnp.float32).min)
    weight = jax.nn.softmax(score, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKD->BTKGD", weight, v, precision=precision)
    return out.reshape(batch, length, heads, dim)


def grown_attention(
    q: Array,
    k_new: Array,
    v_new: Array,
    k_drafted: Array,
    v_drafted: Array,
    k_cache: Array,
    v_cache: Array,
    length: Array,
    ancestors: Array,
    layer: Any = None,
) -> Array:
    """Attention of new tree nodes over the cache, over nodes drafted before them, and over themselves.

    Two softmaxes, the prefix's and the tree's, merged by their log-sum-exp: the tree stays outside of
    the cache, where its nodes would need a mask.

    Args:
      q: `[B, T, N, D]`. k_new, v_new: `[B, T, K, D]`. k_drafted, v_drafted: `[B, M, K, D]`.
      k_cache, v_cache, length, layer: as in `tree_attention`.
      ancestors: `int32[B, T, ceil((M+T)/32)]`; bit j < M is drafted node j, bit M + i new node i.

    Returns:
      `[B, T, N, D]`.
    """
    batch, nodes, heads, dim = q.shape
    keys = jnp.concatenate([k_drafted, k_new], axis=1)
    values = jnp.concatenate([v_drafted, v_new], axis=1)
    kv_heads = keys.shape[2]
    visible = jnp.broadcast_to(length[:, None], (batch, nodes))
    prefix, lse = tree_attention(
        q, None, None, k_cache, v_cache, length, layer=layer, visible=visible, return_lse=True
    )
    precision = precision_of(q.dtype)
    score = jnp.einsum(
        "BTKGD,BSKD->BTKGS",
        q.reshape(batch, nodes, kv_heads, heads // kv_heads, dim),
        keys,
        precision=precision,
        preferred_element_type=jnp.float32,
    ) * jnp.float32(dim**-0.5)
    seen = masks.unpack(ancestors, keys.shape[1])[:, :, None, None]
    score = jnp.where(seen, score, -jnp.inf)
    lse = lse.reshape(*score.shape[:-1], 1)
    # A node sees itself, so that the maximum is finite even where the prefix is empty.
    top = jnp.maximum(jnp.max(score, axis=-1, keepdims=True), lse)
    weight, old = jnp.exp(score - top), jnp.exp(lse - top)
    out = jnp.einsum(
        "BTKGS,BSKD->BTKGD",
        weight.astype(values.dtype),
        values,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    total = jnp.sum(weight, axis=-1, keepdims=True) + old
    prefix = prefix.reshape(out.shape).astype(jnp.float32)
    out = (out + prefix * old) / total
    return out.astype(q.dtype).reshape(q.shape)


class Block(nn.Module):
    """One pre-norm decoder layer: attention and a gated MLP."""

    config: ModelConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array],
        attend: Attend,
        between: Callable[[Array], Array] | None = None,
    ):
        """`x [B, T, E]` -> `(x, (k, v))`.

        `attend(q, k, v)` sees this layer's cache; `between` comes between attention and MLP.
        """
        c = self.config
        batch, length, embed = x.shape
        heads, kv_heads, dim = c.num_heads, c.num_kv_heads, c.head_dim
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        normal = nn.initializers.normal(0.02)
        # Residual branches start small, so that depth does not grow the variance (GPT-2, section 2.3).
        small = nn.initializers.normal(0.02 / (2 * c.num_layers) ** 0.5)

        def param(name, init, *shape):
            return self.param(name, init, shape, self.dtype)

        y = rms_norm(x, param("attention_norm", ones, embed), c.norm_eps)
        qkv = matmul(y, param("qkv", normal, embed, (heads + 2 * kv_heads) * dim))
        if c.qkv_bias:
            qkv = qkv + param("qkv_bias", zeros, qkv.shape[-1])[None, None]
        if tuning.device().platform == "tpu":
            # Without it XLA lays the weights out by heads, in a copy of all layers at the start of a run.
            qkv = lax.optimization_barrier(qkv)
        qkv = qkv.reshape(batch, length, heads + 2 * kv_heads, dim)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        if c.qk_norm:
            q = rms_norm(q, param("q_norm", ones, dim), c.norm_eps)
            k = rms_norm(k, param("k_norm", ones, dim), c.norm_eps)
        q, k = apply_rope(q, *angles), apply_rope(k, *angles)
        y = attend(q, k, v).reshape(batch, length, heads * dim)
        y = matmul(y, param("out", small, heads * dim, embed))
        if c.out_bias:
            y = y + param("out_bias", zeros, embed)[None, None]
        x = x + y
        if between is not None:
            x = between(x)
        y = rms_norm(x, param("mlp_norm", ones, embed), c.norm_eps)
        gate, up = jnp.split(matmul(y, param("gate_up", normal, embed, 2 * c.mlp_size)), 2, axis=-1)
        x = x + matmul(nn.silu(gate) * up, param("down", small, c.mlp_size, embed))
        return x, (k, v)


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


def unembed(params: Params, x: Array) -> Array:
    """`x [B, T, E]` -> scores `float32[B, T, V]` by `head`, or by `embed` where the head is tied."""
    weights, product = ("head", "BTE,EV->BTV") if "head" in params else ("embed", "BTE,VE->BTV")
    out = jnp.einsum(
        product,
        x,
        params[weights],
        precision=precision_of(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.astype(jnp.float32)


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
