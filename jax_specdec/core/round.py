"""One round: what is drafted, at which width it is verified, what becomes text, and where rows end."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_specdec._types import Array, Bool, Float, Int, Params
from jax_specdec.core import acceptance, numerics
from jax_specdec.core.context import Context, Tapped, TargetView
from jax_specdec.core.draft import Draft, root_only
from jax_specdec.core.drafter import Drafter, States
from jax_specdec.core.sampling import STRING_COMPLETE
from jax_specdec.core.sharding import Sharding
from jax_specdec.core.state import LoopState
from jax_specdec.core.stats import FAILED, LENGTH, RUNNING, STOP
from pallas_kernels import masks


class Emitted(NamedTuple):
    """What a verification decided; arrays of `[B, P + 1]` are garbage behind `count`.

    Attributes:
      tokens: emitted tokens. path: the node of the whole draft at each depth, down to `accepted`.
      verified: accepted nodes, root excluded. accepted: those of them that became text.
      count: tokens that became text. finish, stop_state: of the rows, as in `LoopState`.
      logprobs, margins: of each emitted token, None where they are not recorded.
    """

    tokens: Int[Array, "B Q"]
    path: Int[Array, "B Q"]
    verified: Int[Array, " B"]
    accepted: Int[Array, " B"]
    count: Int[Array, " B"]
    finish: Int[Array, " B"]
    stop_state: Int[Array, " B"]
    logprobs: Float[Array, "B Q"] | None
    margins: Float[Array, "B Q"] | None


def nothing(drafter: Drafter, params: Params, states: States, ctx: Context) -> Draft:
    """A draft of the shapes that the drafter gives, of which only the root is valid."""
    shape = jax.eval_shape(lambda: drafter.draft(params, states, ctx)[0])
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
    root = root_only(ctx.text)
    return empty.replace(
        tokens=empty.tokens.at[:, :1].set(root.tokens), valid=empty.valid.at[:, 0].set(True)
    )


def narrow(draft: Draft, width: int) -> tuple[Draft, Int[Array, "B T"] | None]:
    """A draft's first `width` valid nodes, and the index in the whole draft of each, None for the same one.

    A chain keeps its order, and so does a tree, whose parents come before their children; but a tree's main
    chain does not keep its places.
    """
    nodes = draft.tokens.shape[1]
    if width == nodes:
        return draft, None
    fields: dict[str, Any] = {"top_ids": None, "top_probs": None}
    if draft.is_chain or width == 1:
        for name in ("tokens", "valid", "source", "probability"):
            fields[name] = getattr(draft, name)[:, :width]
        fields |= {"parent": None, "depth": None, "ancestors": None}
        q = None if draft.q is None or width == 1 else draft.q[:, : width - 1]
        return draft.replace(**fields, q=q, depth_limit=width - 1), None
    assert draft.ancestors is not None and draft.q is None, "a tree under a coupled rule"
    # Stable: valid nodes in their order.
    order = jnp.argsort(~draft.valid, axis=1, stable=True).astype(jnp.int32)
    place = jnp.argsort(order, axis=1).astype(jnp.int32)
    order = order[:, :width]
    for name in ("tokens", "valid", "source", "probability"):
        fields[name] = jnp.take_along_axis(getattr(draft, name), order, axis=1)
    for name, of in (("parent", draft.parents()), ("depth", draft.depths())):
        of = jnp.broadcast_to(of, draft.tokens.shape)
        fields[name] = jnp.take_along_axis(of, order, axis=1)
    fields["parent"] = jnp.take_along_axis(place, fields["parent"], axis=1)
    above = jnp.take_along_axis(masks.unpack(draft.ancestors, nodes), order[..., None], axis=1)
    above = jnp.take_along_axis(above, order[:, None], axis=2)
    return draft.replace(**fields, ancestors=masks.pack(above)), order


def _padded(x: Array, width: int) -> Array:
    """`x [B, N, ...]` with zeros behind it, or cut."""
    more = width - x.shape[1]
    if more <= 0:
        return x[:, :width]
    return jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))


def verify(
    target: Tapped,
    rule: acceptance.Acceptance,
    params: Params,
    view: TargetView,
    state: LoopState,
    ctx: Context,
    draft: Draft,
    *,
    width: int,
    window: int,
    logprobs: bool,
    margins: bool,
) -> tuple[TargetView, Emitted]:
    """Verifies a draft's first `width` valid nodes, commits what becomes text but the last, and ends rows.

    Args:
      params: the target's. view: the state's, which nothing else reads. window: P + 1 of the whole draft.
    """
    text, active = state.text, ctx.active
    part, order = narrow(draft, width)
    with jax.named_scope("verify"):
        positions = jnp.broadcast_to(text.length[:, None] - 1 + part.depths(), part.tokens.shape)
        out = target.apply(params, part.tokens, positions, view, part.ancestors)
        assert out.logits is not None
        scores = ctx.scores(out.logits, part.tokens[:, 1:], part.on_path())
        found = rule(ctx, part, scores)
    margin, sound = _examine(rule, ctx, part, scores, margins)

    # Tokens before the first node without a law are right; unless they end the row, it fails behind them.
    sound = jnp.take_along_axis(sound, found.path, axis=1)
    sound = jnp.sum(jnp.cumprod(sound.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    whole = jnp.minimum(found.accepted + 1, sound)
    tokens = _padded(found.tokens, window)
    count, finish, stop_state = _cut(state, tokens, whole, active)
    failed = (sound <= found.accepted) & (finish == RUNNING)
    finish = jnp.where(failed, FAILED, finish)
    said = _logprobs(out.logits, found.path, found.tokens) if logprobs else None
    if margin is not None:
        margin = jnp.take_along_axis(margin, found.path, axis=1)
    with jax.named_scope("commit"):
        view = target.commit(view, out, count, None if part.is_chain else found.path)
    path = found.path if order is None else jnp.take_along_axis(order, found.path, axis=1)
    return view, Emitted(
        tokens=tokens,
        path=_padded(path, window),
        verified=found.accepted,
        accepted=jnp.minimum(found.accepted, count),  # counted up to where the text was cut
        count=count,
        finish=finish,
        stop_state=stop_state,
        logprobs=None if said is None else _padded(said, window),
        margins=None if margin is None else _padded(margin, window),
    )


def _logprobs(
    logits: Float[Array, "B T V"], path: Int[Array, "B Q"], tokens: Int[Array, "B Q"]
) -> Float[Array, "B Q"]:
    """The target's log-probability of each emitted token (nats), unprocessed."""
    said = logits.reshape(logits.shape[0], -1)
    said = jnp.take_along_axis(said, path * logits.shape[-1] + tokens, axis=1)
    total = jax.nn.logsumexp(logits, axis=-1)
    return said - jnp.take_along_axis(total, path, axis=1)


def _lead(scores: Float[Array, "B T V"], sharding: Sharding | None) -> Float[Array, "B T"]:
    """How far the best score is ahead of the second best."""
    value, token = numerics.best(scores, sharding)
    index = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None]
    second = jnp.max(jnp.where(index == token[..., None], numerics.NEG_INF, scores), axis=-1)
    return value - second


def _examine(
    rule: acceptance.Acceptance,
    ctx: Context,
    draft: Draft,
    scores: Float[Array, "B T V"],
    margins: bool,
) -> tuple[Float[Array, "B T"] | None, Bool[Array, "B T"]]:
    """The margin of each node's own token where it is recorded, and which nodes have one.

    A node has no token of its own where a score is NaN or infinite, or all tokens are forbidden.
    """
    if rule.coupled:  # the rule took the maximum of this sum, too
        scores = scores + acceptance.node_noise(ctx, draft)
    sound = jnp.isfinite(numerics.best(scores, ctx.sharding)[0])
    if not margins:
        return None, sound
    margin = _lead(scores, ctx.sharding)
    if not rule.coupled:  # a drawn token is no argmax
        greedy = ctx.law.sampling.temperature == 0
        margin = jnp.where(greedy[:, None], margin, jnp.inf)
    return margin, sound


def _cut(
    state: LoopState,
    emitted: Int[Array, "B Q"],
    count: Int[Array, " B"],
    active: Bool[Array, " B"],
) -> tuple[Int[Array, " B"], Int[Array, " B"], Int[Array, " B"]]:
    """Ends rows at the first stop token, stop string or length limit inside the block.

    Returns `(count, finish, stop_state)`, the tokens that become text (the one that ends a row
    included).
    """
    sampling, finish = state.sampling, state.stats.finish
    place = jnp.arange(emitted.shape[1], dtype=jnp.int32)[None]
    stops = jnp.any(emitted[..., None] == sampling.stop_ids[:, None], axis=-1)
    automaton, trail = state.stop_state, emitted
    if sampling.stop_table.shape[0]:
        table = sampling.stop_table

        def advance(current, token):
            following = table[jnp.maximum(current, 0), token]
            following = jnp.where(current >= 0, following, current)
            # -1: the row has no stop strings; -2: one is complete
            return following, following

        _, trail = jax.lax.scan(advance, automaton, jnp.swapaxes(emitted, 0, 1))
        trail = jnp.swapaxes(trail, 0, 1)  # [B, P+1], state after each token
        stops = stops | (trail == STRING_COMPLETE)
    stops = stops & (place < count[:, None])
    stopped = jnp.any(stops, axis=1)
    count = jnp.where(stopped, jnp.argmax(stops, axis=1).astype(jnp.int32) + 1, count)
    budget = state.limit - state.text.length
    stopped = stopped & (count <= budget)
    count = jnp.where(active, jnp.minimum(count, budget), 0)
    if sampling.stop_table.shape[0]:
        last = jnp.maximum(count - 1, 0)[:, None]
        reached = jnp.take_along_axis(trail, last, axis=1)[:, 0]
        automaton = jnp.where(active & (count > 0), reached, automaton)
    ended = jnp.where(stopped, STOP, jnp.where(count >= budget, LENGTH, RUNNING))
    return count, jnp.where(active, ended, finish).astype(jnp.int32), automaton
