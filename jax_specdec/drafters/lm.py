"""`lm`: a smaller decoder with the target's vocabulary drafts a chain, token by token."""

import dataclasses
from typing import Literal

from jax_specdec import cache as kv
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

    def init(self, batch, capacity):
        c = self.decoder.config
        return {
            self.name: kv.init_cache(
                c.num_layers,
                batch,
                c.num_kv_heads,
                capacity + self.catch_up,
                c.head_dim,
                self.decoder.dtype,
                stacked=self.decoder.layer_loop == "scan",
            )
        }

    def reader(self, view):
        del view
        return self.decoder

    def blank(self, batch, nodes):
        return self.decoder.blank(batch, nodes)
