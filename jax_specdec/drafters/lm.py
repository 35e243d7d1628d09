"""`lm`: a smaller decoder with the target's vocabulary drafts a chain, token by token."""

import dataclasses
from typing import Literal

from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.neural import NeuralDrafter
from jax_specdec.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class LmDrafter(NeuralDrafter):
    """Draft-model speculation (Leviathan et al., arXiv 2211.17192).

    Attributes:
      length: tokens per draft.
    """

    decoder: Decoder
    length: int
    name: str = "lm"
    proposal: Literal["matched", "greedy"] = "matched"
    stop: Stop | None = None

    @property
    def body(self):
        return self.decoder

    def reader(self, view):
        del view
        return self.decoder
