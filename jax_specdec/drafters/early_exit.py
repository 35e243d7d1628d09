"""Early draft exit: a draft ends behind a token that the drafter is unsure of."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jax_specdec._types import Array, Bool, Float
from jax_specdec.core.confidence import confidences
from jax_specdec.core.sampling import Sampling
from jax_specdec.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stop:
    """Ends a draft behind a token that the drafter is unsure of: drafting further would hardly pay.

    This does not affect exactness: a token that was drawn stays in the draft.

    Attributes:
      rule: `confidence`, the probability of the drafted token (arXiv 2211.17192 drafts on regardless;
        assisted generation of transformers stops at 0.4), or `entropy`, the lower bound
        1 - sqrt(0.2 H) of the chance of acceptance, H in nats (AdaEDL, arXiv 2410.18351).
      threshold: a draft ends where the figure is below, 0 < threshold < 1.

    Raises:
      UserError: another threshold.
    """

    rule: Literal["confidence", "entropy"]
    threshold: float

    def __post_init__(self):
        if not 0 < self.threshold < 1:
            raise UserError(
                f"A draft stops at a {self.rule} threshold between 0 and 1, got {self.threshold:g}."
            )

    def ends(self, scores: Float[Array, "B 1 V"], sampling: Sampling) -> Bool[Array, " B"]:
        """Which rows end behind the best of `scores`, noise included."""
        best = jnp.max(scores, axis=-1, keepdims=True)
        if self.rule == "confidence":
            return confidences(scores, best, sampling)[:, 0, 0] < self.threshold
        p = confidences(scores, scores, sampling)[:, 0]
        entropy = jnp.sum(jax.scipy.special.entr(p), axis=-1)
        return 1 - jnp.sqrt(0.2 * entropy) < self.threshold
