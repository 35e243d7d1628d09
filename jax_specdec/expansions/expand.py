"""Expansion: wider drafts from any drafter of chains."""

import dataclasses
from typing import Any, ClassVar

from jax_specdec._types import Params
from jax_specdec.core.context import Context
from jax_specdec.core.draft import MAX_NODES, Draft
from jax_specdec.core.drafter import Drafter, Info, Outcome, States
from jax_specdec.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a draft is widened.

    Attributes:
      nodes: the budget of every verification, the root included. Shapes are static: all of it is spent,
        on invalid nodes if a rule finds too few.
      needs: the flag of a drafter's kind that the rule goes by, see `drafters.registry`. keeps_chances: whether the chain of
        the widened draft is the drafter's, with what it says of it (`Info.chances`).
    """

    nodes: int
    needs: ClassVar[str] = "distribution"
    keeps_chances: ClassVar[bool] = False

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

    def init(self, drafter: Any, batch: int, capacity: int) -> States:
        return drafter.init(batch, capacity)

    def draft(
        self, drafter: Any, params: Params, states: States, ctx: Context
    ) -> tuple[Draft, States]:
        """`Drafter.draft` of the expansion."""
        raise NotImplementedError

    def commit(self, drafter: Any, states: States, outcome: Outcome) -> States:
        return drafter.commit(states, outcome)


@dataclasses.dataclass(frozen=True)
class Expand:
    """A drafter whose drafts a rule widens.

    Order of the nodes: the root, the drafter's main chain, then all others, whose source is `sibling`.

    Raises:
      UserError: a budget that does not fit the chain, or a drafter that the rule cannot widen: one that
        proposes trees, or has no distribution, for which wider drafts are not defined.
    """

    drafter: Drafter
    rule: Rule

    def __post_init__(self):
        self.rule.check(self.drafter)
        self.rule.fit(self.drafter.info.depth)

    @property
    def info(self) -> Info:
        inner = self.drafter.info
        return dataclasses.replace(
            inner,
            name=f"{inner.name}+",
            nodes=self.rule.size(inner.depth) - 1,
            sources=(*inner.sources, "sibling"),
            distribution=False,  # it is spent
            chances="after" if inner.chances and self.rule.keeps_chances else None,
        )

    def init(self, batch, capacity):
        return self.rule.init(self.drafter, batch, capacity)

    def reset(self, states, rows):
        return self.drafter.reset(states, rows)

    def extend(self, params, states, ctx):
        return self.drafter.extend(params, states, ctx)

    def draft(self, params, states, ctx):
        return self.rule.draft(self.drafter, params, states, ctx)

    def commit(self, states, outcome):
        return self.rule.commit(self.drafter, states, outcome)
