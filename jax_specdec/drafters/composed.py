"""States of drafters that are made of drafters."""

import jax

from jax_specdec.core.drafter import Drafter, States


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
