"""Expansion: wider drafts from any drafter of chains that has a distribution.

`Expand(drafter, rule)` verifies more than the drafter's chain. The rules of this file add siblings to
each chain token and nothing below them, so that the draft is a comb: CaPE's confidence bins
(Du et al., arXiv 2402.02082, section 4.2), a fixed number at each position, and path probability. They
cost the drafter nothing but the choice. Rules that grow whole trees are in `drafters.growth`.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jax_specdec._types import Array, Float
from jax_specdec.core.draft import TOP, Draft
from jax_specdec.errors import UserError
from jax_specdec.expansions.expand import Rule
from jax_specdec.expansions.select import select
from pallas_kernels import masks

SIBLINGS = TOP - 1  # the most siblings of a chain token: what a drafter reports besides it


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
