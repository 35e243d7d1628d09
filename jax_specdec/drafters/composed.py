"""States of drafters that are made of drafters."""

from collections.abc import Iterable

import jax

from jax_specdec.core.drafter import Drafter, Info, States
from jax_specdec.drafters.cascade_sizes import check_depth
from jax_specdec.errors import UserError


class Composed:
    """The base of drafters that are made of drafters: all state belongs to the parts."""

    @property
    def parts(self) -> tuple[Drafter, ...]:
        raise NotImplementedError

    def init(self, batch, capacity):
        states: States = {}
        for part in self.parts:
            states = larger(states, part.init(batch, capacity))
        return states

    def reset(self, states, rows):
        for part in self.parts:
            states = part.reset(states, rows)
        return states

    def extend(self, params, states, ctx):
        seen: set[str] = set()
        for part in self.parts:
            names = {use.name for use in part.info.models}
            if names and names <= seen:  # the same models again: each reads the text once
                continue
            seen |= names
            states = part.extend(params, states, ctx)
        return states

    def commit(self, states, outcome):
        for part in self.parts:
            states = part.commit(states, outcome)
        return states


def larger(states: States, more: States) -> States:
    """Both; of two states of one name the larger, since a cascade asks for more slots."""

    def size(state) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    kept = {k: v for k, v in more.items() if k not in states or size(v) > size(states[k])}
    return {**states, **kept}


def taps_of(infos: Iterable[Info]) -> tuple[int, ...]:
    """What any of some drafters reads of the target."""
    return tuple(sorted({tap for info in infos for tap in info.taps}))


def check_models(info: Info) -> None:
    """Raises `UserError` for what may not be of a whole nesting; it is checked at each of its levels."""
    check_depth(info.depth)
    identities: dict[str, object] = {}
    for use in info.models:
        if identities.setdefault(use.name, use.identity) != use.identity:
            raise UserError(f"Two drafters of this cascade are named {use.name!r}: rename one.")
        if use.max_depth is not None and use.deepest > use.max_depth:
            what = "verifies tokens" if use.verifies else "drafts"
            raise UserError(
                f"In this cascade {use.name!r} {what} up to {use.deepest} places behind the text, its own "
                f"next token included, and it was trained for at most {use.max_depth}: lower the budgets "
                "and lengths, or cut."
            )
