"""`train lm`: language-model training of any decoder, from JSONL to a Hugging Face folder."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from jax_specdec._types import Params
from jax_specdec.core.sharding import Sharding, is_names
from jax_specdec.models.decoder import Decoder
from jax_specdec.training import trainer
from jax_specdec.training.config import TrainConfig
from jax_specdec.training.data import Documents


def next_token_loss(decoder: Decoder, params: Params, tokens: jax.Array, remat: bool) -> jax.Array:
    """Mean cross-entropy in nats of `tokens int32[B, T+1]`, each predicted from those before it."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32)[None], inputs.shape)
    logits = decoder.apply(params, inputs, positions, remat=remat).logits
    assert logits is not None
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(
    decoder: Decoder,
    config: TrainConfig,
    documents: Documents,
    heldout: Sequence[np.ndarray],
    workdir: str | Path,
    **options: Any,
) -> Params:
    """Trains `decoder` and returns its float32 parameters; arguments and errors of `trainer.train`."""
    compute = dataclasses.replace(decoder, dtype=jnp.dtype(config.dtype))

    def loss(params: Params, frozen: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
        del frozen, key
        return next_token_loss(compute, params, tokens, config.remat)

    def measure(params: Params, frozen: Any, tokens: jax.Array) -> dict[str, jax.Array]:
        del frozen
        return {"heldout_loss": next_token_loss(compute, params, tokens, config.remat)}

    objective = trainer.Objective(
        init=dataclasses.replace(decoder, dtype=jnp.dtype(jnp.float32)).init,
        loss=loss,
        measure=measure,
        settings={"model": dataclasses.asdict(decoder.config)},
        places=functools.partial(_places, decoder),
    )
    return trainer.train(objective, config, documents, heldout, workdir, **options)


def _places(decoder: Decoder, sharding: Sharding) -> Params:
    """Along the axes that divide. Fused matrices are not in the order that decoding has: XLA moves more, and the
    state is the same for every mesh."""

    def place(names: tuple[str | None, ...], x: Any) -> NamedSharding:
        sizes = zip(names, x.shape, strict=True)
        return sharding.of(*(n if n and not size % sharding.size(n) else None for n, size in sizes))

    shapes = jax.eval_shape(decoder.init, jax.random.key(0))
    return jax.tree.map(place, decoder.axes()[0], shapes, is_leaf=is_names)
