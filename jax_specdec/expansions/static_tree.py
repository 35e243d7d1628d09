"""The static tree of Medusa: which candidates are verified together is chosen once, from measured accuracies.

Cai et al., arXiv 2401.10774, section 2.3.3. A node is a path of ranks, (i1, .., id): the i1-th candidate of
the first head, below it the i2-th of the second, and so on. If heads are right independently, a node is
accepted as often as the product of their accuracies at these ranks says, and the sum over a tree's nodes is
how many drafted tokens a round gains.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jax_specdec._types import Array
from jax_specdec.core.draft import MAX_NODES, TOP, Draft, ancestor_bits
from jax_specdec.drafters.medusa import MedusaDrafter
from jax_specdec.errors import UserError
from jax_specdec.expansions.expand import Rule
from pallas_kernels import masks

Path = tuple[int, ...]


@functools.cache
def choose_tree(accuracies: tuple[tuple[float, ...], ...], count: int) -> tuple[Path, ...]:
    """The chain of best candidates, then the `count` nodes off it that gain most, parents first.

    Each step adds the node with the largest product of accuracies among the children of what is there. No
    child has a larger product than its parent, so this is the best tree of that size that holds the chain;
    of equal nodes the shallower wins, then the one of better ranks. The paper's has no chain that it must
    hold; here node d is chain node d, and a tree never accepts less than its chain.

    Args:
      accuracies: in [0, 1], per depth and rank. count: at most as many nodes as there are.
    """
    depth = len(accuracies)
    chain = [(0,) * d for d in range(1, depth + 1)]
    values: dict[Path, float] = {(): 1.0}
    waiting: list[tuple[float, int, Path]] = []

    def add(path: Path) -> None:
        """Its children may be added from now on."""
        for rank, accuracy in enumerate(accuracies[len(path)] if len(path) < depth else ()):
            child = (*path, rank)
            values[child] = values[path] * accuracy
            if any(child):
                heapq.heappush(waiting, (-values[child], len(child), child))

    for path in ((), *chain):
        add(path)
    chosen = []
    for _ in range(count):
        path = heapq.heappop(waiting)[-1]
        chosen.append(path)
        add(path)
    return (*chain, *chosen)


def full_size(ranks: Sequence[int]) -> int:
    """Nodes of the tree that holds every candidate, without the root."""
    return sum(math.prod(ranks[: d + 1]) for d in range(len(ranks)))  # beyond any int64


@dataclasses.dataclass(frozen=True)
class StaticTree(Rule):
    """Verifies a frozen tree of the heads' candidates, the same in every round.

    Exact under both acceptance rules; under the rejection rule only the chain and its siblings can be
    accepted.
    """

    def check(self, drafter):
        if not isinstance(drafter, MedusaDrafter):
            raise UserError(
                f"The drafter {drafter.name!r} has no static tree: only medusa has one, whose candidates do not "
                "depend on each other."
            )
        if len(drafter.accuracies) < drafter.length:
            raise UserError(
                "A static tree is chosen by the measured accuracies of the heads, which this Medusa checkpoint "
                "lacks: measure them with `jax-specdec train medusa --init DIR --calibrate`."
            )
        ranks = [len(some) for some in drafter.accuracies[: drafter.length]]
        if self.nodes - 1 > full_size(ranks):
            raise UserError(
                f"A tree of {drafter.length} heads with {ranks[0]} candidates each has {full_size(ranks) + 1} "
                f"nodes with its root, fewer than {self.nodes}."
            )

    def budgets(self, depth):
        return depth + 2, min(1 + full_size((TOP,) * depth), MAX_NODES)

    def paths(self, drafter: MedusaDrafter) -> tuple[Path, ...]:
        """The nodes of the tree, the root left out."""
        depth = drafter.length
        return choose_tree(drafter.accuracies[:depth], self.nodes - 1 - depth)

    def draft(self, drafter, params, states, text, view, sampling, noise, active, room):
        wide = noise.replace(return_top=True)
        draft, states = drafter.draft(params, states, text, view, sampling, wide, active, room)
        return self.widen(draft, self.paths(drafter)), states

    def widen(self, draft: Draft, paths: tuple[Path, ...]) -> Draft:
        """The tree of `paths` from a chain that reports its best children; all but the chain is a sibling."""
        assert draft.top_ids is not None and draft.top_probs is not None
        batch, depth = draft.tokens.shape[0], draft.depth_limit
        index = {path: i for i, path in enumerate(((), *paths))}
        parents = np.asarray([0, *(index[path[:-1]] for path in paths)], np.int32)
        level = np.asarray([len(path) - 1 for path in paths], np.int32)
        place = level * draft.top_ids.shape[-1] + np.asarray([path[-1] for path in paths], np.int32)

        def nodes(of_children: Array) -> Array:
            return jnp.take(of_children[:, :depth].reshape(batch, -1), jnp.asarray(place), axis=1)

        def everywhere(row: np.ndarray) -> Array:
            return jnp.broadcast_to(jnp.asarray(row)[None], (batch, len(row)))

        above = ancestor_bits(jnp.asarray(parents)[None], depth)
        probs = nodes(draft.top_probs)
        # A node without probability is invalid, and so is all below it.
        possible = jnp.concatenate([draft.valid, probs[:, depth:] > 0], axis=1)
        valid = jnp.all((above & ~masks.pack(possible[:, None])) == 0, axis=-1)
        line = np.arange(len(parents))
        return draft.replace(
            tokens=jnp.concatenate([draft.tokens[:, :1], nodes(draft.top_ids)], axis=1),
            valid=valid,
            origin=everywhere(
                np.where(line == 0, 0, np.where(line <= depth, 1, 2)).astype(np.int32)
            ),
            probability=jnp.concatenate([draft.probability[:, :1], probs], axis=1),
            parent=everywhere(parents),
            depth=everywhere(np.concatenate([[0], level + 1]).astype(np.int32)),
            ancestors=jnp.broadcast_to(above, (batch, *above.shape[1:])),
            top_ids=None,
            top_probs=None,
        )
