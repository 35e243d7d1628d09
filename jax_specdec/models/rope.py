"""Rotary embeddings (Su et al., arXiv 2104.09864)."""

import jax.numpy as jnp

from jax_specdec._types import Array
from jax_specdec.models.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Array:
    """Inverse frequencies `float32[D/2]` in radians per position."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / jnp.float32(head_dim)
    frequency = jnp.float32(1.0) / jnp.float32(rope.theta) ** exponent
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        return frequency / jnp.float32(rope.factor)
    wavelength = jnp.float32(2 * jnp.pi) / frequency
    ratio = jnp.float32(rope.original_context) / wavelength
    ramp = (ratio - jnp.float32(rope.low_freq_factor)) / jnp.float32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    ramp = jnp.clip(ramp, 0.0, 1.0)  # 0: long wavelengths, fully scaled; 1: short ones, untouched
    return frequency * (ramp + (jnp.float32(1.0) - ramp) / jnp.float32(rope.factor))


def rope_angles(rope: RopeConfig, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """`cos, sin: float32[B, T, 1, D]` of the positions `int32[B, T]`, the two halves repeated."""
    angle = positions[..., None].astype(jnp.float32) * rope_frequencies(rope, head_dim)[None, None]
    angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates `x [B, T, N, D]`; pairs are (i, i + D/2), as Hugging Face stores them."""
    y = x.astype(jnp.float32)
    a, b = jnp.split(y, 2, axis=-1)
    return (y * cos + jnp.concatenate([-b, a], axis=-1) * sin).astype(x.dtype)
