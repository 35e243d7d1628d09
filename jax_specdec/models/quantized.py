"""int8 weights: a scale for each output channel, products in the dtype of the activations.

Symmetric rounding to the nearest of 255 levels (LLM.int8(), arXiv 2208.07339, section 2.1, without its outlier
columns: activations stay as they are, so that only weights are rounded). What it saves is memory and its bandwidth,
which bound decoding. Embeddings, routers, norms and biases stay as they are, and so does a tied head: it is the embedding.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jax_specdec._types import Array, Params
from jax_specdec.core.cache import to_int8
from jax_specdec.core.sharding import is_names

# Parameters that stand right of a product.
MULTIPLIED = frozenset(
    (
        *("qkv", "out", "gate_up", "up", "down", "experts_up", "experts_down", "head"),
        *("q", "embed_in", "head_out", "hidden_in"),
    )
)


class Quantized(flax.struct.PyTreeNode):
    """A matrix `values * scale`.

    Attributes:
      values: `int8[..., E, F]`. scale: `float32[..., F]`.
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def quantize(params: Params) -> Params:
    """A parameter tree with its multiplied matrices in int8; those that are stay as they are."""

    def one(path: Any, x: Any) -> Any:
        if isinstance(x, Quantized) or getattr(path[-1], "key", None) not in MULTIPLIED:
            return x
        return _rounded(x) if x.ndim >= 2 else x

    def whole(x: Any) -> bool:
        return isinstance(x, Quantized)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=whole)


@jax.jit
def _rounded(x: Array) -> Quantized:
    most = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-2)
    scale = jnp.where(most > 0, most / 127, jnp.float32(1))
    return Quantized(to_int8(x, scale[..., None, :]), scale)


def quantized_axes(axes: Params) -> Params:
    """The logical axis names of `quantize(params)`."""

    def one(path: Any, names: tuple[str | None, ...]) -> Any:
        if getattr(path[-1], "key", None) not in MULTIPLIED or len(names) < 2:
            return names
        return Quantized(names, (*names[:-2], names[-1]))  # type: ignore[arg-type]

    return jax.tree_util.tree_map_with_path(one, axes, is_leaf=is_names)
