"""Rotary embeddings (Su et al., arXiv 2104.09864)."""

import math

import jax.numpy as jnp

from jax_specdec._types import Array
from jax_specdec.models.config import RopeConfig, rope_width


def rope_frequencies(rope: RopeConfig, head_dim: int, context: int = 0) -> Array:
    """Inverse frequencies `float32[R/2]` in radians per position, of the R dimensions that are rotated.

    Args:
      context: of the model, which decides between `longrope`'s factors.
    """
    width = rope_width(rope, head_dim)
    frequency = jnp.float32(1.0) / jnp.float32(rope.theta) ** _exponents(width)
    if rope.kind == "linear":
        return frequency / jnp.float32(rope.factor)
    if rope.kind == "longrope":
        long = context > rope.original_context
        divisors = rope.long_factors if long else rope.short_factors
        return frequency / jnp.asarray(divisors, jnp.float32)
    if rope.kind == "yarn":
        ramp = _yarn_ramp(rope, width)
    elif rope.kind == "llama3":
        wavelength = jnp.float32(2 * jnp.pi) / frequency
        ratio = jnp.float32(rope.original_context) / wavelength
        ramp = (ratio - jnp.float32(rope.low_freq_factor)) / jnp.float32(
            rope.high_freq_factor - rope.low_freq_factor
        )
        ramp = jnp.clip(ramp, 0.0, 1.0)
    else:
        return frequency
    # A ramp of 0 for long wavelengths, fully scaled, to 1 for short ones, untouched.
    return frequency * (ramp + (jnp.float32(1.0) - ramp) / jnp.float32(rope.factor))


def _exponents(width: int) -> Array:
    return jnp.arange(0, width, 2, dtype=jnp.float32) / jnp.float32(width)


def _yarn_ramp(rope: RopeConfig, width: int) -> Array:
    """1 where a frequency turns `beta_fast` times over the original context, 0 below `beta_slow`."""

    def dimension(turns: float) -> float:
        ratio = rope.original_context / (turns * 2 * math.pi)
        return width * math.log(ratio) / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last = last + 0.001 if first == last else last
    place = jnp.arange(width // 2, dtype=jnp.float32)
    return jnp.float32(1.0) - jnp.clip(
        (place - jnp.float32(first)) / jnp.float32(last - first), 0.0, 1.0
    )


def rope_angles(
    rope: RopeConfig, head_dim: int, positions: Array, context: int = 0
) -> tuple[Array, Array]:
    """`cos, sin: float32[B, T, 1, R]` of the positions `int32[B, T]`, the two halves repeated.

    Args:
      context: see `rope_frequencies`.
    """
    place = positions[..., None].astype(jnp.float32)
    if rope.kind == "dynamic":
        angle = place * _dynamic_frequencies(rope, head_dim, place)
    else:
        angle = place * rope_frequencies(rope, head_dim, context)[None, None]
    angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None]
    scale = jnp.float32(rope.attention_factor)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def _dynamic_frequencies(rope: RopeConfig, head_dim: int, place: Array) -> Array:
    """`float32[B, T, R/2]`: the base grows with the text that ends at `place [B, T, 1]`."""
    width = rope_width(rope, head_dim)
    original = jnp.float32(rope.original_context)
    length = jnp.maximum(place + jnp.float32(1.0), original)
    growth = jnp.float32(rope.factor) * length / original - jnp.float32(rope.factor - 1)
    base = jnp.float32(rope.theta) * growth ** jnp.float32(width / (width - 2))
    return jnp.float32(1.0) / base ** _exponents(width)[None, None]


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the first R dimensions of `x [B, T, N, D]`; pairs are (i, i + R/2), as Hugging Face stores them."""
    width = cos.shape[-1]
    y = x[..., :width].astype(jnp.float32)
    a, b = jnp.split(y, 2, axis=-1)
    y = (y * cos + jnp.concatenate([-b, a], axis=-1) * sin).astype(x.dtype)
    return y if width == x.shape[-1] else jnp.concatenate([y, x[..., width:]], axis=-1)
