"""Text that a drafter writes itself: the on-policy data of DistillSpec (Zhou et al., arXiv 2310.08461)."""

import dataclasses

import jax.numpy as jnp

from jax_specdec.core.acceptance import Verdict
from jax_specdec.core.loop import DecodeLoop
from jax_specdec.drafters.neural import NeuralDrafter
from jax_specdec.errors import UserError


@dataclasses.dataclass(frozen=True)
class Unverified(DecodeLoop):
    """A loop whose text is what the drafter proposes, draft after draft; the target only reads it.

    Nothing is lossless here. The i-th token of each block is predicted at delay i, as it is in decoding
    where the tokens before it are accepted. For a drafter that sees nothing of the target this is its
    own plain decoding.

    Raises:
      UserError: a drafter that is not a neural one, or an expansion.
    """

    def __post_init__(self):
        if not isinstance(self.drafter, NeuralDrafter):
            raise UserError(
                f"The drafter {self.drafter.name!r} cannot write text: lm and glide can, without an "
                "expansion."
            )

    def _verify(self, state, draft, logits, noise):
        del state, noise
        nodes = draft.tokens.shape[1]
        proposed = jnp.sum(draft.valid[:, 1:], axis=1, dtype=jnp.int32)
        path = jnp.broadcast_to(jnp.arange(nodes, dtype=jnp.int32)[None], draft.tokens.shape)
        # The last drafted token stands where the target's own would, and is the next root.
        tokens = jnp.concatenate([draft.tokens[:, 1:], draft.tokens[:, -1:]], axis=1)
        verdict = Verdict(jnp.maximum(proposed - 1, 0), path, tokens)
        return verdict, jnp.full(logits.shape[:2], jnp.inf, jnp.float32)
