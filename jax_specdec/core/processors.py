"""Logits processors with a history of their own at every node of the tree."""

import dataclasses
from typing import Protocol, runtime_checkable

import flax.struct
import jax.numpy as jnp
import numpy as np

from jax_specdec._types import Array, Bool, Float, Int
from jax_specdec.errors import UserError


class History(flax.struct.PyTreeNode):
    """What a processor may read: the committed text and the drafted path down to each node.

    Attributes:
      tokens: `int32[B, C]`. length: `int32[B]`. prompt_length: `int32[B]`.
      draft_tokens: `int32[B, T]`. on_path: `bool[B, T, T]`, entry (i, j) iff node j is node i or above
        it. The root (node 0) is the last committed token and is also in `tokens`.
    """

    tokens: Int[Array, "B C"]
    length: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    draft_tokens: Int[Array, "B T"]
    on_path: Bool[Array, "B T T"]


@runtime_checkable
class Processor(Protocol):
    """A logits processor with a history of its own at every node of the tree.

    Processors are frozen dataclasses (static under jit); they run on the raw logits, before warping.
    """

    def __call__(
        self, logits: Float[Array, "B T V"], history: History
    ) -> Float[Array, "B T V"]: ...


def seen_tokens(history: History, vocab: int) -> Bool[Array, "B T V"]:
    """Which tokens occur in the text (prompt included) or on the path to each node."""
    batch, nodes = history.draft_tokens.shape
    place = jnp.arange(history.tokens.shape[1], dtype=jnp.int32)[None]
    text = jnp.where(place < history.length[:, None], history.tokens, vocab)
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    base = jnp.zeros((batch, vocab), bool).at[row, text].set(True, mode="drop")
    token = jnp.where(history.on_path, history.draft_tokens[:, None], vocab)  # [B, T, T]
    node = jnp.arange(nodes, dtype=jnp.int32)[None, :, None]
    path = jnp.zeros((batch, nodes, vocab), bool)
    path = path.at[row[..., None], node, token].set(True, mode="drop")
    return path | base[:, None]


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Makes tokens that are in the text less likely (Keskar et al., arXiv 1909.05858, section 4.1).

    As in transformers: the logit of every token seen in the prompt, the output or on the way to the node
    is divided by `penalty` where it is positive and multiplied by it where it is not. 1 is off.
    """

    penalty: float

    def __post_init__(self):
        if not 0 < self.penalty < np.inf:
            raise UserError(f"A repetition penalty must be finite and above 0, got {self.penalty}.")

    def __call__(self, logits: Float[Array, "B T V"], history: History) -> Float[Array, "B T V"]:
        penalty = jnp.float32(self.penalty)
        lower = jnp.where(logits > 0, logits / penalty, logits * penalty)
        return jnp.where(seen_tokens(history, logits.shape[-1]), lower, logits)
