"""One round: what is drafted, at which width it is verified, what becomes text, and where rows end."""

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jax_specdec._types import Array, Bool, Float, Int, Params
from jax_specdec.core import acceptance, numerics
from jax_specdec.core.budget import Plan, select_in_place, told_as, worth
from jax_specdec.core.context import Context, TargetView
from jax_specdec.core.draft import Draft, Text, narrow, root_only, widened
from jax_specdec.core.drafter import Drafter, Outcome, States, foreseen, ways_of
from jax_specdec.core.sampling import STRING_COMPLETE
from jax_specdec.core.sharding import Sharding
from jax_specdec.core.state import LoopState
from jax_specdec.core.stats import FAILED, LENGTH, RUNNING, STOP, write_window

if TYPE_CHECKING:
    from jax_specdec.core.loop import DecodeLoop


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


def decode_round(
    loop: "DecodeLoop",
    params: Params,
    state: LoopState,
    replaced: bool,
) -> LoopState:
    """`DecodeLoop.round`."""
    text, budget, info = state.text, state.budget, loop.drafter.info
    active = state.stats.finish == RUNNING
    plan, index = Plan(jnp.int32(0), jnp.int32(info.depth)), jnp.int32(0)
    weights = worth(active, None if replaced else state.limit - text.length)
    if budget is not None:
        ahead = foreseen(loop.drafter, text)
        widths, told = loop.widths, loop.told
        plan = budget.plan(weights, widths, info.is_chain, told, ahead, replaced=replaced)
    with jax.named_scope("draft"):
        ctx, draft, drafts = _propose(loop, params["drafters"], state, plan, weights)
    proposed = draft.valid & (draft.depths() <= ctx.budget[:, None])
    kept, chance = proposed, draft.probability[:, 1 : loop.window]
    expected = jnp.ones_like(weights)
    if budget is not None:
        nodes, reached = _size(draft, proposed, plan)
        for way, said in enumerate(ahead):
            if said is not None:
                said = jnp.pad(said, ((0, 0), (0, chance.shape[1] - said.shape[1])))
                chance = jnp.where(plan.way == way, said, chance)
        index, expected = budget.width(
            weights, nodes, reached, plan.way, loop.widths, info.is_chain, loop.told, chance
        )
        plan = _drafted(loop, plan, proposed & active[:, None])
        # What `narrow` leaves of it.
        kept = jnp.cumsum(proposed, axis=1, dtype=jnp.int32) <= jnp.asarray(loop.widths)[index]
        kept = proposed & kept
    draft = draft.replace(valid=kept)
    arm = functools.partial(_verify, loop, params["target"], state, ctx, draft)
    arms = [functools.partial(arm, width) for width in loop.widths or (loop.nodes,)]
    view, found = select_in_place(index, arms, state.view)
    place = jnp.arange(loop.window, dtype=jnp.int32)[None]
    on_chain = (found.path == place) & (place >= 1) & (place <= found.accepted[:, None])
    matched = text.length + jnp.sum(on_chain, axis=1, dtype=jnp.int32)
    with jax.named_scope("commit"):
        drafts = loop.drafter.commit(drafts, Outcome(matched, found.path, found.accepted))
    if budget is not None:
        chain = (proposed[:, 1 : loop.window], draft.tokens[:, 1 : loop.window])
        seen = (found.tokens, found.count, found.accepted)
        budget = budget.observe(active, *chain, *seen, plan, index, expected, loop.told, chance)
    return state.replace(
        text=Text(write_window(text.tokens, found.tokens, text.length), text.length + found.count),
        view=view,
        drafts=drafts,
        stop_state=found.stop_state,
        stats=state.stats.record(
            draft,
            found.path,
            found.verified,
            found.accepted,
            found.finish,
            text.length,
            active,
            found.logprobs,
            found.margins,
            depth=plan.depth,
            width=index,
        ),
        budget=budget,
    )


def _propose(
    loop: "DecodeLoop",
    weights: Params,
    state: LoopState,
    plan: Plan,
    worth: Float[Array, " B"],
) -> tuple[Context, Draft, States]:
    """What is drafted, at most `plan.depth` tokens deep, and the context that it was drafted in.

    Args:
      worth: see `budget.worth`.
    """
    info, needs_q = loop.drafter.info, loop.rule.needs_q
    ctx = loop.context(state, return_q=needs_q)
    if state.budget is None or not info.depth:
        return ctx, *loop.drafter.draft(weights, state.drafts, ctx)
    ctx = ctx.replace(budget=jnp.minimum(ctx.budget, plan.depth))
    if "after" in loop.told:
        thrift = state.budget.thrift(worth, plan, loop.widths, loop.told)
        ctx = ctx.replace(return_chance=True, thrift=thrift)

    def by(way: Drafter, states: States) -> tuple[States, Draft]:
        draft, states = way.draft(weights, states, ctx)
        if way is not loop.drafter:
            draft = widened(
                draft, info.nodes, [loop.sources.index(n) + 1 for n in way.info.sources]
            )
        return states, draft

    arms = [functools.partial(by, way) for way in ways_of(loop.drafter)]
    way = jnp.where(plan.depth > 0, plan.way, -1)
    empty = nothing(loop.drafter, weights, state.drafts, ctx)
    states, draft = select_in_place(way, arms, state.drafts, empty)
    return ctx, draft, states


def _drafted(loop: "DecodeLoop", plan: Plan, proposed: Bool[Array, "B T"]) -> Plan:
    """The plan, as deep as a way that ends its drafts itself has drafted."""
    nodes = jnp.sum(proposed[:, 1 : loop.window], axis=1, dtype=jnp.int32)
    reached = jnp.clip(jnp.max(nodes), 1, jnp.maximum(plan.depth, 1))
    late = told_as("after", loop.told, plan.way) & (plan.depth > 0)
    return plan._replace(depth=jnp.where(late, reached, plan.depth))


def nothing(drafter: Drafter, params: Params, states: States, ctx: Context) -> Draft:
    """A draft of the shapes that the drafter gives, of which only the root is valid."""
    shape = jax.eval_shape(lambda: drafter.draft(params, states, ctx)[0])
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
    root = root_only(ctx.text)
    return empty.replace(
        tokens=empty.tokens.at[:, :1].set(root.tokens), valid=empty.valid.at[:, 0].set(True)
    )


def _size(
    draft: Draft, proposed: Bool[Array, "B T"], plan: Plan
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Drafted nodes of each row and the depth of the deepest, as the choice of a width may know them.

    A draft that was drawn from a distribution counts as whole: whether its tokens are verified must not depend
    on what they are, and where a drafter is unsure and ends does.
    """
    nodes = jnp.sum(proposed[:, 1:], axis=1, dtype=jnp.int32)
    reached = jnp.max(jnp.where(proposed, draft.depths(), 0), axis=1)
    if draft.q is None:
        return nodes, reached
    depth = jnp.broadcast_to(plan.depth, nodes.shape)
    whole = jnp.where(depth > 0, draft.tokens.shape[1] - 1, 0)
    return depth if draft.is_chain else whole, depth


def _padded(x: Array, width: int) -> Array:
    """`x [B, N, ...]` with zeros behind it, or cut."""
    more = width - x.shape[1]
    if more <= 0:
        return x[:, :width]
    return jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))


def _verify(
    loop: "DecodeLoop",
    params: Params,
    state: LoopState,
    ctx: Context,
    draft: Draft,
    width: int,
    view: TargetView,
) -> tuple[TargetView, Emitted]:
    """Verifies a draft's first `width` valid nodes, commits what becomes text but the last, and ends rows.

    Args:
      params: the target's. view: the state's, which nothing else reads.
    """
    text, active, window = state.text, ctx.active, loop.window
    part, order = narrow(draft, width)
    with jax.named_scope("verify"):
        positions = jnp.broadcast_to(text.length[:, None] - 1 + part.depths(), part.tokens.shape)
        out = loop.tapped.apply(params, part.tokens, positions, view, part.ancestors)
        assert out.logits is not None
        scores = ctx.scores(out.logits, part.tokens[:, 1:], part.on_path())
        # Where a rule has draws of its own, drafts have this noise.
        ctx = ctx.replace(node_noise=None if loop.rule.needs_q else node_noise(ctx, part))
        found = loop.rule(ctx, part, scores)
    margin, sound = _examine(loop.rule, ctx, scores, loop.margins)

    # Tokens before the first node without a law are right; unless they end the row, it fails behind them.
    sound = jnp.take_along_axis(sound, found.path, axis=1)
    sound = jnp.sum(jnp.cumprod(sound.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    whole = jnp.minimum(found.accepted + 1, sound)
    tokens = _padded(found.tokens, window)
    count, finish, stop_state = _cut(state, tokens, whole, active)
    failed = (sound <= found.accepted) & (finish == RUNNING)
    finish = jnp.where(failed, FAILED, finish)
    said = _logprobs(out.logits, found.path, found.tokens) if loop.logprobs else None
    if margin is not None:
        margin = jnp.take_along_axis(margin, found.path, axis=1)
    with jax.named_scope("commit"):
        view = loop.tapped.commit(view, out, count, None if part.is_chain else found.path)
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


def node_noise(ctx: Context, draft: Draft) -> Float[Array, "B T V"]:
    """The shared noise of the target's token behind each node, by the node's depth."""
    nodes = draft.tokens.shape[1]
    if draft.is_chain:
        return ctx.noise(depths=nodes)
    depths = min(nodes, draft.depth_limit + 1)
    depth = jnp.broadcast_to(draft.depths(), draft.tokens.shape)
    depth = jnp.minimum(depth, depths - 1)  # of nodes that are not valid
    return jnp.take_along_axis(ctx.noise(depths=depths), depth[..., None], axis=1)


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
    scores: Float[Array, "B T V"],
    margins: bool,
) -> tuple[Float[Array, "B T"] | None, Bool[Array, "B T"]]:
    """The margin of each node's own token where it is recorded, and which nodes have one.

    A node has no token of its own where a score is NaN or infinite, or all tokens are forbidden.
    """
    if rule.coupled:  # the rule took the maximum of this sum, too
        assert ctx.node_noise is not None
        scores = scores + ctx.node_noise
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
