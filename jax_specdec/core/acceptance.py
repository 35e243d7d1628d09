"""Acceptance rules: which drafted path becomes text.

Each rule is a pure function of tokens and probabilities in any float dtype plus a thin draw, so that
its law can be enumerated exactly.

* `match` (default): the target's token at every node is fixed by the shared noise, and the walk follows
  it. Exact for any tree (sample-then-match; the shared noise is the coupling of arXiv 2408.07978).
* `reject`: speculative sampling of one chain (Leviathan et al., arXiv 2211.17192, Algorithm 1), whose
  residual draw is then matched against the siblings of the rejected token.
* `lossy-typical`: typical acceptance (Cai et al., arXiv 2401.10774, section 2.3.1). Not exact: it emits what
  the target finds likely enough, whatever it would have said. Nothing chooses it but its own name.
"""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp

from jax_specdec._types import Array, Bool, Float, Int
from jax_specdec.core.draft import Draft, paths
from jax_specdec.errors import UserError
from pallas_kernels import masks

Rule = Literal["match", "reject", "lossy-typical"]
RULES: tuple[Rule, ...] = get_args(Rule)


@dataclasses.dataclass(frozen=True)
class LossyTypical:
    """What `lossy-typical` finds likely enough: a probability above min(epsilon, delta exp(-H)).

    H is the entropy of the target's law in nats: where many tokens are likely, a less likely one will do.

    Attributes:
      epsilon: in (0, 1]. delta: above 0; the paper recommends sqrt(epsilon), and its code has these.

    Raises:
      UserError: values out of range.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self):
        if not 0 < self.epsilon <= 1:
            raise UserError(f"The epsilon of lossy-typical must be in (0, 1], got {self.epsilon}.")
        if not 0 < self.delta < math.inf:
            raise UserError(f"The delta of lossy-typical must be above 0, got {self.delta}.")


PUBLISHED = LossyTypical()


class Verdict(NamedTuple):
    """What one round emits.

    Attributes:
      accepted: `int32[B]`, accepted nodes, root excluded.
      path: `int32[B, P+1]`, node index at each depth; meaningful down to `accepted`.
      tokens: `int32[B, P+1]`, the emitted tokens: accepted nodes, then the target's own.
    """

    accepted: Int[Array, " B"]
    path: Int[Array, "B Q"]
    tokens: Int[Array, "B Q"]


def match(draft: Draft, target: Int[Array, "B T"]) -> Verdict:
    """Accepts the longest path on which every node is the target's token at its parent.

    Args:
      target: the target's own token after each node, `int32[B, T]`.
    """
    nodes = draft.tokens.shape[1]
    if draft.ancestors is None:  # a chain
        agree = draft.valid[:, 1:] & (draft.tokens[:, 1:] == target[:, :-1])
        accepted = jnp.sum(jnp.cumprod(agree.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
        path = jnp.broadcast_to(jnp.arange(nodes, dtype=jnp.int32)[None], target.shape)
        return Verdict(accepted, path, target)
    said = jnp.take_along_axis(target, draft.parents(), axis=1)
    accepted = _reached(draft, draft.tokens == said)
    # Siblings with equal tokens would tie; the deepest, then first in chain-first order, wins.
    score = jnp.where(accepted, draft.depths(), -1)
    leaf = jnp.argmax(score, axis=1).astype(jnp.int32)
    path = paths(draft, leaf)
    depth = jnp.take_along_axis(draft.depths(), leaf[:, None], axis=1)[:, 0]
    return Verdict(depth, path, jnp.take_along_axis(target, path, axis=1))


def _reached(draft: Draft, good: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """The nodes of a tree that are good and valid, and so are all above them."""
    good = (draft.valid & good).at[:, 0].set(True)
    bits = masks.pack(good[:, None])  # [B, 1, W]
    assert draft.ancestors is not None
    return jnp.all((draft.ancestors & ~bits) == 0, axis=-1)


def typical_threshold(p: Float[Array, "*s V"], lossy: LossyTypical) -> Float[Array, "*s"]:
    """min(epsilon, delta exp(-H(p))), above which a probability is typical."""
    surprise = jnp.where(p > 0, -p * jnp.log(jnp.where(p > 0, p, jnp.ones_like(p))), 0)
    bound = jnp.asarray(lossy.delta, p.dtype) * jnp.exp(-jnp.sum(surprise, axis=-1))
    return jnp.minimum(jnp.asarray(lossy.epsilon, p.dtype), bound)


def lossy_typical(
    draft: Draft, p: Float[Array, "B T V"], target: Int[Array, "B T"], lossy: LossyTypical
) -> Verdict:
    """Accepts the longest path of typical tokens, of equally long ones the likeliest. Not exact.

    At temperature 0, where p is certain of one token, it is `match`.

    Args:
      p: the target's law after each node. target: its own token there, which is emitted behind the last
        accepted node.
    """
    if draft.ancestors is None:  # a chain
        chance = jnp.take_along_axis(p[:, :-1], draft.tokens[:, 1:, None], axis=-1)[..., 0]
        good = draft.valid[:, 1:] & (chance > typical_threshold(p[:, :-1], lossy))
        accepted = jnp.sum(jnp.cumprod(good.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
        line = jnp.arange(draft.tokens.shape[1], dtype=jnp.int32)[None]
        drafted = jnp.concatenate([draft.tokens[:, 1:], target[:, -1:]], axis=1)
        tokens = jnp.where(line < accepted[:, None], drafted, target)
        return Verdict(accepted, jnp.broadcast_to(line, target.shape), tokens)
    parents = jnp.broadcast_to(draft.parents(), draft.tokens.shape)
    vocab = p.shape[-1]
    flat = p.reshape(p.shape[0], -1)
    chance = jnp.take_along_axis(flat, parents * vocab + draft.tokens, axis=1).at[:, 0].set(1)
    bound = jnp.take_along_axis(typical_threshold(p, lossy), parents, axis=1)
    accepted = _reached(draft, chance > bound)
    above = masks.unpack(draft.ancestors, draft.tokens.shape[1])  # [B, T, T]
    log = jnp.log(jnp.where(chance > 0, chance, jnp.ones_like(chance)))
    likelihood = jnp.sum(jnp.where(above, log[:, None], 0), axis=-1)
    depths = jnp.where(accepted, draft.depths(), -1)
    longest = jnp.max(depths, axis=1, keepdims=True)
    score = jnp.where(depths == longest, likelihood, -jnp.inf)
    leaf = jnp.argmax(score, axis=1).astype(jnp.int32)
    path = paths(draft, leaf)
    drafted = jnp.take_along_axis(draft.tokens, path, axis=1)
    drafted = jnp.concatenate([drafted[:, 1:], drafted[:, :1]], axis=1)
    own = jnp.take_along_axis(target, path, axis=1)
    level = jnp.arange(path.shape[1], dtype=jnp.int32)[None]
    return Verdict(longest[:, 0], path, jnp.where(level < longest, drafted, own))


def accept_probability(p: Array, q: Array) -> Array:
    """Probability min(1, p/q) that a token drawn with probability q > 0 is accepted; q = 0 gives 1."""
    return jnp.where(p >= q, jnp.ones_like(p), p / jnp.where(q > 0, q, jnp.ones_like(q)))


def accepts(uniform: Array, p: Array, q: Array) -> Bool[Array, "*s"]:
    """`u q < p` with u in [0, 1): never accepts a token of probability 0, needs no division."""
    return uniform * q < p


def residual(p: Array, q: Array) -> Array:
    """norm(max(p - q, 0)) over the last axis; p itself where nothing is left (p = q)."""
    left = jnp.maximum(p - q, jnp.zeros_like(p))
    total = jnp.sum(left, axis=-1, keepdims=True)
    return jnp.where(total > 0, left / jnp.where(total > 0, total, jnp.ones_like(total)), p)


def reject(
    draft: Draft,
    p: Float[Array, "B T V"],
    q: Float[Array, "B P V"],
    uniforms: Float[Array, "B P"],
    residual_noise: Float[Array, "B Q V"],
    bonus_noise: Float[Array, "B Q V"],
) -> Verdict:
    """Speculative sampling of the main chain, then the residual draw matched against siblings.

    Args:
      p: the target's law after each node. q: the law that chain node d + 1 was drawn from, row d.
      uniforms: in [0, 1), one per chain position. residual_noise, bonus_noise: Gumbel noise per depth,
        from keys that nothing else draws from.

    A sibling of the rejected token is accepted when the residual draw equals it; then the target's
    token below the sibling comes from `p` at that sibling with the bonus noise of its depth.
    """
    depth = draft.depth_limit
    tokens, valid = draft.tokens, draft.valid
    drawn = tokens[:, 1 : depth + 1]
    p_chain = p[:, :depth]
    p_drawn = jnp.take_along_axis(p_chain, drawn[..., None], axis=-1)[..., 0]
    q_drawn = jnp.take_along_axis(q, drawn[..., None], axis=-1)[..., 0]
    drafted = valid[:, 1 : depth + 1]
    ok = drafted & accepts(uniforms, p_drawn, q_drawn)
    count = jnp.sum(jnp.cumprod(ok.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)

    def at(values: Array, index: Array) -> Array:
        index = jnp.minimum(index, values.shape[1] - 1)[:, None, None]
        return jnp.take_along_axis(values, index, axis=1)[:, 0]

    def draw(law: Array, noise: Array) -> Array:
        return jnp.argmax(jnp.log(law) + noise, axis=-1).astype(jnp.int32)

    # Where drafting had ended nothing was rejected, and the target's own law speaks.
    was_drafted = jnp.take_along_axis(
        jnp.concatenate([drafted, jnp.zeros_like(drafted[:, :1])], axis=1), count[:, None], axis=1
    )
    p_last = at(p, count)
    from_residual = draw(residual(p_last, at(q, count)), at(residual_noise, count))
    from_target = draw(p_last, at(bonus_noise, count))
    last = jnp.where(was_drafted[:, 0], from_residual, from_target)

    level = jnp.arange(depth + 1, dtype=jnp.int32)[None]
    path = jnp.broadcast_to(level, (tokens.shape[0], depth + 1))
    chain_tokens = jnp.concatenate([drawn, jnp.zeros_like(drawn[:, :1])], axis=1)
    emitted = jnp.where(level == count[:, None], last[:, None], chain_tokens)
    if draft.is_chain:
        return Verdict(count, path, emitted)
    node = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    sibling = (
        valid
        & (node > depth)
        & (draft.parents() == count[:, None])
        & (tokens == last[:, None])
        & was_drafted
    )
    found = jnp.any(sibling, axis=1)
    leaf = jnp.argmax(sibling, axis=1).astype(jnp.int32)
    after = draw(at(p, leaf), at(bonus_noise, count + 1))
    path = jnp.where(found[:, None] & (level == count[:, None] + 1), leaf[:, None], path)
    emitted = jnp.where(found[:, None] & (level == count[:, None] + 1), after[:, None], emitted)
    return Verdict(count + found.astype(jnp.int32), path, emitted)
