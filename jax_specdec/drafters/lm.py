"""`lm`: a smaller model with the target's vocabulary drafts a chain, token by token."""

import dataclasses

from jax_specdec.core.context import Proposal
from jax_specdec.core.model import Model
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.neural import NeuralDrafter


@dataclasses.dataclass(frozen=True)
class LmDrafter(NeuralDrafter):
    """Draft-model speculation (Leviathan et al., arXiv 2211.17192).

    Attributes:
      length: tokens per draft.
    """

    decoder: Model
    length: int
    name: str = "lm"
    proposal: Proposal = "matched"
    stop: Stop | None = None

    @property
    def body(self):
        return self.decoder

    def reader(self, view):
        del view
        return self.decoder
