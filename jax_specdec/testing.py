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
from jax_specdec.core.draft import MAX_NODES, TOP, Draft, Text
from jax_specdec.core.drafter import Drafter, Outcome, TargetView
from jax_specdec.core.loop import DecodeLoop
from jax_specdec.core.prefill import read_text
from jax_specdec.drafters.cascade import Composed
from jax_specdec.drafters.none import NoDrafter
from jax_specdec.models.decoder import Decoder
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
    target: Decoder,
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
        prompts = [rng.integers(0, target.config.vocab_size, n).tolist() for n in (1, 2, 5, 9, 3)]
    run = _Run(drafter, dict(params), target, target_params)
    run.prepare(prompts, max_new_tokens, seed)
    run.check_rounds()
    run.check_lags()
    run.check_inactive_rows()
    run.check_text()


def check_draft(draft: Draft, drafter: Drafter, text: Text, vocab: int, wants_q: bool) -> None:
    """Checks one draft alone: shapes, dtypes, order and the tree's consistency.

    Raises:
      AssertionError: what is wrong with it.
    """
    batch, nodes = text.length.shape[0], drafter.num_nodes + 1

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
    origin = array("origin", (batch, nodes), "int32")
    chance = array("probability", (batch, nodes), "float32")
    parent = array("parent", (batch, nodes), "int32", optional=True)
    depth = array("depth", (batch, nodes), "int32", optional=True)
    bits = array("ancestors", (batch, nodes, words), "int32", optional=True)
    top = (batch, nodes, min(TOP, vocab))
    ids = array("top_ids", top, "int32", optional=True)
    top_probs = array("top_probs", top, "float32", optional=True)
    q = array("q", (batch, drafter.depth, vocab), "float32", optional=True)

    _require(
        draft.depth_limit == drafter.depth,
        f"Draft.depth_limit must be the drafter's depth {drafter.depth}, got {draft.depth_limit}",
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
    _require((origin[:, 0] == 0).all(), "the root's origin must be 0")
    known = (origin[:, 1:] >= 1) & (origin[:, 1:] <= len(drafter.proposers))
    _require(
        (known | ~valid[:, 1:]).all(),
        f"the origin of a drafted node must be in 1..{len(drafter.proposers)}",
    )
    in_range = (chance >= 0) & (chance <= 1 + 1e-5)
    _require((in_range | ~valid).all(), "the probability of a node must be in [0, 1]")

    if bits is None:
        _require(nodes == drafter.depth + 1, "a chain must have as many nodes as its depth")
        parent = np.broadcast_to(np.maximum(np.arange(nodes) - 1, 0), tokens.shape)
    else:
        _check_tree(parent, depth, bits, drafter.depth)
    above = np.take_along_axis(valid, parent, axis=1)
    _require((above | ~valid).all(), "a node below an invalid one must be invalid")

    _require((ids is None) == (top_probs is None), "top_ids and top_probs must be given together")
    if ids is not None:
        _require(
            ((ids >= 0) & (ids < vocab)).all(), f"top_ids must be in the vocabulary of {vocab}"
        )
        known = top_probs.max(axis=-1) > 0
        # A token drawn from q comes first whatever its chance, and so does one that lenience let pass.
        lenient = isinstance(getattr(drafter, "drafter", drafter), Composed)
        start = 1 if wants_q or lenient else 0
        _require(
            (np.diff(top_probs[..., start:], axis=-1) <= 0).all(),
            "top_probs must be in falling order, except that a token drawn from q comes first",
        )
        drafted = known[:, : drafter.depth] & valid[:, 1 : drafter.depth + 1]
        _require(
            (ids[:, : drafter.depth, 0] == tokens[:, 1 : drafter.depth + 1])[drafted].all(),
            "the first of a main-chain node's top_ids must be the next token of the chain",
        )
    if not wants_q:
        _require(q is None, "q must be None where noise.return_q is false")
    elif q is not None:
        live = valid[:, 1 : drafter.depth + 1]
        _require(
            (abs(q.sum(-1) - 1)[live] < 1e-4).all() and (q >= 0).all(), "q must be probabilities"
        )
        drawn = np.take_along_axis(q, tokens[:, 1 : drafter.depth + 1, None], axis=-1)[..., 0]
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
    missing = [
        name
        for name in (
            "name",
            "num_nodes",
            "depth",
            "proposers",
            "reads_hidden",
            "has_distribution",
            "init",
            "extend",
            "draft",
            "commit",
        )
        if not hasattr(drafter, name)
    ]
    _require(not missing, f"a drafter must have {', '.join(missing)}")
    try:
        hash(drafter)
    except TypeError as error:
        raise AssertionError(
            f"a drafter must be hashable, as a frozen dataclass is: {error}"
        ) from None
    sizes = (drafter.num_nodes, drafter.depth)
    _require(
        all(isinstance(n, int) for n in sizes) and 0 <= sizes[1] <= sizes[0] < MAX_NODES,
        f"0 <= depth <= num_nodes < {MAX_NODES} must hold, got depth {sizes[1]}, nodes {sizes[0]}",
    )
    names = drafter.proposers
    _require(
        isinstance(names, tuple) and all(isinstance(n, str) for n in names),
        f"proposers must be a tuple of names, got {names!r}",
    )
    _require(bool(names) == bool(drafter.num_nodes), "a drafter has proposers if it drafts nodes")


def _require(holds: Any, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence + ".")


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, jnp.asarray(x).dtype.name), tree)


@functools.cache
def _programs(target: Decoder) -> tuple[Any, Any, Any]:
    """`(read, noise, decode)`: what does not depend on the drafter is compiled once for all."""

    def read(params, text, slots):
        cache = target.init_cache(text.length.shape[0], slots, hidden=True)
        return read_text(target, params, cache, text.tokens, text.length - 1)

    def noise(keys, sampling, start, depth):
        return prng.shared_noise(keys, sampling, start, depth, target.config.vocab_size)

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
        self.read, self.noise, self.decode = _programs(target)
        self.init = jax.jit(drafter.init, static_argnums=(0, 1))
        self.extend, self.commit, self.draft = (
            jax.jit(function) for function in (drafter.extend, drafter.commit, drafter.draft)
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
        loop = DecodeLoop(self.target, NoDrafter())
        self.plain = jax.device_get(self.decode(loop, self.capacity, *self.args))
        # The drafter's buffers are wider than plain decoding's by its depth.
        self.columns = self.capacity + self.drafter.depth + 1
        wide = np.zeros((batch, self.columns), np.int32)
        wide[:, : self.capacity] = self.plain.text.tokens[:, : self.capacity]
        self.tokens, self.ends = wide, np.asarray(self.plain.text.length)

    def at(self, lengths: np.ndarray) -> tuple[Text, TargetView]:
        """The text of these lengths, other tokens behind it, and the target's cache of it."""
        place = np.arange(self.columns)[None]
        tokens = np.where(place < lengths[:, None], self.tokens, 1).astype(np.int32)
        text = Text(jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32))
        slots = self.capacity + self.drafter.num_nodes + 1
        return text, TargetView(self.read(self.all_params["target"], text, slots))

    def fresh(self, text: Text, view: TargetView) -> dict[str, Any]:
        """States that have read the text at once, beside those of another drafter."""
        states = self.init(text.length.shape[0], self.columns)
        _require(
            isinstance(states, dict) and all(isinstance(name, str) for name in states),
            "init must return a dictionary of states by drafter name",
        )
        states = {**states, FOREIGN: jnp.arange(3, dtype=jnp.int32)}
        return self.same(states, self.extend(self.params, states, text, view), "extend")

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
        vocab = self.target.config.vocab_size
        gumbel = self.noise(self.keys, self.sampling, text.length, self.drafter.depth + 1)
        active = np.ones((batch,), bool) if active is None else active
        room = jnp.full((batch,), self.drafter.depth + 1, jnp.int32)
        draft, after = self.draft(
            self.params,
            states,
            text,
            view,
            self.sampling,
            prng.Noise(gumbel, return_q=wants_q, return_top=True),
            jnp.asarray(active),
            room,
        )
        self.same(states, after, "draft")
        if active.all():
            check_draft(draft, self.drafter, text, vocab, wants_q)
            _require(
                (draft.top_ids is not None) == self.drafter.has_distribution,
                "top_ids must be given when they are asked for, if and only if has_distribution",
            )
        return jax.device_get(draft), after

    def follow(self, draft: Draft, lengths: np.ndarray) -> Outcome:
        """What verification would say: the deepest drafted path that the text takes."""
        batch, nodes = draft.tokens.shape
        path = np.zeros((batch, self.drafter.depth + 1), np.int32)
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
        agreed = ((path == level) & (level >= 1) & (level <= accepted[:, None])).sum(axis=1)
        out = (new, lengths + agreed, path, accepted)
        return Outcome(*(jnp.asarray(x, jnp.int32) for x in out))

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
            outcome = self.follow(draft, lengths)
            lengths = np.asarray(outcome.length)
            text, view = self.at(lengths)
            states = self.same(states, self.commit(states, outcome, view), "commit")

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
            caught_up = self.same(states, self.extend(self.params, states, text, view), "extend")
            again, _ = self.propose(caught_up, text, view, wants_q=True)
            sentence = (
                "a draft must not depend on how the text was read: by lags, by extend or draft"
            )
            self.equal(got, want, lengths > 0, sentence)
            self.equal(again, want, lengths > 0, sentence)

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
