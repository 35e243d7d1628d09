"""What neural drafters share: a chain drafted token by token, and steps over trees.

A subclass says what runs a forward pass over its own cache; reading text, drafting a chain, rolling
back, and whatever grows a tree over it (`drafters.growth`) follow from that.
"""

import dataclasses
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Bool, Float, Int
from jax_specdec.core import cache as kv
from jax_specdec.core.draft import TOP, Text, chain
from jax_specdec.core.drafter import ChainDrafter, States, TargetView, rollback
from jax_specdec.core.prefill import read_ending, read_text
from jax_specdec.core.sampling import NEG_INF, Noise, Sampling, argmax, largest, law_of, warp
from jax_specdec.errors import UserError
from jax_specdec.models.decoder import Decoder, Output, Params

# A drafter lags by one or two tokens after a normal round; the first step of a draft reads that many.
CATCH_UP = 2
# What a reviewer lags behind by inside a round is read this many tokens at a time.
REVIEW_CHUNK = 16


class Model(Protocol):
    """A forward pass and a head, as `models.Decoder` has them."""

    def apply(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        cache: kv.KVCache,
        ancestors: Array | None = None,
        *,
        drafted: tuple[Any, Any] | None = None,
        logits: bool = True,
    ) -> Output: ...

    def head(self, params: Params, hidden: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Stop:
    """Ends a draft behind a token that the drafter is unsure of: drafting further would hardly pay.

    Which tokens follow is no matter of exactness: a token stays in the draft once it was drawn.

    Attributes:
      rule: `confidence`, the probability of the drafted token (arXiv 2211.17192 drafts on regardless;
        assisted generation of transformers stops at 0.4), or `entropy`, the lower bound
        1 - sqrt(0.2 H) of the chance of acceptance, H in nats (AdaEDL, arXiv 2410.18351).
      threshold: a draft ends where the figure is below, 0 < threshold < 1.

    Raises:
      UserError: another threshold.
    """

    rule: Literal["confidence", "entropy"]
    threshold: float

    def __post_init__(self):
        if not 0 < self.threshold < 1:
            raise UserError(
                f"A draft stops at a {self.rule} threshold between 0 and 1, got {self.threshold:g}."
            )

    def ends(self, scores: Float[Array, "B 1 V"], sampling: Sampling) -> Bool[Array, " B"]:
        """Which rows end behind the best of `scores`, noise included."""
        best = jnp.max(scores, axis=-1, keepdims=True)
        if self.rule == "confidence":
            return confidences(scores, best, sampling)[:, 0, 0] < self.threshold
        p = confidences(scores, scores, sampling)[:, 0]
        entropy = jnp.sum(jax.scipy.special.entr(p), axis=-1)
        return 1 - jnp.sqrt(0.2 * entropy) < self.threshold


class NeuralDrafter(ChainDrafter):
    """A drafter with a forward pass and a KV cache, which is `states[name]`.

    Attributes:
      proposal: `matched` draws with the shared noise, which agrees with the target most often;
        `greedy` proposes the argmax at every temperature.
      stop: where a draft ends early, None for nowhere.
    """

    proposal: Literal["matched", "greedy"]
    stop: Stop | None
    has_distribution = True

    @property
    def sizes(self):
        return (self.length,) if self.stop is None else tuple(range(1, self.length + 1))

    @property
    def body(self) -> Decoder:
        """The decoder whose keys and values the cache holds."""
        raise NotImplementedError

    @property
    def reach(self) -> int | None:
        """How many places behind the last committed token it may predict, None for any."""
        return None

    @property
    def catch_up(self) -> int:
        """Tokens that the first step of a draft reads; the cache has as many spare slots."""
        return CATCH_UP

    def init(self, batch: int, capacity: int) -> States:
        return {self.name: self.body.init_cache(batch, capacity + self.catch_up)}

    def reader(self, view: TargetView) -> Model:
        """What reads text and drafted tokens beside the target."""
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
        """One pass over new tokens behind `cache`, which is not written.

        Args:
          drafted, ancestors: tree nodes that were read before, and who sees whom, as in
            `Decoder.apply`; None where the new tokens are a chain.
        """
        weights = params[self.name]
        return self.reader(view).apply(
            weights, tokens, positions, cache, ancestors, drafted=drafted
        )

    def extend(self, params, states, text, view):
        # The last tokens are left to the first step of the draft, which needs their logits.
        upto = jnp.maximum(text.length - self.catch_up, 0)
        reader, weights = self.reader(view), params[self.name]
        cache = read_text(reader, weights, states[self.name], text.tokens, upto)
        return {**states, self.name: cache}

    def read(
        self, params: dict[str, Any], states: States, text: Text, view: TargetView
    ) -> tuple[kv.KVCache, Float[Array, "B 1 V"]]:
        """The cache with the whole text in it, the root included, and the logits after the root."""
        cache = self.extend(params, states, text, view)[self.name]
        reader, weights = self.reader(view), params[self.name]
        cache, hidden = read_ending(reader, weights, cache, text, self.catch_up)
        return cache, reader.head(weights, hidden)

    def review(
        self,
        params: dict[str, Any],
        states: States,
        text: Text,
        drafted: Int[Array, "B M"],
        count: Int[Array, " B"],
        view: TargetView,
    ) -> tuple[kv.KVCache, Float[Array, "B Q V"]]:
        """Reads what another drafter proposed behind the text, in one pass.

        Args:
          count: how many of `drafted` are proposed. The cache has M slots more than for drafting.

        Returns:
          The cache with the text and `count` drafted tokens in it, and the logits after the root and after
          each drafted token, Q = M + 1; those behind `count` are garbage.
        """
        most = drafted.shape[1]
        width = self.catch_up + most
        reader, weights = self.reader(view), params[self.name]
        # A short draft leaves room in the pass for text that was not read yet.
        upto = jnp.maximum(text.length + count - width, 0)
        cache = read_text(reader, weights, states[self.name], text.tokens, upto, REVIEW_CHUNK)
        start = jnp.minimum(cache.length, text.length - 1)
        position = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        place = position - text.length[:, None]
        old = jnp.minimum(position, text.tokens.shape[1] - 1)
        tokens = jnp.where(
            place < 0,
            jnp.take_along_axis(text.tokens, old, axis=1),
            jnp.take_along_axis(drafted, jnp.clip(place, 0, most - 1), axis=1),
        )
        cache = cache.replace(length=start)
        out = reader.apply(weights, tokens, position, cache, logits=False)
        read = text.length + count - start
        cache = kv.commit(cache, out.new_kv, read, after=out.hidden)
        rows = text.length[:, None] - 1 - start[:, None]
        rows = rows + jnp.arange(most + 1, dtype=jnp.int32)[None]
        rows = jnp.minimum(rows, width - 1)[..., None]
        return cache, reader.head(weights, jnp.take_along_axis(out.hidden, rows, axis=1))

    def kept(self, cache: kv.KVCache, view: TargetView) -> kv.KVCache:
        """What of the cache is still true once the draft is committed."""
        del view
        return cache

    def draft(self, params, states, text, view, sampling, noise, active, room):
        del room
        cache, logits = self.read(params, states, text, view)
        described = noise.return_top or noise.return_q

        def propose(logits, depth, going):
            """The next token of rows that go on, what is kept of it, and which rows go on behind it."""
            scores = warp(logits, sampling)
            chosen = perturbed(scores, noise, depth, self.proposal)
            token = argmax(chosen)
            item = {"token": token[:, 0], "valid": going}
            if described:
                item["scores"] = scores[:, 0]
            if self.stop is not None:
                going = going & ~self.stop.ends(chosen, sampling)
            return token, item, going

        def step(carry):
            depth, going, cache, token, items = carry
            out = self.forward(params, cache, view, token, cache.length[:, None])
            cache = kv.commit(cache, out.new_kv, going.astype(jnp.int32), after=out.hidden)
            token, item, going = propose(out.logits, depth, going)
            items = {key: items[key].at[depth].set(item[key]) for key in items}
            return depth + 1, going, cache, token, items

        # The last drafted token is not read: it is among the two that the next round begins with.
        going = jnp.ones_like(active) if self.stop is None else active
        token, item, going = propose(logits, 0, going)
        items = {
            key: jnp.zeros((self.length, *value.shape), value.dtype).at[0].set(value)
            for key, value in item.items()
        }
        carry = lax.while_loop(
            lambda carry: (carry[0] < self.length) & jnp.any(carry[1]),
            step,
            (jnp.int32(1), going, cache, token, items),
        )
        cache = carry[2]
        items = {key: jnp.swapaxes(value, 0, 1) for key, value in carry[-1].items()}
        tokens, fields = items["token"], {}
        if self.stop is not None:
            fields["valid"] = items["valid"]
        if described:
            fields |= chain_fields(items["scores"], tokens, sampling, noise, self.proposal)
        return chain(text, tokens, **fields), {**states, self.name: self.kept(cache, view)}

    def commit(self, states, outcome, view):
        del view
        cache = states[self.name]
        return {**states, self.name: cache.replace(length=rollback(cache.length, outcome))}


def perturbed(
    scores: Float[Array, "B T V"],
    noise: Noise,
    depth: Array | int,
    proposal: str,
    depths: int = 1,
) -> Float[Array, "B T V"]:
    """What tokens at `depth` are the argmax of: warped scores, with the noise unless greedy.

    Under the rejection rule a token must be drawn from the law that is handed over, whatever the
    proposal.

    Args:
      depths: 1 for tokens of one depth, T for those of T depths from `depth` on.
    """
    if proposal == "greedy" and not noise.return_q:
        return scores
    return scores + lax.dynamic_slice_in_dim(noise.gumbel, depth, depths, axis=1)


def chain_fields(
    scores: Float[Array, "B P V"],
    tokens: Int[Array, "B P"],
    sampling: Sampling,
    noise: Noise,
    proposal: str,
) -> dict[str, Array]:
    """The fields of a chain's `Draft` that `noise` asks for.

    Args:
      scores: warped logits at each depth. tokens: what was drafted from them.

    Children are ranked by what the token was chosen by. Under the match rule that is scores + noise:
    the target's token will be the best of its own scores + the same noise, so the next best of the
    drafter's sum are the likeliest alternatives. Under the rejection rule the drawn token comes first
    and the others follow by scores alone: which ones the residual prefers does not depend on the noise
    of the draw.

    Probabilities are those of a softmax at temperature 1, of the logits + temperature * noise that the
    ranking amounts to. At temperature 0 this is the max softmax that CaPE calls confidence
    (arXiv 2402.02082, section 4.2); at any other it stays a measure of how far the token is ahead, in
    the same units as the drafter's errors, which the law's own probability of the token is not: there
    an unlikely token that the noise made a clear winner will be the target's, too.
    """
    fields: dict[str, Array] = {}
    if noise.return_q:
        fields["q"] = law_of(scores, sampling)
    if noise.return_top:
        if proposal != "greedy" and not noise.return_q:
            scores = scores + noise.gumbel[:, : scores.shape[1]]
        ids, probs = best_children(scores, tokens, sampling)
        fields["probability"] = probs[..., 0]
        # The children of the last node are not known: its row is empty.
        pad = ((0, 0), (0, 1), (0, 0))
        fields |= {"top_ids": jnp.pad(ids, pad), "top_probs": jnp.pad(probs, pad)}
    return fields


def best_children(
    scores: Float[Array, "B T V"], first: Int[Array, "B T"], sampling: Sampling, count: int = TOP
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
    """`first`, then the next best of `scores`, with probabilities at temperature 1.

    `scores` are divided by the row's temperature, or noise is added that should be; both are undone.
    """
    chosen = jnp.take_along_axis(scores, first[..., None], axis=-1)
    line = lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    others, ids = largest(
        jnp.where(line == first[..., None], NEG_INF, scores), min(count, scores.shape[-1]) - 1
    )
    values = jnp.concatenate([chosen, others], axis=-1)
    probs = confidences(scores, values, sampling)
    return jnp.concatenate([first[..., None], ids], axis=-1), probs


def confidences(
    scores: Float[Array, "B T V"], values: Float[Array, "B T K"], sampling: Sampling
) -> Float[Array, "B T K"]:
    """The probabilities at temperature 1 of tokens whose scores are `values`."""
    hot = sampling.temperature > 0
    floor = jnp.finfo(jnp.float32).tiny
    scale = jnp.where(hot, jnp.maximum(sampling.temperature, floor), jnp.float32(1))
    scale = scale.astype(scores.dtype)[:, None, None]
    top = jnp.max(scores, axis=-1, keepdims=True)
    total = jnp.sum(jnp.exp((scores - top) * scale), axis=-1, keepdims=True)
    return jnp.exp((values - top) * scale) / total
