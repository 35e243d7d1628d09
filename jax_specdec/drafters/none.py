"""No drafting: plain decoding by the same loop."""

import dataclasses

from jax_specdec.core.draft import root_only
from jax_specdec.core.drafter import StatelessDrafter


@dataclasses.dataclass(frozen=True)
class NoDrafter(StatelessDrafter):
    """The baseline: the draft is the root alone, so a round is one token of the target."""

    name: str = "none"
    num_nodes: int = 0
    depth: int = 0
    proposers: tuple[str, ...] = ()

    def draft(self, params, states, text, view, sampling, noise, active, room):
        del params, view, sampling, noise, active, room
        return root_only(text), states
