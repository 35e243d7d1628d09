"""What neural drafters share: a chain drafted token by token, and steps over trees.

A subclass says what runs a forward pass over its own cache; reading text, drafting a chain, rolling
back, and whatever grows a tree over it (`drafters.growth`) follow from that.
"""

from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Float, Int, Params
from jax_specdec.core import cache as kv
from jax_specdec.core.confidence import chain_fields, perturbed
from jax_specdec.core.draft import Text, chain
from jax_specdec.core.drafter import ChainDrafter, States, TargetView, rollback
from jax_specdec.core.numerics import argmax
from jax_specdec.core.prefill import read_ending, read_text
from jax_specdec.core.sampling import warp
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.models.decoder import Decoder, Output

# A drafter lags by one or two tokens after a normal round; the first step of a draft reads that many.
CATCH_UP = 2
# What a reviewer lags behind by inside a round is read this many tokens at a time.
REVIEW_CHUNK = 16


@runtime_checkable
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
