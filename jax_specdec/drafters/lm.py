"""`lm`: a smaller decoder with the target's vocabulary drafts a chain, token by token."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jax_specdec.drafters.neural import NeuralDrafter
from jax_specdec.models.decoder import Decoder
from jax_specdec.prefill import read_ending, read_text


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

    @property
    def body(self):
        return self.decoder

    def extend(self, params, states, text, view):
        del view
        # The last two tokens are left to the first step of the draft, which needs their logits.
        upto = jnp.maximum(text.length - self.catch_up, 0)
        cache = read_text(self.decoder, params[self.name], states[self.name], text.tokens, upto)
        return {**states, self.name: cache}

    def read(self, params, states, text, view):
        cache = self.extend(params, states, text, view)[self.name]
        weights = params[self.name]
        cache, hidden = read_ending(self.decoder, weights, cache, text, self.catch_up)
        return cache, self.decoder.head(weights, hidden)

    def forward(self, params, cache, view, tokens, positions, drafted=None, ancestors=None):
        del view
        return self.decoder.apply(
            params[self.name], tokens, positions, cache, ancestors, drafted=drafted
        )
