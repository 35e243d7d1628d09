"""`train medusa`: Medusa heads on a frozen target (Cai et al., arXiv 2401.10774, section 2.2.1, Medusa-1).

The target reads each batch inside the step, without a gradient, as in `training.glide`. Head k reads the
hidden state of position t, from which the target predicts token t + 1, and learns token t + k + 1.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec._types import Array, Float, Params
from jax_specdec.checkpoints.medusa import Accuracies
from jax_specdec.core.draft import TOP
from jax_specdec.core.numerics import argmax
from jax_specdec.core.sharding import to_host
from jax_specdec.errors import UserError
from jax_specdec.models.decoder import Decoder
from jax_specdec.models.medusa import Medusa
from jax_specdec.training import losses, trainer
from jax_specdec.training.config import MedusaRecipe, TrainConfig
from jax_specdec.training.data import Documents, heldout_windows
from jax_specdec.training.reading import Reading, read


@dataclasses.dataclass(frozen=True)
class Heads:
    """Medusa heads and their target, reading the same text."""

    model: Medusa
    target: Decoder
    recipe: MedusaRecipe = dataclasses.field(default_factory=MedusaRecipe)
    remat: bool = False

    def read(self, target_params: Params, tokens: Array) -> Reading:
        """The target's reading of `tokens [B, T+1]` without the last one."""
        return read(self.target, target_params, tokens)

    def loss(self, params: Params, target_params: Params, reading: Reading, tokens: Array) -> Array:
        """The sum over heads of decay^k times the mean loss of head k, over `tokens [B, T+1]`."""
        total = jnp.zeros((), jnp.float32)
        for index in range(self.model.config.num_heads):
            weight = self.recipe.decay ** (index + 1)
            total = total + weight * self._head_loss(params, target_params, reading, tokens, index)
        return total

    def agreement(
        self, params: Params, target_params: Params, reading: Reading, tokens: Array
    ) -> dict[str, Array]:
        """The loss, and how often each head is right: `acceptance` and `greedy_match` by place in the draft."""
        found = []
        for index in range(self.model.config.num_heads):
            log_p, log_q = self.laws(params, target_params, reading, index)
            acceptance, match = losses.agreement(log_p, log_q)
            entropy = losses.cross_entropy(log_q, tokens[:, index + 2 :])
            found.append(jnp.stack([acceptance.mean(), match.mean(), entropy.mean()]))
        acceptance, match, entropy = jnp.stack(found, axis=1)
        return {
            "heldout_loss": self.loss(params, target_params, reading, tokens),
            "heldout_cross_entropy": entropy,
            "acceptance": acceptance,
            "greedy_match": match,
        }

    def accuracies(
        self, params: Params, target_params: Params, reading: Reading
    ) -> Float[Array, "H K"]:
        """How often the i-th best candidate of each head is the target's best token of its place."""
        return jnp.stack(
            [
                rank_shares(*self.laws(params, target_params, reading, index))
                for index in range(self.model.config.num_heads)
            ]
        )

    def laws(
        self, params: Params, target_params: Params, reading: Reading, index: int
    ) -> tuple[Array, Array]:
        """Log-probabilities `float32[B, T - k, V]`, k = index + 1: the target's, which has read the k tokens
        between, and the head's, without them."""
        joined = self.model.join(params, target_params)
        hidden = reading.hidden[:, : -index - 1]
        log_q = jax.nn.log_softmax(self.model.head(joined, hidden, index), axis=-1)
        return reading.log_p[:, index + 1 :], log_q

    def _head_loss(self, params, target_params, reading, tokens, index: int) -> Array:
        def mean(params: Params) -> Array:
            log_p, log_q = self.laws(params, target_params, reading, index)
            return losses.of_recipe(self.recipe, log_p, log_q, tokens[:, index + 2 :]).mean()

        # Otherwise the scores of all heads are kept for the backward pass.
        return jax.checkpoint(mean)(params) if self.remat else mean(params)


def rank_shares(log_p: Float[Array, "B T V"], log_q: Float[Array, "B T V"]) -> Float[Array, " K"]:
    """How often the best token of p is the i-th best of q, for the best 8."""
    best = jnp.take_along_axis(log_q, argmax(log_p)[..., None], axis=-1)
    rank = jnp.sum(log_q > best, axis=-1, dtype=jnp.int32)
    line = jnp.arange(min(TOP, log_q.shape[-1]), dtype=jnp.int32)
    return jnp.mean((rank[..., None] == line[None, None]).astype(jnp.float32), axis=(0, 1))


def check_window(model: Medusa, length: int) -> None:
    """Raises `UserError` for windows of `length` in which the last head would have nothing to learn."""
    heads = model.config.num_heads
    if length <= heads:
        raise UserError(
            f"Windows of {length} tokens leave nothing to the last of {heads} heads: raise "
            "--sequence-length."
        )


def calibrate(
    model: Medusa,
    target: Decoder,
    params: Params,
    target_params: Params,
    heldout: Sequence[np.ndarray],
    length: int,
    batch: int,
) -> Accuracies:
    """The accuracies of heads on held-out text, by which a static tree is chosen.

    Args:
      params: the heads' own. heldout: token ids per document. length, batch: of the windows that are read.
    """
    dtype = target.dtype
    heads = Heads(dataclasses.replace(model, dtype=dtype), target)
    own, frozen = (
        jax.tree.map(lambda x: jnp.asarray(x, dtype), tree) for tree in (params, target_params)
    )
    windows = heldout_windows(heldout, length)
    batch = min(batch, len(windows))
    found = [
        _accuracies(heads, own, frozen, jnp.asarray(windows[i : i + batch]))
        for i in range(0, len(windows) // batch * batch, batch)
    ]
    return tuple(map(tuple, np.mean(to_host(found), axis=0).astype(float).tolist()))


@functools.partial(jax.jit, static_argnums=0)
def _accuracies(heads: Heads, params: Params, target_params: Params, tokens: Array) -> Array:
    return heads.accuracies(params, target_params, heads.read(target_params, tokens))


def make_objective(
    model: Medusa,
    target: Decoder,
    target_params: Params,
    recipe: MedusaRecipe,
    config: TrainConfig,
    fingerprint: str = "",
) -> trainer.Objective:
    """The objective of a run.

    Args:
      fingerprint: of the target, so that a run is not resumed beside another one.

    Raises:
      UserError: windows that are too short for the heads.
    """
    check_window(model, config.sequence_length)
    dtype = jnp.dtype(config.dtype)
    heads = Heads(
        dataclasses.replace(model, dtype=dtype),
        dataclasses.replace(target, dtype=dtype),
        recipe,
        config.remat,
    )

    def init(key: Array) -> Params:
        del key
        return dataclasses.replace(model, dtype=jnp.dtype(jnp.float32)).init(target_params)

    def loss(params: Params, frozen: Params, tokens: Array, key: Array) -> Array:
        del key
        return heads.loss(params, frozen, heads.read(frozen, tokens), tokens)

    def measure(params: Params, frozen: Params, tokens: Array) -> dict[str, Array]:
        return heads.agreement(params, frozen, heads.read(frozen, tokens), tokens)

    return trainer.Objective(
        init=init,
        loss=loss,
        measure=measure,
        settings={
            "medusa": dataclasses.asdict(model.config),
            "recipe": dataclasses.asdict(recipe),
            "target": fingerprint,
        },
        frozen=jax.tree.map(lambda x: x.astype(dtype), target_params),
    )


def train(
    model: Medusa,
    target: Decoder,
    target_params: Params,
    recipe: MedusaRecipe,
    config: TrainConfig,
    documents: Documents,
    heldout: Sequence[np.ndarray],
    workdir: str | Path,
    *,
    fingerprint: str = "",
    **options: Any,
) -> Params:
    """Trains `model` and returns its own float32 parameters; see `make_objective` and `trainer.train`."""
    objective = make_objective(model, target, target_params, recipe, config, fingerprint)
    return trainer.train(objective, config, documents, heldout, workdir, **options)
