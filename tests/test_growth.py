"""Grown trees: against EAGLE-2 and beam search in plain Python, and exactness of what comes of them."""

import dataclasses
import functools
from typing import Literal

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import enumerate_reject, pair
from loop_runs import MIXED, RAGGED, check_stats
from sampled_laws import LEVEL, chi_square, exact_law, reference_law, sample

from jax_specdec import DecodeLoop, Decoder, UserError
from jax_specdec.core import prng
from jax_specdec.core.cache import init_cache
from jax_specdec.core.context import TargetView, make_context
from jax_specdec.core.draft import Text
from jax_specdec.core.model import Output
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.neural import NeuralDrafter
from jax_specdec.expansions.beam_search import BeamSearch
from jax_specdec.expansions.dynamic_tree import DynamicTree
from jax_specdec.expansions.expand import Expand
from jax_specdec.models import stack_layers
from jax_specdec.testing import check_drafter
from pallas_kernels import masks

WIDTH = 24
# Filters leave fewer candidates than the budget holds.
LAWS = {
    "temperature": [0.0, 1.0, 0.6, 1.0, 1.0, 0.8],
    "top_k": [0, 0, 2, 1, 0, 0],
    "top_p": [1.0, 1.0, 1.0, 1.0, 0.3, 1.0],
    "min_p": [0.0, 0.0, 0.0, 0.0, 0.0, 0.3],
}


@jax.jit
def forward(tokens):
    positions = jnp.broadcast_to(jnp.arange(WIDTH, dtype=jnp.int32)[None], tokens.shape)
    return h.TARGET.apply(h.close_params(), tokens, positions).logits


def log_probs(paths, text, law, gumbel):
    """After each path of one length, `[n, V]`: a softmax of logits + temperature * noise where the law
    leaves something.
    """
    tokens = np.zeros((8, WIDTH), np.int32)
    for i, path in enumerate(paths):
        tokens[i, : len(text) + len(path)] = [*text, *path]
    logits = np.asarray(forward(jnp.asarray(tokens)), np.float64)
    logits = logits[: len(paths), len(text) + len(paths[0]) - 1]
    x = logits + law["temperature"] * gumbel[len(paths[0])]
    if law["temperature"] > 0:
        possible = np.stack([reference_law(row, **law) > 0 for row in logits])
        x = np.where(possible, x, -np.inf)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def grow(text, law, gumbel, depth, width):
    """All candidates `{path: value}`, and those that were read, by depth. The best child of the best
    child ... of the root is read at every depth.
    """
    value, main, read, levels = {(): 0.0}, (), [()], []
    for _ in range(depth):
        found = {}
        for path, row in zip(read, log_probs(read, text, law, gumbel), strict=True):
            for token in np.argsort(-row)[:width]:
                if row[token] > -np.inf:
                    found[(*path, int(token))] = value[path] + row[token]
        best = log_probs([main], text, law, gumbel)[0].argmax()
        main = (*main, int(best))
        others = sorted((p for p in found if p != main), key=lambda p: -found[p])
        read = [main, *others[: width - 1]]
        levels.append(read)
        value |= found
    del value[()]
    return value, levels, main


def expected_tree(rule, text, law, gumbel, depth):
    """The paths that a rule verifies, with their values."""
    width = rule.width if isinstance(rule, DynamicTree) else (rule.nodes - 1) // depth
    value, levels, main = grow(text, law, gumbel, depth, width)
    if isinstance(rule, BeamSearch):
        return {path: value[path] for level in levels for path in level}, main
    chain = {main[:d] for d in range(1, depth + 1)}
    others = sorted((p for p in value if p not in chain), key=lambda p: -value[p])
    return {p: value[p] for p in [*chain, *others[: rule.nodes - 1 - depth]]}, main


@pytest.mark.parametrize(
    ("rule", "depth"),
    [(DynamicTree(17), 4), (DynamicTree(12, width=3), 5), (BeamSearch(13), 3), (DynamicTree(5), 1)],
    ids=["tree", "narrow tree", "beam", "one level"],
)
def test_trees_against_plain_python(rule, depth):
    prompts = h.prompts_of([5, 9, 1, 4, 7, 3], seed=4)
    rows = len(prompts)
    tokens, lengths = h.pad(prompts, WIDTH)
    text = Text(tokens, lengths)
    drafter = Expand(LmDrafter(h.TARGET, depth), rule)
    sampling = h.sampling_of(rows, **LAWS, seed=3)
    keys = prng.row_keys(sampling, jnp.arange(rows, dtype=jnp.int32))
    gumbel = prng.shared_noise(keys, sampling, lengths, depth + 1, h.VOCAB)

    @jax.jit
    def draw(params):
        ctx = make_context(text, TargetView(None), sampling, h.VOCAB, keys=keys)
        states = drafter.extend(params, drafter.init(rows, WIDTH + depth + 1), ctx)
        return drafter.draft(params, states, ctx)[0]

    draft, gumbel = jax.device_get((draw({"lm": h.close_params()}), gumbel))
    assert draft.tokens.shape[1] == drafter.info.nodes + 1 <= rule.nodes
    for b, prompt in enumerate(prompts):
        law = {name: values[b] for name, values in LAWS.items()}
        want, main = expected_tree(rule, prompt, law, gumbel[b], depth)
        got, path = {}, {0: ()}
        for i in range(1, draft.tokens.shape[1]):
            above = int(draft.parent[b, i])
            if not draft.valid[b, i]:
                assert above == 0 and draft.depth[b, i] == 1, (
                    "an invalid node is a leaf of the root"
                )
                continue
            path[i] = (*path[above], int(draft.tokens[b, i]))
            assert draft.depth[b, i] == len(path[i])
            got[path[i]] = np.log(draft.probability[b, i]) + got.get(path[above], 0.0)
        assert path[depth] == main, "the main chain comes first"
        assert len(got) == len(path) - 1, "no path twice"
        if set(got) != set(want):  # a tie at the edge
            edge = min(want.values())
            assert all(abs(got.get(p, want.get(p)) - edge) < 1e-3 for p in set(got) ^ set(want))
        for p in set(got) & set(want):
            assert abs(got[p] - want[p]) < 1e-3


# Exactness

TREES = {
    "tree": lambda n: DynamicTree(min(16, 2 + 3 * n)),
    "beam": lambda n: BeamSearch(1 + 3 * n),
}


@functools.cache
def plain():
    return h.decode(h.plain_loop(), h.all_params(), h.prompts_of(RAGGED), h.sampling_of(4, **MIXED))


@pytest.mark.parametrize(
    ("name", "length"),
    [("tree", 1), ("tree", 2), ("tree", 5), ("tree", 6), ("beam", 2), ("beam", 6)],
)
def test_ragged_batch_is_plain_decoding(name, length):
    """Greedy and sampled rows, with filters of their own."""
    loop = DecodeLoop(h.TARGET, Expand(LmDrafter(h.TARGET, length), TREES[name](length)))
    params = h.all_params(lm=h.close_params())
    got = h.decode(loop, params, h.prompts_of(RAGGED), h.sampling_of(4, **MIXED))
    h.assert_identical(got, plain())
    check_stats(got, loop)
    assert (got.stats.accepted[:, 1:].sum(axis=0) > 0).all(), "no branch was ever accepted"


@pytest.mark.parametrize("scan", [False, True])
def test_stacked_caches(scan):
    target = Decoder(h.CONFIG, layer_loop="scan" if scan else "unroll", stacked_cache=True)
    loop = DecodeLoop(target, Expand(LmDrafter(target, 4), DynamicTree(14)))
    form = stack_layers if scan else lambda params: params
    params = h.all_params(target=form(h.target_params()), lm=form(h.close_params()))
    got = h.decode(loop, params, h.prompts_of(RAGGED), h.sampling_of(4, **MIXED))
    h.assert_identical(got, plain())
    assert got.stats.accepted[:, 2].sum() > 0


@pytest.mark.parametrize(("name", "length"), [("tree", 3), ("beam", 4)])
def test_contract(name, length):
    """The rejection rule included, under which the tokens are certain."""
    drafter = Expand(LmDrafter(h.SMALL, length), TREES[name](length))
    params = {"lm": h.perturbed(h.small_params(), 0.25)}
    check_drafter(drafter, params, h.SMALL, h.small_params())


@dataclasses.dataclass(frozen=True)
class Table:
    """What a `Markov` drafter reads with: logits are a row of a table, by the last token alone."""

    def apply(self, table, tokens, positions, cache, ancestors=None, *, drafted=None):
        shape = (1, *tokens.shape, h.SMALL_CONFIG.num_kv_heads, h.SMALL_CONFIG.head_dim)
        new = tuple(jnp.zeros(shape, jnp.float32))
        return Output(table[tokens], jnp.zeros((1, 1, 1)), (new, new), {})


@dataclasses.dataclass(frozen=True)
class Markov(NeuralDrafter):
    length: int
    name: str = "markov"
    proposal: Literal["matched", "greedy"] = "matched"
    stop: None = None

    @property
    def body(self):
        return h.SMALL

    def reader(self, view):
        return Table()

    def read(self, params, states, ctx):
        return states[self.name], params[self.name][ctx.text.root()][:, None]


@pytest.mark.parametrize("rule", [DynamicTree(6, 2), BeamSearch(7)], ids=["tree", "beam"])
@pytest.mark.parametrize("kind", ["dense", "both with zeros"])
def test_rejection_with_a_grown_tree_is_exact(rule, kind):
    """Whole paths enumerated in float64: the drafter is certain of its chain, what is beside it is
    matched with the residual's draw, and what is below that is never accepted.
    """
    vocab, depth = 3, 2
    table = np.log(np.random.default_rng(1).dirichlet(np.ones(vocab), vocab)).astype(np.float32)
    drafter = Expand(Markov(depth), rule)
    text = Text(jnp.zeros((1, 9), jnp.int32), jnp.full((1,), 5, jnp.int32))
    sampling = h.sampling_of(1, temperature=1.0)
    ctx = make_context(text, TargetView(None), sampling, vocab, return_q=True)
    params = {"markov": jnp.asarray(table)}
    draft = drafter.draft(params, drafter.init(1, 16), ctx)[0]
    tokens, parent, valid = (np.asarray(x)[0] for x in (draft.tokens, draft.parent, draft.valid))
    chain = tuple(tokens[1 : depth + 1].tolist())
    assert chain[0] == table[0].argmax() and chain[1] == table[chain[0]].argmax()
    beside = [
        [int(tokens[i]) for i in range(depth + 1, len(tokens)) if valid[i] and parent[i] == d]
        for d in range(depth)
    ]
    assert all(beside)
    p, q = pair(kind, 1, vocab, depth)
    q = {prefix: np.eye(vocab)[chain[len(prefix)]] for prefix in q if len(prefix) < depth}
    with jax.enable_x64(True):
        joint, verdict = enumerate_reject(p, q, vocab, depth, lambda q, drawn: beside)
    assert joint.distance() < 1e-12
    assert (verdict.path[:, 1:] > depth).any(), "no branch was ever accepted"


@pytest.mark.parametrize("rule", [DynamicTree(9), BeamSearch(7)], ids=["tree", "beam"])
def test_chi_square_of_the_rejection_rule(rule):
    """The first two tokens of whole generations, temperatures and filters mixed in each batch."""
    counts = sample(Expand(LmDrafter(h.TARGET, 2), rule), "reject", lm=h.close_params())
    for case in range(4):
        assert chi_square(counts[case], exact_law(case)) > LEVEL


def test_what_was_read_is_not_read_again():
    """After a round in which a branch was accepted, the drafter lags by its two last tokens at most."""
    length = 4
    loop = DecodeLoop(h.TARGET, Expand(LmDrafter(h.TARGET, length), DynamicTree(16)))
    params = h.all_params(lm=h.close_params())
    tokens, lengths = h.pad(h.prompts_of(RAGGED))
    sampling, ids = h.sampling_of(4, **MIXED), jnp.arange(4, dtype=jnp.int32)
    state = h.start(loop, params, tokens, lengths, sampling, ids, capacity=48)
    branches = 0
    for _ in range(5):
        state = h.run(loop, params, state, jnp.int32(1))
        running = np.asarray(state.stats.finish) == 0
        lag = np.asarray(state.text.length - state.drafts["lm"].length)[running]
        assert ((lag >= 1) & (lag <= 2)).all()
        branches = int(state.stats.accepted[:, 2].sum())
    assert branches > 2


WINDOWED = Decoder(dataclasses.replace(h.CONFIG, windows=(5, None)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Expand(MaxGram(4), DynamicTree(12)), "max-gram.* cannot grow trees"),
        (lambda: Expand(LmDrafter(WINDOWED, 4), DynamicTree(12)), "lm.* has .* a sliding window"),
        (lambda: Expand(LmDrafter(h.TARGET, 4), DynamicTree(5)), "takes 6 to 53 nodes"),
        (lambda: Expand(LmDrafter(h.TARGET, 4), BeamSearch(8)), "takes 9 to 33 nodes"),
        (lambda: Expand(LmDrafter(h.TARGET, 4), DynamicTree(16, width=9)), "2 to 8"),
    ],
)
def test_wrong_use(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


# The drafter's attention


@pytest.mark.parametrize("layer_loop", ["unroll", "scan"])
def test_levels_of_a_tree_are_one_forward_of_it(layer_loop):
    """A tree read level by level, its keys beside the cache, gives the logits of one pass over it."""
    rng = np.random.default_rng(0)
    decoder = Decoder(h.CONFIG, layer_loop=layer_loop)
    params = h.target_params()
    params = stack_layers(params) if layer_loop == "scan" else params
    batch, slots, widths = 3, 12, (2, 3, 4)
    c = h.CONFIG
    stacked = layer_loop == "scan"
    cache = init_cache(
        c.num_layers, batch, c.num_kv_heads, slots, c.head_dim, jnp.float32, stacked=stacked
    )
    cache = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.ndim), x.shape), cache)
    cache = cache.replace(length=jnp.asarray([0, 5, 11], jnp.int32))
    parent, level, first = [0], [0], 1
    for depth, width in enumerate(widths, 1):
        above = [i for i, x in enumerate(level) if x == depth - 1]
        parent += rng.choice(above, width).tolist()
        level += [depth] * width
    nodes = len(parent)
    bits = h.ancestor_bits(jnp.broadcast_to(jnp.asarray(parent, jnp.int32), (batch, nodes)), 3)
    tokens = jnp.asarray(rng.integers(0, h.VOCAB, (batch, nodes)), jnp.int32)
    positions = cache.length[:, None] + jnp.asarray(level, jnp.int32)[None]
    apply = jax.jit(decoder.apply)
    want = apply(params, tokens, positions, cache, bits)
    seen = masks.unpack(bits, nodes)
    done = None
    for width in (1, *widths):
        new = slice(first - 1, first - 1 + width)
        first += width
        ancestors = masks.pack(seen[:, new, : new.stop])
        got = apply(params, tokens[:, new], positions[:, new], cache, ancestors, drafted=done)
        np.testing.assert_allclose(got.logits, want.logits[:, new], atol=2e-4)
        axis = 2 if stacked else 1
        join = functools.partial(lambda axis, *x: jnp.concatenate(x, axis=axis), axis)
        done = got.new if done is None else jax.tree.map(join, done, got.new)
