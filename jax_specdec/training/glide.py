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

from jax_specdec._types import Array
from jax_specdec.models.decoder import Decoder, Output, Params
from jax_specdec.models.glide import GliDe, glimpse_text, last_seen
from jax_specdec.training import losses, trainer
from jax_specdec.training.config import GliDeRecipe, TrainConfig
from jax_specdec.training.data import Documents
from jax_specdec.training.visibility import visible_keys

# Held-out agreement is measured at delays up to this, whatever was trained.
MEASURED_DELAYS = 16


@dataclasses.dataclass(frozen=True)
class Pair:
    """A drafter and its target, reading the same text."""

    model: GliDe
    target: Decoder
    remat: bool = False

    def target_reads(
        self, params: Params, inputs: Array, logits: bool
    ) -> tuple[Output, Array | None]:
        """What the target makes of `inputs [B, T]`, and log-probabilities `float32[B, T, V]` or None."""
        out = self.target.apply(params, inputs, _positions(inputs), logits=logits)
        log_p = None if out.logits is None else jax.nn.log_softmax(out.logits, axis=-1)
        return out, log_p

    def drafter_reads(
        self, params: Params, target_params: Params, inputs: Array, seen: Output, visible: Array
    ) -> Array:
        """Log-probabilities `float32[B, T, V]` of the token after each of `inputs [B, T]`.

        Args:
          seen: what the target made of the inputs. visible: see `visible_keys`.
        """
        joined = self.model.join(params, target_params)
        glimpse = glimpse_text(seen.new_kv, visible, self.model.target.windows)
        hidden = last_seen(seen.hidden, visible) if self.model.config.hidden_input else None
        out = self.model.apply(
            joined, inputs, _positions(inputs), glimpse, hidden=hidden, remat=self.remat
        )
        assert out.logits is not None
        return jax.nn.log_softmax(out.logits, axis=-1)


def _positions(tokens: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)


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
        config.remat,
    )
    weights = losses.parse_mixture(recipe.loss)
    needs_target = any(name != "cross_entropy" for name, _ in weights)

    def loss(params: Params, frozen: Params, tokens: Array, key: Array) -> Array:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        seen, log_p = pair.target_reads(frozen, inputs, needs_target)
        visible = visible_keys(recipe.visibility, inputs.shape, model.config.trained_delay, key)
        log_q = pair.drafter_reads(params, frozen, inputs, seen, visible)
        each = losses.mixture(weights, log_p, log_q, labels, recipe.jensen_shannon_beta)
        return each.mean()

    def measure(params: Params, frozen: Params, tokens: Array) -> dict[str, Array]:
        """Every block is a draft: one pass measures all delays, each on its share of positions.

        What is measured is decoding's law for one layer without the target's hidden state, whose own keys
        depend on the text alone. Otherwise decoding reads committed tokens again at delay 1, and here
        the keys of a block carry the delays of their own places.
        """
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        length = inputs.shape[1]
        delays = max(1, min(MEASURED_DELAYS, length // 2))
        seen, log_p = pair.target_reads(frozen, inputs, True)
        assert log_p is not None
        visible = visible_keys("block", inputs.shape, delays, jax.random.key(0))
        log_q = pair.drafter_reads(params, frozen, inputs, seen, visible)
        each = losses.mixture(weights, log_p, log_q, labels, recipe.jensen_shannon_beta)
        position = jnp.arange(length, dtype=jnp.int32)[:, None]
        place = jnp.arange(delays, dtype=jnp.int32)[None]
        # The first block sees nothing, which happens once in a text.
        counts = ((position % delays == place) & (position >= delays)).astype(jnp.float32)

        def by_delay(values: Array) -> Array:
            total = jnp.dot(values, counts, precision=lax.Precision.HIGHEST)
            return total.mean(axis=0) / counts.sum(axis=0)

        acceptance, match = losses.agreement(log_p, log_q)
        return {
            "heldout_loss": each.mean(),
            "heldout_cross_entropy": losses.cross_entropy(log_q, labels).mean(),
            "acceptance": by_delay(acceptance),
            "greedy_match": by_delay(match),
        }

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
