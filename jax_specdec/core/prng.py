"""PRNG keys of rows and positions, and the noise that drafting and verification share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Float, Int, UInt
from jax_specdec.core.sampling import Sampling

# Named everywhere: the default generator may be another one. With rbg, usual on TPU, draws under vmap
# depend on the batch, and texts would differ from plain decoding's.
IMPL = "threefry2x32"

# Roles of random bits (rejection rule). Each has a key of its own: one uniform for both drafting and
# accepting would bias the output.
ROLE_MATCH, ROLE_DRAFT, ROLE_ACCEPT, ROLE_RESIDUAL, ROLE_BONUS = range(5)


def row_keys(sampling: Sampling, request_ids: Int[Array, " B"]) -> UInt[Array, "B 2"]:
    """Key data of each row: its seed folded with its request id, or its own seed alone."""

    def one(seed, own, request):
        key = jax.random.key(seed, impl=IMPL)
        folded = jax.random.fold_in(key, request)
        return jnp.where(own, jax.random.key_data(key), jax.random.key_data(folded))

    return jax.vmap(one)(sampling.seed, sampling.own_seed, request_ids)


def position_noise(
    keys: UInt[Array, "B 2"],
    start: Int[Array, " B"],
    depth: int,
    vocab: int,
    role: int = ROLE_MATCH,
    words: Int[Array, " R"] | None = None,
) -> Float[Array, "B P V"]:
    """Gumbel noise of the `depth` positions from `start[b]` on; a function of (key, role, position, token).

    Args:
      words: the tokens that it is wanted of, in place of all V.
    """
    tokens = jnp.arange(vocab, dtype=jnp.uint32) if words is None else words.astype(jnp.uint32)
    return _by_position(lambda key: _gumbel(key, tokens), keys, start, depth, role)


def _gumbel(key: Array, tokens: UInt[Array, " R"]) -> Float[Array, " R"]:
    """One draw for each token, from 64 bits: with 32, no token rarer than e^-16 would be drawn as often as it should."""
    words = jax.random.key_data(key)
    high, low = (
        word.astype(jnp.float32) for word in threefry(words, jnp.zeros_like(tokens), tokens)
    )
    above = (high + low * jnp.float32(2**-32)) * jnp.float32(2**-32)
    # The chance of more noise than this, in (0, 1).
    above = jnp.clip(above, jnp.float32(2**-64), jnp.float32(1 - 2**-24))
    return -jnp.log(-jnp.log1p(-above))


def threefry(
    key: UInt[Array, "2"], high: UInt[Array, "*s"], low: UInt[Array, "*s"]
) -> tuple[UInt[Array, "*s"], UInt[Array, "*s"]]:
    """Threefry-2x32 of 20 rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): two words for each counter.

    JAX's own makes its rounds a loop on CPU, which keeps it apart from what is made of the bits: twice the time.
    """
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    high, low = high + schedule[0], low + schedule[1]
    for group in range(5):
        for turn in rotations[group % 2]:
            high = high + low
            low = high ^ ((low << jnp.uint32(turn)) | (low >> jnp.uint32(32 - turn)))
        high = high + schedule[(group + 1) % 3]
        low = low + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return high, low


def position_uniform(
    keys: UInt[Array, "B 2"], start: Int[Array, " B"], depth: int, role: int
) -> Float[Array, "B P"]:
    """Uniforms in [0, 1) of the `depth` positions from `start[b]` on."""

    return _by_position(
        lambda key: jax.random.uniform(key, (), jnp.float32), keys, start, depth, role
    )


def _by_position(
    draw: Callable[[Array], Array], keys: UInt[Array, "B 2"], start: Int[Array, " B"], depth, role
) -> Array:
    """`draw` with the key of each of the `depth` positions from `start[b]` on."""

    def one(key_data, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data, impl=IMPL), role)
        return draw(jax.random.fold_in(key, position))

    positions = start[:, None] + jnp.arange(depth, dtype=jnp.int32)[None]
    with jax.threefry_partitionable(True):  # the same bits whatever the process is set to
        return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(keys, positions)


def shared_noise(
    keys: UInt[Array, "B 2"],
    sampling: Sampling,
    start: Int[Array, " B"],
    depth: int,
    vocab: int,
    role: int = ROLE_MATCH,
    words: Int[Array, " R"] | None = None,
) -> Float[Array, "B P V"]:
    """`position_noise`, zero at temperature 0, and not computed where no row samples."""
    hot = sampling.temperature > 0

    def draw() -> Array:
        noise = position_noise(keys, start, depth, vocab, role, words)
        return jnp.where(hot[:, None, None], noise, jnp.float32(0))

    def zero() -> Array:
        tokens = vocab if words is None else words.shape[0]
        return jnp.zeros((keys.shape[0], depth, tokens), jnp.float32)

    return lax.cond(jnp.any(hot), draw, zero)
