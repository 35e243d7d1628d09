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
from jax_specdec.core.context import Tapped, make_context
from jax_specdec.core.draft import Text
from jax_specdec.core.drafter import Outcome
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
      probs: `float32[R, P, 8]`, `Draft.top_probs` of the chain.
    """

    row: np.ndarray
    length: np.ndarray
    tokens: np.ndarray
    matched: np.ndarray
    rank: np.ndarray
    probs: np.ndarray


def record(
    target: Target,
    drafter: LoadedDrafter,
    texts: Sequence[Sequence[int]],
    starts: Sequence[int],
    everywhere: bool = False,
) -> Record:
    """Drafts along texts of greedy decoding, each round going on where its chain was first wrong.

    Args:
      drafter: one of chains, with a distribution. texts: token ids, prompt included. starts: where the
        drafting begins, the prompts' lengths. everywhere: a round begins at every token.

    Raises:
      UserError: a drafter without a distribution.
    """
    inner, info = drafter.drafter, drafter.drafter.info
    depth = info.depth
    batch, rounds = len(texts), max(len(t) - s for t, s in zip(texts, starts, strict=True))
    columns = max(map(len, texts)) + depth + 1
    padded = np.zeros((batch, columns), np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    ends = jnp.asarray([len(t) for t in texts], jnp.int32)
    sampling = make_sampling(batch, max_new_tokens=1)
    tapped = Tapped(target.decoder, info.taps)

    @jax.jit
    def run(params: dict[str, Any], tokens, starts):
        view = tapped.init_view(params["target"], batch, columns)
        view = read_text(tapped, params["target"], view, tokens, ends - 1)
        place = jnp.arange(depth, dtype=jnp.int32)[None]
        greedy = jnp.zeros((batch, depth + 1, tapped.vocab_size), jnp.float32)
        path = jnp.broadcast_to(jnp.arange(depth + 1, dtype=jnp.int32)[None], (batch, depth + 1))

        def step(carry, _):
            states, length = carry
            ctx = make_context(
                Text(tokens, length),
                tapped.rollback(view, length - 1),
                sampling,
                greedy,
                return_top=True,
            )
            draft, states = inner.draft(params["drafter"], states, ctx)
            if draft.top_ids is None or draft.top_probs is None or not draft.is_chain:
                raise UserError(f"The drafter {info.name!r} has no chains to expand.")
            at = length[:, None] + place
            known = jnp.take_along_axis(tokens, jnp.minimum(at, columns - 1), axis=1)
            probs = draft.top_probs[:, :depth]
            same = (draft.top_ids[:, :depth] == known[..., None]) & (probs > 0)
            rank = jnp.where(jnp.any(same, axis=2), jnp.argmax(same, axis=2).astype(jnp.int32), -1)
            rank = jnp.where(at < ends[:, None], rank, -1)
            matched = jnp.sum(jnp.cumprod((rank == 0).astype(jnp.int32), axis=1), axis=1)
            matched = matched.astype(jnp.int32)
            kept = jnp.minimum(matched, 0 if everywhere else depth)
            following = jnp.minimum(length + kept + 1, ends)
            outcome = Outcome(length + jnp.minimum(matched, kept + 1), path, kept)
            states = inner.commit(states, outcome)
            row = jnp.arange(batch, dtype=jnp.int32)
            chain = draft.tokens[:, 1 : depth + 1]
            return (states, following), (length < ends, row, length, chain, matched, rank, probs)

        states = inner.init(batch, columns)
        return lax.scan(step, (states, starts), None, length=rounds)[1]

    params = {"target": target.params, "drafter": drafter.params}
    out = run(params, jnp.asarray(padded), jnp.asarray(starts, jnp.int32))
    live, *rest = (np.asarray(x) for x in out)
    return Record(*(x[live] for x in rest))


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
