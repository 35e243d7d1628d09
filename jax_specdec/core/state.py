"""Everything a round reads and writes."""

import flax.struct

from jax_specdec._types import Array, Int, UInt
from jax_specdec.core.budget import Budget
from jax_specdec.core.context import TargetView
from jax_specdec.core.draft import Text
from jax_specdec.core.drafter import States
from jax_specdec.core.sampling import Sampling
from jax_specdec.core.stats import Stats


class LoopState(flax.struct.PyTreeNode):
    """Everything a round reads and writes.

    Attributes:
      text: committed tokens. `text.tokens[:, length - 1]` is the root, which the target has not read yet.
      prompt_length, limit: `int32[B]`; a row ends when its length reaches `limit`.
      view: the target's cache and taps, of length `text.length - 1`.
      drafts: drafter states by name.
      keys: `uint32[B, 2]`, key data per row. stop_state: `int32[B]`, stop-string automaton.
      budget: how deep to draft and how wide to verify; None where every round is the drafter's whole draft.
    """

    text: Text
    prompt_length: Int[Array, " B"]
    limit: Int[Array, " B"]
    view: TargetView
    drafts: States
    keys: UInt[Array, "B 2"]
    sampling: Sampling
    stop_state: Int[Array, " B"]
    stats: Stats
    budget: Budget | None = None
