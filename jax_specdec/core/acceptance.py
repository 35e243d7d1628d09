"""Acceptance rules: which drafted path becomes text.

Each rule is a pure function of tokens and probabilities in any float dtype, so that its distribution can be
enumerated exactly, and an `Acceptance` object that the loop calls:

* `Match` (default): the target's token at every node is fixed by the shared noise, and the walk follows
  it. Exact for any tree (sample-then-match; the shared noise is the coupling of arXiv 2408.07978).
* `Reject`: speculative sampling of one chain (Leviathan et al., arXiv 2211.17192, Algorithm 1), whose
  residual draw is then matched against the siblings of the rejected token.
* `LossyTypical`: typical acceptance (Cai et al., arXiv 2401.10774, section 2.3.1). Not exact: it emits any
  drafted token that the target finds likely enough. Used only when asked for by name.
* `Unverified`: what was drafted becomes text, for training on a drafter's own text.
"""

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jax_specdec._types import Array, Bool, Float, Int
from jax_specdec.core import prng
from jax_specdec.core.context import Context
from jax_specdec.core.draft import Draft, paths
from jax_specdec.core.sampling import distribution
from jax_specdec.errors import UserError
from pallas_kernels import masks


class Verification(NamedTuple):
    """What one round emits.

    Attributes:
      accepted: `int32[B]`, accepted nodes, root excluded.
      path: `int32[B, P+1]`, node index at each depth; meaningful down to `accepted`.
      tokens: `int32[B, P+1]`, the emitted tokens: accepted nodes, then the target's own.
    """

    accepted: Int[Array, " B"]
    path: Int[Array, "B Q"]
    tokens: Int[Array, "B Q"]


@runtime_checkable
class Acceptance(Protocol):
    """A rule of acceptance: a frozen dataclass (static under jit).

    Attributes:
      name: what `--rule` calls it. exact: whether the text is distributed as the target's own.
      coupled: whether every emitted token is the argmax of the target's scores + the shared noise
        (`Context.node_noise`), so that the text is plain decoding's with the same seed.
      needs_q: whether drafts must come with the distribution they were drawn from. Drafting then uses other
        noise than the target.
    """

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool: ...

    @property
    def coupled(self) -> bool: ...

    @property
    def needs_q(self) -> bool: ...

    def __call__(self, ctx: Context, draft: Draft, scores: Float[Array, "B T V"]) -> Verification:
        """Which path becomes text.

        Args:
          scores: log-weights of the target's law at every node.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Match:
    """Sample-then-match, see `match`."""

    name = "match"
    exact = coupled = True
    needs_q = False

    def __call__(self, ctx, draft, scores):
        return match(draft, ctx.argmax(_heard(ctx, scores)))


@dataclasses.dataclass(frozen=True)
class Reject:
    """Speculative sampling, see `reject`."""

    name = "reject"
    exact = needs_q = True
    coupled = False

    def __call__(self, ctx, draft, scores):
        start, depth, vocab = ctx.text.length, draft.depth_limit, scores.shape[-1]
        p = distribution(scores, ctx.law.sampling)
        bonus = prng.position_noise(ctx.keys, start, depth + 1, vocab, prng.ROLE_BONUS)
        if depth == 0:  # plain decoding: nothing can be rejected
            tokens = jnp.argmax(jnp.log(p) + bonus, axis=-1).astype(jnp.int32)
            return Verification(jnp.zeros_like(start), jnp.zeros_like(tokens), tokens)
        q = draft.q
        if q is None:  # a drafter without a distribution is certain of its token
            q = jax.nn.one_hot(draft.tokens[:, 1 : depth + 1], vocab, dtype=jnp.float32)
        return reject(
            draft,
            p,
            q,
            prng.position_uniform(ctx.keys, start, depth, prng.ROLE_ACCEPT),
            prng.position_noise(ctx.keys, start, depth + 1, vocab, prng.ROLE_RESIDUAL),
            bonus,
        )


@dataclasses.dataclass(frozen=True)
class LossyTypical:
    """Accepts what the target finds likely enough: a probability above min(epsilon, delta exp(-H)).

    H is the entropy of the target's distribution in nats: where many tokens are likely, a less likely one
    will do. See `lossy_typical`.

    Attributes:
      epsilon: in (0, 1]. delta: above 0; the paper recommends sqrt(epsilon), and its code has these.

    Raises:
      UserError: values out of range.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    name = "lossy-typical"
    exact = coupled = needs_q = False

    def __post_init__(self):
        if not 0 < self.epsilon <= 1:
            raise UserError(f"The epsilon of lossy-typical must be in (0, 1], got {self.epsilon}.")
        if not 0 < self.delta < math.inf:
            raise UserError(f"The delta of lossy-typical must be above 0, got {self.delta}.")

    def __call__(self, ctx, draft, scores):
        token = ctx.argmax(_heard(ctx, scores))
        return lossy_typical(draft, distribution(scores, ctx.law.sampling), token, self)


@dataclasses.dataclass(frozen=True)
class Unverified:
    """Emits what was drafted, draft after draft; the target only reads it. Nothing is lossless here.

    For chains. The last drafted token takes the place of the target's own and is the next root, so that a
    round emits exactly the draft.
    """

    name = "unverified"
    exact = coupled = needs_q = False

    def __call__(self, ctx, draft, scores):
        del ctx, scores
        proposed = jnp.sum(draft.valid[:, 1:], axis=1, dtype=jnp.int32)
        path = jnp.arange(draft.tokens.shape[1], dtype=jnp.int32)[None]
        tokens = jnp.concatenate([draft.tokens[:, 1:], draft.tokens[:, -1:]], axis=1)
        path = jnp.broadcast_to(path, tokens.shape)
        return Verification(jnp.maximum(proposed - 1, 0), path, tokens)


def _heard(ctx: Context, scores: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
    assert ctx.node_noise is not None, "the loop says what noise a rule hears"
    return scores + ctx.node_noise


MATCH = Match()
RULES: dict[str, type] = {rule.name: rule for rule in (Match, Reject, LossyTypical)}


def match(draft: Draft, target: Int[Array, "B T"]) -> Verification:
    """Accepts the longest path on which every node is the target's token at its parent.

    Args:
      target: the target's own token after each node, `int32[B, T]`.
    """
    nodes = draft.tokens.shape[1]
    if draft.ancestors is None:  # a chain
        agree = draft.valid[:, 1:] & (draft.tokens[:, 1:] == target[:, :-1])
        accepted = jnp.sum(jnp.cumprod(agree.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
        path = jnp.broadcast_to(jnp.arange(nodes, dtype=jnp.int32)[None], target.shape)
        return Verification(accepted, path, target)
    said = jnp.take_along_axis(target, draft.parents(), axis=1)
    accepted = _reached(draft, draft.tokens == said)
    # Siblings with equal tokens would tie; the deepest, then first in chain-first order, wins.
    score = jnp.where(accepted, draft.depths(), -1)
    leaf = jnp.argmax(score, axis=1).astype(jnp.int32)
    path = paths(draft, leaf)
    depth = jnp.take_along_axis(draft.depths(), leaf[:, None], axis=1)[:, 0]
    return Verification(depth, path, jnp.take_along_axis(target, path, axis=1))


def _reached(draft: Draft, good: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Which nodes of a tree are good and valid, with all their ancestors."""
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
) -> Verification:
    """Accepts the longest path of typical tokens; among equally long ones, the likeliest. Not exact.

    At temperature 0, where p is certain of one token, it is `match`.

    Args:
      p: the target's distribution after each node. target: its own token there, which is emitted behind the last
        accepted node.
    """
    if draft.ancestors is None:  # a chain
        chance = jnp.take_along_axis(p[:, :-1], draft.tokens[:, 1:, None], axis=-1)[..., 0]
        good = draft.valid[:, 1:] & (chance > typical_threshold(p[:, :-1], lossy))
        accepted = jnp.sum(jnp.cumprod(good.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
        line = jnp.arange(draft.tokens.shape[1], dtype=jnp.int32)[None]
        drafted = jnp.concatenate([draft.tokens[:, 1:], target[:, -1:]], axis=1)
        tokens = jnp.where(line < accepted[:, None], drafted, target)
        return Verification(accepted, jnp.broadcast_to(line, target.shape), tokens)
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
    return Verification(longest[:, 0], path, jnp.where(level < longest, drafted, own))


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
) -> Verification:
    """Speculative sampling of the main chain, then the residual draw matched against siblings.

    Args:
      p: the target's distribution after each node. q: the distribution that chain node d + 1 was drawn from, row d.
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

    # Behind the end of a draft nothing was rejected: the target's own distribution decides.
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
        return Verification(count, path, emitted)
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
    return Verification(count + found.astype(jnp.int32), path, emitted)
