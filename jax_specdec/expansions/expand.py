"""Expansion: wider drafts from any drafter of chains."""

import dataclasses
from typing import Any

from jax_specdec.core.draft import MAX_NODES, Draft
from jax_specdec.core.drafter import Drafter
from jax_specdec.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a draft is widened.

    Attributes:
      nodes: the budget of every verification, the root included. Shapes are static: it is spent,
        on invalid nodes where a rule finds too few.
    """

    nodes: int

    def check(self, drafter: Drafter) -> None:
        """Raises `UserError` for a drafter that the rule cannot widen."""

    def budgets(self, depth: int) -> tuple[int, int]:
        """The smallest and the largest `nodes` that the rule can spend on a chain of `depth`."""
        raise NotImplementedError

    def fit(self, depth: int) -> None:
        """Raises `UserError` for a budget that does not fit a chain of `depth`."""
        if self.fits(depth):
            return
        least, most = self.budgets(depth)
        most = min(most, MAX_NODES)
        if least > most:
            raise UserError(
                f"A chain of {depth} leaves no room for this expansion: a draft has at most "
                f"{MAX_NODES} nodes."
            )
        raise UserError(
            f"This expansion of a chain of {depth} takes {least} to {most} nodes, the root and the "
            f"chain included, got {self.nodes}."
        )

    def fits(self, depth: int) -> bool:
        """Whether `fit` would not raise."""
        least, most = self.budgets(depth)
        return least <= self.nodes <= min(most, MAX_NODES)

    def size(self, depth: int) -> int:
        """T, at most `nodes`."""
        del depth
        return self.nodes

    def init(self, drafter: Drafter, batch: int, capacity: int) -> dict[str, Any]:
        return drafter.init(batch, capacity)

    def draft(
        self, drafter: Any, params, states, text, view, sampling, noise, active, room
    ) -> tuple[Draft, dict[str, Any]]:
        """`Drafter.draft` of the expansion."""
        raise NotImplementedError

    def commit(self, drafter: Any, states, outcome, view) -> dict[str, Any]:
        return drafter.commit(states, outcome, view)


@dataclasses.dataclass(frozen=True)
class Expand:
    """A drafter whose drafts a rule widens.

    Order of the nodes: the root, the drafter's main chain, then all others, whose origin is the
    proposer `sibling`.

    Raises:
      UserError: a budget that does not fit the chain, or a drafter that the rule cannot widen: one that
        proposes trees, or has no distribution, for which wider drafts are not defined.
    """

    drafter: Drafter
    rule: Rule
    has_distribution = False  # it is spent

    def __post_init__(self):
        self.rule.check(self.drafter)
        self.rule.fit(self.drafter.depth)

    @property
    def name(self) -> str:
        return f"{self.drafter.name}+"

    @property
    def num_nodes(self) -> int:
        return self.rule.size(self.drafter.depth) - 1

    @property
    def depth(self) -> int:
        return self.drafter.depth

    @property
    def proposers(self) -> tuple[str, ...]:
        return (*self.drafter.proposers, "sibling")

    @property
    def reads_hidden(self) -> bool:
        return self.drafter.reads_hidden

    def init(self, batch, capacity):
        return self.rule.init(self.drafter, batch, capacity)

    def extend(self, params, states, text, view):
        return self.drafter.extend(params, states, text, view)

    def draft(self, params, states, text, view, sampling, noise, active, room):
        return self.rule.draft(
            self.drafter, params, states, text, view, sampling, noise, active, room
        )

    def commit(self, states, outcome, view):
        return self.rule.commit(self.drafter, states, outcome, view)
