"""`medusa`: heads on the target's last hidden state draft a chain at once, each its own token.

Cai et al., arXiv 2401.10774, section 2.1.1. The hidden state that predicted the root is the last that the
target's cache holds, and head k says what comes k places behind the root. There is no state of its own and
nothing to read: a draft is a function of that hidden state and the noise.

What a head says does not depend on the tokens before it, so the candidates of a depth are the same below
every node, and a tree of them (`drafters.static_tree`) costs no more than a chain.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Float
from jax_specdec.core.confidence import chain_fields, perturbed
from jax_specdec.core.draft import Text, chain
from jax_specdec.core.drafter import ChainDrafter, StatelessDrafter, TargetView
from jax_specdec.core.numerics import argmax
from jax_specdec.core.sampling import warp
from jax_specdec.errors import UserError
from jax_specdec.models.glide import last_seen
from jax_specdec.models.medusa import Medusa


@dataclasses.dataclass(frozen=True)
class MedusaDrafter(StatelessDrafter, ChainDrafter):
    """A drafter of Medusa heads.

    Attributes:
      model: parameters are those of `Medusa.join`.
      length: tokens per draft, at most as many as there are heads.
      accuracies: per head, how often its i-th best candidate is the target's token; what a static tree is
        chosen by. Empty where nobody measured them.
      proposal: `matched` draws with the shared noise, `greedy` proposes each head's best.

    Raises:
      UserError: more tokens than heads.
    """

    model: Medusa
    length: int
    name: str = "medusa"
    accuracies: tuple[tuple[float, ...], ...] = ()
    proposal: Literal["matched", "greedy"] = "matched"

    has_distribution = True

    def __post_init__(self):
        if self.length > self.reach:
            raise UserError(
                f"This Medusa drafter has {self.reach} heads, one for each token of a draft, and was asked "
                f"for {self.length}: draft {self.reach} tokens or fewer."
            )

    @property
    def reads_hidden(self) -> bool:
        return True

    @property
    def body(self) -> Medusa:
        """What tells drafters of one name apart."""
        return self.model

    @property
    def reach(self) -> int:
        """How many places behind the last committed token it may predict."""
        return self.model.config.num_heads

    def scores(self, params: Any, text: Text, view: TargetView) -> Float[Array, "B P V"]:
        """What the heads say of the next `length` tokens of a text."""
        known = view.cache.length[:, None]
        assert view.hidden is not None, "the loop keeps them for such a drafter"
        hidden = last_seen(view.hidden, known)  # 0 where the root is the first token
        # In a cascade others have drafted behind the committed text; those places' heads are passed over.
        ahead = text.length[:, None] - 1 - known

        def further() -> Array:
            head = ahead + jnp.arange(self.length, dtype=jnp.int32)[None]
            head = jnp.minimum(head, self.reach - 1)[..., None]
            return jnp.take_along_axis(self.model.first(params, hidden, self.reach), head, axis=1)

        def nearest() -> Array:
            return self.model.first(params, hidden, self.length)

        return lax.cond(jnp.any(ahead > 0), further, nearest)

    def draft(self, params, states, text, view, sampling, noise, active, room):
        del active, room
        scores = warp(self.scores(params[self.name], text, view), sampling)
        tokens = argmax(perturbed(scores, noise, 0, self.proposal, scores.shape[1]))
        fields = chain_fields(scores, tokens, sampling, noise, self.proposal)
        return chain(text, tokens, **fields), states
