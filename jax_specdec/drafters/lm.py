"""`lm`: a smaller decoder with the target's vocabulary drafts a chain, token by token."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jax_specdec import cache as kv
from jax_specdec.drafters.neural import CATCH_UP, NeuralDrafter
from jax_specdec.errors import UserError
from jax_specdec.models.decoder import Decoder
from jax_specdec.prefill import read_text


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
                capacity + CATCH_UP,
                c.head_dim,
                self.decoder.dtype,
                stacked=self.decoder.layer_loop == "scan",
            )
        }

    def extend(self, params, states, text, view):
        del view
        # The last two tokens are left to the first step of the draft, which needs their logits.
        upto = jnp.maximum(text.length - CATCH_UP, 0)
        cache = read_text(self.decoder, params[self.name], states[self.name], text.tokens, upto)
        return {**states, self.name: cache}

    def read(self, params, states, text, view):
        cache = self.extend(params, states, text, view)[self.name]
        # The two last tokens. A row with a single token reads it twice at position 0 and keeps the
        # first answer, which sees its own key alone.
        start = jnp.maximum(text.length - CATCH_UP, 0)
        cache = cache.replace(length=start)
        position = start[:, None] + jnp.arange(CATCH_UP, dtype=jnp.int32)[None]
        position = jnp.minimum(position, text.length[:, None] - 1)
        tokens = jnp.take_along_axis(text.tokens, position, axis=1)
        out = self.decoder.apply(params[self.name], tokens, position, cache)
        assert out.logits is not None
        last = (text.length - 1 - start)[:, None, None]
        logits = jnp.take_along_axis(out.logits, last, axis=1)  # [B, 1, V]
        cache = kv.commit(cache, out.new_kv, text.length - start, after=out.hidden)
        return cache, logits

    def blank(self, batch, nodes):
        c, d = self.decoder.config, self.decoder
        if any(c.windows):
            raise UserError(
                f"The drafter {self.name!r} has layers with a sliding window, which cannot grow trees: "
                "expand it by cape, fixed or path."
            )
        shape = (batch, nodes, c.num_kv_heads, c.head_dim)
        if d.layer_loop == "scan":
            return (jnp.zeros((c.num_layers, *shape), d.dtype),) * 2
        return ((jnp.zeros(shape, d.dtype),) * c.num_layers,) * 2

    def forward(self, params, cache, view, tokens, positions, drafted=None, ancestors=None):
        del view
        return self.decoder.apply(
            params[self.name], tokens, positions, cache, ancestors, drafted=drafted
        )
