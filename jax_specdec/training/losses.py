"""Losses of a drafter q against its target p, and what they are for: agreement.

Each loss takes log-probabilities `float32[..., V]` and returns nats (or, for the total variation, a share)
`float32[...]`. The divergences are those of DistillSpec (Zhou et al., arXiv 2310.08461, table 1). A drafted
token is accepted with probability 1 - TV(p, q) at temperature 1 (section 3 there).
"""

from typing import Protocol

import jax.numpy as jnp

from jax_specdec._types import Array, Float, Int
from jax_specdec.core.numerics import argmax
from jax_specdec.errors import UserError

LOSSES = ("cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon", "total_variation")


def parse_mixture(text: str) -> tuple[tuple[str, float], ...]:
    """`name` or `name=weight,name=weight` -> pairs of name and weight.

    Raises:
      UserError: an unknown loss, or a weight that is not above 0.
    """
    found = []
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        if name not in LOSSES:
            raise UserError(f"Unknown loss {name!r}; there are {', '.join(LOSSES)}.")
        try:
            value = float(weight or 1)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise UserError(f"The weight of {name} must be a number above 0, got {weight!r}.")
        found.append((name, value))
    return tuple(found)


def kl(log_p: Float[Array, "*s V"], log_q: Float[Array, "*s V"]) -> Float[Array, "*s"]:
    """KL(p || q); tokens that p excludes add nothing."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)


def jensen_shannon(
    log_p: Float[Array, "*s V"], log_q: Float[Array, "*s V"], beta: float
) -> Float[Array, "*s"]:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""
    log_m = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def total_variation(log_p: Float[Array, "*s V"], log_q: Float[Array, "*s V"]) -> Float[Array, "*s"]:
    """Half the sum of |p - q|."""
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def mixture(
    weights: tuple[tuple[str, float], ...],
    log_p: Float[Array, "*s V"],
    log_q: Float[Array, "*s V"],
    labels: Int[Array, "*s"],
    beta: float,
) -> Float[Array, "*s"]:
    """The weighted sum of losses at each position.

    Args:
      labels: the next token of the data, for the cross-entropy. beta: of Jensen-Shannon.
    """
    losses = {
        "cross_entropy": lambda: cross_entropy(log_q, labels),
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "jensen_shannon": lambda: jensen_shannon(log_p, log_q, beta),
        "total_variation": lambda: total_variation(log_p, log_q),
    }
    total = jnp.zeros(labels.shape, jnp.float32)
    for name, weight in weights:
        total = total + weight * losses[name]()
    return total


class Recipe(Protocol):
    """What says which losses are meant."""

    @property
    def loss(self) -> str: ...

    @property
    def jensen_shannon_beta(self) -> float: ...


def of_recipe(
    recipe: Recipe,
    log_p: Float[Array, "*s V"],
    log_q: Float[Array, "*s V"],
    labels: Int[Array, "*s"],
) -> Float[Array, "*s"]:
    """The `mixture` that a recipe names."""
    weights = parse_mixture(recipe.loss)
    return mixture(weights, log_p, log_q, labels, recipe.jensen_shannon_beta)


def cross_entropy(log_q: Float[Array, "*s V"], labels: Int[Array, "*s"]) -> Float[Array, "*s"]:
    """-log q of the label."""
    return -jnp.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]


def agreement(
    log_p: Float[Array, "*s V"], log_q: Float[Array, "*s V"]
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """At each position: sum of min(p, q), how often a drawn token is accepted; whether the best agree."""
    acceptance = jnp.sum(jnp.exp(jnp.minimum(log_p, log_q)), axis=-1)
    return acceptance, (argmax(log_p) == argmax(log_q)).astype(jnp.float32)
