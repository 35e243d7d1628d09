"""No drafting: plain decoding by the same loop."""

import dataclasses

from jax_specdec.core.draft import root_only
from jax_specdec.core.drafter import Info, StatelessDrafter


@dataclasses.dataclass(frozen=True)
class NoDrafter(StatelessDrafter):
    """The baseline: the draft is the root alone, so a round is one token of the target."""

    info = Info("none", nodes=0, depth=0, sizes=(0,), sources=())

    def draft(self, params, states, ctx):
        del params
        return root_only(ctx.text), states
