"""Tiny models, a drafter that knows the answer, and comparisons, for the tests of the decoding core.

Programs are shared: `decode` is jitted once per (loop, capacity, shapes), and loops are hashable, so two
tests that ask for the same thing compile it once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec import DecodeLoop, Decoder, ModelConfig, make_sampling
from jax_specdec.core.draft import Draft
from jax_specdec.core.drafter import Info, StatelessDrafter
from jax_specdec.core.plain import NoDrafter
from jax_specdec.drafters.lm import LmDrafter
from pallas_kernels import masks

VOCAB = 32
NEAR_TIE = 1e-3
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    mlp_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context=512,
    eos_ids=(),
)
SMALL_CONFIG = dataclasses.replace(
    CONFIG, hidden_size=16, mlp_size=16, num_layers=1, num_heads=2, num_kv_heads=1, windows=()
)
TARGET, SMALL = Decoder(CONFIG), Decoder(SMALL_CONFIG)


def weights(decoder: Decoder, seed: int, scale: float = 8.0) -> Any:
    """Random parameters with matrices scaled up, so that logits are not flat."""
    with jax.ensure_compile_time_eval():  # the first to ask may be inside a jitted function
        params = decoder.init(jax.random.key(seed))
        return jax.tree.map(lambda x: x * x.dtype.type(scale) if x.ndim > 1 else x, params)


def perturbed(params: Any, amount: float, seed: int = 7) -> Any:
    """Every matrix with relative noise: a drafter that agrees with the target now and then."""
    leaves, tree = jax.tree.flatten(params)
    with jax.ensure_compile_time_eval():
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        out = [
            x + jnp.float32(amount) * jnp.std(x) * jax.random.normal(k, x.shape)
            if x.ndim > 1
            else x
            for x, k in zip(leaves, keys, strict=True)
        ]
    return jax.tree.unflatten(tree, out)


@functools.cache
def target_params() -> Any:
    return weights(TARGET, 0)


@functools.cache
def close_params() -> Any:
    """Of a drafter of the target's shape that agrees with it about half the time."""
    return perturbed(target_params(), 0.25)


@functools.cache
def small_params() -> Any:
    return weights(SMALL, 3)


# Decoding


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacity")
def start(loop, params, tokens, lengths, sampling, ids, *, capacity, costs=None):
    args = (params, tokens, lengths, sampling, ids)
    return loop.start(*args, capacity=capacity, costs=costs)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def run(loop, params, state, rounds):
    return loop.run(params, state, rounds)


@functools.partial(jax.jit, static_argnums=0, static_argnames="capacity")
def _decode(loop, params, tokens, lengths, sampling, ids, costs=None, *, capacity):
    args = (params, tokens, lengths, sampling, ids)
    state = loop.start(*args, capacity=capacity, costs=costs)
    return loop.run(params, state, 2 * capacity)


@dataclasses.dataclass
class Result:
    """One decoded batch, on the host."""

    tokens: list[list[int]]  # emitted, per row
    margins: list[np.ndarray]
    state: Any

    @property
    def stats(self):
        return self.state.stats

    @property
    def text(self) -> np.ndarray:
        return self.state.text.tokens


def result(state) -> Result:
    state = jax.device_get(state)
    margins = state.stats.margins
    spans = [
        slice(int(a), int(b)) for a, b in zip(state.prompt_length, state.text.length, strict=True)
    ]
    return Result(
        [state.text.tokens[i, s].tolist() for i, s in enumerate(spans)],
        [] if margins is None else [margins[i, s] for i, s in enumerate(spans)],
        state,
    )


def pad(prompts, width: int = 16) -> tuple[jax.Array, jax.Array]:
    """Prompts left-aligned in one array; the garbage behind them is a legal token, as it may be."""
    tokens = np.full((len(prompts), width), 3, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray([len(p) for p in prompts], jnp.int32)


def decode(
    loop: DecodeLoop,
    params,
    prompts,
    sampling,
    *,
    capacity: int = 48,
    ids=None,
    width: int = 16,
    costs=None,
) -> Result:
    tokens, lengths = pad(prompts, width)
    ids = jnp.arange(len(prompts), dtype=jnp.int32) if ids is None else jnp.asarray(ids, jnp.int32)
    args = (params, tokens, lengths, sampling, ids, costs)
    return result(_decode(loop, *args, capacity=capacity))


def plain_loop(**fields) -> DecodeLoop:
    fields = {"margins": True, **fields}
    return DecodeLoop(fields.pop("target", TARGET), NoDrafter(), **fields)


def all_params(**drafters) -> dict[str, Any]:
    return {"target": drafters.pop("target", None) or target_params(), "drafters": drafters}


def prompts_of(lengths, seed: int = 0) -> list[list[int]]:
    """Random prompts that repeat themselves a little, so that n-gram drafters find something."""
    rng = np.random.default_rng(seed)
    out = []
    for n in lengths:
        half = rng.integers(0, VOCAB, (max(1, (n + 1) // 2),))
        out.append(np.tile(half, 2)[:n].tolist())
    return out


def sampling_of(batch: int, *, max_new_tokens=24, **fields):
    return make_sampling(batch, max_new_tokens=max_new_tokens, **{"stop_ids": (-1, -1), **fields})


def assert_identical(got: Result, want: Result, ties: int = 1) -> None:
    """Token for token, except past a near-tie of the plain run; more than `ties` of those fail too."""
    near = 0
    for row, (a, b) in enumerate(zip(got.tokens, want.tokens, strict=True)):
        if a == b:
            continue
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        assert first is not None, f"row {row}: one text ends early: {a} and {b}"
        margin = want.margins[row][first]
        assert margin < NEAR_TIE, (
            f"row {row} differs at token {first}, margin {margin}: {a} and {b}"
        )
        near += 1
    assert near <= ties, f"{near} near-ties"


# Drafters for tests only


def ancestor_bits(parent: Any, depth_limit: int | None = None) -> jax.Array:
    """The ancestor bitmask `int32[B, T, W]` of trees given by their parents `[B, T]`, the root its own."""
    parent = jnp.asarray(parent)
    line = jnp.arange(parent.shape[1], dtype=jnp.int32)
    seen = jnp.broadcast_to(line[:, None] == line[None], (*parent.shape, parent.shape[1]))
    current = parent
    for _ in range(parent.shape[1] if depth_limit is None else depth_limit):
        seen = seen | (current[..., None] == line[None, None])
        current = jnp.take_along_axis(parent, current, axis=1)
    return masks.pack(seen)


@dataclasses.dataclass(frozen=True)
class Oracle(StatelessDrafter):
    """Random token trees that hide the right answer on a random path, cut at a random depth.

    Every round a random node is drawn; the path to it gets the right tokens, every other node a random
    one, and some subtrees are invalid. Its parameters are those of `Oracle.params`.

    Attributes:
      parent: the tree, the root first and its own parent.
    """

    parent: tuple[int, ...]
    name: str = "oracle"
    vocab: int = VOCAB
    tree: bool = True

    @staticmethod
    def params(answer, certain: bool = False, holes: float = 0.0) -> dict[str, Any]:
        """Args: answer: `int32[B, C]`, the text of plain decoding. certain: the whole main chain is
        right in every round. holes: share of nodes made invalid, with what is below them.
        """
        answer = jnp.asarray(answer)
        return {"oracle": (answer, jnp.asarray(certain), jnp.asarray(holes, jnp.float32))}

    @property
    def info(self) -> Info:
        depth = self.depth
        sizes = tuple(range(depth + 1))
        return Info(self.name, len(self.parent) - 1, depth, sizes, ("even", "odd"))

    @property
    def depths(self) -> tuple[int, ...]:
        out = [0]
        for p in self.parent[1:]:
            out.append(out[p] + 1)
        return tuple(out)

    @property
    def depth(self) -> int:
        return max(self.depths)

    def draft(self, params, states, ctx):
        text = ctx.text
        (answer, certain, holes), nodes = params[self.name], len(self.parent)
        batch = text.length.shape[0]
        parent = jnp.broadcast_to(jnp.asarray(self.parent, jnp.int32), (batch, nodes))
        depth = jnp.broadcast_to(jnp.asarray(self.depths, jnp.int32), (batch, nodes))
        ancestors = ancestor_bits(parent)
        place = jnp.minimum(text.length[:, None] - 1 + depth, answer.shape[1] - 1)
        right = jnp.take_along_axis(answer, place, axis=1)

        def one(length):
            key = jax.random.fold_in(jax.random.key(0), length)
            a, b, c = jax.random.split(key, 3)
            leaf = jax.random.randint(a, (), 0, nodes, jnp.int32)
            hole = jax.random.uniform(b, (nodes,)) < holes
            return leaf, hole, jax.random.randint(c, (nodes,), 0, self.vocab, jnp.int32)

        leaf, hole, junk = jax.vmap(one)(text.length)
        hole = hole.at[:, 0].set(False)
        leaf = jnp.where(certain, self.depth, leaf)  # chain-first: node P ends the main chain
        above = masks.unpack(ancestors, nodes)  # [B, T, T], j above or at i
        good = jnp.take_along_axis(above, leaf[:, None, None], axis=1)[:, 0]
        tokens = jnp.where(good, right, junk).at[:, 0].set(text.root())
        valid = ~jnp.any(above & hole[:, None], axis=-1)
        is_root = jnp.arange(nodes, dtype=jnp.int32)[None] == 0
        return (
            Draft(
                tokens=tokens,
                valid=valid,
                source=jnp.where(is_root, 0, 1 + depth % 2),
                probability=jnp.ones((batch, nodes), jnp.float32),
                parent=parent if self.tree else None,
                depth=depth if self.tree else None,
                ancestors=ancestors if self.tree else None,
                depth_limit=self.depth,
            ),
            states,
        )


def chain_oracle(length: int) -> Oracle:
    return Oracle((0, *range(length)), tree=False)


def random_parents(rng: np.random.Generator, chain: int, extra: int) -> tuple[int, ...]:
    """A main chain, then `extra` nodes anywhere above the deepest level."""
    parent, depth = [0, *range(chain)], list(range(chain + 1))
    while len(parent) < chain + 1 + extra:
        p = int(rng.integers(0, len(parent)))
        if depth[p] < chain:
            parent.append(p)
            depth.append(depth[p] + 1)
    return tuple(parent)


@dataclasses.dataclass(frozen=True)
class Siblings(StatelessDrafter):
    """The chain of an lm drafter, and at each depth the next best of the same scores as leaves.

    Some leaves are invalid, by a random mask, so that holes in the tree are seen too.
    """

    inner: LmDrafter
    count: int = 2
    holes: float = 0.2

    @property
    def info(self) -> Info:
        inner = self.inner.info
        return dataclasses.replace(
            inner,
            nodes=inner.depth * (1 + self.count),
            sources=(inner.name, "sibling"),
            distribution=False,
        )

    def init(self, batch, capacity):
        return self.inner.init(batch, capacity)

    def reset(self, states, rows):
        return self.inner.reset(states, rows)

    def extend(self, params, states, ctx):
        return self.inner.extend(params, states, ctx)

    def commit(self, states, outcome):
        return self.inner.commit(states, outcome)

    def draft(self, params, states, ctx):
        wants_q, text = ctx.return_q, ctx.text
        whole = ctx.replace(return_q=True, return_top=True)
        draft, states = self.inner.draft(params, states, whole)
        batch, depth = text.length.shape[0], self.inner.length
        # Under the rejection rule siblings must not reuse the noise of the target's draw; the draft's
        # own noise is free for any use.
        scores = jnp.log(draft.q) + ctx.noise(depths=depth)
        drawn = jax.nn.one_hot(draft.tokens[:, 1:], draft.q.shape[-1], dtype=bool)
        scores = jnp.where(drawn, -jnp.inf, scores)
        best, ids = jax.lax.top_k(scores, self.count)  # [B, P, count]
        keys = jax.vmap(lambda n: jax.random.fold_in(jax.random.key(5), n))(text.length)
        holes = jax.vmap(lambda k: jax.random.uniform(k, ids.shape[1:]))(keys) < self.holes
        leaf_valid = (best > -jnp.inf) & ~holes & draft.valid[:, :depth, None]
        parent = jnp.concatenate(
            [draft.parents(), jnp.repeat(jnp.arange(depth, dtype=jnp.int32), self.count)[None]], 1
        )
        nodes = 1 + depth * (1 + self.count)
        parent = jnp.broadcast_to(parent, (batch, nodes))
        own = jnp.broadcast_to(draft.depths(), draft.tokens.shape)
        level = jnp.concatenate([own, parent[:, depth + 1 :] + 1], axis=1)

        def leaves(x, y):
            return jnp.concatenate([x, y.reshape(batch, -1)], axis=1)

        return (
            Draft(
                tokens=leaves(draft.tokens, ids.astype(jnp.int32)),
                valid=leaves(draft.valid, leaf_valid),
                source=leaves(draft.source, jnp.full(ids.shape, 2, jnp.int32)),
                probability=leaves(draft.probability, jnp.take_along_axis(draft.q, ids, axis=-1)),
                parent=parent,
                depth=level,
                ancestors=ancestor_bits(parent),
                q=draft.q if wants_q else None,
                depth_limit=depth,
            ),
            states,
        )
