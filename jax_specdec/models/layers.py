"""The parts of a decoder: embedding, norms, one layer and the head."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Array, Params
from jax_specdec.core.sharding import Sharding, constrain
from jax_specdec.models.attention import capped
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.draft_vocabulary import widen
from jax_specdec.models.experts import mixture, route
from jax_specdec.models.parameters import layer_parameters
from jax_specdec.models.products import matmul, unembed
from jax_specdec.models.rope import apply_rope
from pallas_kernels import tuning

Attend = Callable[[Array, Array, Array], Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}


def embed(c: ModelConfig, params: Params, tokens: Array, positions: Array) -> Array:
    """What the first layer reads, `[B, T, E]`, of tokens and positions `int32[B, T]`."""
    x = jnp.take(params["embed"], tokens, axis=0)
    if c.embed_scale != 1:
        x = x * x.dtype.type(c.embed_scale)
    if c.learned_positions:
        # Drafts may reach behind the context, where nothing is accepted.
        x = x + jnp.take(params["positions"], positions, axis=0, mode="clip")
    return x


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMS norm (arXiv 1910.07467) with float32 statistics, over the last axis."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + jnp.float32(eps))
    return y.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def norm(c: ModelConfig, params: Mapping[str, Array], name: str, x: Array) -> Array:
    """The model's kind of norm over the last axis, by the parameters of that name."""
    weight = params[name]
    if c.norm == "rms":
        return rms_norm(x, weight, c.norm_eps)
    y, shape = x.astype(jnp.float32), (1,) * (x.ndim - 1) + weight.shape
    weight = weight.astype(jnp.float32).reshape(shape)
    if c.norm == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + jnp.float32(c.norm_eps))
    if c.norm == "layer":
        y = y * weight + params[f"{name}_bias"].astype(jnp.float32).reshape(shape)
    else:
        y = y * (weight + jnp.float32(1.0))
    return y.astype(x.dtype)


def head(c: ModelConfig, params: Params, x: Array) -> Array:
    """Normed states `[B, T, E]` -> logits `float32[B, T, V]`; -inf outside of a draft vocabulary.

    `[B, T, R]` with parameters of `in_draft_vocabulary`.
    """
    logits = unembed(params, x)
    if c.logit_divisor != 1:
        logits = logits / jnp.float32(c.logit_divisor)
    return widen(params, capped(logits, c.logit_cap))


class Block(nn.Module):
    """One decoder layer: attention and an MLP, or a mixture of them, as the configuration says.

    The columns of `qkv` are queries, keys, values, and those of `gate_up` gates and ups. On a mesh that
    divides heads, or the MLP, over t devices, they are t such groups behind each other, each of the heads
    or the part of the MLP of one device: no device then needs what another has multiplied.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    sharding: Sharding | None = None
    experts: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        angles: tuple[Array, Array] | None,
        attend: Attend,
        between: Callable[[Array], Array] | None = None,
    ):
        """`x [B, T, E]` -> `(x, (k, v))`.

        `attend(q, k, v)` sees this layer's cache; `between` comes between attention and MLP.
        """
        c = self.config
        p = {
            name: self.param(name, self._initial(name), parameter.shape, self.dtype)
            for name, parameter in layer_parameters(c, self.experts).items()
        }
        y, kv = self._attention(p, self._before(p, "attention", x), angles, attend)
        y = self._behind(p, "attention", y)
        # A sum over the parts of all devices, which all of them need: here, and below, is the all-reduce.
        after = constrain(self.sharding, x + y, "batch", None, "embed")
        if between is not None:
            after = between(after)
        y = self._before(p, "mlp", x if c.parallel else after)
        y = self._mixture(p, y) if self.experts else self._mlp(p, y)
        x = after + self._behind(p, "mlp", y)
        return constrain(self.sharding, x, "batch", None, "embed"), kv

    def _initial(self, name: str) -> Any:
        if name.endswith("_bias") or (name.endswith("norm") and self.config.norm == "rms1"):
            return nn.initializers.zeros
        if name.endswith("norm"):
            return nn.initializers.ones
        # Residual branches start small, so that depth does not grow the variance (GPT-2, section 2.3).
        small = name in ("out", "down", "experts_down")
        depth = (2 * self.config.num_layers) ** 0.5 if small else 1.0
        return nn.initializers.normal(0.02 / depth)

    def _before(self, p: Mapping[str, Array], branch: str, x: Array) -> Array:
        name = f"{branch}_norm"
        return norm(self.config, p, name, x) if name in p else x

    def _behind(self, p: Mapping[str, Array], branch: str, y: Array) -> Array:
        name, scale = f"{branch}_out_norm", self.config.residual_scale
        y = norm(self.config, p, name, y) if name in p else y
        return y if scale == 1 else y * y.dtype.type(scale)

    def _attention(
        self, p: Mapping[str, Array], x: Array, angles: tuple[Array, Array] | None, attend: Attend
    ) -> tuple[Array, tuple[Array, Array]]:
        c = self.config
        batch, length, _ = x.shape
        dim = c.head_dim
        qkv = _linear(p, "qkv", x)
        if tuning.device().platform == "tpu":
            # Without it XLA lays the weights out by heads, in a copy of all layers at the start of a run.
            qkv = lax.optimization_barrier(qkv)
        widths = tuple(count * dim for count in (c.num_heads, c.num_kv_heads, c.num_kv_heads))
        q, k, v = self._parts(qkv, "heads", widths)
        if c.qk_norm and c.wide_qk_norm:
            q, k = norm(c, p, "q_norm", q), norm(c, p, "k_norm", k)
        q, k, v = (part.reshape(batch, length, -1, dim) for part in (q, k, v))
        if c.qk_norm and not c.wide_qk_norm:
            q, k = norm(c, p, "q_norm", q), norm(c, p, "k_norm", k)
        if angles is not None:
            q, k = apply_rope(q, *angles), apply_rope(k, *angles)
        # Or else XLA may divide the rotation, and gather it again.
        q, k = (constrain(self.sharding, part, "batch", None, "heads", None) for part in (q, k))
        y = attend(q, k, v).reshape(batch, length, -1)
        return _linear(p, "out", y), (k, v)

    def _mlp(self, p: Mapping[str, Array], x: Array) -> Array:
        c, act = self.config, ACTIVATIONS[self.config.activation]
        if not c.gated:
            return _linear(p, "down", act(_linear(p, "up", x)))
        gate, up = self._parts(_linear(p, "gate_up", x), "mlp", (c.mlp_size, c.mlp_size))
        return _linear(p, "down", act(gate) * up)

    def _mixture(self, p: Mapping[str, Array], x: Array) -> Array:
        c, act = self.config, ACTIVATIONS[self.config.activation]
        groups = 1 if self.sharding is None else self.sharding.size("mlp")

        def activate(y: Array) -> Array:
            if not c.gated:
                return act(y)
            y = y.reshape(y.shape[0], groups, 2, -1)
            return (act(y[:, :, 0]) * y[:, :, 1]).reshape(y.shape[0], -1)

        chosen, weights = route(
            matmul(x, p["router"]).reshape(-1, c.num_experts), c.experts_per_token, c.norm_experts
        )
        rows = x.reshape(-1, x.shape[-1])
        y = mixture(rows, chosen, weights, p["experts_up"], p["experts_down"], activate)
        return y.reshape(x.shape)

    def _parts(self, x: Array, axis: str, widths: tuple[int, ...]) -> list[Array]:
        """A fused product `[B, T, sum of widths]` taken apart."""
        ends = np.cumsum(widths)[:-1]
        if self.sharding is None:
            return jnp.split(x, ends.tolist(), axis=-1)
        groups = self.sharding.size(axis)
        x = self.sharding.constrain(x, "batch", None, axis)
        x = x.reshape(*x.shape[:2], groups, -1)
        parts = jnp.split(x, (ends // groups).tolist(), axis=-1)
        parts = [part.reshape(*x.shape[:2], -1) for part in parts]
        return [self.sharding.constrain(part, "batch", None, axis) for part in parts]


def _linear(p: Mapping[str, Array], name: str, x: Array) -> Array:
    y, bias = matmul(x, p[name]), p.get(f"{name}_bias")
    return y if bias is None else y + bias[None, None]
