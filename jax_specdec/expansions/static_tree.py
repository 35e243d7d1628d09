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
from typing import ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from jax_specdec._types import Array
from jax_specdec.core.draft import MAX_NODES, TOP, Draft, Text, from_parents
from jax_specdec.core.drafter import Drafter
from jax_specdec.errors import UserError
from jax_specdec.expansions.expand import Rule

Path = tuple[int, ...]


@runtime_checkable
class Independent(Drafter, Protocol):
    """A drafter whose candidates at one depth are the same whatever the tokens before them."""

    @property
    def accuracies(self) -> tuple[tuple[float, ...], ...]:
        """Per depth, how often its i-th best candidate is the target's token; empty if never measured."""
        ...


@functools.cache
def choose_tree(accuracies: tuple[tuple[float, ...], ...], count: int) -> tuple[Path, ...]:
    """The chain of best candidates, then the `count` nodes off it that gain most, parents first.

    Each step adds the node with the largest product of accuracies among the children of what is there. No
    child has a larger product than its parent, so this is the best tree of that size that holds the chain;
    of equal nodes the shallower wins, then the one of better ranks. The paper's tree need not hold the
    chain; here node d is chain node d, and a tree never accepts less than its chain.

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

    needs: ClassVar[str] = "independent"

    def check(self, drafter):
        info = drafter.info
        if not isinstance(drafter, Independent):
            raise UserError(
                f"The drafter {info.name!r} has no static tree: only one whose candidates do not depend on each "
                "other has, as medusa."
            )
        if len(drafter.accuracies) < info.depth:
            raise UserError(
                "A static tree is chosen by the measured accuracies of the heads, which this Medusa checkpoint "
                "lacks: measure them with `jax-specdec train medusa --init DIR --calibrate`."
            )
        ranks = [len(some) for some in drafter.accuracies[: info.depth]]
        if self.nodes - 1 > full_size(ranks):
            raise UserError(
                f"A tree of {info.depth} heads with {ranks[0]} candidates each has {full_size(ranks) + 1} "
                f"nodes with its root, fewer than {self.nodes}."
            )

    def budgets(self, depth):
        return depth + 2, min(1 + full_size((TOP,) * depth), MAX_NODES)

    def paths(self, drafter: Independent) -> tuple[Path, ...]:
        """The nodes of the tree, the root left out."""
        depth = drafter.info.depth
        return choose_tree(drafter.accuracies[:depth], self.nodes - 1 - depth)

    def draft(self, drafter, params, states, ctx):
        draft, states = drafter.draft(params, states, ctx.replace(return_top=True))
        return self.widen(draft, ctx.text, self.paths(drafter)), states

    def widen(self, draft: Draft, text: Text, paths: tuple[Path, ...]) -> Draft:
        """The tree of `paths` from a chain that reports its best children; all but the chain is a sibling."""
        assert draft.top_ids is not None and draft.top_probs is not None
        batch, depth = draft.tokens.shape[0], draft.depth_limit
        index = {path: i for i, path in enumerate(((), *paths))}
        level = np.asarray([len(path) - 1 for path in paths], np.int32)
        place = level * draft.top_ids.shape[-1] + np.asarray([path[-1] for path in paths], np.int32)

        def nodes(of_children: Array) -> Array:
            return jnp.take(of_children[:, :depth].reshape(batch, -1), jnp.asarray(place), axis=1)

        probs = nodes(draft.top_probs)
        source = np.where(np.arange(len(paths)) < depth, 1, 2).astype(np.int32)
        return from_parents(
            text,
            tokens=nodes(draft.top_ids),
            parent=jnp.asarray([[index[path[:-1]] for path in paths]], jnp.int32),
            # A node without probability is invalid, and so is all below it.
            valid=jnp.concatenate([draft.valid[:, 1:], probs[:, depth:] > 0], axis=1),
            depth_limit=depth,
            source=jnp.asarray(source)[None],
            probability=probs,
            q=draft.q,
        )
