"""A conformance test for drafters: does any object keep the contract of `jax_specdec.Drafter`?

In a test of your own:

    from jax_specdec.testing import check_drafter
    check_drafter(MyDrafter(...), {"my-drafter": params}, target.decoder, target.params)
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec._types import Params
from jax_specdec.core import prng
from jax_specdec.core import sampling as laws
from jax_specdec.core.context import Context, Tapped, TargetView
from jax_specdec.core.draft import MAX_NODES, TOP, Draft, Text
from jax_specdec.core.drafter import Info, Outcome
from jax_specdec.core.law import Law
from jax_specdec.core.loop import DecodeLoop
from jax_specdec.core.model import Model
from jax_specdec.core.plain import NoDrafter
from jax_specdec.core.prefill import read_text
from pallas_kernels import masks

# Two best scores closer than this may change places between a one-row and a T-row forward.
NEAR_TIE = 1e-3
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
    _check_static(drafter)
    if prompts is None:
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, target.vocab_size, n).tolist() for n in (1, 2, 5, 9, 3)]
    run = _Run(drafter, dict(params), target, target_params)
    run.prepare(prompts, max_new_tokens, seed)
    run.check_rounds()
    run.check_lags()
    run.check_reset()
    run.check_inactive_rows()
    run.check_text()


def check_draft(draft: Draft, info: Info, text: Text, vocab: int, wants_q: bool) -> None:
    """Checks one draft alone: shapes, dtypes, order and the tree's consistency.

    Raises:
      AssertionError: what is wrong with it.
    """
    batch, nodes = text.length.shape[0], info.nodes + 1

    def array(name: str, shape: tuple[int, ...], dtype: str, optional: bool = False) -> Any:
        value = getattr(draft, name)
        if value is None:
            _require(optional, f"Draft.{name} must be an array, not None")
            return None
        _require(
            value.shape == shape and value.dtype == jnp.dtype(dtype),
            f"Draft.{name} must be {dtype}{shape}, got {value.dtype}{value.shape}",
        )
        return np.asarray(value)

    words = masks.num_words(nodes)
    tokens, valid = array("tokens", (batch, nodes), "int32"), array("valid", (batch, nodes), "bool")
    source = array("source", (batch, nodes), "int32")
    chance = array("probability", (batch, nodes), "float32")
    parent = array("parent", (batch, nodes), "int32", optional=True)
    depth = array("depth", (batch, nodes), "int32", optional=True)
    bits = array("ancestors", (batch, nodes, words), "int32", optional=True)
    top = (batch, nodes, min(TOP, vocab))
    ids = array("top_ids", top, "int32", optional=True)
    top_probs = array("top_probs", top, "float32", optional=True)
    q = array("q", (batch, info.depth, vocab), "float32", optional=True)

    _require(
        draft.depth_limit == info.depth,
        f"Draft.depth_limit must be the drafter's depth {info.depth}, got {draft.depth_limit}",
    )
    given = [x is not None for x in (parent, depth, bits)]
    _require(
        all(given) or not any(given),
        "parent, depth and ancestors must all be given (a tree) or all be None (a chain)",
    )
    _require(
        (tokens[:, 0] == np.asarray(text.root())).all() and valid[:, 0].all(),
        "node 0 must be the root: the last committed token, valid",
    )
    inside = (tokens >= 0) & (tokens < vocab)
    _require(inside.all(), f"drafted tokens must be in the vocabulary of {vocab}, valid or not")
    _require((source[:, 0] == 0).all(), "the root's source must be 0")
    known = (source[:, 1:] >= 1) & (source[:, 1:] <= len(info.sources))
    _require(
        (known | ~valid[:, 1:]).all(),
        f"the source of a drafted node must be in 1..{len(info.sources)}",
    )
    in_range = (chance >= 0) & (chance <= 1 + 1e-5)
    _require((in_range | ~valid).all(), "the probability of a node must be in [0, 1]")

    if bits is None:
        _require(nodes == info.depth + 1, "a chain must have as many nodes as its depth")
        parent = np.broadcast_to(np.maximum(np.arange(nodes) - 1, 0), tokens.shape)
    else:
        _check_tree(parent, depth, bits, info.depth)
    above = np.take_along_axis(valid, parent, axis=1)
    _require((above | ~valid).all(), "a node below an invalid one must be invalid")

    _require((ids is None) == (top_probs is None), "top_ids and top_probs must be given together")
    if ids is not None:
        _require(
            ((ids >= 0) & (ids < vocab)).all(), f"top_ids must be in the vocabulary of {vocab}"
        )
        known = top_probs.max(axis=-1) > 0
        # A token drawn from q comes first whatever its chance, and so does one that lenience let pass.
        start = 1 if wants_q or not info.ranked else 0
        _require(
            (np.diff(top_probs[..., start:], axis=-1) <= 0).all(),
            "top_probs must be in falling order, except that a token drawn from q comes first",
        )
        drafted = known[:, : info.depth] & valid[:, 1 : info.depth + 1]
        _require(
            (ids[:, : info.depth, 0] == tokens[:, 1 : info.depth + 1])[drafted].all(),
            "the first of a main-chain node's top_ids must be the next token of the chain",
        )
    if not wants_q:
        _require(q is None, "q must be None where ctx.return_q is false")
    elif q is not None:
        live = valid[:, 1 : info.depth + 1]
        _require(
            (abs(q.sum(-1) - 1)[live] < 1e-4).all() and (q >= 0).all(), "q must be probabilities"
        )
        drawn = np.take_along_axis(q, tokens[:, 1 : info.depth + 1, None], axis=-1)[..., 0]
        _require((drawn[live] > 0).all(), "a drawn token must be possible under q")


def _check_tree(parent: np.ndarray, depth: np.ndarray, bits: np.ndarray, limit: int) -> None:
    nodes = parent.shape[1]
    place = np.arange(nodes)[None]
    _require((parent[:, 0] == 0).all(), "the root must be its own parent")
    _require(
        ((parent[:, 1:] >= 0) & (parent[:, 1:] < place[:, 1:])).all(),
        "a node must come after its parent",
    )
    chain = slice(1, limit + 1)
    _require(
        (parent[:, chain] == place[:, chain] - 1).all(),
        "the main chain must come first: the parent of node d is d - 1 for d up to the depth",
    )
    want = np.zeros_like(parent)
    seen = np.zeros((*parent.shape, nodes), bool)
    seen[:, 0, 0] = True
    rows = np.arange(parent.shape[0])
    for i in range(1, nodes):
        want[:, i] = want[rows, parent[:, i]] + 1
        seen[:, i] = seen[rows, parent[:, i]]
        seen[:, i, i] = True
    _require((depth == want).all(), "a node's depth must be its parent's plus 1, the root's 0")
    _require((want <= limit).all(), f"no node may be deeper than the drafter's depth {limit}")
    given = np.asarray(masks.unpack(jnp.asarray(bits), nodes))
    _require(
        (given == seen).all(),
        "bit j of a node's ancestors must be set if and only if j is the node or above it",
    )


def _check_static(drafter: Any) -> None:
    wanted = ("info", "init", "reset", "extend", "draft", "commit")
    missing = [name for name in wanted if not hasattr(drafter, name)]
    _require(not missing, f"a drafter must have {', '.join(missing)}")
    try:
        hash(drafter)
    except TypeError as error:
        raise AssertionError(
            f"a drafter must be hashable, as a frozen dataclass is: {error}"
        ) from None
    info = drafter.info
    _require(isinstance(info, Info), f"info must be an Info, got {info!r}")
    counts = (info.nodes, info.depth)
    _require(
        all(isinstance(n, int) for n in counts) and 0 <= counts[1] <= counts[0] < MAX_NODES,
        f"0 <= depth <= nodes < {MAX_NODES} must hold, got depth {counts[1]}, nodes {counts[0]}",
    )
    names = info.sources
    _require(
        isinstance(names, tuple) and all(isinstance(n, str) for n in names),
        f"sources must be a tuple of names, got {names!r}",
    )
    _require(bool(names) == bool(info.nodes), "a drafter has sources if it drafts nodes")
    sizes = info.sizes
    _require(
        sizes == tuple(sorted(set(sizes))) and max(sizes) == info.depth and sizes[0] >= 0,
        f"sizes must rise to the depth {info.depth}, got {sizes!r}",
    )


def _require(holds: Any, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence + ".")


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, jnp.asarray(x).dtype.name), tree)


@functools.cache
def _programs(target: Model, taps: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """`(read, noise, decode)`: what does not depend on the drafter is compiled once for all."""

    tapped = Tapped(target, taps)

    def read(params, text, slots):
        view = tapped.init_view(params, text.length.shape[0], slots)
        return read_text(tapped, params, view, text.tokens, text.length - 1)

    def noise(keys, sampling, start, depth):
        return prng.shared_noise(keys, sampling, start, depth, target.vocab_size)

    def decode(loop, capacity, params, *args):
        state = loop.start(params, *args, capacity=capacity)
        return loop.run(params, state, 2 * capacity)

    return (
        jax.jit(read, static_argnums=2),
        jax.jit(noise, static_argnums=3),
        jax.jit(decode, static_argnums=(0, 1)),
    )


class _Run:
    """One drafter, its text, and compiled pieces."""

    def __init__(self, drafter, params, target, target_params):
        self.drafter, self.params, self.target = drafter, params, target
        self.all_params = {"target": target_params, "drafters": params}
        self.info = drafter.info
        self.read, self.noise, self.decode = _programs(target, self.info.taps)
        self.init = jax.jit(drafter.init, static_argnums=(0, 1))
        self.extend, self.commit, self.draft, self.reset = (
            jax.jit(f) for f in (drafter.extend, drafter.commit, drafter.draft, drafter.reset)
        )

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
        _require(
            isinstance(states, dict) and all(isinstance(name, str) for name in states),
            "init must return a dictionary of states by drafter name",
        )
        states = {**states, FOREIGN: jnp.arange(3, dtype=jnp.int32)}
        return self.same(states, self.extended(states, text, view), "extend")

    def extended(self, states, text, view):
        return self.extend(self.params, states, self.context(text, view))

    def context(self, text: Text, view: TargetView, noise=None, active=None, **static) -> Context:
        batch = text.length.shape[0]
        return Context(
            text=text,
            view=view,
            law=Law(self.sampling, jnp.asarray(self.lengths)),
            noise=noise,
            keys=self.keys,
            active=jnp.ones((batch,), bool) if active is None else jnp.asarray(active),
            budget=jnp.full((batch,), self.info.depth + 1, jnp.int32),
            **static,
        )

    def same(self, before, after, function: str):
        _require(
            isinstance(after, dict)
            and FOREIGN in after
            and np.asarray(after[FOREIGN]).tolist() == [0, 1, 2],
            f"{function} must pass on the states of other drafters as they are",
        )
        _require(
            jax.tree.structure(before) == jax.tree.structure(after)
            and _shapes(before) == _shapes(after),
            f"{function} must return states of the structure, shapes and dtypes that it was given",
        )
        return after

    def propose(self, states, text, view, *, active=None, wants_q=False):
        """A checked draft, on the host, and the states after it."""
        batch = text.length.shape[0]
        vocab = self.target.vocab_size
        gumbel = self.noise(self.keys, self.sampling, text.length, self.info.depth + 1)
        active = np.ones((batch,), bool) if active is None else active
        ctx = self.context(text, view, gumbel, active, return_q=wants_q, return_top=True)
        draft, after = self.draft(self.params, states, ctx)
        self.same(states, after, "draft")
        if active.all():
            check_draft(draft, self.info, text, vocab, wants_q)
            _require(
                (draft.top_ids is not None) == self.info.distribution,
                "top_ids must be given when they are asked for, if and only if info.distribution",
            )
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

    def check_inactive_rows(self) -> None:
        text, view = self.at(self.lengths)
        states = self.fresh(text, view)
        want, _ = self.propose(states, text, view)
        active = np.arange(len(self.lengths)) % 2 == 0
        got, _ = self.propose(states, text, view, active=active)
        self.equal(got, want, active, "rows that are not active must not change the others")

    def equal(self, got: Draft, want: Draft, rows: np.ndarray, sentence: str) -> None:
        live = want.valid & rows[:, None]
        same = (got.valid == want.valid)[rows].all() and (got.tokens == want.tokens)[live].all()
        _require(same, sentence)

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
            tie = first < n and self.plain.stats.margins[b, start + first] < NEAR_TIE
            kind = "at temperature 0" if self.sampling.temperature[b] == 0 else "with the same seed"
            _require(
                tie, f"row {b} must be plain decoding's text {kind}, and differs at token {first}"
            )
        drafted, accepted = got.stats.drafted, got.stats.accepted
        _require((accepted <= drafted).all(), "no more tokens can be accepted than were drafted")
