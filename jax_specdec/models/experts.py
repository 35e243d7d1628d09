"""A mixture of experts: each token goes through a few of them (Shazeer et al., arXiv 1701.06538).

No token is dropped and none depends on another, so a tree of drafts is routed like a text. Tokens are sorted by
expert; a dense pass over all experts would read, and compute with, every expert's weights for every token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array
from jax_specdec.models.products import matmul
from jax_specdec.models.quantized import Quantized
from pallas_kernels import precision_of, tuning

# Rows of one expert that are multiplied at a time.
_BLOCK = 32


def route(logits: Array, count: int, normalised: bool) -> tuple[Array, Array]:
    """Router logits `[R, X]` -> each row's experts `int32[R, count]` and their weights `float32[R, count]`.

    Args:
      normalised: the weights of a row sum to 1; otherwise they are its probabilities.
    """
    weights, chosen = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), count)
    if normalised:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return chosen.astype(jnp.int32), weights


def mixture(
    x: Array,
    chosen: Array,
    weights: Array,
    up: Any,
    down: Any,
    activate: Callable[[Array], Array],
) -> Array:
    """The weighted sum of what each row's experts make of it.

    Args:
      x: `[R, E]`. chosen, weights: `[R, C]`, see `route`.
      up: `[X, E, F]`. down: `[X, G, E]`; either may be `Quantized`.
      activate: `[.., F] -> [.., G]`.

    Returns:
      `[R, E]` in the dtype of `x`.
    """
    rows, count = chosen.shape
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    expert = chosen.reshape(-1)[order]
    experts = up.shape[0]
    chose = expert[:, None] == jnp.arange(experts, dtype=jnp.int32)[None]
    sizes = jnp.sum(chose, axis=0, dtype=jnp.int32)
    y = x[order // count]
    if tuning.device().platform == "tpu":
        y = _ragged(activate(_ragged(y, up, sizes, expert)), down, sizes, expert)
    else:  # where `ragged_dot` is a dense pass
        y = _in_blocks(y, sizes, expert, up, down, activate)
    back = jnp.argsort(order)
    y = y[back].reshape(rows, count, -1)
    return jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=1).astype(x.dtype)


def _ragged(x: Array, w: Any, sizes: Array, expert: Array) -> Array:
    values = w.values.astype(x.dtype) if isinstance(w, Quantized) else w
    y = lax.ragged_dot(
        x, values, sizes, precision=precision_of(x.dtype), preferred_element_type=jnp.float32
    )
    if isinstance(w, Quantized):
        y = y * w.scale[expert]
    return y.astype(x.dtype)


def _in_blocks(
    x: Array, sizes: Array, expert: Array, up: Any, down: Any, activate: Callable[[Array], Array]
) -> Array:
    """Sorted rows `x [R, E]` through their experts, a block of rows of one expert after the other.

    As many blocks are run as there are. No gradients: a mixture is read, and not trained.
    """
    rows, experts = x.shape[0], sizes.shape[0]
    size = min(_BLOCK, max(1, rows // experts))
    ends = jnp.cumsum(sizes)
    blocks = (sizes + size - 1) // size  # of each expert
    block_ends = jnp.cumsum(blocks)
    line = jnp.arange(size, dtype=jnp.int32)

    def block(index: Array, out: Array) -> Array:
        e = jnp.searchsorted(block_ends, index, side="right").astype(jnp.int32)
        # A block at the end of an expert's rows reaches into the next one's, and leaves them alone.
        start = ends[e] - sizes[e] + (index - block_ends[e] + blocks[e]) * size
        place = start + line
        y = x[jnp.minimum(place, rows - 1)]
        y = _product(activate(_product(y, up, e)), down, e)
        return out.at[jnp.where(place < ends[e], place, rows)].set(y, mode="drop")

    return lax.fori_loop(0, block_ends[-1], block, jnp.zeros(x.shape, x.dtype))


def _product(x: Array, w: Any, expert: Array) -> Array:
    one = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, expert, keepdims=False), w)
    return matmul(x, one)
