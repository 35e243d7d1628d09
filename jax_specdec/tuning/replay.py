"""Replaying drafts against a text that is known: what an expansion would have accepted.

One record of long chains with all their siblings predicts every rule of leaf siblings, draft length and budget, so
that `tune` need not decode once for each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.context import Tapped, TargetView, make_context
from jax_specdec.core.draft import Text
from jax_specdec.core.drafter import Outcome, foreseen
from jax_specdec.core.prefill import read_text
from jax_specdec.core.sampling import make_sampling
from jax_specdec.errors import UserError
from jax_specdec.expansions.siblings import LeafSiblings
from jax_specdec.specs.build import LoadedDrafter


class Record(NamedTuple):
    """R rounds of greedy decoding with a chain of P tokens.

    Attributes:
      row: `int32[R]`, which text. length: `int32[R]`, its tokens before the round.
      tokens: `int32[R, P]`, the chain.
      matched: `int32[R]`, chain tokens that are the text's.
      rank: `int32[R, P]`, which child of the chain node above the text's next token is: 0 the chain's
        own, -1 none. It means something down to the first that is not 0.
      probs: `float32[R, P, 8]`, `Draft.top_probs` of the chain; all 0 of a drafter without a distribution.
      proposed: `int32[R]`, tokens of the chain that were drafted. chance: `float32[R, P]`, how likely they are to be right,
        by what the drafter says (`Info.chances`).
    """

    row: np.ndarray
    length: np.ndarray
    tokens: np.ndarray
    matched: np.ndarray
    rank: np.ndarray
    probs: np.ndarray
    proposed: np.ndarray
    chance: np.ndarray


def record(
    target: Target,
    drafter: LoadedDrafter,
    texts: Sequence[Sequence[int]],
    starts: Sequence[int],
    everywhere: bool = False,
    view: TargetView | None = None,
) -> Record:
    """Drafts along texts of greedy decoding, each round going on where its chain was first wrong.

    Args:
      drafter: one of chains. texts: token ids, prompt included. starts: where the drafting begins, the
        prompts' lengths. everywhere: a round begins at every token.
      view: `read_whole` of the texts, with the drafter's taps; default: it is read here.

    Raises:
      UserError: a drafter of trees.
    """
    inner, info = drafter.drafter, drafter.drafter.info
    depth = info.depth
    batch, rounds = len(texts), max(len(t) - s for t, s in zip(texts, starts, strict=True))
    columns = max(map(len, texts)) + depth + 1
    padded, ends = _padded(texts, columns)
    sampling = make_sampling(batch, max_new_tokens=1)
    tapped = Tapped(target.decoder, info.taps)
    if not info.is_chain:
        raise UserError(f"The drafter {info.name!r} has no chains to expand.")
    if view is None:
        view = read_whole(target, info.taps, texts, depth + 1)

    @jax.jit
    def run(params: Any, view: TargetView, tokens, starts):
        place = jnp.arange(depth, dtype=jnp.int32)[None]
        path = jnp.broadcast_to(jnp.arange(depth + 1, dtype=jnp.int32)[None], (batch, depth + 1))

        def step(carry, _):
            states, length = carry
            ctx = make_context(
                Text(tokens, length),
                tapped.rollback(view, length - 1),
                sampling,
                tapped.vocab_size,
                return_top=True,
            )
            draft, states = inner.draft(params, states, ctx)
            chain, there = draft.tokens[:, 1 : depth + 1], draft.valid[:, 1 : depth + 1]
            at = length[:, None] + place
            known = jnp.take_along_axis(tokens, jnp.minimum(at, columns - 1), axis=1)
            if draft.top_ids is None or draft.top_probs is None:
                probs = jnp.zeros((batch, depth, 8), jnp.float32)
                rank = jnp.where((chain == known) & there, 0, -1)
            else:
                probs = draft.top_probs[:, :depth]
                same = (draft.top_ids[:, :depth] == known[..., None]) & (probs > 0)
                rank = jnp.argmax(same, axis=2).astype(jnp.int32)
                rank = jnp.where(jnp.any(same, axis=2), rank, -1)
            rank = jnp.where(at < ends[:, None], rank, -1)
            matched = jnp.sum(jnp.cumprod((rank == 0).astype(jnp.int32), axis=1), axis=1)
            matched = matched.astype(jnp.int32)
            kept = jnp.minimum(matched, 0 if everywhere else depth)
            following = jnp.minimum(length + kept + 1, ends)
            outcome = Outcome(length + jnp.minimum(matched, kept + 1), path, kept)
            states = inner.commit(states, outcome)
            row = jnp.arange(batch, dtype=jnp.int32)
            proposed = jnp.sum(there, axis=1, dtype=jnp.int32)
            chance = draft.probability[:, 1 : depth + 1]
            if info.chances == "before":
                (said,) = foreseen(inner, ctx.text)
                assert said is not None
                chance = jnp.pad(said, ((0, 0), (0, depth - said.shape[1])))
            seen = (length < ends, row, length, chain, matched, rank, probs, proposed, chance)
            return (states, following), seen

        states = inner.init(batch, columns)
        return lax.scan(step, (states, starts), None, length=rounds)[1]

    out = run(drafter.params, view, padded, jnp.asarray(starts, jnp.int32))
    live, *rest = (np.asarray(x) for x in out)
    return Record(*(x[live] for x in rest))


def read_whole(
    target: Target, taps: tuple[int, ...], texts: Sequence[Sequence[int]], room: int
) -> TargetView:
    """What the target has of whole texts, with room for `room` tokens behind them."""
    columns = max(map(len, texts)) + room
    tokens, ends = _padded(texts, columns)
    tapped = Tapped(target.decoder, taps)

    @jax.jit
    def run(params: Any, tokens):
        view = tapped.init_view(params, len(texts), columns)
        return read_text(tapped, params, view, tokens, ends - 1)

    return run(target.params, tokens)


def _padded(texts: Sequence[Sequence[int]], columns: int) -> tuple[jax.Array, jax.Array]:
    """Texts `int32[B, columns]`, and their lengths."""
    padded = np.zeros((len(texts), columns), np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    return jnp.asarray(padded), jnp.asarray([len(t) for t in texts], jnp.int32)


def rounds_of(found: Record, length: int) -> Record:
    """Of a record of rounds from everywhere, those that decoding with chains of `length` tokens has."""
    kept, following = [], {}
    for place in np.lexsort((found.length, found.row)).tolist():
        row, at = int(found.row[place]), int(found.length[place])
        if at >= following.get(row, 0):
            kept.append(place)
            following[row] = at + min(int(found.matched[place]), length) + 1
    return Record(*(values[kept] for values in found))


def acceptance(found: Record, length: int, rule: LeafSiblings | None = None) -> list[float]:
    """A_1 .. A_length: how often a draft of that length has a token accepted at each position.

    Args:
      rule: which siblings the chain has; None for none. 1 + the sum of the answer is tau.
    """
    depth = np.arange(1, length + 1)
    matched = np.minimum(found.matched, length)
    accepted = matched[:, None] >= depth
    if rule is not None:
        rule.fit(length)
        priority = np.asarray(rule.rank(jnp.asarray(found.probs[:, :length])))
        missed = np.minimum(matched, length - 1)[:, None]
        rank = np.take_along_axis(found.rank, missed, axis=1)
        wanted = missed * (priority.shape[1] // length) + np.maximum(rank, 1) - 1
        mine = np.take_along_axis(priority, wanted, axis=1)
        first = np.arange(priority.shape[1]) < wanted
        ahead = ((priority > mine) | ((priority == mine) & first)).sum(axis=1)
        taken = (ahead < rule.nodes - 1 - length) & (mine[:, 0] > -np.inf)
        covered = taken & (rank[:, 0] > 0) & (matched < length)
        accepted |= covered[:, None] & (matched[:, None] + 1 == depth)
    return accepted.mean(axis=0).tolist()
