"""`train glide`: a GliDe drafter beside its frozen target (Du et al., arXiv 2402.02082, section 4.2).

The target reads each batch inside the step, without a gradient, and its keys and values are used and
dropped. The paper's recipe is `GliDeConfig.paper`, visibility `block` and the loss `cross_entropy`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Array, Params
from jax_specdec.core.context import last_seen
from jax_specdec.models.decoder import Decoder
from jax_specdec.models.glide import GliDe, glimpse_text
from jax_specdec.training import losses, trainer
from jax_specdec.training.config import GliDeRecipe, TrainConfig
from jax_specdec.training.data import Documents
from jax_specdec.training.glide_mask import visible_keys
from jax_specdec.training.reading import Reading, positions, read

# Held-out agreement is measured at delays up to this, whatever was trained.
MEASURED_DELAYS = 16


@dataclasses.dataclass(frozen=True)
class Pair:
    """A drafter and its target, reading the same text.

    The target reads a batch once (`read`), for as many drafters as learn from it.
    """

    model: GliDe
    target: Decoder
    recipe: GliDeRecipe
    remat: bool = False

    def read(self, target_params: Params, tokens: Array) -> Reading:
        """The target's reading of `tokens [B, T+1]` without the last one."""
        return read(self.target, target_params, tokens)

    def loss(
        self, params: Params, target_params: Params, reading: Reading, tokens: Array, key: Array
    ) -> Array:
        """The mean loss over `tokens [B, T+1]`, keys hidden as the recipe says."""
        shape = (tokens.shape[0], tokens.shape[1] - 1)
        delay = self.model.config.trained_delay
        visible = visible_keys(self.recipe.visibility, shape, delay, key)
        log_q = self.drafter_reads(params, target_params, reading, tokens, visible)
        return self._losses(reading, log_q, tokens).mean()

    def agreement(
        self, params: Params, target_params: Params, reading: Reading, tokens: Array
    ) -> dict[str, Array]:
        """Every block is a draft: one pass measures all delays, each on its share of positions.

        For one layer without the target's hidden state this is decoding's acceptance, since the drafter's
        own keys depend on the text alone. For other forms it is an estimate: decoding reads committed tokens
        again at delay 1, while here the keys of a block carry the delays of their own places.
        """
        length = tokens.shape[1] - 1
        delays = max(1, min(MEASURED_DELAYS, length // 2))
        visible = visible_keys("block", (tokens.shape[0], length), delays, jax.random.key(0))
        log_q = self.drafter_reads(params, target_params, reading, tokens, visible)
        position = jnp.arange(length, dtype=jnp.int32)[:, None]
        place = jnp.arange(delays, dtype=jnp.int32)[None]
        # The first block sees nothing, which happens once in a text.
        counts = ((position % delays == place) & (position >= delays)).astype(jnp.float32)

        def by_delay(values: Array) -> Array:
            total = jnp.matmul(values, counts, precision=lax.Precision.HIGHEST)
            return total.mean(axis=0) / counts.sum(axis=0)

        acceptance, match = losses.agreement(reading.log_p, log_q)
        return {
            "heldout_loss": self._losses(reading, log_q, tokens).mean(),
            "heldout_cross_entropy": losses.cross_entropy(log_q, tokens[:, 1:]).mean(),
            "acceptance": by_delay(acceptance),
            "greedy_match": by_delay(match),
        }

    def drafter_reads(
        self, params: Params, target_params: Params, reading: Reading, tokens: Array, visible: Array
    ) -> Array:
        """Log-probabilities `float32[B, T, V]` of the token after each of `tokens [B, T+1]` but the last."""
        inputs = tokens[:, :-1]
        joined = self.model.join(params, target_params)
        target = self.model.target
        glimpse = glimpse_text(
            reading.kv,
            visible,
            target.windows,
            scale=target.scale,
            soft_cap=target.attention_cap,
        )
        hidden = None
        if self.model.config.hidden_input:
            hidden = last_seen(reading.hidden, visible)
        place, remat = positions(inputs), self.remat
        out = self.model.apply(
            joined, inputs, place, glimpse, hidden=hidden, visible=visible, remat=remat
        )
        assert out.logits is not None
        return jax.nn.log_softmax(out.logits, axis=-1)

    def _losses(self, reading: Reading, log_q: Array, tokens: Array) -> Array:
        return losses.of_recipe(self.recipe, reading.log_p, log_q, tokens[:, 1:])


def make_objective(
    model: GliDe,
    target: Decoder,
    target_params: Params,
    recipe: GliDeRecipe,
    config: TrainConfig,
    fingerprint: str = "",
) -> trainer.Objective:
    """The objective of a run.

    Args:
      fingerprint: of the target, so that a run is not resumed beside another one.
    """
    dtype = jnp.dtype(config.dtype)
    pair = Pair(
        dataclasses.replace(model, dtype=dtype),
        dataclasses.replace(target, dtype=dtype),
        recipe,
        config.remat,
    )

    def loss(params: Params, frozen: Params, tokens: Array, key: Array) -> Array:
        return pair.loss(params, frozen, pair.read(frozen, tokens), tokens, key)

    def measure(params: Params, frozen: Params, tokens: Array) -> dict[str, Array]:
        return pair.agreement(params, frozen, pair.read(frozen, tokens), tokens)

    return trainer.Objective(
        init=dataclasses.replace(model, dtype=jnp.dtype(jnp.float32)).init,
        loss=loss,
        measure=measure,
        settings={
            "glide": dataclasses.asdict(model.config),
            "recipe": dataclasses.asdict(recipe),
            "target": fingerprint,
        },
        frozen=jax.tree.map(lambda x: x.astype(dtype), target_params),
        places=None if model.sharding is None else lambda _: model.places(),
    )


def train(
    model: GliDe,
    target: Decoder,
    target_params: Params,
    recipe: GliDeRecipe,
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
