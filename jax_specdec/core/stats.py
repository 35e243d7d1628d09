"""What a run counts."""

import flax.struct

from jax_specdec._types import Array, Float, Int

RUNNING, STOP, LENGTH = 0, 1, 2


FINISH_REASONS = {RUNNING: None, STOP: "stop", LENGTH: "length"}


class Stats(flax.struct.PyTreeNode):
    """Counts and per-token records of a run.

    Attributes:
      rounds: `int32[B]`, target forwards while the row was running (prefill apart).
      drafted, accepted: `int32[B, O+1]`, tokens by proposer; column 0 is unused.
      calls: `int32[B, O+1]`, rounds in which the proposer drafted for the row.
      accepted_per_pos: `int32[B, P]`, how often the draft's token at depth d + 1 was accepted.
      finish: `int32[B]`: RUNNING, STOP or LENGTH.
      logprobs: `float32[B, C]`, the target's log-probability (nats, before temperature and filters) of
        each emitted token. margins: `float32[B, C]`, by how much the emitted token's score beat the
        second best. Both are indexed as the text; prompt positions hold 0.
      origin: `int32[B, C]`, proposer of each emitted token, 0 the target.
    """

    rounds: Int[Array, " B"]
    drafted: Int[Array, "B O"]
    accepted: Int[Array, "B O"]
    calls: Int[Array, "B O"]
    accepted_per_pos: Int[Array, "B P"]
    finish: Int[Array, " B"]
    logprobs: Float[Array, "B C"]
    margins: Float[Array, "B C"]
    origin: Int[Array, "B C"]
