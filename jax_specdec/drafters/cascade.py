"""Cascades: drafters that propose one after the other, and drafters that verify what others proposed.

Cascade speculative drafting (Chen et al., arXiv 2312.11462, Algorithm 1), for any drafters of chains:

* `Horizontal(drafters, budgets)` lets the first drafter propose until its budget is spent, then the next:
  strong and slow ones where a token is likely to count, fast ones where it is not.
* `Cascade(verifier, drafters, budgets)` lets another drafter verify such a draft in one pass: it keeps what
  it would have drafted itself and adds its own next token.

Both are drafters, so they nest: the paper's K matrix is a `Horizontal` of cascades. The recursion is
unrolled when the program is traced. Every drafter is called in a `lax.while_loop` until no row of the
batch lacks tokens; each row has its own counts.

Inside, a drafter gets the committed text with everything drafted so far behind it, and `commit` tells it
what became of its draft. `commit` may only roll back to `Outcome.matched`, because the last call of a round
reports a draft that is not the drafter's own.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Bool, Float, Int
from jax_specdec.core.confidence import chain_fields, confidences
from jax_specdec.core.context import Context
from jax_specdec.core.draft import MAX_NODES, TOP, Text, chain, on_chain
from jax_specdec.core.drafter import (
    Drafter,
    Info,
    ModelUse,
    Verifier,
    accepted_prefix,
)
from jax_specdec.drafters.cascade_sizes import (
    check_budget,
    check_lenience,
    turns,
    verified,
)
from jax_specdec.drafters.composed import Composed, check_models, larger, taps_of
from jax_specdec.errors import UserError


@dataclasses.dataclass(frozen=True)
class Horizontal(Composed):
    """Drafters that propose one chain, each in its turn.

    Attributes:
      budgets: tokens that each drafter adds to what is wanted. Turn c ends for a row when its draft has
        `budgets[0] + ... + budgets[c]` tokens, whoever proposed them, or when the drafter finds none or
        ends a draft early because it is unsure.
      cut: whether tokens beyond the budget so far are dropped. As published they are kept.

    Raises:
      UserError: no drafters, a budget below 1, a draft that may exceed the node limit, a drafter of trees,
        one name for two models, or a drafter that would be asked for tokens further ahead than it was
        trained for.
    """

    drafters: tuple[Drafter, ...]
    budgets: tuple[int, ...]
    cut: bool = False

    def __post_init__(self):
        if not self.drafters or len(self.drafters) != len(self.budgets):
            raise UserError(
                f"A cascade takes one budget for each of its drafters, at least one, got "
                f"{len(self.budgets)} for {len(self.drafters)}."
            )
        for budget in self.budgets:
            check_budget(budget)
        self.check_drafters()

    def check_drafters(self) -> None:
        """Raises `UserError` for drafters that cannot take turns, or not with these budgets."""
        for drafter in self.drafters:
            if not drafter.info.is_chain or not drafter.info.depth:
                raise UserError(
                    f"The drafter {drafter.info.name!r} cannot propose beside others: it drafts no chain."
                )
        check_models(self.info)

    @property
    def parts(self):
        return self.drafters

    @functools.cached_property
    def cheaper(self) -> "tuple[Horizontal, ...]":
        """The drafters behind the first one, which has a model; see `core.drafter.ways_of`."""
        if len(self.drafters) == 1 or not self.drafters[0].info.models:
            return ()
        rest = Horizontal(self.drafters[1:], self.budgets[1:], self.cut)
        return (rest, *rest.cheaper)

    def chances(self, text: Text) -> Float[Array, "B Q"]:
        """See `core.drafter.foreseen`: those of a single drafter."""
        (drafter,) = self.drafters
        says: Any = drafter
        return says.chances(text)

    @property
    def info(self) -> Info:
        return self._info

    @functools.cached_property
    def _info(self) -> Info:
        infos = [drafter.info for drafter in self.drafters]
        latest, sizes = turns(
            [info.sizes for info in infos],
            self.budgets,
            [info.ends_early for info in infos],
            cut=self.cut,
        )
        models, budget = [], 0
        for info, more, before in zip(infos, self.budgets, latest, strict=True):
            budget += more
            if before >= 0:  # it is called with so many tokens drafted before
                most = budget if self.cut else MAX_NODES
                models += [_further(use, before, most) for use in info.models]
        depth = max(sizes)
        # A draft of several turns does not end by `thrift`, nor is all of it known before.
        one_turn = len(infos) == 1 and self.budgets[0] == 1
        return Info(
            name=",".join(info.name for info in infos),
            nodes=depth,
            depth=depth,
            sizes=sizes,
            sources=tuple(dict.fromkeys(name for info in infos for name in info.sources)),
            taps=taps_of(infos),
            distribution=any(info.distribution for info in infos),
            ranked=all(info.ranked for info in infos),
            rewinds=all(info.rewinds for info in infos),
            models=tuple(models),
            chances=infos[0].chances if one_turn else None,
        )

    def draft(self, params, states, ctx):
        text, batch, depth = ctx.text, ctx.text.length.shape[0], self.info.depth
        top = min(TOP, ctx.vocab_size)
        fields = {
            "source": jnp.zeros((batch, depth), jnp.int32),
            "probability": jnp.ones((batch, depth), jnp.float32),
        }
        if ctx.return_top and self.info.distribution:
            fields["top_ids"] = jnp.zeros((batch, depth, top), jnp.int32)
            fields["top_probs"] = jnp.zeros((batch, depth, top), jnp.float32)
        count = jnp.zeros((batch,), jnp.int32)
        # Where a draft ends is counted from the text's end, and known to the drafter that begins it alone.
        if len(self.drafters) > 1 or self.budgets[0] > 1:
            ctx = ctx.replace(thrift=None, return_chance=False)
        carry, budget = (states, text.tokens, count, fields), 0
        for drafter, more in zip(self.drafters, self.budgets, strict=True):
            budget += more
            carry = self._turn(drafter, budget, carry, params, ctx.replace(return_q=False))
        states, tokens, count, fields = carry
        line = jnp.arange(depth, dtype=jnp.int32)[None]
        place = jnp.minimum(text.length[:, None] + line, tokens.shape[1] - 1)
        source = fields.pop("source")
        for name in ("top_ids", "top_probs"):  # the children of the last node are not known
            if name in fields:
                fields[name] = jnp.pad(fields[name], ((0, 0), (0, 1), (0, 0)))
        draft = chain(
            text,
            jnp.take_along_axis(tokens, place, axis=1),
            valid=line < count[:, None],
            **fields,
        )
        return draft.replace(source=draft.source.at[:, 1:].set(source)), states

    def _turn(self, drafter: Drafter, budget: int, carry, params, ctx: Context):
        """Calls one drafter until every row has `budget` tokens, or the drafter has none for it.

        Args:
          carry: states; `int32[B, C]` the text with the draft behind it; `int32[B]` drafted tokens; what is
            known of each, `[B, P, ...]` by field of `Draft`.
        """
        text, info = ctx.text, drafter.info
        wanted = jnp.where(ctx.active, jnp.minimum(budget, ctx.budget), 0)
        label = [0, *(self.info.sources.index(name) + 1 for name in info.sources)]

        def lacking(carry):
            (_, _, count, _), going = carry
            return going & (count < wanted)

        def call(carry):
            (states, tokens, count, fields), going = carry
            need, length = lacking(carry), text.length + count
            here = ctx.replace(
                text=Text(tokens, length),
                active=need,
                budget=ctx.budget - count,
            )
            draft, states = drafter.draft(params, states, here)
            found = jnp.sum(draft.valid[:, 1:], axis=1, dtype=jnp.int32)
            done = found < (info.depth if info.ends_early else 1)
            if self.cut:
                found = jnp.minimum(found, budget - count)
            found = jnp.where(need, found, 0)
            new = {
                "source": jnp.take(jnp.asarray(label, jnp.int32), draft.source[:, 1:]),
                "probability": draft.probability[:, 1:],
            }
            if "top_ids" in fields and draft.top_ids is not None and draft.top_probs is not None:
                new |= {"top_ids": draft.top_ids[:, :-1], "top_probs": draft.top_probs[:, :-1]}
            fields = {
                name: _write(old, new[name], count, found) if name in new else old
                for name, old in fields.items()
            }
            tokens = _write(tokens, draft.tokens[:, 1:], length, found)
            states = drafter.commit(states, accepted_prefix(length, found, info.depth))
            return (states, tokens, count + found, fields), going & ~done

        going = jnp.ones_like(ctx.active)
        return lax.while_loop(lambda c: jnp.any(lacking(c)), call, (carry, going))[0]


@dataclasses.dataclass(frozen=True)
class Cascade(Composed):
    """A drafter that verifies what other drafters propose, and so drafts without generating.

    Without lenience it drafts what the verifier alone would: its own tokens under the shared noise decide.
    Tokens that the target verifies are exact whatever the lenience, see `acceptance`.

    The first source is the verifier, for its own tokens; the others say who proposed a token that it
    accepted, as in `lm[max-gram]`.

    Attributes:
      verifier: its own draft length plays no part.
      drafters, budgets, cut: the `Horizontal` draft that it verifies.
      lenience: l >= 1. A token that is not the verifier's own is still accepted if the verifier's
        probability of it is above the proposing drafter's divided by l. Probabilities are those of
        `confidence.chain_fields`, at temperature 1 and under the noise, so that lenience means the same at
        every temperature.
      copies: whether lenience also holds for tokens without a distribution, whose drafter counts as
        certain. None: only if no drafter has a distribution, when lenience could mean nothing else. The
        paper says no (appendix B), its code does it.

    Raises:
      UserError: as `Horizontal`, a lenience below 1, or a verifier that cannot verify.
    """

    verifier: Verifier
    drafters: tuple[Drafter, ...]
    budgets: tuple[int, ...]
    lenience: float = 1.0
    copies: bool | None = None
    cut: bool = False

    def __post_init__(self):
        if not isinstance(self.verifier, Verifier):
            name = self.verifier.info.name
            raise UserError(f"The drafter {name!r} cannot verify what others propose.")
        check_lenience(self.lenience)
        check_models(self.info)

    @functools.cached_property
    def inner(self) -> Horizontal:
        """The draft that is verified."""
        return Horizontal(self.drafters, self.budgets, self.cut)

    @property
    def cheaper(self) -> tuple[Horizontal, ...]:
        """What it verifies, as it was proposed."""
        return (self.inner, *self.inner.cheaper)

    @property
    def parts(self):
        return (self.verifier, self.inner)

    @property
    def info(self) -> Info:
        return self._info

    @functools.cached_property
    def _info(self) -> Info:
        own, inner = self.verifier.info, self.inner.info
        sizes = verified(inner.sizes)
        depth = max(sizes)
        verifying = [dataclasses.replace(use, deepest=depth, verifies=True) for use in own.models]
        return Info(
            name=f"{own.name}[{inner.name}]",
            nodes=depth,
            depth=depth,
            sizes=sizes,
            sources=(own.name, *(f"{own.name}[{name}]" for name in inner.sources)),
            taps=taps_of((own, inner)),
            distribution=own.distribution,
            ranked=own.ranked and self.lenience == 1,
            rewinds=own.rewinds and inner.rewinds,
            models=(*verifying, *inner.models),
        )

    def init(self, batch, capacity):
        states = self.inner.init(batch, capacity)
        return larger(states, self.verifier.init(batch, capacity + self.inner.info.depth))

    def draft(self, params, states, ctx):
        lenient, text, depth = self.lenience > 1, ctx.text, self.info.depth
        sampling = ctx.law.sampling
        own_ctx = ctx.replace(return_q=False)
        # The verifier adds a token of its own.
        own_ctx = own_ctx.replace(return_chance=False, thrift=None)
        inner_ctx = own_ctx.replace(return_top=lenient, budget=ctx.budget - 1)
        proposed, states = self.inner.draft(params, states, inner_ctx)
        drafted, valid = proposed.tokens[:, 1:], proposed.valid[:, 1:]
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)
        logits, states = self.verifier.verify(params, states, ctx, drafted, count)
        raw = ctx.scores(logits, drafted, on_chain(depth))
        scores = own_ctx.perturbed(raw, 0, self.verifier.proposal, depth)
        own = ctx.argmax(scores)
        agree = drafted == own[:, :-1]
        if lenient:
            said = jnp.take_along_axis(scores[:, :-1], drafted[..., None], axis=-1)
            chance = confidences(scores[:, :-1], said, sampling)[..., 0]
            copies = not self.inner.info.distribution if self.copies is None else self.copies
            near = chance * self.lenience > proposed.probability[:, 1:]
            if not copies:
                near = near & _has_distribution(proposed.top_probs, valid)
            agree = agree | near
        agree = valid & agree & ctx.active[:, None]
        accepted = jnp.sum(jnp.cumprod(agree.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
        states = self.commit(states, accepted_prefix(text.length, accepted, depth))

        line = jnp.arange(depth, dtype=jnp.int32)[None]
        end = ((0, 0), (0, 1))
        before, real = line < accepted[:, None], line <= accepted[:, None]
        tokens = jnp.where(before, jnp.pad(drafted, end), own)
        fields: dict[str, Array] = {}
        if ctx.return_top:
            fields = chain_fields(scores, tokens, own_ctx)
            # Behind its own token the verifier has read tokens that it rejected.
            rows = jnp.pad(real, end)[..., None]
            fields["top_probs"] = jnp.where(rows, fields["top_probs"], 0)
        draft = chain(text, tokens, valid=real, **fields)
        source = jnp.where(before, jnp.pad(proposed.source[:, 1:], end) + 1, 1)
        return draft.replace(source=draft.source.at[:, 1:].set(source)), states


def _further(use: ModelUse, before: int, most: int) -> ModelUse:
    """The use of a model that is called with `before` tokens drafted, when tokens behind `most` are dropped."""
    return dataclasses.replace(use, deepest=min(before + use.deepest, most))


def _has_distribution(top_probs: Array | None, valid: Bool[Array, "B M"]) -> Bool[Array, "B M"]:
    """Which tokens have a distribution behind them."""
    if top_probs is None:
        return jnp.zeros_like(valid)
    return jnp.max(top_probs[:, :-1], axis=-1) > 0


def _write(old: Array, new: Array, start: Int[Array, " B"], count: Int[Array, " B"]) -> Array:
    """`old [B, N, ...]` with the first `count[b]` of `new [B, P, ...]` at `start[b]` of each row."""
    place = jnp.arange(old.shape[1], dtype=jnp.int32)[None] - start[:, None]
    here = (place >= 0) & (place < count[:, None])
    trailing = (1,) * (old.ndim - 2)
    place = jnp.clip(place, 0, new.shape[1] - 1).reshape(*place.shape, *trailing)
    values = jnp.take_along_axis(new, place, axis=1)
    return jnp.where(here.reshape(*here.shape, *trailing), values, old)
