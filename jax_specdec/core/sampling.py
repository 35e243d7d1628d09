"""Temperature, top-k, top-p and min-p, one value per row, and what else a request asks for.

The distribution of a node is `softmax(warp(logits))`; at temperature 0 it is the argmax. Warping is applied
to the target and to proposals alike. Thresholds are found by bisection over the 32-bit patterns of the
floats, which is exact and needs no sort.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Array, Bool, Float, Int, UInt
from jax_specdec.core.numerics import NEG_INF, argmax, largest_threshold, order_key
from jax_specdec.core.processors import Processing, make_processing
from jax_specdec.core.rows import PerRow, per_row
from jax_specdec.errors import UserError

STRING_COMPLETE = -2  # in the stop-string automaton: a stop string is in the text


class Sampling(flax.struct.PyTreeNode):
    """Sampling parameters, one entry per row.

    Attributes:
      temperature: `float32[B]`, 0 is greedy. top_k: `int32[B]`, 0 is off. top_p: `float32[B]`, 1 is
        off. min_p: `float32[B]`, relative to the best token's probability, 0 is off.
      seed: `uint32[B]`. own_seed: `bool[B]`, the seed is the row's own and is not folded with its
        request id.
      max_new_tokens: `int32[B]`.
      stop_ids: `int32[B, n]`, token ids that end a row, -1 for none.
      stop_state: `int32[B]`, the row's start state in the stop-string automaton, -1 for none.
      stop_table: `int32[A, V]`, the automaton's next state, `STRING_COMPLETE` where one is in the text; A is 0
        where no row has stop strings.
      processing: penalties, bias and forbidden words, or None where no row has any.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    seed: UInt[Array, " B"]
    own_seed: Bool[Array, " B"]
    max_new_tokens: Int[Array, " B"]
    stop_ids: Int[Array, "B n"]
    stop_state: Int[Array, " B"]
    stop_table: Int[Array, "A V"]
    processing: Processing | None = None


def make_sampling(
    batch: int,
    *,
    max_new_tokens: PerRow,
    temperature: PerRow = 0.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
    seed: PerRow = 0,
    own_seed: PerRow = False,
    stop_ids: Sequence[int] | np.ndarray = (),
    stop_state: PerRow = -1,
    stop_table: np.ndarray | None = None,
    repetition_penalty: PerRow = 1.0,
    presence_penalty: PerRow = 0.0,
    frequency_penalty: PerRow = 0.0,
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] = (),
    min_new_tokens: PerRow = 0,
    bad_words: Sequence[Any] = (),
) -> Sampling:
    """Host values, scalars or one per row, to checked arrays.

    >>> make_sampling(2, max_new_tokens=8, temperature=[0.0, 0.7]).temperature.tolist()
    [0.0, 0.699999988079071]

    Args:
      repetition_penalty and what follows: see `processors.make_processing`.

    Raises:
      UserError: a value outside its range, NaN included, with the value.
    """

    def rows(name: str, value: PerRow, dtype: Any, legal: Any, expected: str) -> Array:
        return per_row(name, value, batch, dtype, legal, expected)

    stops = np.asarray(stop_ids, np.int32)
    stops = np.broadcast_to(stops, (batch, stops.shape[-1]))
    own = np.asarray(own_seed, bool)
    made = Sampling(
        temperature=rows(
            "temperature", temperature, "f4", lambda t: 0 <= t < np.inf, "finite and at least 0"
        ),
        top_k=rows("top_k", top_k, "i4", lambda k: 0 <= k < 2**31, "0 (off) or a positive count"),
        top_p=rows("top_p", top_p, "f4", lambda p: 0 < p <= 1, "in (0, 1]"),
        min_p=rows("min_p", min_p, "f4", lambda p: 0 <= p <= 1, "in [0, 1]"),
        seed=rows("seed", seed, "u4", lambda s: 0 <= s < 2**32, "in [0, 2^32)"),
        own_seed=jax.device_put(np.broadcast_to(own, (batch,))),
        max_new_tokens=rows(
            "max_new_tokens",
            max_new_tokens,
            "i4",
            # The prompt's length is added to it in int32.
            lambda n: 1 <= n < 2**30,
            "at least 1 and below 2^30",
        ),
        stop_ids=jax.device_put(stops),
        stop_state=jax.device_put(np.broadcast_to(np.asarray(stop_state, np.int32), (batch,))),
        stop_table=jax.device_put(
            np.zeros((0, 1), np.int32) if stop_table is None else np.asarray(stop_table, np.int32)
        ),
        processing=make_processing(
            batch,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            min_new_tokens=min_new_tokens,
            bad_words=bad_words,
        ),
    )
    # By the host's values, as `make_processing`.
    limits = np.broadcast_arrays(*(np.ravel(x) for x in (min_new_tokens, max_new_tokens)))
    for fewest, most in zip(*(x.tolist() for x in limits), strict=True):
        if fewest > most:
            raise UserError(
                f"min_new_tokens must not be above max_new_tokens, got {fewest} and {most}."
            )
    return made


def _top_k(scores: Float[Array, "B T V"], top_k: Int[Array, " B"]) -> Float[Array, "B T V"]:
    order = order_key(scores)
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, scores.shape[-1]), scores.shape[-1])[:, None]

    def holds(threshold):
        return jnp.sum(order >= threshold[..., None], axis=-1, dtype=jnp.int32) >= wanted

    keep = order >= largest_threshold(holds, scores.shape[:2])[..., None]
    return jnp.where(keep | (top_k <= 0)[:, None, None], scores, NEG_INF)


def _top_p(scores: Float[Array, "B T V"], top_p: Float[Array, " B"]) -> Float[Array, "B T V"]:
    weight = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    order = order_key(weight)
    wanted = top_p[:, None] * jnp.sum(weight, axis=-1)

    def holds(threshold):
        kept = jnp.sum(jnp.where(order >= threshold[..., None], weight, 0.0), axis=-1)
        return kept >= wanted

    keep = order >= largest_threshold(holds, scores.shape[:2])[..., None]
    return jnp.where(keep | (top_p >= 1)[:, None, None], scores, NEG_INF)


def _min_p(scores: Float[Array, "B T V"], min_p: Float[Array, " B"]) -> Float[Array, "B T V"]:
    weight = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    keep = weight >= min_p[:, None, None]
    return jnp.where(keep, scores, NEG_INF)


def warp(logits: Float[Array, "B T V"], sampling: Sampling) -> Float[Array, "B T V"]:
    """Log-weights of the distribution: temperature, then top-k, top-p, min-p.

    Tokens that are filtered out are -inf. Ties at a threshold are all kept. Rows at temperature 0 keep their
    logits: only their argmax matters. Work that no row asks for is skipped at run time.
    """
    hot = sampling.temperature > 0
    # The best score is taken off first: 0 / T stays 0 where x / T would overflow.
    floor = jnp.finfo(jnp.float32).tiny
    scale = jnp.where(hot, jnp.maximum(sampling.temperature, floor), jnp.float32(1))[:, None, None]

    def sampled(x: Array) -> Array:
        x = (x - jnp.max(x, axis=-1, keepdims=True)) / scale
        for active, apply in (
            (sampling.top_k > 0, lambda s: _top_k(s, sampling.top_k)),
            (sampling.top_p < 1, lambda s: _top_p(s, sampling.top_p)),
            (sampling.min_p > 0, lambda s: _min_p(s, sampling.min_p)),
        ):
            x = lax.cond(jnp.any(active & hot), apply, lambda s: s, x)
        return x

    warped = lax.cond(jnp.any(hot), sampled, lambda x: x, logits)
    return jnp.where(hot[:, None, None], warped, logits)


def distribution(scores: Float[Array, "B T V"], sampling: Sampling) -> Float[Array, "B T V"]:
    """Probabilities from warped logits; one-hot at temperature 0."""
    soft = jax.nn.softmax(scores, axis=-1)
    best = jax.nn.one_hot(argmax(scores), scores.shape[-1], dtype=soft.dtype)
    return jnp.where((sampling.temperature > 0)[:, None, None], soft, best)
