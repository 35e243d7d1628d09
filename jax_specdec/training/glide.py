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
from jax_specdec.training.glide_mask import drafts, random_drafts, visible_keys
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
        config, kind = self.model.config, self.recipe.visibility
        if kind == "draft" and config.trained_delay > 1:
            seen = random_drafts(shape, config.trained_delay, key, config.window)
            log_q = self.drafter_reads(
                params, target_params, reading, tokens, seen.visible, seen.ancestors
            )
            keep = (seen.delay > 0).astype(jnp.float32)  # which have a root in their text
            return jnp.sum(self._losses(reading, log_q, tokens) * keep) / jnp.sum(keep)
        visible = visible_keys(
            "none" if kind == "draft" else kind, shape, config.trained_delay, key
        )
        log_q = self.drafter_reads(params, target_params, reading, tokens, visible)
        return self._losses(reading, log_q, tokens).mean()

    def agreement(
        self, params: Params, target_params: Params, reading: Reading, tokens: Array
    ) -> dict[str, Array]:
        """What decoding accepts, by delay, in one pass: each delay but 1 on its share of positions, see `drafts`."""
        batch, length = tokens.shape[0], tokens.shape[1] - 1
        delays = max(2, min(MEASURED_DELAYS, length // 2))
        first = jnp.full((batch, 1), 1 % (delays - 1), jnp.int32)  # at best its root is token 0
        seen = drafts((batch, length), delays, first, self.model.config.window)
        log_q = self.drafter_reads(
            params, target_params, reading, tokens, seen.visible, seen.ancestors
        )
        counts = (seen.delay[..., None] == jnp.arange(1, delays + 1)).astype(jnp.float32)

        def by_delay(values: Array) -> Array:
            total = jnp.einsum("bt,btd->d", values, counts, precision=lax.Precision.HIGHEST)
            return total / counts.sum(axis=(0, 1))

        acceptance, match = losses.agreement(twice(reading.log_p), log_q)
        labels = twice(tokens[:, 1:])
        return {
            "heldout_loss": by_delay(self._losses(reading, log_q, tokens)).mean(),
            "heldout_cross_entropy": by_delay(losses.cross_entropy(log_q, labels)).mean(),
            "acceptance": by_delay(acceptance),
            "greedy_match": by_delay(match),
        }

    def drafter_reads(
        self,
        params: Params,
        target_params: Params,
        reading: Reading,
        tokens: Array,
        visible: Array,
        ancestors: Array | None = None,
    ) -> Array:
        """Log-probabilities `float32[B, T, V]` of the token after each of `tokens [B, T+1]` but the last.

        With the `visible` and `ancestors` of `Drafts`, `float32[B, 2T, V]`.
        """
        inputs = tokens[:, :-1]
        place, model = positions(inputs), self.model
        if ancestors is not None:
            inputs, place = twice(inputs), twice(place)
            # The mask holds the window, of positions: the two readings lie one behind the other.
            model = dataclasses.replace(
                model, config=dataclasses.replace(model.config, window=None)
            )
        joined = model.join(params, target_params)
        target = model.target
        glimpse = glimpse_text(
            reading.kv,
            visible,
            target.windows,
            scale=target.scale,
            soft_cap=target.attention_cap,
        )
        hidden = None
        if model.config.hidden_input:
            hidden = last_seen(reading.hidden, visible)
        out = model.apply(
            joined,
            inputs,
            place,
            glimpse,
            ancestors=ancestors,
            hidden=hidden,
            visible=visible,
            remat=self.remat,
        )
        assert out.logits is not None
        return jax.nn.log_softmax(out.logits, axis=-1)

    def _losses(self, reading: Reading, log_q: Array, tokens: Array) -> Array:
        log_p, labels = reading.log_p, tokens[:, 1:]
        if log_q.shape[1] != log_p.shape[1]:
            log_p, labels = twice(log_p), twice(labels)
        return losses.of_recipe(self.recipe, log_p, log_q, labels)


def twice(x: Array) -> Array:
    """`[B, T, ...]` -> the same behind itself, `[B, 2T, ...]`."""
    return jnp.concatenate([x, x], axis=1)


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
