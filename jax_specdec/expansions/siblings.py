"""Expansion: wider drafts from any drafter of chains that has a distribution.

`Expand(drafter, rule)` verifies more than the drafter's chain. The rules of this file add leaf siblings: to
each chain token alternatives with nothing below them. They are CaPE's confidence bins (`expansions.cape`), a
fixed number at each position, and path probability. They cost the drafter only the choice. Rules that grow
whole trees are in `expansions.grown`.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jax_specdec._types import Array, Float
from jax_specdec.core.draft import TOP, Draft, Text, from_parents
from jax_specdec.errors import UserError
from jax_specdec.expansions.expand import Rule
from jax_specdec.expansions.select import select

SIBLINGS = TOP - 1  # the most siblings of a chain token: what a drafter reports besides it


class LeafSiblings(Rule):
    """A rule that adds siblings to the chain, chosen by their probabilities alone.

    Exact under both acceptance rules: siblings never depend on random bits that the target uses beyond
    what matching shares by intention (see `confidence.chain_fields`).
    """

    keeps_chances = True

    def check(self, drafter):
        info = drafter.info
        if not info.is_chain or not info.distribution:
            why = "it has no distribution" if info.is_chain else "it proposes trees"
            raise UserError(f"The drafter {info.name!r} cannot be expanded: {why}.")

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

    def draft(self, drafter, params, states, ctx):
        draft, states = drafter.draft(params, states, ctx.replace(return_top=True))
        return self.widen(draft, ctx.text, len(drafter.info.sources) + 1), states

    def widen(self, draft: Draft, text: Text, source: int) -> Draft:
        """The chain with the chosen siblings, labelled `source`, behind it."""
        depth = draft.depth_limit
        assert draft.top_ids is not None and draft.top_probs is not None
        top_ids, top_probs = draft.top_ids[:, :depth], draft.top_probs[:, :depth]
        chosen, some = select(self.rank(top_probs), self.nodes - 1 - depth)
        above = chosen // (top_probs.shape[-1] - 1)  # the chain node at each sibling's parent

        def leaves(of_chain: Array, of_siblings: Array) -> Array:
            flat = of_siblings.reshape(of_siblings.shape[0], -1)
            chosen_ones = jnp.take_along_axis(flat, chosen, axis=1)
            return jnp.concatenate([of_chain[:, 1:], chosen_ones], axis=1)

        line = jnp.broadcast_to(draft.parents()[:, 1:], draft.tokens[:, 1:].shape)
        return from_parents(
            text,
            tokens=leaves(draft.tokens, top_ids[..., 1:]),
            parent=jnp.concatenate([line, above], axis=1),
            valid=jnp.concatenate([draft.valid[:, 1:], some], axis=1),
            depth_limit=depth,
            source=jnp.concatenate([draft.source[:, 1:], jnp.full_like(chosen, source)], axis=1),
            probability=leaves(draft.probability, top_probs[..., 1:]),
            q=draft.q,
        )


@dataclasses.dataclass(frozen=True)
class Fixed(LeafSiblings):
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
class PathProbability(LeafSiblings):
    """The siblings with the largest probability of being reached and right.

    A sibling counts only if every chain token above it is accepted, so its probability is multiplied by
    theirs: the rerank of EAGLE-2 (arXiv 2406.16858, section 4.2), applied to leaf siblings. CaPE's bins,
    in contrast, spend as much on the last position as on the first.
    """

    def priority(self, probs, confidence):
        # A token without a distribution has no probability; its position's siblings do not either.
        sure = jnp.log(jnp.where(confidence > 0, confidence, 1.0))
        reach = jnp.cumsum(sure, axis=1) - sure  # of the siblings' parent
        return reach[..., None] + jnp.log(probs)
