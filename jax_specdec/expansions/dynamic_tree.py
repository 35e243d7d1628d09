"""EAGLE-2's dynamic draft tree (arXiv 2406.16858, section 4)."""

import dataclasses

import jax.numpy as jnp

from jax_specdec.core.draft import TOP
from jax_specdec.errors import UserError
from jax_specdec.expansions.grown import GrownTree
from jax_specdec.expansions.select import select


@dataclasses.dataclass(frozen=True)
class DynamicTree(GrownTree):
    """EAGLE-2's tree: expand the most probable nodes of each depth, verify the most probable of all.

    A node's probability is the product of those on its path, so that whatever is chosen, its parent is
    too.

    Attributes:
      width: nodes read at each depth and children of each, EAGLE-2's top-k, at most 8.
    """

    width: int = 4

    def check(self, drafter):
        super().check(drafter)
        if not 2 <= self.width <= TOP:
            raise UserError(f"The width of a dynamic tree must be in 2 to {TOP}, got {self.width}.")

    def budgets(self, depth):
        return depth + 2, 1 + self.width + (depth - 1) * self.width**2

    def shape(self, depth):
        del depth
        return self.width, self.width

    def chosen(self, grown):
        value = grown.value.at[:, :, 0].set(-jnp.inf)  # the chain is in already
        count = self.nodes - 1 - value.shape[1]
        return select(value.reshape(value.shape[0], -1), count)
