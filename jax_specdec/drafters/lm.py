"""`lm`: a smaller decoder with the target's vocabulary drafts a chain, token by token."""

import dataclasses

from jax_specdec import cache as kv
from jax_specdec.drafters.base import ChainDrafter, rollback
from jax_specdec.drafters.neural import CATCH_UP, Proposal, catch_up, draft_chain
from jax_specdec.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class LmDrafter(ChainDrafter):
    """Draft-model speculation (Leviathan et al., arXiv 2211.17192).

    Attributes:
      length: tokens per draft.
      proposal: `matched` draws with the shared noise, which agrees with the target most often;
        `greedy` proposes the argmax at every temperature.
    """

    decoder: Decoder
    length: int
    name: str = "lm"
    proposal: Proposal = "matched"

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
        cache = catch_up(self.decoder, params[self.name], states[self.name], text)
        return {**states, self.name: cache}

    def draft(self, params, states, text, view, sampling, noise, active, room):
        del active, room
        states = self.extend(params, states, text, view)
        draft, cache = draft_chain(
            self.decoder,
            params[self.name],
            states[self.name],
            text,
            sampling,
            noise,
            length=self.length,
            proposal=self.proposal,
        )
        return draft, {**states, self.name: cache}

    def commit(self, states, outcome, view):
        del view
        cache = states[self.name]
        return {**states, self.name: cache.replace(length=rollback(cache.length, outcome))}
