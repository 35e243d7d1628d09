"""Expansion: wider drafts from any drafter of chains that has a distribution.

`Expand(drafter, rule)` verifies more than the drafter's chain. The rules of this file add siblings to
each chain token and nothing below them, so that the draft is a comb: CaPE's confidence bins
(Du et al., arXiv 2402.02082, section 4.2), a fixed number at each position, and path probability. They
cost the drafter nothing but the choice. Rules that grow whole trees are in `drafters.growth`.
"""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jax_specdec._types import Array, Bool, Float, Int
from jax_specdec.core.draft import MAX_NODES, TOP, Draft
from jax_specdec.core.drafter import Drafter
from jax_specdec.errors import UserError
from pallas_kernels import masks

SIBLINGS = TOP - 1  # the most siblings of a chain token: what a drafter reports besides it


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a draft is widened.

    Attributes:
      nodes: the budget of every verification, the root included. Shapes are static: it is spent,
        on invalid nodes where a rule finds too few.
    """

    nodes: int

    def check(self, drafter: Drafter) -> None:
        """Raises `UserError` for a drafter that the rule cannot widen."""

    def budgets(self, depth: int) -> tuple[int, int]:
        """The smallest and the largest `nodes` that the rule can spend on a chain of `depth`."""
        raise NotImplementedError

    def fit(self, depth: int) -> None:
        """Raises `UserError` for a budget that does not fit a chain of `depth`."""
        if self.fits(depth):
            return
        least, most = self.budgets(depth)
        most = min(most, MAX_NODES)
        if least > most:
            raise UserError(
                f"A chain of {depth} leaves no room for this expansion: a draft has at most "
                f"{MAX_NODES} nodes."
            )
        raise UserError(
            f"This expansion of a chain of {depth} takes {least} to {most} nodes, the root and the "
            f"chain included, got {self.nodes}."
        )

    def fits(self, depth: int) -> bool:
        """Whether `fit` would not raise."""
        least, most = self.budgets(depth)
        return least <= self.nodes <= min(most, MAX_NODES)

    def size(self, depth: int) -> int:
        """T, at most `nodes`."""
        del depth
        return self.nodes

    def init(self, drafter: Drafter, batch: int, capacity: int) -> dict[str, Any]:
        return drafter.init(batch, capacity)

    def draft(
        self, drafter: Any, params, states, text, view, sampling, noise, active, room
    ) -> tuple[Draft, dict[str, Any]]:
        """`Drafter.draft` of the expansion."""
        raise NotImplementedError

    def commit(self, drafter: Any, states, outcome, view) -> dict[str, Any]:
        return drafter.commit(states, outcome, view)


@dataclasses.dataclass(frozen=True)
class Expand:
    """A drafter whose drafts a rule widens.

    Order of the nodes: the root, the drafter's main chain, then all others, whose origin is the
    proposer `sibling`.

    Raises:
      UserError: a budget that does not fit the chain, or a drafter that the rule cannot widen: one that
        proposes trees, or has no distribution, for which wider drafts are not defined.
    """

    drafter: Drafter
    rule: Rule
    has_distribution = False  # it is spent

    def __post_init__(self):
        self.rule.check(self.drafter)
        self.rule.fit(self.drafter.depth)

    @property
    def name(self) -> str:
        return f"{self.drafter.name}+"

    @property
    def num_nodes(self) -> int:
        return self.rule.size(self.drafter.depth) - 1

    @property
    def depth(self) -> int:
        return self.drafter.depth

    @property
    def proposers(self) -> tuple[str, ...]:
        return (*self.drafter.proposers, "sibling")

    @property
    def reads_hidden(self) -> bool:
        return self.drafter.reads_hidden

    def init(self, batch, capacity):
        return self.rule.init(self.drafter, batch, capacity)

    def extend(self, params, states, text, view):
        return self.drafter.extend(params, states, text, view)

    def draft(self, params, states, text, view, sampling, noise, active, room):
        return self.rule.draft(
            self.drafter, params, states, text, view, sampling, noise, active, room
        )

    def commit(self, states, outcome, view):
        return self.rule.commit(self.drafter, states, outcome, view)


# Combs


class Comb(Rule):
    """A rule that adds siblings to the chain, chosen by their probabilities alone.

    Exact under both acceptance rules: siblings never depend on random bits that the target uses beyond
    what matching shares by intention (see `neural.chain_fields`).
    """

    def check(self, drafter):
        tree = drafter.num_nodes > drafter.depth
        if tree or not drafter.has_distribution:
            why = "it proposes trees" if tree else "it has no distribution"
            raise UserError(f"The drafter {drafter.name!r} cannot be expanded: {why}.")

    def budgets(self, depth):
        return depth + 2, 1 + depth * (1 + SIBLINGS)

    def priority(
        self, probs: Float[Array, "B P J"], confidence: Float[Array, "B P"]
    ) -> Float[Array, "B P J"]:
        """The higher, the sooner a sibling is taken; -inf for those that must not be.

        Args:
          probs: of the siblings at each depth, falling, 0 for none. confidence: the largest
            probability of any token at each depth.
        """
        raise NotImplementedError

    def rank(self, top_probs: Float[Array, "B P K"]) -> Float[Array, "B N"]:
        """`priority` of every sibling, depth * (K - 1) + place, of a chain's `Draft.top_probs`."""
        probs = top_probs[..., 1:]
        priority = self.priority(probs, jnp.max(top_probs, axis=-1))
        return jnp.where(probs > 0, priority, -jnp.inf).reshape(probs.shape[0], -1)

    def draft(self, drafter, params, states, text, view, sampling, noise, active, room):
        wide = noise.replace(return_top=True)
        draft, states = drafter.draft(params, states, text, view, sampling, wide, active, room)
        return self.widen(draft, len(drafter.proposers) + 1), states

    def widen(self, draft: Draft, origin: int) -> Draft:
        """The chain with the chosen siblings, labelled `origin`, behind it."""
        depth, nodes = draft.depth_limit, self.nodes
        batch = draft.tokens.shape[0]
        assert draft.top_ids is not None and draft.top_probs is not None
        top_ids, top_probs = draft.top_ids[:, :depth], draft.top_probs[:, :depth]
        probs = top_probs[..., 1:]
        chosen, some = select(self.rank(top_probs), nodes - 1 - depth)
        per_depth = probs.shape[-1]

        def leaves(of_chain: Array, of_siblings: Array) -> Array:
            flat = of_siblings.reshape(batch, -1)
            return jnp.concatenate([of_chain, jnp.take_along_axis(flat, chosen, axis=1)], axis=1)

        above = chosen // per_depth  # the chain node at each sibling's parent
        parent = jnp.concatenate(
            [jnp.broadcast_to(draft.parents(), draft.tokens.shape), above], axis=1
        )
        line = jnp.arange(nodes, dtype=jnp.int32)
        # All that a node sees is itself and the chain down to its parent.
        seen = (line[None, None] <= parent[..., None]) | jnp.eye(nodes, dtype=bool)[None]
        depths = jnp.broadcast_to(draft.depths(), draft.tokens.shape)
        some = some & jnp.take_along_axis(draft.valid, above, axis=1)
        return draft.replace(
            tokens=leaves(draft.tokens, top_ids[..., 1:]),
            valid=jnp.concatenate([draft.valid, some], axis=1),
            origin=jnp.concatenate([draft.origin, jnp.full_like(chosen, origin)], axis=1),
            probability=leaves(draft.probability, probs),
            parent=parent,
            depth=jnp.concatenate([depths, above + 1], axis=1),
            ancestors=masks.pack(seen),
            top_ids=None,
            top_probs=None,
        )


@dataclasses.dataclass(frozen=True)
class Cape(Comb):
    """Confidence-aware proposal expansion (arXiv 2402.02082, section 4.2).

    The surer the drafter is of a token, the fewer siblings it gets: 7, 5, 3 or 1 where the confidence
    (the largest probability at temperature 1) is at most 0.3, 0.6, 0.8 or 1. The paper verifies them
    all; here, where the budget is too small for them, those at the smallest depths go first.

    Attributes:
      boundary: `paper` closes the intervals on the right (0.3 gets 7), `code`, the authors' published
        code, on the left (0.3 gets 5).
    """

    boundary: Literal["paper", "code"] = "paper"

    edges = (0.3, 0.6, 0.8)
    extra = (7, 5, 3, 1)

    def siblings(self, confidence: Float[Array, "*s"]) -> Int[Array, "*s"]:
        """How many siblings a token gets."""
        edges = jnp.asarray(self.edges, confidence.dtype)
        side: Any = "left" if self.boundary == "paper" else "right"
        place = jnp.searchsorted(edges, confidence, side=side, method="compare_all")
        return jnp.take(jnp.asarray(self.extra, jnp.int32), place)

    def priority(self, probs, confidence):
        rank = jnp.arange(probs.shape[-1], dtype=jnp.int32)[None, None]
        taken = rank < self.siblings(confidence)[..., None]
        place = np.arange(math.prod(probs.shape[1:]), dtype=np.float32).reshape(1, *probs.shape[1:])
        return jnp.where(taken, -jnp.asarray(place), -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Fixed(Comb):
    """The same number of siblings at every position, as far as the budget divides.

    The baseline of arXiv 2402.02082, section 5.5.
    """

    def priority(self, probs, confidence):
        del confidence
        depth, count = probs.shape[1:]
        # All first siblings before any second.
        place = np.arange(depth * count, dtype=np.float32).reshape(1, count, depth)
        return jnp.broadcast_to(-jnp.asarray(place.swapaxes(1, 2)), probs.shape)


@dataclasses.dataclass(frozen=True)
class PathProbability(Comb):
    """The siblings with the largest probability of being reached and right.

    A sibling counts only if every chain token above it is accepted, so that its probability is
    multiplied by theirs: the rerank of EAGLE-2 (arXiv 2406.16858, section 4.2) on a comb. CaPE's bins
    spend as much on the last position as on the first.
    """

    def priority(self, probs, confidence):
        # A token without a distribution has no probability; its position's siblings do not either.
        sure = jnp.log(jnp.where(confidence > 0, confidence, 1.0))
        reach = jnp.cumsum(sure, axis=1) - sure  # of the siblings' parent
        return reach[..., None] + jnp.log(probs)


def select(
    priority: Float[Array, "B N"], count: int
) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """The `count <= N` places of highest priority, in rising order, and whether each is above -inf.

    Of equal ones the first wins. By counting pairs: for the few places of a draft that is cheaper than
    a sort, and comes out in order.
    """
    size = priority.shape[1]
    line = jnp.arange(size, dtype=jnp.int32)
    mine, other = priority[:, :, None], priority[:, None, :]
    first = (line[None, :] < line[:, None])[None]
    ahead = (other > mine) | ((other == mine) & first)
    taken = jnp.sum(ahead, axis=2, dtype=jnp.int32) < count
    slot = jnp.sum(taken[:, None, :] & first, axis=2, dtype=jnp.int32)
    here = taken[:, None, :] & (
        slot[:, None, :] == jnp.arange(count, dtype=jnp.int32)[None, :, None]
    )
    places = jnp.sum(jnp.where(here, line[None, None], 0), axis=2, dtype=jnp.int32)
    return places, jnp.take_along_axis(priority, places, axis=1) > -jnp.inf
