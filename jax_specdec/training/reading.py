"""The frozen target's side of training a drafter: it reads each batch once, for all that learn from it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_specdec._types import Array, Params
from jax_specdec.models.decoder import Decoder


class Reading(NamedTuple):
    """What the target made of a batch of texts `[B, T+1]`, their last tokens left out.

    Attributes:
      kv, hidden: as `Output.new` and `Output.hidden`.
      log_p: log-probabilities `float32[B, T, V]` of the token after each input.
    """

    kv: Any
    hidden: Array
    log_p: Array


def read(target: Decoder, target_params: Params, tokens: Array) -> Reading:
    """The target's reading of `tokens [B, T+1]` without the last one."""
    inputs = tokens[:, :-1]
    out = target.apply(target_params, inputs, positions(inputs))
    assert out.logits is not None
    return Reading(out.new, out.hidden, jax.nn.log_softmax(out.logits, axis=-1))


def positions(tokens: Array) -> Array:
    """0, 1, .. of each row of `tokens [B, T]`."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
