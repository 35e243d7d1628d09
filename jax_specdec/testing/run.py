"""A run that drafts, commits and decodes with a drafter, beside plain decoding."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec._types import Params
from jax_specdec.core import prng
from jax_specdec.core import sampling as laws
from jax_specdec.core.context import Context, Tapped, TargetView, make_context
from jax_specdec.core.draft import Draft, Text
from jax_specdec.core.drafter import Outcome, accepted_prefix, ways_of
from jax_specdec.core.law import Law
from jax_specdec.core.loop import DecodeLoop
from jax_specdec.core.model import Model
from jax_specdec.core.plain import NoDrafter
from jax_specdec.core.prefill import read_text
from jax_specdec.generation import near_tie
from jax_specdec.testing.draft import check_chances, check_draft, check_static, require

FOREIGN = "another drafter's"
# Of each row in turn. Filters leave a drafter fewer tokens than it has places for.
LAWS = {
    "temperature": (0.0, 1.0, 0.7, 1.0, 1.0),
    "top_k": (0, 2, 0, 1, 0),
    "top_p": (1.0, 1.0, 1.0, 1.0, 0.3),
}


def check_drafter(
    drafter: Any,
    params: Mapping[str, Any],
    target: Model,
    target_params: Params,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 16,
    seed: int = 0,
) -> None:
    """Drafts, commits and decodes with a drafter, and checks every part of the contract.

    Args:
      params: the drafter's parameters by name, as in `LoadedDrafter.params`.
      prompts: three or more rows of different lengths; default: random ones of 1, 2, 5, 9 and 3 tokens.

    Raises:
      AssertionError: what the drafter does, and what it should do.
    """
    check_static(drafter)
    if prompts is None:
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, target.vocab_size, n).tolist() for n in (1, 2, 5, 9, 3)]
    run = _Run(drafter, dict(params), target, target_params)
    run.prepare(prompts, max_new_tokens, seed)
    run.check_rounds()
    run.check_lags()
    run.check_reset()
    run.check_rewind()
    run.check_inactive_rows()
    run.check_ways()
    run.check_text()


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, jnp.asarray(x).dtype.name), tree)


@functools.cache
def _programs(target: Model, taps: tuple[int, ...]) -> tuple[Any, Any]:
    """`(read, decode)`: what does not depend on the drafter is compiled once for all."""

    tapped = Tapped(target, taps)

    def read(params, text, slots):
        view = tapped.init_view(params, text.length.shape[0], slots)
        return read_text(tapped, params, view, text.tokens, text.length - 1)

    def decode(loop, capacity, params, *args):
        state = loop.start(params, *args, capacity=capacity)
        return loop.run(params, state, 2 * capacity)

    return (
        jax.jit(read, static_argnums=2),
        jax.jit(decode, static_argnums=(0, 1)),
    )


class _Run:
    """One drafter, its text, and compiled pieces."""

    def __init__(self, drafter, params, target, target_params):
        self.drafter, self.params, self.target = drafter, params, target
        self.all_params = {"target": target_params, "drafters": params}
        self.info = drafter.info
        self.read, self.decode = _programs(target, self.info.taps)
        self.init = jax.jit(drafter.init, static_argnums=(0, 1))
        self.extend, self.commit, self.reset = (
            jax.jit(f) for f in (drafter.extend, drafter.commit, drafter.reset)
        )
        self.draft = jax.jit(lambda way, *args: way.draft(*args), static_argnums=0)

    def prepare(self, prompts, max_new_tokens: int, seed: int) -> None:
        """Decodes plainly: the text that everything below is measured against."""
        batch = len(prompts)
        self.prompts = [list(p) for p in prompts]
        longest = max(map(len, prompts))
        tokens = np.zeros((batch, longest), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        self.lengths = np.asarray([len(p) for p in prompts], np.int32)
        rows: Any = {name: [law[i % 5] for i in range(batch)] for name, law in LAWS.items()}
        self.sampling = laws.make_sampling(
            batch,
            max_new_tokens=max_new_tokens,
            seed=seed,
            **rows,
        )
        ids = jnp.arange(batch, dtype=jnp.int32)
        self.keys = prng.row_keys(self.sampling, ids)
        self.capacity = longest + max_new_tokens
        self.args = (
            self.all_params,
            jnp.asarray(tokens),
            jnp.asarray(self.lengths),
            self.sampling,
            ids,
        )
        loop = DecodeLoop(self.target, NoDrafter(), margins=True)
        self.plain = jax.device_get(self.decode(loop, self.capacity, *self.args))
        # The drafter's buffers are wider than plain decoding's by its depth.
        self.columns = self.capacity + self.info.depth + 1
        wide = np.zeros((batch, self.columns), np.int32)
        wide[:, : self.capacity] = self.plain.text.tokens[:, : self.capacity]
        self.tokens, self.ends = wide, np.asarray(self.plain.text.length)

    def at(self, lengths: np.ndarray, texts: np.ndarray | None = None) -> tuple[Text, TargetView]:
        """Texts, by default the run's, up to these lengths, other tokens behind; and the target's view."""
        place = np.arange(self.columns)[None]
        tokens = np.where(place < lengths[:, None], self.tokens if texts is None else texts, 1)
        text = Text(jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32))
        slots = self.capacity + self.info.nodes + 1
        return text, self.read(self.all_params["target"], text, slots)

    def fresh(self, text: Text, view: TargetView) -> dict[str, Any]:
        """States that have read the text at once, beside those of another drafter."""
        states = self.init(text.length.shape[0], self.columns)
        require(
            isinstance(states, dict) and all(isinstance(name, str) for name in states),
            "init must return a dictionary of states by drafter name",
        )
        states = {**states, FOREIGN: jnp.arange(3, dtype=jnp.int32)}
        return self.same(states, self.extended(states, text, view), "extend")

    def extended(self, states, text, view):
        return self.extend(self.params, states, self.context(text, view))

    def context(self, text: Text, view: TargetView, **fields) -> Context:
        batch = text.length.shape[0]
        return make_context(
            text,
            view,
            self.sampling,
            self.target.vocab_size,
            law=Law(self.sampling, jnp.asarray(self.lengths)),
            keys=self.keys,
            budget=jnp.full((batch,), self.info.depth + 1, jnp.int32),
            **fields,
        )

    def same(self, before, after, function: str):
        require(
            isinstance(after, dict)
            and FOREIGN in after
            and np.asarray(after[FOREIGN]).tolist() == [0, 1, 2],
            f"{function} must pass on the states of other drafters as they are",
        )
        require(
            jax.tree.structure(before) == jax.tree.structure(after)
            and _shapes(before) == _shapes(after),
            f"{function} must return states of the structure, shapes and dtypes that it was given",
        )
        return after

    def propose(self, states, text, view, *, active=None, wants_q=False, way=None):
        """A checked draft, on the host, and the states after it; by default, the drafter's own way."""
        way = self.drafter if way is None else way
        batch = text.length.shape[0]
        vocab = self.target.vocab_size
        active = np.ones((batch,), bool) if active is None else active
        rows = jnp.asarray(active)
        ctx = self.context(text, view, active=rows, return_q=wants_q, return_top=True)
        draft, after = self.draft(way, self.params, states, ctx)
        self.same(states, after, "draft")
        if active.all():
            check_draft(draft, way.info, text, vocab, wants_q)
            require(
                (draft.top_ids is not None) == way.info.distribution,
                "top_ids must be given when they are asked for, if and only if info.distribution",
            )
        if way.info.chances is not None:
            said = draft
            if not wants_q:  # as the loop asks
                plain = ctx.replace(return_top=False, return_chance=True)
                said = self.draft(way, self.params, states, plain)[0]
                require(
                    bool((said.tokens == draft.tokens)[rows].all()),
                    "what is drafted must not depend on what is asked of it",
                )
            check_chances(said, way, text, np.asarray(active))
        return jax.device_get(draft), after

    def follow(self, draft: Draft, lengths: np.ndarray) -> tuple[np.ndarray, Outcome]:
        """What verification would say: the new lengths, and the deepest drafted path that the text takes."""
        batch, nodes = draft.tokens.shape
        path = np.zeros((batch, self.info.depth + 1), np.int32)
        accepted = np.zeros((batch,), np.int32)
        parent = np.broadcast_to(np.asarray(draft.parents()), draft.tokens.shape)
        for b in range(batch):
            node = 0
            while lengths[b] + accepted[b] < self.ends[b]:
                right = self.tokens[b, lengths[b] + accepted[b]]
                child = [
                    i
                    for i in range(1, nodes)
                    if draft.valid[b, i] and parent[b, i] == node and draft.tokens[b, i] == right
                ]
                if not child:
                    break
                node = child[0]
                accepted[b] += 1
                path[b, accepted[b]] = node
        if draft.is_chain:
            path = np.broadcast_to(np.arange(path.shape[1], dtype=np.int32), path.shape)
        new = np.minimum(lengths + accepted + 1, self.ends)
        accepted = np.minimum(accepted, new - lengths)
        level = np.arange(path.shape[1])[None]
        matched = ((path == level) & (level >= 1) & (level <= accepted[:, None])).sum(axis=1)
        out = (lengths + matched, path, accepted)
        return new, Outcome(*(jnp.asarray(x, jnp.int32) for x in out))

    def check_rounds(self) -> None:
        """Round by round, with whatever was rejected rolled back, against reading everything anew."""
        lengths = self.lengths
        text, view = self.at(lengths)
        states = self.fresh(text, view)
        while (lengths < self.ends).any():
            draft, states = self.propose(states, text, view)
            anew, _ = self.propose(self.fresh(text, view), text, view)
            self.equal(
                draft,
                anew,
                lengths < self.ends,
                "after rounds with rejections a draft must be the one of a state that has just read "
                "the text: is what was rejected rolled back?",
            )
            lengths, outcome = self.follow(draft, lengths)
            text, view = self.at(lengths)
            states = self.same(states, self.commit(states, outcome), "commit")

    def check_lags(self) -> None:
        """Text that was committed without the drafter, a different number of tokens in each row."""
        text, view = self.at(self.lengths)
        states = self.fresh(text, view)
        step = np.arange(len(self.lengths))
        for lag in (1, 5):
            lengths = np.minimum(self.lengths + lag + step, self.ends - 1)
            text, view = self.at(lengths)
            want, _ = self.propose(self.fresh(text, view), text, view, wants_q=True)
            got, _ = self.propose(states, text, view, wants_q=True)
            caught_up = self.same(states, self.extended(states, text, view), "extend")
            again, _ = self.propose(caught_up, text, view, wants_q=True)
            sentence = (
                "a draft must not depend on how the text was read: by lags, by extend or draft"
            )
            self.equal(got, want, lengths > 0, sentence)
            self.equal(again, want, lengths > 0, sentence)

    def check_reset(self) -> None:
        """New texts in some rows: drafts are those of states that never saw the old ones."""
        states = self.fresh(*self.at(self.ends - 1))
        rows = np.arange(len(self.lengths)) % 2 == 0
        lengths = np.where(rows, np.roll(self.lengths, 1), self.ends - 1)
        texts = np.where(rows[:, None], np.roll(self.tokens, 1, axis=0), self.tokens)
        text, view = self.at(lengths, texts)
        states = self.same(states, self.reset(states, jnp.asarray(rows)), "reset")
        got, _ = self.propose(self.extended(states, text, view), text, view)
        want, _ = self.propose(self.fresh(text, view), text, view)
        everywhere = np.ones_like(rows)
        self.equal(got, want, everywhere, "after reset a draft must not depend on the old text")

    def check_rewind(self) -> None:
        """Texts of which the beginning alone is kept, as the next turn of a conversation may do."""
        if not self.info.rewinds:
            return
        states = self.fresh(*self.at(self.ends - 1))
        kept = self.lengths // 2
        place = np.arange(self.columns)[None]
        texts = np.where(place < kept[:, None], self.tokens, np.roll(self.tokens, 1, axis=0))
        text, view = self.at(self.lengths, texts)
        none = jnp.zeros_like(text.length)
        outcome = accepted_prefix(jnp.asarray(kept, jnp.int32), none, self.info.depth)
        states = self.same(states, self.commit(states, outcome), "commit")
        got, _ = self.propose(self.extended(states, text, view), text, view)
        want, _ = self.propose(self.fresh(text, view), text, view)
        sentence = (
            "commit must take a state back to any length, or info.rewinds be false: a draft depends on text that "
            "was cut off"
        )
        self.equal(got, want, kept >= 0, sentence)

    def check_inactive_rows(self) -> None:
        text, view = self.at(self.lengths)
        states = self.fresh(text, view)
        want, _ = self.propose(states, text, view)
        active = np.arange(len(self.lengths)) % 2 == 0
        got, _ = self.propose(states, text, view, active=active)
        self.equal(got, want, active, "rows that are not active must not change the others")

    def check_ways(self) -> None:
        """A round in each of its ways, and then one with all of its drafters."""
        for way in ways_of(self.drafter):
            if way is self.drafter:
                continue
            check_static(way)
            require(
                way.info.is_chain and way.info.depth <= self.info.depth,
                "a way to draft must be of chains, and no longer than the drafter's",
            )
            text, view = self.at(self.lengths)
            draft, states = self.propose(self.fresh(text, view), text, view, way=way)
            lengths, outcome = self.follow(draft, self.lengths)
            states = self.same(states, self.commit(states, outcome), "commit")
            text, view = self.at(lengths)
            got, _ = self.propose(states, text, view)
            want, _ = self.propose(self.fresh(text, view), text, view)
            sentence = "a draft must not depend on the way in which the one before was drafted"
            self.equal(got, want, lengths < self.ends, sentence)

    def equal(self, got: Draft, want: Draft, rows: np.ndarray, sentence: str) -> None:
        live = want.valid & rows[:, None]
        same = (got.valid == want.valid)[rows].all() and (got.tokens == want.tokens)[live].all()
        require(same, sentence)

    def check_text(self) -> None:
        """The whole loop, ragged, greedy and sampled rows: the text is plain decoding's."""
        loop = DecodeLoop(self.target, self.drafter)
        got = jax.device_get(self.decode(loop, self.capacity, *self.args))
        for b, start in enumerate(self.lengths):
            ours = got.text.tokens[b, start : got.text.length[b]]
            plain = self.tokens[b, start : self.ends[b]]
            if ours.tolist() == plain.tolist():
                continue
            n = min(len(ours), len(plain))
            apart = np.flatnonzero(ours[:n] != plain[:n])
            first = int(apart[0]) if len(apart) else n
            tie = first < n and self.plain.stats.margins[b, start + first] < near_tie("float32")
            kind = "at temperature 0" if self.sampling.temperature[b] == 0 else "with the same seed"
            require(
                tie, f"row {b} must be plain decoding's text {kind}, and differs at token {first}"
            )
        drafted, accepted = got.stats.drafted, got.stats.accepted
        require((accepted <= drafted).all(), "no more tokens can be accepted than were drafted")
