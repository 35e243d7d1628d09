"""The drafter contract: what `GradientTransformation` is to optimisers.

A drafter is a frozen dataclass (static under jit) of pure functions over pytrees. It reads what it has
not seen from the text, so rollback is a `min` over lengths, and drafters compose without knowing of
each other. States of all drafters live in one dictionary by drafter name.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from jax_specdec._types import Array, Bool, Float, Int, Params
from jax_specdec.core.context import Context, Proposal
from jax_specdec.core.draft import Draft, Text
from jax_specdec.errors import UserError, a_kind

States = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelUse:
    """How a drafter uses a model: what a composition of drafters must know of its parts.

    Attributes:
      name: of its parameters and state. identity: equal for two drafters that may share them.
      deepest: how far behind the committed text it predicts at most.
      max_depth: how far it may predict, None for any.
      verifies: whether it verifies other drafters' tokens, rather than drafting its own.
    """

    name: str
    identity: Any
    deepest: int
    max_depth: int | None = None
    verifies: bool = False


@dataclasses.dataclass(frozen=True)
class Info:
    """What composition, verification and tuning need to know of a drafter.

    Attributes:
      name: key of its parameters and state.
      nodes: drafted nodes per round, root excluded. depth: the longest drafted path.
      sizes: how many tokens of the main chain a draft may have, rising; a cascade's buffers are sized by it.
      sources: names for `Draft.source`, which counts from 1.
      taps: hidden states of the target that are kept for it (see `Model`).
      distribution: whether a draft has `top_ids` when `Context.return_top` asks for them.
      ends_early: whether a draft shorter than the longest means that drafting further would not pay.
      ranked: whether a drafted token is the best of its node's `top_ids`. Lenience and a token drawn from q
        break that.
      rewinds: whether `commit` takes states back to any length, and what begins larger states may be copied
        from smaller ones. Others read a text anew that another one begins with.
      models: the models inside, none for statistical drafters.
      chances: when it says of each token of a chain how likely it is to be right: `before` it drafts, by a method
        (`foreseen`); or `after`, by `Draft.probability` where `Context.return_chance` asks for it, and then a draft that
        costs more the longer it is ends where `Context.thrift` says. None: never.
    """

    name: str
    nodes: int
    depth: int
    sizes: tuple[int, ...]
    sources: tuple[str, ...]
    taps: tuple[int, ...] = ()
    distribution: bool = False
    ends_early: bool = False
    ranked: bool = True
    rewinds: bool = True
    models: tuple[ModelUse, ...] = ()
    chances: Literal["before", "after"] | None = None

    @property
    def is_chain(self) -> bool:
        return self.nodes == self.depth


class Outcome(NamedTuple):
    """What became of a draft.

    Attributes:
      matched: `int32[B]`, length of the prefix that the drafter's own main chain shares with the new text.
      path: `int32[B, P+1]`, accepted node at each depth. accepted: `int32[B]`.
    """

    matched: Int[Array, " B"]
    path: Int[Array, "B Q"]
    accepted: Int[Array, " B"]


@runtime_checkable
class Drafter(Protocol):
    """Proposes token trees."""

    @property
    def info(self) -> Info: ...

    def init(self, batch: int, capacity: int) -> States:
        """Empty states for `batch` rows of text of at most `capacity` tokens, drafts included."""
        ...

    def reset(self, states: States, rows: Bool[Array, " B"]) -> States:
        """Forgets the texts of some rows, for new requests in their places."""
        ...

    def extend(self, params: Params, states: States, ctx: Context) -> States:
        """Reads what it has not read of the committed text, the prompt included, in chunks.

        Args:
          ctx: its noise is of no use here.
        """
        ...

    def draft(self, params: Params, states: States, ctx: Context) -> tuple[Draft, States]:
        """Proposes a tree below each row's root. Rows that are not active may hold anything."""
        ...

    def commit(self, states: States, outcome: Outcome) -> States:
        """Rolls back to what still holds: by default to min(own, matched)."""
        ...


def ways_of(drafter: Drafter) -> tuple[Drafter, ...]:
    """How a drafter can draft: itself, then with a part of its drafters, where it has `cheaper` ones.

    Where it has `alternatives`, these are all: each of its drafters alone. See `foreseen` for what one may say beforehand.

    Ways work on the drafter's states, draft chains as it does, and give no distribution.
    """
    alternatives = getattr(drafter, "alternatives", ())
    return alternatives or (drafter, *getattr(drafter, "cheaper", ()))


def foreseen(drafter: Drafter, text: Text) -> tuple[Float[Array, "B Q"] | None, ...]:
    """Of each of a drafter's ways, how likely the tokens of its draft are to be right, before it drafts.

    A drafter that knows this from the text alone says it by a method `chances(text)`: `float32[B, Q]`, of the token at each
    depth where all before it are right, 0 where it has none.

    Raises:
      UserError: chances of another shape.
    """

    def said(way: Any) -> Array | None:
        if way.info.chances != "before":
            return None
        chances, rows, most = way.chances(text), text.length.shape[0], way.info.depth
        shape = getattr(chances, "shape", ())
        if len(shape) != 2 or shape[0] != rows or not 1 <= shape[1] <= most:
            raise UserError(
                f"The chances of drafter {way.info.name!r} must be float32[{rows}, P] of 1 to {most} depths, not "
                f"{a_kind(chances) if not shape else list(shape)}."
            )
        return jnp.asarray(chances, jnp.float32)

    return tuple(map(said, ways_of(drafter)))


@runtime_checkable
class Verifier(Drafter, Protocol):
    """A drafter that can say what it would have drafted in place of another's tokens."""

    @property
    def proposal(self) -> Proposal:
        """How it chooses its own tokens, see `Context.perturbed`."""
        ...

    def verify(
        self,
        params: Params,
        states: States,
        ctx: Context,
        drafted: Int[Array, "B M"],
        count: Int[Array, " B"],
    ) -> tuple[Float[Array, "B Q V"], States]:
        """Reads what another drafter proposed behind the text, in one pass.

        Args:
          count: how many of `drafted` are proposed. States are those of `init` with M tokens more.

        Returns:
          The logits after the root and after each drafted token, Q = M + 1, garbage behind `count`; and the
          states with the text and `count` drafted tokens read.
        """
        ...


class StatelessDrafter:
    """A drafter that reads everything from the text."""

    def init(self, batch: int, capacity: int) -> States:
        del batch, capacity
        return {}

    def reset(self, states: States, rows: Bool[Array, " B"]) -> States:
        del rows
        return states

    def extend(self, params: Params, states: States, ctx: Context) -> States:
        del params, ctx
        return states

    def commit(self, states: States, outcome: Outcome) -> States:
        del outcome
        return states


def chain_info(name: str, length: int, sizes: tuple[int, ...] | None = None, **fields) -> Info:
    """The `Info` of a single source of chains of `length` tokens."""
    sizes = (length,) if sizes is None else sizes
    return Info(name, length, length, sizes, (name,), **fields)


def rollback(length: Int[Array, " B"], outcome: Outcome) -> Int[Array, " B"]:
    """The default commit: what the drafter holds of the matched prefix."""
    return jnp.minimum(length, outcome.matched)


def accepted_prefix(length: Int[Array, " B"], accepted: Int[Array, " B"], depth: int) -> Outcome:
    """The outcome of a chain of `depth` tokens of which the first `accepted` are kept."""
    path = jnp.arange(depth + 1, dtype=jnp.int32)[None]
    path = jnp.broadcast_to(path, (length.shape[0], depth + 1))
    return Outcome(length + accepted, path, accepted)
