"""Beam search whose every beam is verified (arXiv 2402.02082, section 5.4)."""

import dataclasses

import jax.numpy as jnp

from jax_specdec.core.draft import TOP
from jax_specdec.expansions.grown import GrownTree


@dataclasses.dataclass(frozen=True)
class BeamSearch(GrownTree):
    """Beam search, every beam of every depth verified: as many beams as the budget holds."""

    def budgets(self, depth):
        return 1 + 2 * depth, 1 + TOP * depth

    def size(self, depth):
        return 1 + self.shape(depth)[0] * depth

    def shape(self, depth):
        width = (self.nodes - 1) // depth
        return width, width

    def chosen(self, grown):
        batch, depth, candidates = grown.tokens.shape
        beams = grown.read[:, :, 1:]
        value = jnp.take_along_axis(grown.value, beams, axis=2)
        node = jnp.arange(depth, dtype=jnp.int32)[None, :, None] * candidates + beams
        return node.reshape(batch, -1), value.reshape(batch, -1) > -jnp.inf
