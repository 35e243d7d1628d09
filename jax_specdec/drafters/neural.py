"""What drafters that are decoders share: a chain drafted token by token against a cache of their own."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec import cache as kv
from jax_specdec._types import Array, Int
from jax_specdec.models.decoder import Params
from jax_specdec.prefill import Reader, read_text
from jax_specdec.sampling import Noise, Sampling, argmax, law_of, warp
from jax_specdec.tree import TOP, Draft, Text, chain

# A drafter lags by one or two tokens after a normal round; the first step of a draft reads that many.
CATCH_UP = 2
Proposal = Literal["matched", "greedy"]


def catch_up(
    reader: Reader, params: Params, cache: kv.KVCache, text: Text, width: int = CATCH_UP
) -> kv.KVCache:
    """Reads the text but its last `width` tokens, which the first step of a draft reads."""
    upto = jnp.maximum(text.length - width, 0)
    return read_text(reader, params, cache, text.tokens, upto)


def draft_chain(
    reader: Reader,
    params: Params,
    cache: kv.KVCache,
    text: Text,
    sampling: Sampling,
    noise: Noise,
    *,
    length: int,
    proposal: Proposal = "matched",
    width: int = CATCH_UP,
) -> tuple[Draft, kv.KVCache]:
    """Drafts `length` tokens below the root, each from those before it.

    Args:
      cache: the drafter's own, caught up with the text but for its last `width` tokens, and with as
        many spare slots behind the longest text and draft.

    Returns:
      The draft, and a cache that has read the text and all drafted tokens but the last: that one is
      among those that the next round begins with.
    """
    # First step: the last `width` tokens. A shorter row reads its root several times and keeps the
    # first answer, which sees its own key and those before it alone.
    start = jnp.maximum(text.length - width, 0)
    cache = cache.replace(length=start)
    position = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    position = jnp.minimum(position, text.length[:, None] - 1)
    tokens = jnp.take_along_axis(text.tokens, position, axis=1)
    out = reader.apply(params, tokens, position, cache, logits=False)
    last = (text.length - 1 - start)[:, None, None]
    hidden = jnp.take_along_axis(out.hidden, last, axis=1)  # [B, 1, E]
    cache = kv.commit(cache, out.new_kv, text.length - start, after=out.hidden)
    one = jnp.ones_like(text.length)

    def propose(hidden: Array, depth: Array | int) -> tuple[Int[Array, "B 1"], dict[str, Any]]:
        scores = pick = warp(reader.head(params, hidden), sampling)
        if proposal == "matched" or noise.return_q:
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

    def step(carry: Any, depth: Array) -> tuple[Any, dict[str, Any]]:
        cache, token = carry
        out = reader.apply(params, token, cache.length[:, None], cache, logits=False)
        cache = kv.commit(cache, out.new_kv, one, after=out.hidden)
        token, item = propose(out.hidden, depth)
        return (cache, token), item

    token, first = propose(hidden, 0)
    depth = jnp.arange(1, length, dtype=jnp.int32)
    (cache, _), rest = lax.scan(step, (cache, token), depth)
    fields = {
        key: jnp.concatenate([value[:, None], jnp.swapaxes(rest[key], 0, 1)], axis=1)
        for key, value in first.items()
    }
    for key in ("top_ids", "top_probs"):
        if key in fields:  # the children of the last node are not known: its row is empty
            fields[key] = jnp.pad(fields[key], ((0, 0), (0, 1), (0, 0)))
    return chain(text, **fields), cache
