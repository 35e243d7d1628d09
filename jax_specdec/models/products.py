"""Products of activations with matrices, plain or int8."""

from typing import Any

import jax.numpy as jnp

from jax_specdec._types import Array, Params
from jax_specdec.models.quantized import Quantized
from pallas_kernels import precision_of, tuning


def matmul(x: Array, w: Any) -> Array:
    """`x [..., E] @ w [E, F]`, in the dtype of `x`; `w` is of that dtype or `Quantized`."""
    if isinstance(w, Quantized):
        return _product(x, w, "...E,EF->...F").astype(x.dtype)
    if _slow_row(x):
        row = x.reshape(1, x.shape[-1])
        return jnp.dot(jnp.concatenate([row, row]), w)[:1].reshape(*x.shape[:-1], w.shape[-1])
    return jnp.dot(x, w, precision=precision_of(x.dtype))


def _slow_row(x: Array) -> bool:
    """XLA's CPU backend multiplies a single bfloat16 row element by element; two rows take the fast path."""
    single = x.size == x.shape[-1]
    return single and x.dtype == jnp.bfloat16 and tuning.device().platform == "cpu"


def _product(x: Array, w: Any, product: str) -> Array:
    """An einsum with float32 sums, and the scales behind it: int8 is exact in every dtype here."""
    values = w.values.astype(x.dtype) if isinstance(w, Quantized) else w
    precision = precision_of(x.dtype)
    out = jnp.einsum(product, x, values, precision=precision, preferred_element_type=jnp.float32)
    if isinstance(w, Quantized):
        out = out * w.scale.reshape((1,) * (out.ndim - 1) + w.scale.shape)
    return out


def unembed(params: Params, x: Array) -> Array:
    """`x [B, T, E]` -> scores `float32[B, T, V]` by `head`, or by `embed` where the head is tied."""
    weights, product = ("head", "BTE,EV->BTV") if "head" in params else ("embed", "BTE,VE->BTV")
    rows = jnp.concatenate([x, x], axis=1) if _slow_row(x) else x
    return _product(rows, params[weights], product)[:, : x.shape[1]].astype(jnp.float32)
