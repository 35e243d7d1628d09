"""The sampling law: what the next token's distribution is, at every node of a draft.

Processors with a history, then temperature and filters. Target and drafters apply the same law, so that a
drafter does not propose what a penalty forbids.
"""

import flax.struct
import jax.numpy as jnp

from jax_specdec._types import Array, Bool, Float, Int
from jax_specdec.core import sampling as warping
from jax_specdec.core.draft import Text
from jax_specdec.core.processors import History, Processor
from jax_specdec.core.sampling import Sampling


class Law(flax.struct.PyTreeNode):
    """Temperature, filters and processors of a batch.

    Attributes:
      sampling: one entry per row. prompt_length: `int32[B]`, what some processors do not count.
      processors: static; a user's own, applied after those of `sampling.processing`.
    """

    sampling: Sampling
    prompt_length: Int[Array, " B"]
    processors: tuple[Processor, ...] = flax.struct.field(pytree_node=False, default=())

    @property
    def has_history(self) -> bool:
        """Static: whether a node's scores depend on the tokens that lead to it."""
        return self.sampling.processing is not None or bool(self.processors)

    def process(
        self,
        logits: Float[Array, "B T V"],
        text: Text,
        drafted: Int[Array, "B M"] | None = None,
        on_path: Bool[Array, "#B T M"] | None = None,
    ) -> Float[Array, "B T V"]:
        """The logits after all processors, each node with the history that leads to it."""
        if not self.has_history:
            return logits
        batch, nodes = logits.shape[:2]
        if drafted is None or on_path is None:
            drafted = jnp.zeros((batch, 0), jnp.int32)
            on_path = jnp.zeros((batch, nodes, 0), bool)
        on_path = jnp.broadcast_to(on_path, (batch, nodes, drafted.shape[1]))
        history = History(text.tokens, text.length, self.prompt_length, drafted, on_path)
        processing = self.sampling.processing
        if processing is not None:
            logits = processing(logits, history, self.sampling.stop_ids)
        for processor in self.processors:
            logits = processor(logits, history)
        return logits

    def scores(
        self,
        logits: Float[Array, "B T V"],
        text: Text,
        drafted: Int[Array, "B M"] | None = None,
        on_path: Bool[Array, "#B T M"] | None = None,
    ) -> Float[Array, "B T V"]:
        """`process`, then `sampling.warp`: log-weights of the law at every node."""
        return warping.warp(self.process(logits, text, drafted, on_path), self.sampling)
