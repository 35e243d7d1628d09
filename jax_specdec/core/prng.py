"""PRNG keys of rows and positions, and the noise that drafting and verification share."""

import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Float, Int, UInt
from jax_specdec.core.sampling import Sampling

# Keys are of this generator everywhere, whatever the default is, and all bits are made by `threefry`: those of others depend
# on the batch under vmap (rbg, usual on TPU), and texts would differ from plain decoding's.
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
    positions: int,
    vocab: int,
    role: int = ROLE_MATCH,
    words: Int[Array, " R"] | None = None,
) -> Float[Array, "B P V"]:
    """Gumbel noise of some positions, from `start[b]` on; a function of (key, role, position, token).

    Args:
      words: the tokens that it is wanted of, in place of all V.
    """
    tokens = jnp.arange(vocab, dtype=jnp.uint32) if words is None else words.astype(jnp.uint32)
    # The chance of more noise than this.
    above = _uniforms(keys, start, positions, role, tokens)
    return -jnp.log(-jnp.log1p(-above))


def position_uniform(
    keys: UInt[Array, "B 2"], start: Int[Array, " B"], positions: int, role: int
) -> Float[Array, "B P"]:
    """Uniforms in (0, 1) of some positions, from `start[b]` on."""
    return _uniforms(keys, start, positions, role, jnp.zeros((1,), jnp.uint32))[..., 0]


def _uniforms(
    keys: UInt[Array, "B 2"],
    start: Int[Array, " B"],
    positions: int,
    role: int,
    counters: UInt[Array, " R"],
) -> Float[Array, "B P R"]:
    """Uniforms in (0, 1), each of 64 bits: those near 0 decide what is rare, down to e^-44. JAX's have 23."""

    def draw(key_data: Array, position: Array) -> tuple[Array, Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data, impl=IMPL), role)
        key = jax.random.key_data(jax.random.fold_in(key, position))
        return threefry(key, jnp.zeros_like(counters), counters)

    places = start[:, None] + jnp.arange(positions, dtype=jnp.int32)[None]
    words = jax.vmap(jax.vmap(draw, in_axes=(None, 0)))(keys, places)
    high, low = (word.astype(jnp.float32) for word in words)
    # Both products are exact, so that it does not matter what a compiler contracts.
    uniform = (high + low * jnp.float32(2**-32)) * jnp.float32(2**-32)
    return jnp.clip(uniform, jnp.float32(2**-64), jnp.float32(1 - 2**-24))


def threefry(
    key: UInt[Array, "2"], high: UInt[Array, "*s"], low: UInt[Array, "*s"]
) -> tuple[UInt[Array, "*s"], UInt[Array, "*s"]]:
    """Threefry-2x32 of 20 rounds (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): two words for each counter.

    JAX's own makes its rounds a loop on CPU, which keeps it apart from what is made of the bits: twice the time.
    """
    assert key.shape == (2,), "the key of another generator"
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


def shared_noise(
    keys: UInt[Array, "B 2"],
    sampling: Sampling,
    start: Int[Array, " B"],
    positions: int,
    vocab: int,
    role: int = ROLE_MATCH,
    words: Int[Array, " R"] | None = None,
) -> Float[Array, "B P V"]:
    """`position_noise`, zero at temperature 0, and not computed where no row samples."""
    hot = sampling.temperature > 0

    def draw() -> Array:
        noise = position_noise(keys, start, positions, vocab, role, words)
        return jnp.where(hot[:, None, None], noise, jnp.float32(0))

    def zero() -> Array:
        tokens = vocab if words is None else words.shape[0]
        return jnp.zeros((keys.shape[0], positions, tokens), jnp.float32)

    return lax.cond(jnp.any(hot), draw, zero)
