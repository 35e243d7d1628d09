"""What a drafter says of its draft beyond the tokens: children, probabilities, confidence."""

import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Float, Int
from jax_specdec.core.context import Context, tokens_of
from jax_specdec.core.draft import TOP
from jax_specdec.core.numerics import NEG_INF, largest
from jax_specdec.core.sampling import Sampling, distribution


def chain_fields(
    scores: Float[Array, "B P V"],
    tokens: Int[Array, "B P"],
    ctx: Context,
    words: Int[Array, " R"] | None = None,
) -> dict[str, Array]:
    """The fields of a chain's `Draft` that the context asks for.

    Args:
      scores: at each depth, those whose best the token is, of `Context.perturbed`; those of the law alone where the draft
        must hand over its distribution. tokens: what was drafted, by column.
      words: the token of each column, where that is not its number (`Context.may_score_some`).

    Children are ranked by what the token was chosen by. Under the match rule that is scores + noise:
    the target's token will be the best of its own scores + the same noise, so the next best of the
    drafter's sum are the likeliest alternatives. Under the rejection rule the drawn token comes first
    and the others follow by scores alone: which ones the residual prefers does not depend on the noise
    of the draw.

    Probabilities are a softmax at temperature 1 of logits + temperature * noise, which ranks in the same
    order. At temperature 0 this is the max softmax that CaPE calls confidence (arXiv 2402.02082, section
    4.2). At other temperatures it still measures how far the token is ahead, in the units of the drafter's
    errors. The token's probability under the law does not: an unlikely token that the noise made a clear
    winner will be the target's too.
    """
    fields: dict[str, Array] = {}
    sampling = ctx.law.sampling
    if ctx.return_q:
        fields["q"] = distribution(scores, sampling)
    if ctx.return_top or ctx.return_chance:
        if not ctx.return_top:
            chosen = jnp.take_along_axis(scores, tokens[..., None], axis=-1)
            return fields | {"probability": confidences(scores, chosen, sampling)[..., 0]}
        ids, probs = best_children(scores, tokens, sampling)
        ids = tokens_of(ids, words)
        fields["probability"] = probs[..., 0]
        # The children of the last node are not known: its row is empty.
        pad = ((0, 0), (0, 1), (0, 0))
        fields |= {"top_ids": jnp.pad(ids, pad), "top_probs": jnp.pad(probs, pad)}
    return fields


def best_children(
    scores: Float[Array, "B T V"], first: Int[Array, "B T"], sampling: Sampling, count: int = TOP
) -> tuple[Int[Array, "B T K"], Float[Array, "B T K"]]:
    """`first`, then the next best of `scores`, with probabilities at temperature 1.

    `scores` are logits / temperature, perhaps with noise added; the probabilities are those of
    `scores` * temperature, and of `scores` at temperature 0.
    """
    chosen = jnp.take_along_axis(scores, first[..., None], axis=-1)
    line = lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    others, ids = largest(
        jnp.where(line == first[..., None], NEG_INF, scores), min(count, scores.shape[-1]) - 1
    )
    values = jnp.concatenate([chosen, others], axis=-1)
    probs = confidences(scores, values, sampling)
    return jnp.concatenate([first[..., None], ids], axis=-1), probs


def confidences(
    scores: Float[Array, "B T V"], values: Float[Array, "B T K"], sampling: Sampling
) -> Float[Array, "B T K"]:
    """The probabilities at temperature 1 of tokens whose scores are `values`."""
    hot = sampling.temperature > 0
    floor = jnp.finfo(jnp.float32).tiny
    scale = jnp.where(hot, jnp.maximum(sampling.temperature, floor), jnp.float32(1))
    scale = scale.astype(scores.dtype)[:, None, None]
    top = jnp.max(scores, axis=-1, keepdims=True)
    total = jnp.sum(jnp.exp((scores - top) * scale), axis=-1, keepdims=True)
    return jnp.exp((values - top) * scale) / total
