"""What neural drafters share: a chain drafted token by token, and rolling back.

A subclass says how it reads text and how it runs a forward pass over its own cache.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec import cache as kv
from jax_specdec._types import Array, Float, Int
from jax_specdec.drafters.base import ChainDrafter, States, TargetView, rollback
from jax_specdec.models.decoder import Output
from jax_specdec.sampling import argmax, law_of, warp
from jax_specdec.tree import TOP, Text, chain

# A drafter lags by one or two tokens after a normal round; the first step of a draft reads that many.
CATCH_UP = 2


class NeuralDrafter(ChainDrafter):
    """A drafter with a forward pass and a KV cache, which is `states[name]`.

    Attributes:
      proposal: `matched` draws with the shared noise, which agrees with the target most often;
        `greedy` proposes the argmax at every temperature.
    """

    proposal: Literal["matched", "greedy"]

    def read(
        self, params: dict[str, Any], states: States, text: Text, view: TargetView
    ) -> tuple[kv.KVCache, Float[Array, "B 1 V"]]:
        """The cache with the whole text in it, the root included, and the logits after the root."""
        raise NotImplementedError

    def forward(
        self,
        params: dict[str, Any],
        cache: kv.KVCache,
        view: TargetView,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        drafted: tuple[Any, Any] | None = None,
        ancestors: Int[Array, "B T W"] | None = None,
    ) -> Output:
        """One pass over new tokens behind `cache`; see `Decoder.apply` for the last argument."""
        raise NotImplementedError

    def draft(self, params, states, text, view, sampling, noise, active, room):
        del active, room
        cache, logits = self.read(params, states, text, view)

        def propose(logits, depth):
            scores = pick = warp(logits, sampling)
            if self.proposal == "matched" or noise.return_q:
                pick = scores + lax.dynamic_slice_in_dim(noise.gumbel, depth, 1, axis=1)
            token = argmax(pick)  # [B, 1]
            item = {"tokens": token[:, 0]}
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
            out = self.forward(params, cache, view, token, cache.length[:, None])
            cache = kv.commit(cache, out.new_kv, jnp.ones_like(cache.length), after=out.hidden)
            token, item = propose(out.logits, depth)
            return (cache, token), item

        # The last drafted token is not read: it is among the two that the next round begins with.
        token, first = propose(logits, 0)
        depth = jnp.arange(1, self.length, dtype=jnp.int32)
        (cache, _), rest = lax.scan(step, (cache, token), depth)
        fields = {
            key: jnp.concatenate([value[:, None], jnp.swapaxes(rest[key], 0, 1)], axis=1)
            for key, value in first.items()
        }
        for key in ("top_ids", "top_probs"):
            if key in fields:  # the children of the last node are not known: its row is empty
                fields[key] = jnp.pad(fields[key], ((0, 0), (0, 1), (0, 0)))
        return chain(text, **fields), {**states, self.name: cache}

    def commit(self, states, outcome, view):
        del view
        cache = states[self.name]
        return {**states, self.name: cache.replace(length=rollback(cache.length, outcome))}
