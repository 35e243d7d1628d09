"""GliDe: a small decoder that glimpses at the target's keys and values (arXiv 2402.02082, section 4.1).

Each layer is self-attention, cross-attention to one layer of the target, MLP. The cross-attention has
a query and an output projection and none for keys and values, which are the target's as they lie in its
cache: rotated already, so that only the query is rotated, and grouped by heads, never repeated.

Axis letters as in `models.decoder`; `N`, `K`, `D` of the cross-attention are the target's. Parameters:

    {"layers": (block + {"cross": {"norm", "q", "q_bias", "q_norm", "out"}}, ...), "norm": [E],
     "embed": [V, E], "head": [E, V], "hidden_norm": [Et], "hidden_in": [Et, D E]}

where embedding and head are the target's own arrays if they are shared, with `embed_in [Et, E]` and
`head_out [E, Et]` between where the drafter is not as wide as the target. The last two are there where
the target's hidden state is an input; D is the number of delays that have a projection of their own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jax_specdec._types import Array, Params
from jax_specdec.core.cache import KVCache
from jax_specdec.core.context import TargetView
from jax_specdec.core.model import Output
from jax_specdec.core.sharding import Sharding, constrain, partition_of
from jax_specdec.models.attention import masked_attention
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.decoder import Decoder
from jax_specdec.models.draft_vocabulary import widen
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.layers import head, rms_norm
from jax_specdec.models.products import matmul, unembed
from jax_specdec.models.rope import apply_rope, rope_angles
from pallas_kernels import tree_attention


class Glimpse(Protocol):
    """Attention of `q [B, T, N, D]` to the keys of a target layer that each query may see."""

    def __call__(self, q: Array, layer: int) -> Array: ...


def glimpse_view(
    view: TargetView,
    visible: Array,
    windows: tuple[int | None, ...],
    sharding: Sharding | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Glimpse:
    """Attention to the target's cache, read in place.

    Args:
      visible: `int32[B, T]`, each query sees the slots before it; committed ones only.
      windows: the target's, per layer: of those a query then sees the last so many.
      sharding, scale, soft_cap: the target's, see `tree_attention`.
    """

    def attend(q: Array, layer: int) -> Array:
        cached = view.kv(layer)
        dtype = cached["k_cache"].dtype
        out = tree_attention(
            q if dtype == jnp.int8 else q.astype(dtype),
            None,
            None,
            **cached,
            scale=scale,
            soft_cap=soft_cap,
            window=windows[layer],
            visible=visible,
            partition=partition_of(sharding),
        )
        return cast(Array, out).astype(q.dtype)

    return attend


def glimpse_text(
    kv: tuple[Any, Any],
    visible: Array,
    windows: tuple[int | None, ...],
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Glimpse:
    """Attention to the keys of a whole text that the target has just read, for training.

    Args:
      kv: the target's `Output.new`. The others are as in `glimpse_view`.
    """
    keys, values = kv

    def attend(q: Array, layer: int) -> Array:
        slot = jnp.arange(keys[layer].shape[1], dtype=jnp.int32)[None, None]
        keep = slot < visible[..., None]
        window = windows[layer]
        if window is not None:
            keep = keep & (slot >= visible[..., None] - window)
        k, v = keys[layer].astype(q.dtype), values[layer].astype(q.dtype)
        out = masked_attention(q, k, v, keep, scale=scale, soft_cap=soft_cap)
        return jnp.where((visible > 0)[..., None, None], out, jnp.zeros((), q.dtype))

    return attend


class CrossAttention(nn.Module):
    """The branch between self-attention and MLP."""

    config: GliDeConfig
    target: ModelConfig
    dtype: Any = jnp.float32
    sharding: Sharding | None = None

    @nn.compact
    def __call__(
        self, x: Array, angles: tuple[Array, Array] | None, attend: Callable[[Array], Array]
    ) -> Array:
        """`x [B, T, E]` -> the same plus what `attend` saw; `angles` are those of the target's layer."""
        c, t = self.config, self.target
        batch, length, embed = x.shape
        ones, normal = nn.initializers.ones, nn.initializers.normal(0.02)
        small = nn.initializers.normal(0.02 / (2 * c.num_layers) ** 0.5)

        def param(name, init, *shape):
            return self.param(name, init, shape, self.dtype)

        y = rms_norm(x, param("norm", ones, embed), t.norm_eps) if c.cross_norm else x
        q = matmul(y, param("q", normal, embed, t.num_heads * t.head_dim))
        if c.qkv_bias:
            q = q + param("q_bias", nn.initializers.zeros, q.shape[-1])[None, None]
        q = q.reshape(batch, length, t.num_heads, t.head_dim)
        if t.qk_norm:  # the target's keys were normed, and expect such queries
            q = rms_norm(q, param("q_norm", ones, t.head_dim), t.norm_eps)
        q = q if angles is None else apply_rope(q, *angles)
        # Heads as the kernel wants them: XLA may divide the rotation otherwise, and gather it again.
        q = constrain(self.sharding, q, "batch", None, "heads", None)
        y = attend(q).reshape(batch, length, -1)
        x = x + matmul(y, param("out", small, y.shape[-1], embed))
        return constrain(self.sharding, x, "batch", None, None)


@dataclasses.dataclass(frozen=True)
class GliDe:
    """The drafter of a `GliDeConfig` for a target: `init` and `apply`, no state.

    Attributes:
      dtype: of parameters, activations and its own cache.
      sharding: the target's. Cross-attention is divided as the target's heads are, since it reads their keys;
        all else lies on every device, rows with the target's.
    """

    config: GliDeConfig
    target: ModelConfig
    dtype: Any = jnp.float32
    sharding: Sharding | None = None

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        self.config.layers_read(self.target)

    @property
    def decoder(self) -> Decoder:
        """The same without cross-attention; it holds the self-attention's cache."""
        own = None if self.sharding is None else self.sharding.replicated
        return Decoder(self.config.decoder(self.target), self.dtype, sharding=own)

    def init(self, key: Array) -> Params:
        """Fresh parameters of its own: what is shared with the target is not among them."""
        c, t = self.config, self.target
        keys = iter(jax.random.split(key, 2 * c.num_layers + 3))
        cross = CrossAttention(c, t, self.dtype)
        x = jnp.zeros((1, 1, c.hidden_size), self.dtype)

        def layer() -> Params:
            weights = self.decoder.init_layer(next(keys))
            if c.cross_attention:
                weights["cross"] = dict(cross.init(next(keys), x, None, lambda q: q)["params"])
            return weights

        def matrix(rows: int, columns: int, scale: float = 0.02) -> Array:
            return nn.initializers.normal(scale)(next(keys), (rows, columns), self.dtype)

        params: Params = {"layers": tuple(layer() for _ in range(c.num_layers))}
        if c.final_norm:
            params["norm"] = jnp.ones((c.hidden_size,), self.dtype)
        if not c.share:
            params["embed"] = matrix(t.vocab_size, c.hidden_size)
            params["head"] = matrix(c.hidden_size, t.vocab_size)
        elif c.hidden_size != t.hidden_size:  # of unit gain: the scale is the embedding's
            params["embed_in"] = matrix(t.hidden_size, c.hidden_size, t.hidden_size**-0.5)
            params["head_out"] = matrix(c.hidden_size, t.hidden_size, c.hidden_size**-0.5)
        if c.hidden_input:
            params["hidden_norm"] = jnp.ones((t.hidden_size,), self.dtype)
            # At first it adds nothing: the embedding is much smaller than a state of norm 1.
            width = c.hidden_delays * c.hidden_size
            params["hidden_in"] = jnp.zeros((t.hidden_size, width), self.dtype)
        return params

    def shapes(self) -> Params:
        """Its own parameters as shapes and dtypes."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def places(self) -> Any:
        """On a mesh, where each of its own parameters lies."""
        sharding = self.sharding
        assert sharding is not None
        crossing: dict[str, tuple[str | None, ...]] = {
            "q": (None, "heads"),
            "q_bias": ("heads",),
            "out": ("heads", None),
        }

        def place(path: Any, leaf: Any) -> NamedSharding:
            *_, above, name = ("", *(str(getattr(key, "key", "")) for key in path))
            whole: tuple[str | None, ...] = (None,) * len(leaf.shape)
            return sharding.of(*(crossing.get(name, whole) if above == "cross" else whole))

        return jax.tree_util.tree_map_with_path(place, self.shapes())

    def parameter_count(self) -> int:
        """Number of its own parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes()))

    def join(self, params: Params, target_params: Params) -> Params:
        """Its own parameters and, where they are shared, the target's embedding and head, not copied."""
        if not self.config.share:
            return params
        shared = {name: target_params[name] for name in ("embed", "head") if name in target_params}
        return {**params, **shared}

    def apply(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        glimpse: Glimpse | None,
        cache: KVCache | None = None,
        ancestors: Array | None = None,
        *,
        hidden: Array | None = None,
        projected: Array | None = None,
        visible: Array | None = None,
        drafted: tuple[Any, Any] | None = None,
        logits: bool = True,
        remat: bool = False,
    ) -> Output:
        """One forward pass over new tokens.

        Args:
          params: as `join` returns them. tokens, positions: `int32[B, T]`.
          glimpse: how the target's keys are read; None without cross-attention.
          hidden: `[B, T, Et]`, the target's at the last position that each token sees, where the target's hidden state is
            an input; or in its place `projected`, what `project` makes of it, `[B, T or 1, D, E]`.
          visible: `int32[B, T]`, each token sees the positions before it, where `GliDeConfig.hidden_delays` count.
          cache, ancestors, drafted: of the self-attention, as in `Decoder.apply`.
        """
        x = jnp.take(params["embed"], tokens, axis=0).astype(self.dtype)
        if self.config.share and self.target.embed_scale != 1:
            x = x * x.dtype.type(self.target.embed_scale)
        if "embed_in" in params:
            x = matmul(x, params["embed_in"])
        if self.config.hidden_input:
            if projected is None:
                assert hidden is not None, "the target's hidden states are an input"
                projected = self.project(params, hidden)
            x = x + self._of_delay(projected, positions, visible)
        read = self.config.layers_read(self.target)
        angles = {layer: self._target_angles(layer, positions) for layer in set(read)}
        cross = CrossAttention(self.config, self.target, self.dtype, self.sharding)

        def between(weights: Params, x: Array, *, index: int) -> Array:
            assert glimpse is not None, "cross-attention needs the target's keys"
            attend = functools.partial(glimpse, layer=read[index])
            return cast(
                Array, cross.apply({"params": weights["cross"]}, x, angles[read[index]], attend)
            )

        x, new_kv, _ = self.decoder.layers(
            params,
            x,
            positions,
            cache,
            ancestors,
            drafted=drafted,
            between=between if self.config.cross_attention else None,
            remat=remat,
        )
        return Output(self.head(params, x) if logits else None, x, new_kv, {})

    def project(self, params: Params, hidden: Array) -> Array:
        """The target's hidden states `[B, T, Et]` as an input at each delay, `[B, T, D, E]`."""
        y = rms_norm(hidden.astype(self.dtype), params["hidden_norm"], self.target.norm_eps)
        y = matmul(y, params["hidden_in"])
        return y.reshape(*y.shape[:2], self.config.hidden_delays, self.config.hidden_size)

    def _of_delay(self, projected: Array, positions: Array, visible: Array | None) -> Array:
        """Of `[B, T, D, E]` the part for each token's delay, `[B, T, E]`."""
        count = self.config.hidden_delays
        if count == 1:
            return projected[:, :, 0]
        assert visible is not None, "a hidden state is projected by its delay"
        which = jnp.clip(positions - visible, 0, count - 1)[..., None, None]
        return jnp.take_along_axis(projected, which, axis=2)[:, :, 0]

    def head(self, params: Params, hidden: Array) -> Array:
        """`hidden [B, T, E]` before the final norm -> `float32[B, T, V]`."""
        x = hidden
        if "norm" in params:
            x = rms_norm(x, params["norm"], self.target.norm_eps)
        if "head_out" in params:
            x = matmul(x, params["head_out"])
        if self.config.share:
            return head(self.target, params, x)
        return widen(params, unembed(params, x))

    def _target_angles(self, layer: int, positions: Array) -> tuple[Array, Array] | None:
        """What the target's layer turns its keys by."""
        t, rope = self.target, self.target.rope_of(layer)
        return None if rope is None else rope_angles(rope, t.head_dim, positions, t.context)
