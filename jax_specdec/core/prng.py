"""PRNG keys of rows and positions, and the noise that drafting and verification share."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Float, Int, UInt
from jax_specdec.core.sampling import Sampling

# Roles of random bits (rejection rule). Each draws from a key of its own: a uniform shared by drafting
# and accepting is biased.
ROLE_MATCH, ROLE_DRAFT, ROLE_ACCEPT, ROLE_RESIDUAL, ROLE_BONUS = range(5)


def row_keys(sampling: Sampling, request_ids: Int[Array, " B"]) -> UInt[Array, "B 2"]:
    """Key data of each row: its seed folded with its request id, or its own seed alone."""

    def one(seed, own, request):
        key = jax.random.key(seed)
        folded = jax.random.fold_in(key, request)
        return jnp.where(own, jax.random.key_data(key), jax.random.key_data(folded))

    return jax.vmap(one)(sampling.seed, sampling.own_seed, request_ids)


def position_noise(
    keys: UInt[Array, "B 2"],
    start: Int[Array, " B"],
    depth: int,
    vocab: int,
    role: int = ROLE_MATCH,
) -> Float[Array, "B P V"]:
    """Gumbel noise of the `depth` positions from `start[b]` on; a function of (key, role, position)."""

    def one(key_data, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), role)
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,), jnp.float32)

    positions = start[:, None] + jnp.arange(depth, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(keys, positions)


def position_uniform(
    keys: UInt[Array, "B 2"], start: Int[Array, " B"], depth: int, role: int
) -> Float[Array, "B P"]:
    """Uniforms in [0, 1) of the `depth` positions from `start[b]` on."""

    def one(key_data, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), role)
        return jax.random.uniform(jax.random.fold_in(key, position), (), jnp.float32)

    positions = start[:, None] + jnp.arange(depth, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(keys, positions)


class Noise(flax.struct.PyTreeNode):
    """The noise that drafting and verification share in one round.

    Attributes:
      gumbel: `float32[B, P+1, V]`; entry d is added to the scores at depth d, that is for the token at
        position `length + d`. Zero in rows at temperature 0.
      return_q: static; the proposer must hand over the law it drew from (rejection rule).
      return_top: static; a proposer with a distribution must report its probability of every node and
        the best children. They cost passes over the vocabulary, so only who reads them asks.
    """

    gumbel: Float[Array, "B Q V"]
    return_q: bool = flax.struct.field(pytree_node=False, default=False)
    return_top: bool = flax.struct.field(pytree_node=False, default=False)


def shared_noise(
    keys: UInt[Array, "B 2"],
    sampling: Sampling,
    start: Int[Array, " B"],
    depth: int,
    vocab: int,
    role: int = ROLE_MATCH,
) -> Float[Array, "B P V"]:
    """`position_noise`, zero at temperature 0, and not computed where no row samples."""
    hot = sampling.temperature > 0

    def draw() -> Array:
        noise = position_noise(keys, start, depth, vocab, role)
        return jnp.where(hot[:, None, None], noise, jnp.float32(0))

    def zero() -> Array:
        return jnp.zeros((keys.shape[0], depth, vocab), jnp.float32)

    return lax.cond(jnp.any(hot), draw, zero)
