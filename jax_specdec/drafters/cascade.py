"""Cascades: drafters that propose one after the other, and drafters that review what others proposed.

Cascade speculative drafting (Chen et al., arXiv 2312.11462, Algorithm 1), for any drafters of chains:

* `Horizontal(drafters, quotas)` lets the first drafter propose until its quota is filled, then the next:
  strong and slow ones where a token is likely to count, fast ones where it is not.
* `Cascade(reviewer, drafters, quotas)` has such a draft reviewed by a neural drafter, in one pass: what it
  would have drafted itself is kept, and its own next token put behind it.

Both are drafters, so they nest: the paper's K matrix is a `Horizontal` of cascades. The recursion is
unrolled when the program is traced, every drafter is called in a `lax.while_loop` until no row of the
batch lacks tokens, and rows differ in all they do.

Inside, a drafter is handed the committed text with all that was drafted so far behind it, and `commit`
tells it what became of its draft. It must not do more then than roll back to `Outcome.agreed`, since later
it hears of drafts that are not its own.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Bool, Float, Int
from jax_specdec.core.confidence import chain_fields, confidences, perturbed
from jax_specdec.core.draft import MAX_NODES, TOP, Text, chain
from jax_specdec.core.drafter import Drafter, Outcome, States
from jax_specdec.core.numerics import argmax
from jax_specdec.core.prng import Noise
from jax_specdec.core.sampling import warp
from jax_specdec.drafters.neural import NeuralDrafter
from jax_specdec.errors import UserError


class Composed:
    """What drafters that are made of drafters share: they hold no state that is not their parts'."""

    @property
    def parts(self) -> dict[str, Drafter]:
        """The drafters that hold states, by name."""
        raise NotImplementedError

    @property
    def sizes(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def depth(self) -> int:
        return max(self.sizes)

    @property
    def num_nodes(self) -> int:
        return self.depth

    @property
    def reads_hidden(self) -> bool:
        return any(part.reads_hidden for part in self.parts.values())

    def extend(self, params, states, text, view):
        for part in self.parts.values():
            states = part.extend(params, states, text, view)
        return states

    def commit(self, states, outcome, view):
        for part in self.parts.values():
            states = part.commit(states, outcome, view)
        return states


@dataclasses.dataclass(frozen=True)
class Horizontal(Composed):
    """Drafters that propose one chain, each in its turn.

    Attributes:
      quotas: tokens that each drafter adds to what is wanted. Turn c ends for a row when its draft has
        `quotas[0] + ... + quotas[c]` tokens, whoever proposed them, or when the drafter finds none or
        ends a draft early, being unsure.
      cut: whether what exceeds the quota so far is dropped. As published it is kept.

    Raises:
      UserError: no drafters, a quota below 1, a draft that may exceed the node limit, a drafter of trees,
        one name for two models, or a drafter that would be asked for tokens further ahead than it was
        trained for.
    """

    drafters: tuple[Drafter, ...]
    quotas: tuple[int, ...]
    cut: bool = False

    def __post_init__(self):
        if not self.drafters or len(self.drafters) != len(self.quotas):
            raise UserError(
                f"A cascade takes one quota for each of its drafters, at least one, got "
                f"{len(self.quotas)} for {len(self.drafters)}."
            )
        for quota in self.quotas:
            if quota < 1:
                raise UserError(f"A quota must be at least 1, got {quota}.")
        for drafter in self.drafters:
            if drafter.num_nodes != drafter.depth or not drafter.depth:
                raise UserError(
                    f"The drafter {drafter.name!r} cannot propose in a cascade: it drafts no chain."
                )
        _check(self)

    @property
    def name(self) -> str:
        return ",".join(drafter.name for drafter in self.drafters)

    @functools.cached_property
    def _turns(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return turns(
            [_sizes(drafter) for drafter in self.drafters],
            self.quotas,
            [_stops(drafter) for drafter in self.drafters],
            cut=self.cut,
        )

    @property
    def sizes(self):
        return self._turns[1]

    @property
    def proposers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for d in self.drafters for name in d.proposers))

    @property
    def has_distribution(self) -> bool:
        return any(drafter.has_distribution for drafter in self.drafters)

    @functools.cached_property
    def parts(self):
        return {k: v for drafter in self.drafters for k, v in _parts(drafter).items()}

    def init(self, batch, capacity):
        states: States = {}
        for drafter in self.drafters:
            states = _larger(states, drafter.init(batch, capacity))
        return states

    def draft(self, params, states, text, view, sampling, noise, active, room):
        batch, depth = text.length.shape[0], self.depth
        top = min(TOP, noise.gumbel.shape[-1])
        fields = {
            "origin": jnp.zeros((batch, depth), jnp.int32),
            "probability": jnp.ones((batch, depth), jnp.float32),
        }
        described = noise.return_top and self.has_distribution
        if described:
            fields["top_ids"] = jnp.zeros((batch, depth, top), jnp.int32)
            fields["top_probs"] = jnp.zeros((batch, depth, top), jnp.float32)
        count = jnp.zeros((batch,), jnp.int32)
        carry, quota = (states, text.tokens, count, fields), 0
        for drafter, more in zip(self.drafters, self.quotas, strict=True):
            quota += more
            carry = self._turn(
                drafter, quota, carry, params, text, view, sampling, noise, active, room
            )
        states, tokens, count, fields = carry
        line = jnp.arange(depth, dtype=jnp.int32)[None]
        place = jnp.minimum(text.length[:, None] + line, tokens.shape[1] - 1)
        origin = fields.pop("origin")
        for name in ("top_ids", "top_probs"):  # the children of the last node are not known
            if name in fields:
                fields[name] = jnp.pad(fields[name], ((0, 0), (0, 1), (0, 0)))
        draft = chain(
            text,
            jnp.take_along_axis(tokens, place, axis=1),
            valid=line < count[:, None],
            **fields,
        )
        return draft.replace(origin=draft.origin.at[:, 1:].set(origin)), states

    def _turn(self, drafter, quota: int, carry, params, text, view, sampling, noise, active, room):
        """Calls one drafter until every row has `quota` tokens, or the drafter has none for it."""
        wanted = jnp.where(active, jnp.minimum(quota, room), 0)
        label = [0, *(self.proposers.index(name) + 1 for name in drafter.proposers)]
        noise = noise.replace(return_q=False)

        def lacking(carry):
            (_, _, count, _), going = carry
            return going & (count < wanted)

        def call(carry):
            (states, tokens, count, fields), going = carry
            need = lacking(carry)
            length = text.length + count
            draft, states = drafter.draft(
                params,
                states,
                Text(tokens, length),
                view,
                sampling,
                _ahead(noise, count, drafter.depth + 1),
                need,
                room - count,
            )
            found = jnp.sum(draft.valid[:, 1:], axis=1, dtype=jnp.int32)
            done = found < (drafter.depth if _stops(drafter) else 1)
            if self.cut:
                found = jnp.minimum(found, quota - count)
            found = jnp.where(need, found, 0)
            new = {
                "origin": jnp.take(jnp.asarray(label, jnp.int32), draft.origin[:, 1:]),
                "probability": draft.probability[:, 1:],
            }
            if "top_ids" in fields and draft.top_ids is not None:
                new |= {"top_ids": draft.top_ids[:, :-1], "top_probs": draft.top_probs[:, :-1]}
            fields = {
                name: _write(old, new[name], count, found) if name in new else old
                for name, old in fields.items()
            }
            tokens = _write(tokens, draft.tokens[:, 1:], length, found)
            states = drafter.commit(states, _accepted(length, found, drafter.depth), view)
            return (states, tokens, count + found, fields), going & ~done

        going = jnp.ones_like(active)
        return lax.while_loop(lambda c: jnp.any(lacking(c)), call, (carry, going))[0]


@dataclasses.dataclass(frozen=True)
class Cascade(Composed):
    """A neural drafter that reviews what other drafters propose, and so drafts without generating.

    Without lenience it drafts what the reviewer alone would: its own tokens under the shared noise decide.
    Tokens that the target reviews are exact whatever the lenience, see `acceptance`.

    The first of `proposers` is the reviewer, for its own tokens; the others are who proposed what it
    accepted, `lm[max-gram]` for instance.

    Attributes:
      reviewer: its own draft length plays no part.
      drafters, quotas, cut: the `Horizontal` draft that it reviews.
      lenience: l >= 1. A token that is not the reviewer's own is accepted all the same if the reviewer's
        probability of it is above the proposer's divided by l. Probabilities are those of
        `neural.chain_fields`, at temperature 1 and under the noise, so that lenience means the same at
        every temperature.
      copies: whether lenience holds for tokens that no distribution is behind, too, whose proposer
        counts as certain. None: only if no drafter has one, so that nothing else can be meant. The paper
        says no (appendix B), its code does.

    Raises:
      UserError: as `Horizontal`, or a lenience below 1.
    """

    reviewer: NeuralDrafter
    drafters: tuple[Drafter, ...]
    quotas: tuple[int, ...]
    lenience: float = 1.0
    copies: bool | None = None
    cut: bool = False

    has_distribution = True

    def __post_init__(self):
        if not 1 <= self.lenience < math.inf:
            raise UserError(f"A lenience must be finite and at least 1, got {self.lenience:g}.")
        _check(self)

    @functools.cached_property
    def inner(self) -> Horizontal:
        """The draft that is reviewed."""
        return Horizontal(self.drafters, self.quotas, self.cut)

    @property
    def name(self) -> str:
        """Its state is `int32[B]`, how many reviews it made for each row."""
        return f"{self.reviewer.name}[{self.inner.name}]"

    @property
    def sizes(self):
        return tuple(range(1, self.inner.depth + 2))

    @property
    def proposers(self) -> tuple[str, ...]:
        name = self.reviewer.name
        return (name, *(f"{name}[{inner}]" for inner in self.inner.proposers))

    @functools.cached_property
    def parts(self):
        return {self.reviewer.name: self.reviewer, **self.inner.parts}

    def init(self, batch, capacity):
        states = self.inner.init(batch, capacity)
        states = _larger(states, self.reviewer.init(batch, capacity + self.inner.depth))
        return {**states, self.name: jnp.zeros((batch,), jnp.int32)}

    def draft(self, params, states, text, view, sampling, noise, active, room):
        lenient, name = self.lenience > 1, self.reviewer.name
        noise = noise.replace(return_q=False)
        wide = noise.replace(return_top=lenient)
        # The reviewer adds a token of its own.
        proposed, states = self.inner.draft(
            params, states, text, view, sampling, wide, active, room - 1
        )
        drafted, valid = proposed.tokens[:, 1:], proposed.valid[:, 1:]
        count = jnp.sum(valid, axis=1, dtype=jnp.int32)
        cache, logits = self.reviewer.review(params, states, text, drafted, count, view)
        raw = warp(logits, sampling)
        scores = perturbed(raw, noise, 0, self.reviewer.proposal, raw.shape[1])
        own = argmax(scores)
        agree = drafted == own[:, :-1]
        if lenient:
            said = jnp.take_along_axis(scores[:, :-1], drafted[..., None], axis=-1)
            chance = confidences(scores[:, :-1], said, sampling)[..., 0]
            near = chance * self.lenience > proposed.probability[:, 1:]
            copies = not self.inner.has_distribution if self.copies is None else self.copies
            if not copies:
                near = near & _has_law(proposed.top_probs, valid)
            agree = agree | near
        agree = valid & agree & active[:, None]
        accepted = jnp.sum(jnp.cumprod(agree.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)

        cache = cache.replace(length=text.length + accepted)
        states = self.inner.commit(states, _accepted(text.length, accepted, self.depth, 1), view)
        reviews = states[self.name] + active.astype(jnp.int32)
        states = {**states, name: self.reviewer.kept(cache, view), self.name: reviews}

        line = jnp.arange(self.depth, dtype=jnp.int32)[None]
        end = ((0, 0), (0, 1))
        before, real = line < accepted[:, None], line <= accepted[:, None]
        tokens = jnp.where(before, jnp.pad(drafted, end), own)
        fields: dict[str, Any] = {}
        if noise.return_top:
            fields = chain_fields(raw, tokens, sampling, noise, self.reviewer.proposal)
            # Behind its own token the reviewer has read another one.
            rows = jnp.pad(real, end)[..., None]
            fields["top_probs"] = jnp.where(rows, fields["top_probs"], 0)
        draft = chain(text, tokens, valid=real, **fields)
        origin = jnp.where(before, jnp.pad(proposed.origin[:, 1:], end) + 1, 1)
        return draft.replace(origin=draft.origin.at[:, 1:].set(origin)), states


def turns(
    sizes: Sequence[Sequence[int]], quotas: Sequence[int], stops: Sequence[bool], *, cut: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What can happen in a `Horizontal` of drafters whose drafts have these sizes.

    Args:
      stops: whether a draft that is shorter than the drafter's longest ends its turn; one of no token
        always does.

    Returns:
      Per drafter, the most tokens before one of its calls, -1 if it is never called; and the sizes that
      the whole draft may have.
    """
    counts, latest, quota = {0}, [], 0
    for some, more, stop in zip(sizes, quotas, stops, strict=True):
        quota += more
        ended = {n for n in counts if n >= quota}
        waiting = sorted(counts - ended)
        called: set[int] = set()
        while waiting:
            n = waiting.pop()
            if n in called:
                continue
            called.add(n)
            for size in some:
                new = min(n + size, quota) if cut else n + size
                if size == 0 or new >= quota or (stop and size < max(some)):
                    ended.add(new)
                else:
                    waiting.append(new)
        counts = ended
        latest.append(max(called, default=-1))
    return tuple(latest), tuple(sorted(counts))


def _sizes(drafter: Any) -> tuple[int, ...]:
    return getattr(drafter, "sizes", tuple(range(drafter.depth + 1)))


def _stops(drafter: Any) -> bool:
    """Whether it ends drafts that it is unsure of."""
    return getattr(drafter, "stop", None) is not None


def _parts(drafter: Drafter) -> dict[str, Drafter]:
    return drafter.parts if isinstance(drafter, Composed) else {drafter.name: drafter}


def _models(drafter: Any, before: int, limit: int) -> Iterator[tuple[Any, int, bool]]:
    """Drafters with a model, how far behind the text their tokens lie at most, and whether they review.

    Args:
      before: tokens drafted before. limit: tokens further behind are dropped.
    """
    if isinstance(drafter, Cascade):
        yield drafter.reviewer, min(before + drafter.depth, limit), True
        yield from _models(drafter.inner, before, limit)
    elif isinstance(drafter, Horizontal):
        quota = 0
        for part, more, latest in zip(
            drafter.drafters, drafter.quotas, drafter._turns[0], strict=True
        ):
            quota += more
            if latest >= 0:
                end = min(limit, before + quota) if drafter.cut else limit
                yield from _models(part, before + latest, end)
    elif hasattr(drafter, "reach"):
        yield drafter, min(before + drafter.depth, limit), False


def _check(drafter: Horizontal | Cascade) -> None:
    """What must hold of a whole nesting, and is checked at each of its levels."""
    if drafter.depth >= MAX_NODES:
        raise UserError(
            f"This cascade may draft {drafter.depth} tokens at once, and a draft has at most "
            f"{MAX_NODES - 1}: lower its quotas and lengths, or cut."
        )
    bodies: dict[str, Any] = {}
    for part, end, reviews in _models(drafter, 0, MAX_NODES):
        if bodies.setdefault(part.name, part.body) != part.body:
            raise UserError(f"Two drafters of this cascade are named {part.name!r}: rename one.")
        if part.reach is not None and end > part.reach:
            what = "reviews tokens" if reviews else "drafts"
            raise UserError(
                f"In this cascade {part.name!r} {what} up to {end} places behind the text, its own next "
                f"token included, and it was trained for at most {part.reach}: lower the quotas and "
                "lengths, or cut."
            )


def _has_law(top_probs: Array | None, valid: Bool[Array, "B M"]) -> Bool[Array, "B M"]:
    """Which tokens a distribution is behind."""
    if top_probs is None:
        return jnp.zeros_like(valid)
    return jnp.max(top_probs[:, :-1], axis=-1) > 0


def _larger(states: States, more: States) -> States:
    """Both, of a name that is in both the larger state: a cascade asks for slots of its own."""

    def size(state: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    kept = {k: v for k, v in more.items() if k not in states or size(v) > size(states[k])}
    return {**states, **kept}


def _ahead(noise: Noise, count: Int[Array, " B"], steps: int) -> Noise:
    """The noise of the positions from `count` tokens further on."""
    place = count[:, None] + jnp.arange(steps, dtype=jnp.int32)[None]
    place = jnp.minimum(place, noise.gumbel.shape[1] - 1)[..., None]
    return noise.replace(gumbel=jnp.take_along_axis(noise.gumbel, place, axis=1))


def _write(
    old: Array, new: Array, start: Int[Array, " B"], count: Int[Array, " B"]
) -> Float[Array, "B N ..."]:
    """`old [B, N, ...]` with the first `count[b]` of `new [B, P, ...]` at `start[b]` of each row."""
    place = jnp.arange(old.shape[1], dtype=jnp.int32)[None] - start[:, None]
    here = (place >= 0) & (place < count[:, None])
    trailing = (1,) * (old.ndim - 2)
    place = jnp.clip(place, 0, new.shape[1] - 1).reshape(*place.shape, *trailing)
    values = jnp.take_along_axis(new, place, axis=1)
    return jnp.where(here.reshape(*here.shape, *trailing), values, old)


def _accepted(
    length: Int[Array, " B"], accepted: Int[Array, " B"], depth: int, own: int = 0
) -> Outcome:
    """The outcome of a draft of which the first `accepted` tokens are kept, and `own` others follow."""
    path = jnp.arange(depth + 1, dtype=jnp.int32)[None]
    path = jnp.broadcast_to(path, (length.shape[0], depth + 1))
    return Outcome(length + accepted + own, length + accepted, path, accepted)
