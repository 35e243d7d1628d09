"""What model drafters share: a chain drafted token by token, and verification of others' tokens.

A subclass says which model reads beside the target; reading text, drafting a chain, rolling back, and
whatever grows a tree over it (`expansions.grown`) follow from that.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Bool, Float, Int, Params
from jax_specdec.core.confidence import chain_fields, confidences
from jax_specdec.core.context import Context, Proposal, TargetView, tokens_of
from jax_specdec.core.draft import Draft, chain
from jax_specdec.core.drafter import Info, ModelUse, Outcome, States, chain_info, rollback
from jax_specdec.core.model import Model, rewinds
from jax_specdec.core.prefill import read_ending, read_text
from jax_specdec.drafters.cascade_sizes import ended_early
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.models.draft_vocabulary import in_draft_vocabulary

# A drafter lags by one or two tokens after a normal round; the first step of a draft reads that many.
PENDING = 2
# Inside a round a verifier reads what it missed this many tokens at a time.
VERIFY_CHUNK = 16


class _Step(NamedTuple):
    """A draft under way: `reach` is how likely all of it is right, as far as anyone asks; `items` are `[length, B, ...]` by field, of which the first `depth` are set."""

    depth: Int[Array, ""]
    going: Bool[Array, " B"]
    reach: Float[Array, " B"]
    cache: Any
    token: Int[Array, "B 1"]
    items: dict[str, Array]


class NeuralDrafter:
    """A drafter with a forward pass and a cache, which is `states[name]`.

    Attributes:
      length: tokens per draft.
      proposal: `matched` draws with the shared noise, which agrees with the target most often;
        `greedy` proposes the argmax at every temperature.
      stop: where a draft ends early, None for nowhere.
    """

    name: str
    length: int
    proposal: Proposal
    stop: Stop | None

    @property
    def body(self) -> Model:
        """The model that the cache belongs to; drafters of one name must have equal ones."""
        raise NotImplementedError

    @property
    def max_depth(self) -> int | None:
        """How many places behind the last committed token it may predict, None for any."""
        return None

    @property
    def taps(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads."""
        return ()

    @property
    def pending(self) -> int:
        """Tokens that the first step of a draft reads; the cache has as many spare slots."""
        return PENDING

    @property
    def info(self) -> Info:
        sizes = None if self.stop is None else ended_early(self.length)
        use = ModelUse(self.name, self.body, self.length, self.max_depth)
        return chain_info(
            self.name,
            self.length,
            sizes,
            taps=self.taps,
            distribution=True,
            chances="after",
            ends_early=self.stop is not None,
            rewinds=rewinds(self.body),
            models=(use,),
        )

    def reader(self, view: TargetView) -> Model:
        """What reads text and drafted tokens beside the target."""
        raise NotImplementedError

    def draft_reader(self, params: Params, view: TargetView) -> Model:
        """`reader` for a draft, whose tokens see the same of the target: what is made of that may be made once."""
        del params
        return self.reader(view)

    def init(self, batch: int, capacity: int) -> States:
        return {self.name: self.body.init_cache(batch, capacity + self.pending)}

    def reset(self, states: States, rows: Bool[Array, " B"]) -> States:
        cache = states[self.name]
        return self._with(states, self.body.rollback(cache, jnp.where(rows, 0, cache.length)))

    def extend(self, params: Params, states: States, ctx: Context) -> States:
        return self._extended(params, states, ctx, None)

    def _extended(self, params: Params, states: States, ctx: Context, chunk: int | None) -> States:
        # The last tokens are left to the first step of the draft, which needs their logits.
        text = ctx.text
        upto = jnp.maximum(text.length - self.pending, 0)
        reader, weights = self.reader(ctx.view), params[self.name]
        cache = read_text(reader, weights, states[self.name], text.tokens, upto, chunk)
        return self._with(states, cache)

    def commit(self, states: States, outcome: Outcome) -> States:
        cache = states[self.name]
        return self._with(states, self.body.rollback(cache, rollback(cache.length, outcome)))

    def _with(self, states: States, cache: Any) -> States:
        return {**states, self.name: cache}

    def settle(self, cache: Any, ctx: Context) -> Any:
        """The part of the cache that still holds once drafted tokens in it are committed."""
        del ctx
        return cache

    def read(
        self, params: Params, states: States, ctx: Context
    ) -> tuple[Any, Float[Array, "B 1 V"]]:
        """The cache with the whole text in it, the root included, and the logits after the root."""
        # Where another drafter has drafted, a few tokens were missed.
        cache = self._extended(params, states, ctx, VERIFY_CHUNK)[self.name]
        reader, weights = self.reader(ctx.view), params[self.name]
        cache, hidden = read_ending(reader, weights, cache, ctx.text, self.pending)
        return cache, reader.head(weights, hidden)

    def verify(
        self,
        params: Params,
        states: States,
        ctx: Context,
        drafted: Int[Array, "B M"],
        count: Int[Array, " B"],
    ) -> tuple[Float[Array, "B Q V"], States]:
        """See `Verifier.verify`."""
        text, most = ctx.text, drafted.shape[1]
        width = self.pending + most
        reader, weights = self.reader(ctx.view), params[self.name]
        # A short draft leaves room in the pass for text that was not read yet.
        upto = jnp.maximum(text.length + count - width, 0)
        cache = read_text(reader, weights, states[self.name], text.tokens, upto, VERIFY_CHUNK)
        start = jnp.minimum(cache.length, text.length - 1)
        position = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        place = position - text.length[:, None]
        old = jnp.minimum(position, text.tokens.shape[1] - 1)
        tokens = jnp.where(
            place < 0,
            jnp.take_along_axis(text.tokens, old, axis=1),
            jnp.take_along_axis(drafted, jnp.clip(place, 0, most - 1), axis=1),
        )
        cache = reader.rollback(cache, start)
        out = reader.apply(weights, tokens, position, cache, logits=False)
        cache = reader.commit(cache, out, text.length + count - start)
        rows = text.length[:, None] - 1 - start[:, None]
        rows = rows + jnp.arange(most + 1, dtype=jnp.int32)[None]
        rows = jnp.minimum(rows, width - 1)[..., None]
        logits = reader.head(weights, jnp.take_along_axis(out.hidden, rows, axis=1))
        return logits, self._with(states, self.settle(cache, ctx))

    def draft(self, params: Params, states: States, ctx: Context) -> tuple[Draft, States]:
        words: Array | None = None
        if ctx.may_score_some:  # all that follows the head then stays in the draft vocabulary
            weights, words = in_draft_vocabulary(params[self.name])
            params = {**params, self.name: weights}
        cache, logits = self.read(params, states, ctx)
        weights = params[self.name]
        reader = self.draft_reader(params, ctx.view) if self.length > 1 else self.reader(ctx.view)
        described = ctx.return_top or ctx.return_q
        line = jnp.arange(self.length, dtype=jnp.int32)

        def propose(logits, depth, going, tokens):
            """The next token of each row, what is kept of it, and which rows draft further."""
            if ctx.law.has_history and tokens is not None:  # which are then no columns
                on_path = jnp.broadcast_to(line < depth, (1, 1, self.length))
                scores = ctx.scores(logits, jnp.swapaxes(tokens, 0, 1), on_path)
            else:
                scores = ctx.scores(logits)
            chosen = ctx.perturbed(scores, depth, self.proposal, words=words)
            choice = ctx.argmax(chosen)
            item = {"choice": choice[:, 0], "valid": going}
            if described:
                item["scores"] = (scores if ctx.return_q else chosen)[:, 0]
            if ctx.return_chance:
                most = jnp.max(chosen, axis=-1, keepdims=True)
                item["chance"] = confidences(chosen, most, ctx.law.sampling)[:, 0, 0]
            if self.stop is not None:
                going = going & ~self.stop.ends(chosen, ctx.law.sampling)
            return tokens_of(choice, words), item, going

        def step(at: _Step) -> _Step:
            position = at.cache.length[:, None]
            out = reader.apply(weights, at.token, position, at.cache)
            cache = reader.commit(at.cache, out, at.going.astype(jnp.int32))
            token, item, going = propose(out.logits, at.depth, at.going, at.items["choice"])
            items = {key: at.items[key].at[at.depth].set(item[key]) for key in at.items}
            return _Step(at.depth + 1, going, reached(at.reach, item, going), cache, token, items)

        def reached(reach, item, going):
            """A row that has ended asks for nothing more."""
            if ctx.thrift is None:
                return reach
            return jnp.where(going, ctx.thrift.further(reach, item["chance"]), 0)

        def further(at: _Step) -> Bool[Array, ""]:
            pays = ctx.thrift is None or ctx.thrift.goes_on(at.reach, at.depth)
            return (at.depth < most) & jnp.any(at.going) & pays

        # Nobody reads tokens behind the budget; at least one is drafted.
        most = jnp.minimum(jnp.max(jnp.where(ctx.active, ctx.budget, 0)), self.length)
        # The last drafted token is not read: it is among the two that the next round begins with.
        going = jnp.ones_like(ctx.active) if self.stop is None else ctx.active
        token, item, going = propose(logits, 0, going, None)
        reach = reached(jnp.ones((going.shape[0],), jnp.float32), item, going)
        items = {
            key: jnp.zeros((self.length, *value.shape), value.dtype).at[0].set(value)
            for key, value in item.items()
        }
        end = lax.while_loop(further, step, _Step(jnp.int32(1), going, reach, cache, token, items))
        items = {key: jnp.swapaxes(value, 0, 1) for key, value in end.items.items()}
        choice, fields = items["choice"], {}
        tokens = tokens_of(choice, words)
        if described:
            fields = chain_fields(items["scores"], choice, ctx, words)
        if ctx.return_chance and not described:
            fields["probability"] = items["chance"]
        fields["valid"] = line[None] < jnp.minimum(most, ctx.budget[:, None])
        if self.stop is not None or ctx.thrift is not None:
            fields["valid"] = fields["valid"] & items["valid"]
            if (
                "top_probs" in fields
            ):  # where a draft has ended there are no scores, or a neighbour's
                known = jnp.pad(items["valid"], ((0, 0), (0, 1)))[..., None]
                fields["top_probs"] = jnp.where(known, fields["top_probs"], 0)
        return chain(ctx.text, tokens, **fields), self._with(states, self.settle(end.cache, ctx))
