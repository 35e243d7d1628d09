"""Bitmasks of ancestors: 32 nodes to an int32 word.

Bit ``j % 32`` of word ``j // 32`` of node i's row is set iff node j is an ancestor of node i or
node i itself. 64 nodes take 512 bytes a batch row; a dense mask over the keys takes megabytes.
"""

import jax
import jax.numpy as jnp
from jax import lax

WORD = 32


def num_words(size: int) -> int:
    """Words that hold `size` bits."""
    return -(-size // WORD)


def pack(mask: jax.Array) -> jax.Array:
    """Packs bool[..., T] into int32[..., ceil(T/32)]; unused high bits are 0."""
    size = mask.shape[-1]
    words = num_words(size)
    pad = [(0, 0)] * (mask.ndim - 1) + [(0, words * WORD - size)]
    bits = jnp.pad(mask.astype(jnp.uint32), pad).reshape(*mask.shape[:-1], words, WORD)
    shifts = jnp.arange(WORD, dtype=jnp.uint32).reshape((1,) * mask.ndim + (WORD,))
    packed = jnp.sum(bits << shifts, axis=-1, dtype=jnp.uint32)
    return lax.bitcast_convert_type(packed, jnp.int32)


def unpack(bits: jax.Array, size: int) -> jax.Array:
    """Unpacks int32[..., W] into bool[..., size], where size <= 32 * W."""
    if size > bits.shape[-1] * WORD:
        raise ValueError(f"{size} bits do not fit in bitmask of shape {bits.shape} (32 to a word)")
    shape = (*bits.shape, WORD)
    words = lax.broadcast_in_dim(bits, shape, range(bits.ndim))
    # A logical shift: bit 31 is the sign of the word.
    shifted = lax.shift_right_logical(words, lax.broadcasted_iota(jnp.int32, shape, bits.ndim))
    flat = (shifted & 1).reshape(*bits.shape[:-1], bits.shape[-1] * WORD)
    return flat[..., :size] == 1


def popcount(bits: jax.Array) -> jax.Array:
    """Counts the set bits of each row: int32[..., W] -> int32[...]."""
    return jnp.sum(lax.population_count(bits), axis=-1, dtype=jnp.int32)


def chain(size: int) -> jax.Array:
    """The ancestors of a chain of `size` nodes, each the child of the one before: int32[T, W]."""
    return pack(jnp.tril(jnp.ones((size, size), bool)))
