"""`lm`: a smaller decoder with the target's vocabulary drafts a chain, token by token."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec import cache as kv
from jax_specdec.drafters.base import ChainDrafter, rollback
from jax_specdec.models.decoder import Decoder
from jax_specdec.prefill import read_text
from jax_specdec.sampling import argmax, law_of, warp
from jax_specdec.tree import TOP, chain

# A drafter lags by one or two tokens after a normal round; the first step of a draft reads that many.
CATCH_UP = 2


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

    def draft(self, params, states, text, view, sampling, noise, active, room):
        del active, room
        weights = params[self.name]
        cache = self.extend(params, states, text, view)[self.name]
        batch = text.length.shape[0]

        # First step: the two last tokens. A row with a single token reads it twice at position 0 and
        # keeps the first answer, which sees its own key alone.
        start = jnp.maximum(text.length - CATCH_UP, 0)
        cache = cache.replace(length=start)
        position = start[:, None] + jnp.arange(CATCH_UP, dtype=jnp.int32)[None]
        position = jnp.minimum(position, text.length[:, None] - 1)
        tokens = jnp.take_along_axis(text.tokens, position, axis=1)
        out = self.decoder.apply(weights, tokens, position, cache)
        assert out.logits is not None
        last = (text.length - 1 - start)[:, None, None]
        logits = jnp.take_along_axis(out.logits, last, axis=1)  # [B, 1, V]
        cache = kv.commit(cache, out.new_kv, text.length - start, after=out.hidden)

        def propose(logits, depth):
            scores = pick = warp(logits, sampling)
            if self.proposal == "matched" or noise.return_q:
                pick = scores + lax.dynamic_slice_in_dim(noise.gumbel, depth, 1, axis=1)
            token = argmax(pick)  # [B, 1]
            item = {"token": token[:, 0]}
            if noise.return_top:
                # At temperature 0 too this says how sure the drafter is; its own law is one-hot there.
                soft = jax.nn.softmax(scores, axis=-1)
                item["probability"] = jnp.take_along_axis(soft, token[..., None], axis=-1)[:, 0, 0]
                top_probs, top_ids = lax.top_k(soft[:, 0], min(TOP, soft.shape[-1]))
                item |= {"top_ids": top_ids, "top_probs": top_probs}
            if noise.return_q:
                item["q"] = law_of(scores, sampling)[:, 0]
            return token, item

        def step(carry, depth):
            cache, token = carry
            out = self.decoder.apply(weights, token, cache.length[:, None], cache)
            one = jnp.ones((batch,), jnp.int32)
            cache = kv.commit(cache, out.new_kv, one, after=out.hidden)
            token, item = propose(out.logits, depth)
            return (cache, token), item

        # The last drafted token is not read: it is among the two that the next round begins with.
        token, item = propose(logits, 0)
        depth = jnp.arange(1, self.length, dtype=jnp.int32)
        (cache, _), rest = lax.scan(step, (cache, token), depth)
        fields = {
            key: jnp.concatenate([first[:, None], jnp.swapaxes(rest[key], 0, 1)], axis=1)
            for key, first in item.items()
        }
        for key in ("top_ids", "top_probs"):
            if key in fields:  # the children of the last node are not known: its row is empty
                fields[key] = jnp.pad(fields[key], ((0, 0), (0, 1), (0, 0)))
        draft = chain(text, fields.pop("token"), **fields)
        return draft, {**states, self.name: cache}

    def commit(self, states, outcome, view):
        del view
        cache = states[self.name]
        return {**states, self.name: cache.replace(length=rollback(cache.length, outcome))}
