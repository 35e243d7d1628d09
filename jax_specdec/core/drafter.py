"""The drafter contract: what `GradientTransformation` is to optimisers.

A drafter is a frozen dataclass (static under jit) of pure functions over pytrees. It reads what it has
not seen from the text, so rollback is a `min` over lengths, and drafters compose without knowing of
each other. States of all drafters live in one dictionary by drafter name.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax.numpy as jnp

from jax_specdec._types import Array, Bool, Int
from jax_specdec.core.cache import KVCache
from jax_specdec.core.draft import Draft, Text
from jax_specdec.core.prng import Noise
from jax_specdec.core.sampling import Sampling

States = dict[str, Any]


class TargetView(flax.struct.PyTreeNode):
    """Read access to the target: its committed keys and values, and hidden states where asked for.

    Attributes:
      cache: covers positions `0 .. length - 2` of the text; the root is not in it.
    """

    cache: KVCache

    @property
    def hidden(self) -> Array | None:
        """`[B, S, E]`, before the final norm, of the same positions; None unless `reads_hidden`."""
        return self.cache.hidden


class Outcome(NamedTuple):
    """What became of a draft.

    Attributes:
      length: `int32[B]`, the new text length.
      agreed: `int32[B]`, length of the prefix that the drafter's own main chain shares with the new
        text.
      path: `int32[B, P+1]`, accepted node at each depth. accepted: `int32[B]`.
    """

    length: Int[Array, " B"]
    agreed: Int[Array, " B"]
    path: Int[Array, "B Q"]
    accepted: Int[Array, " B"]


@runtime_checkable
class Drafter(Protocol):
    """Proposes token trees.

    Attributes:
      name: key of its parameters and state.
      num_nodes: drafted nodes per round, root excluded. depth: the longest drafted path.
      proposers: names for `Draft.origin`, which counts from 1.
      reads_hidden: whether the target's hidden states are kept for it.
      has_distribution: whether a draft has `top_ids` when `Noise.return_top` asks for them.
    """

    @property
    def name(self) -> str: ...

    @property
    def num_nodes(self) -> int: ...

    @property
    def depth(self) -> int: ...

    @property
    def proposers(self) -> tuple[str, ...]: ...

    @property
    def reads_hidden(self) -> bool: ...

    @property
    def has_distribution(self) -> bool: ...

    def init(self, batch: int, capacity: int) -> States:
        """Empty states for `batch` rows of text of at most `capacity` tokens, drafts included."""
        ...

    def extend(
        self, params: dict[str, Any], states: States, text: Text, view: TargetView
    ) -> States:
        """Catches up with the committed text by any lag, in chunks; also reads the prompt."""
        ...

    def draft(
        self,
        params: dict[str, Any],
        states: States,
        text: Text,
        view: TargetView,
        sampling: Sampling,
        noise: Noise,
        active: Bool[Array, " B"],
        room: Int[Array, " B"],
    ) -> tuple[Draft, States]:
        """Proposes a tree below each row's root. Rows that are not active may hold anything.

        Args:
          room: tokens the row may still emit; drafting deeper is of no use.
        """
        ...

    def commit(self, states: States, outcome: Outcome, view: TargetView) -> States:
        """Rolls back to what is still true: by default to min(own, agreed)."""
        ...


class StatelessDrafter:
    """A drafter that reads everything from the text."""

    has_distribution = False

    @property
    def reads_hidden(self) -> bool:
        return False

    def init(self, batch: int, capacity: int) -> States:
        del batch, capacity
        return {}

    def extend(self, params, states, text, view):
        del params, text, view
        return states

    def commit(self, states, outcome, view):
        del outcome, view
        return states


class ChainDrafter:
    """A single proposer of one chain: a dataclass with a `name` and a `length` in tokens."""

    name: str
    length: int

    @property
    def num_nodes(self) -> int:
        return self.length

    @property
    def depth(self) -> int:
        return self.length

    @property
    def proposers(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def reads_hidden(self) -> bool:
        return False

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many tokens a draft may have; a cascade's buffers are sized by it."""
        return (self.length,)


def rollback(length: Int[Array, " B"], outcome: Outcome) -> Int[Array, " B"]:
    """The default commit: what the drafter holds of the agreed prefix."""
    return jnp.minimum(length, outcome.agreed)
