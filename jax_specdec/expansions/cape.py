"""CaPE: siblings by the confidence of the drafter (arXiv 2402.02082, section 4.2)."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jax_specdec._types import Array, Float, Int
from jax_specdec.expansions.siblings import LeafSiblings


@dataclasses.dataclass(frozen=True)
class Cape(LeafSiblings):
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
