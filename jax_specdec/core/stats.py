"""What a run counts."""

import flax.struct
import jax.numpy as jnp

from jax_specdec._types import Array, Bool, Float, Int
from jax_specdec.core.draft import Draft
from pallas_kernels import write_rows

RUNNING, STOP, LENGTH, FAILED = range(4)
FINISH_REASONS = {RUNNING: None, STOP: "stop", LENGTH: "length", FAILED: "failed"}


class Stats(flax.struct.PyTreeNode):
    """Counts and per-token records of a run.

    Attributes:
      rounds: `int32[B]`, target forwards while the row was running (prefill apart).
      drafted, accepted: `int32[B, O+1]`, tokens by source; column 0 is unused.
      calls: `int32[B, O+1]`, rounds in which tokens of the source were verified for the row.
      accepted_per_pos: `int32[B, P]`, how often the draft's token at depth d + 1 was accepted.
      depths: `int32[B, P+1]`, rounds by drafted tokens: those asked for, or as many as a model drafted before it
        ended itself; column 0 are those without a draft.
      widths: `int32[B, K]`, rounds by the loop's widths, the drafter's own where it has none.
      finish: `int32[B]`: RUNNING, STOP, LENGTH, or FAILED where the scores were not finite.
      source: `int32[B, C]`, source of each emitted token, 0 the target. Indexed as the text.
      logprobs: `float32[B, C]`, the target's log-probability (nats, before processors, temperature and
        filters) of each emitted token, or None where they are not recorded. Prompt positions hold 0.
      margins: `float32[B, C]`, by how much the emitted token's score beat the second best, infinite where it
        was drawn otherwise; or None.
    """

    rounds: Int[Array, " B"]
    drafted: Int[Array, "B O"]
    accepted: Int[Array, "B O"]
    calls: Int[Array, "B O"]
    accepted_per_pos: Int[Array, "B P"]
    depths: Int[Array, "B D"]
    widths: Int[Array, "B K"]
    finish: Int[Array, " B"]
    source: Int[Array, "B C"]
    logprobs: Float[Array, "B C"] | None
    margins: Float[Array, "B C"] | None

    @classmethod
    def empty(
        cls,
        finish: Int[Array, " B"],
        columns: int,
        sources: int,
        depth: int,
        widths: int,
        *,
        logprobs: bool,
        margins: bool,
    ) -> "Stats":
        """Nothing counted yet, for texts of `columns` tokens."""
        batch = finish.shape[0]
        counts = jnp.zeros((batch, sources + 1), jnp.int32)
        record = jnp.zeros((batch, columns), jnp.float32)
        return cls(
            rounds=jnp.zeros((batch,), jnp.int32),
            drafted=counts,
            accepted=counts,
            calls=counts,
            accepted_per_pos=jnp.zeros((batch, depth), jnp.int32),
            depths=jnp.zeros((batch, depth + 1), jnp.int32),
            widths=jnp.zeros((batch, widths), jnp.int32),
            finish=finish,
            source=jnp.zeros((batch, columns), jnp.int32),
            logprobs=record if logprobs else None,
            margins=record if margins else None,
        )

    def record(
        self,
        draft: Draft,
        path: Int[Array, "B Q"],
        verified: Int[Array, " B"],
        accepted: Int[Array, " B"],
        finish: Int[Array, " B"],
        start: Int[Array, " B"],
        active: Bool[Array, " B"],
        logprobs: Float[Array, "B Q"] | None,
        margins: Float[Array, "B Q"] | None,
        *,
        depth: Int[Array, ""],
        width: Int[Array, ""],
    ) -> "Stats":
        """The counts with one more round in them.

        Args:
          draft: what was verified. path, verified: as in `Verification`. accepted: drafted tokens that became
            text. start: length of the text before the round. logprobs, margins: of each emitted token.
          depth: tokens that were drafted. width: the index of the round's width.
        """
        window = path.shape[1]
        place = jnp.arange(window, dtype=jnp.int32)[None]
        # The token emitted at place d is node path[d + 1], or the target's own behind the accepted ones.
        following = jnp.broadcast_to(jnp.minimum(place + 1, window - 1), path.shape)
        node = jnp.take_along_axis(path, following, axis=1)
        source = jnp.take_along_axis(draft.source, node, axis=1)
        source = jnp.where(place == verified[:, None], 0, source)
        landed = (place < accepted[:, None]) & active[:, None]
        drafted = self._by_source(draft.source, draft.valid & active[:, None] & (draft.source > 0))

        def one_more(counts: Array, at: Array) -> Array:
            here = jnp.arange(counts.shape[1], dtype=jnp.int32)[None] == at
            return counts + (here & active[:, None]).astype(jnp.int32)

        def written(record: Array | None, values: Array | None) -> Array | None:
            if record is None or values is None:
                return record
            return write_window(record, values, start)

        return self.replace(
            rounds=self.rounds + active.astype(jnp.int32),
            drafted=self.drafted + drafted,
            calls=self.calls + (drafted > 0).astype(jnp.int32),
            accepted=self.accepted + self._by_source(source, landed),
            accepted_per_pos=self.accepted_per_pos + landed[:, :-1].astype(jnp.int32),
            depths=one_more(self.depths, depth),
            widths=one_more(self.widths, width),
            finish=finish,
            source=write_window(self.source, source, start),
            logprobs=written(self.logprobs, logprobs),
            margins=written(self.margins, margins),
        )

    def _by_source(self, source: Array, mask: Array) -> Int[Array, "B O"]:
        label = jnp.arange(self.drafted.shape[1], dtype=jnp.int32)[None, None]
        return jnp.sum((source[..., None] == label) & mask[..., None], axis=1, dtype=jnp.int32)


def write_window(buffer: Array, values: Array, start: Int[Array, " B"]) -> Array:
    """Writes `values [B, Q]` at `start[b]` of each row of `buffer [B, C]`, which must have room."""
    return write_rows(buffer[:, None, :, None], values[:, None, :, None], start)[:, 0, :, 0]
