"""The parts of a decoder: products, norms and one layer."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Array, Params
from jax_specdec.core.sharding import Sharding, constrain
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.quantized import Quantized
from jax_specdec.models.rope import apply_rope
from pallas_kernels import precision_of, tuning

Attend = Callable[[Array, Array, Array], Array]


def matmul(x: Array, w: Any) -> Array:
    """`x [..., E] @ w [E, F]`, in the dtype of `x`; `w` is of that dtype or `Quantized`."""
    if isinstance(w, Quantized):
        return _product(x, w, "...E,EF->...F").astype(x.dtype)
    rows = x.size // x.shape[-1]
    # XLA's CPU backend multiplies a single bfloat16 row element by element; two rows take the fast path.
    if rows == 1 and x.dtype == jnp.bfloat16 and tuning.device().platform == "cpu":
        row = x.reshape(1, x.shape[-1])
        return jnp.dot(jnp.concatenate([row, row]), w)[:1].reshape(*x.shape[:-1], w.shape[-1])
    return jnp.dot(x, w, precision=precision_of(x.dtype))


def _product(x: Array, w: Any, product: str) -> Array:
    """An einsum with float32 sums, and the scales behind it: int8 is exact in every dtype here."""
    values = w.values.astype(x.dtype) if isinstance(w, Quantized) else w
    precision = precision_of(x.dtype)
    out = jnp.einsum(product, x, values, precision=precision, preferred_element_type=jnp.float32)
    if isinstance(w, Quantized):
        out = out * w.scale.reshape((1,) * (out.ndim - 1) + w.scale.shape)
    return out


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMS norm (arXiv 1910.07467) with float32 statistics, over the last axis."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + jnp.float32(eps))
    return y.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


class Block(nn.Module):
    """One pre-norm decoder layer: attention and a gated MLP.

    The columns of `qkv` are queries, keys, values, and those of `gate_up` gates and ups. On a mesh that
    divides heads, or the MLP, over t devices, they are t such groups behind each other, each of the heads
    or the part of the MLP of one device: no device then needs what another has multiplied.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    sharding: Sharding | None = None

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
        q, k, v = self._parts(qkv, "heads", (heads * dim, kv_heads * dim, kv_heads * dim))
        q, k, v = (x.reshape(batch, length, -1, dim) for x in (q, k, v))
        if c.qk_norm:
            q = rms_norm(q, param("q_norm", ones, dim), c.norm_eps)
            k = rms_norm(k, param("k_norm", ones, dim), c.norm_eps)
        q, k = apply_rope(q, *angles), apply_rope(k, *angles)
        # Or else XLA may divide the rotation, and gather it again.
        q, k = (constrain(self.sharding, x, "batch", None, "heads", None) for x in (q, k))
        y = attend(q, k, v).reshape(batch, length, heads * dim)
        y = matmul(y, param("out", small, heads * dim, embed))
        if c.out_bias:
            y = y + param("out_bias", zeros, embed)[None, None]
        # A sum over the parts of all devices, which all of them need: here, and below, is the all-reduce.
        x = constrain(self.sharding, x + y, "batch", None, "embed")
        if between is not None:
            x = between(x)
        y = rms_norm(x, param("mlp_norm", ones, embed), c.norm_eps)
        y = matmul(y, param("gate_up", normal, embed, 2 * c.mlp_size))
        gate, up = self._parts(y, "mlp", (c.mlp_size, c.mlp_size))
        x = x + matmul(nn.silu(gate) * up, param("down", small, c.mlp_size, embed))
        return constrain(self.sharding, x, "batch", None, "embed"), (k, v)

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


def unembed(params: Params, x: Array) -> Array:
    """`x [B, T, E]` -> scores `float32[B, T, V]` by `head`, or by `embed` where the head is tied."""
    weights, product = ("head", "BTE,EV->BTV") if "head" in params else ("embed", "BTE,VE->BTV")
    return _product(x, params[weights], product).astype(jnp.float32)
