"""A softmax over some of the keys, and how two of them are one."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._rows import precision_of


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["out", "top", "total"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Partial:
    """A softmax over some of the keys: sums of exp(score - top), float32.

    Attributes:
        out: [B, K, T, G, D], the sum of the values so weighted.
        top: [B, K, T, G, 1], the largest score, and finite where no key is seen.
        total: [B, K, T, G, 1], the sum of the weights; 0 where no key is seen.
    """

    out: jax.Array
    top: jax.Array
    total: jax.Array


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of the call: how scores are made from products."""

    scale: float
    soft_cap: float | None
    window: int | None


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Products of [B, K, ., .] arrays, summed in at least float32."""
    wide = np.promote_types(x.dtype, np.float32)
    dims = (((contract[0],), (contract[1],)), ((0, 1), (0, 1)))
    return lax.dot_general(x, y, dims, precision=precision_of(x.dtype), preferred_element_type=wide)


def softmax(
    spec: Spec,
    q: jax.Array,  # [B, K, T, G, D]
    keys: jax.Array,  # [B, K, P, D]
    values: jax.Array,  # [B, K, P, D]
    mask: jax.Array,  # bool[B or 1, 1, T or 1, 1, P]
) -> Partial:
    b, k, t, g, d = q.shape
    size = keys.shape[2]
    scores = _dot(q.reshape(b, k, t * g, d), keys, (3, 3)) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    scores = jnp.where(mask, scores.reshape(b, k, t, g, size), -jnp.inf)
    # A finite floor under the maximum keeps a query that sees nothing at exp(-inf) = 0.
    top = jnp.max(scores, axis=-1, keepdims=True, initial=jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _dot(weights.astype(values.dtype).reshape(b, k, t * g, size), values, (3, 2))
    return Partial(out.reshape(b, k, t, g, d), top, total)


def merge(x: Partial, y: Partial) -> Partial:
    top = jnp.maximum(x.top, y.top)
    x_scale, y_scale = jnp.exp(x.top - top), jnp.exp(y.top - top)
    return Partial(x.out * x_scale + y.out * y_scale, top, x.total * x_scale + y.total * y_scale)


def nothing(q: jax.Array) -> Partial:
    wide = np.promote_types(q.dtype, np.float32)
    one = (*q.shape[:-1], 1)
    floor = jnp.full(one, jnp.finfo(wide).min, wide)
    return Partial(jnp.zeros(q.shape, wide), floor, jnp.zeros(one, wide))


def each_row(of: Callable[..., Partial], q: jax.Array, *rest: jax.Array | None) -> Partial:
    """`of(row, q, *rest)` for one batch row after the other, of arrays that keep a batch axis of 1."""
    b = q.shape[0]
    if b == 1:
        return of(0, q, *rest)

    def body(row, part):
        def take(x):
            return lax.dynamic_slice_in_dim(x, row, 1, allow_negative_indices=False)

        def put(x, y):
            return lax.dynamic_update_slice_in_dim(x, y, row, 0, allow_negative_indices=False)

        return jax.tree.map(put, part, of(row, *jax.tree.map(take, (q, *rest))))

    return lax.fori_loop(0, b, body, nothing(q))
