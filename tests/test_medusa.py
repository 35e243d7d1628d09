"""Medusa: heads, drafts, the static tree, checkpoints, training, and the lossy rule of its paper."""

import dataclasses
import functools
import itertools
import json

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from jax_specdec import DecodeLoop, Decoder, UserError, load_drafter, load_target
from jax_specdec.checkpoints.import_medusa import import_medusa, is_medusa
from jax_specdec.checkpoints.medusa import (
    load_medusa,
    read_medusa_config,
    save_medusa,
)
from jax_specdec.checkpoints.target_bound import read_own, target_fingerprint
from jax_specdec.core import acceptance
from jax_specdec.core.context import Tapped
from jax_specdec.core.draft import Draft, Text, chain
from jax_specdec.core.prefill import read_text
from jax_specdec.drafters.cascade import Cascade, Horizontal
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.medusa import MedusaDrafter
from jax_specdec.drafters.registry import longest as longest_draft
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.expand import Expand
from jax_specdec.expansions.static_tree import StaticTree, choose_tree
from jax_specdec.models.medusa import Medusa, MedusaConfig
from jax_specdec.specs.build import parse_drafter
from jax_specdec.testing import check_drafter
from jax_specdec.training import medusa
from jax_specdec.training.config import MedusaRecipe, TrainConfig

TEMPERATURES = (0.0, 0.3, 1.0, 1.7)
MODEL = Medusa(MedusaConfig(num_heads=4, share=False), h.SMALL_CONFIG)
TREE = StaticTree(10)


@functools.cache
def texts() -> np.ndarray:
    """What the target writes, `int32[B, T+1]`."""
    rows = 12
    sampling = h.sampling_of(rows, temperature=[0.0, 0.5, 1.0] * 4, max_new_tokens=200)
    loop, params = h.plain_loop(target=h.SMALL), h.all_params(target=h.small_params())
    got = h.decode(loop, params, h.prompts_of([3] * rows), sampling, capacity=100)
    return np.stack([row[:96] for row in got.tokens]).astype(np.int32)


@functools.cache
def trained():
    """Heads that are right now and then: `(own parameters, joined ones, accuracies)`."""
    config = TrainConfig(steps=1, sequence_length=95)
    target, tokens = h.small_params(), jnp.asarray(texts())
    with (
        jax.ensure_compile_time_eval(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        recipe = MedusaRecipe(loss="forward_kl")
        objective = medusa.make_objective(MODEL, h.SMALL, target, recipe, config)
        optimizer, own = optax.adam(1e-2), objective.init(jax.random.key(0))

        @jax.jit
        def fit(own):
            def step(carry, _):
                own, state = carry
                grads = jax.grad(objective.loss)(own, target, tokens, jax.random.key(0))
                updates, state = optimizer.update(grads, state, own)
                return (optax.apply_updates(own, updates), state), None

            return jax.lax.scan(step, (own, optimizer.init(own)), None, length=150)[0][0]

        own = fit(own)
        accuracies = medusa.calibrate(MODEL, h.SMALL, own, target, list(texts()), 95, 4)
    return own, MODEL.join(own, target), accuracies


@functools.cache
def reading_program():
    heads = medusa.Heads(MODEL, h.SMALL)

    @jax.jit
    def read(own, target, tokens):
        reading = heads.read(target, tokens)
        laws = [heads.laws(own, target, reading, index) for index in range(4)]
        loss = heads.loss(own, target, reading, tokens)
        return laws, loss, heads.accuracies(own, target, reading), reading.log_p

    return read


def all_laws(tokens):
    """`(log_p, log_q)` of each head over a text, on the host."""
    return jax.device_get(reading_program()(trained()[0], h.small_params(), tokens))[0]


def drafter(length=3, **fields) -> MedusaDrafter:
    return MedusaDrafter(MODEL, length, accuracies=trained()[2], **fields)


def params(**more):
    return h.all_params(target=h.small_params(), medusa=trained()[1], **more)


# The heads


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_fresh_heads_say_what_the_target_says(share, tied):
    target = Decoder(dataclasses.replace(h.SMALL_CONFIG, tied_head=tied))
    weights = h.weights(target, 4)
    model = Medusa(MedusaConfig(3, num_layers=2, share=share), target.config)
    own = model.init(weights)
    joined = model.join(own, weights)
    assert model.parameter_count() == sum(x.size for x in jax.tree.leaves(own))
    assert jax.tree.structure(model.shapes()) == jax.tree.structure(own)
    hidden = jax.random.normal(jax.random.key(0), (2, 5, 16))
    want = target.head(weights, hidden)
    for index in range(3):
        np.testing.assert_allclose(model.head(joined, hidden, index), want, rtol=1e-6, atol=1e-6)
    got = model.first(joined, hidden[:, :1], 2)
    np.testing.assert_allclose(got, jnp.repeat(want[:, :1], 2, axis=1), rtol=1e-6, atol=1e-6)
    if share:
        name = "embed" if tied else "head"
        assert "out" not in own and joined[name] is weights[name]


def test_heads_in_float64():
    model = Medusa(MedusaConfig(2, num_layers=2, share=False), h.SMALL_CONFIG)
    rng = np.random.default_rng(0)
    own = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), model.shapes())
    joined = model.join(own, h.small_params())
    hidden = rng.normal(size=(1, 3, 16)).astype(np.float32)
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), joined)
    x = hidden[0] / np.sqrt((hidden[0] ** 2).mean(-1, keepdims=True) + h.SMALL_CONFIG.norm_eps)
    for index in range(2):
        y = x * w["norm"]
        for block in w["heads"][index]:
            z = y @ block["weight"] + block["bias"]
            y = y + z / (1 + np.exp(-z))
        got = model.head(joined, jnp.asarray(hidden), index)[0]
        np.testing.assert_allclose(got, y @ w["out"][index], rtol=2e-4, atol=2e-4)


def test_decoding_reads_what_training_reads():
    """Head k, from the state that predicted the root, for the token k places behind the root; in a cascade
    the heads of places that others drafted are passed over."""
    tokens, target = jnp.asarray(texts()[:3, :21]), h.small_params()
    laws = all_laws(tokens)
    committed, ahead = np.array([4, 7, 11]), np.array([0, 2, 1])
    tapped = Tapped(h.SMALL, drafter(2).info.taps)
    view = jax.jit(lambda *x: read_text(tapped, *x))(
        target, tapped.init_view(target, 3, 24), tokens, jnp.asarray(committed - 1, jnp.int32)
    )
    scores = jax.jit(drafter(2).scores)
    for extra in (0 * ahead, ahead):
        text = Text(tokens, jnp.asarray(committed + extra, jnp.int32))
        got = jax.nn.log_softmax(scores(trained()[1], text, view))
        for row, (known, skip) in enumerate(zip(committed, extra, strict=True)):
            for i in range(2):
                at = known - 2  # of the hidden state that predicted the root
                want = laws[i + skip][1][row, at]
                np.testing.assert_allclose(got[row, i], want, rtol=1e-4, atol=1e-4)


# Drafts


@pytest.mark.parametrize("rule", [None, TREE], ids=str)
def test_contract(rule):
    one = drafter()
    assert one.info.taps == (h.SMALL.config.num_layers - 1,) and one.info.distribution
    check_drafter(
        one if rule is None else Expand(one, rule),
        {"medusa": trained()[1]},
        h.SMALL,
        h.small_params(),
        max_new_tokens=8,
    )


def cascaded() -> Horizontal:
    """`cascade(lm[medusa:2]:1, medusa:2)`: the second asks for tokens behind those of others."""
    lm = LmDrafter(h.SMALL, 1)
    return Horizontal((Cascade(lm, (drafter(2),), (2,)), drafter(2)), (1, 2))


@functools.cache
def plain_answers():
    sampling = h.sampling_of(4, temperature=TEMPERATURES, top_k=[0, 2, 0, 0], max_new_tokens=28)
    loop, given = h.plain_loop(target=h.SMALL), h.all_params(target=h.small_params())
    return sampling, h.decode(loop, given, h.prompts_of([1, 3, 8, 13]), sampling)


@pytest.mark.parametrize("kind", ["greedy", "static", "cascade"])
def test_identity(kind):
    made = {
        "greedy": lambda: Expand(drafter(4, proposal="greedy"), Cape(9)),
        "static": lambda: Expand(drafter(3), StaticTree(24)),
        "cascade": lambda: Expand(cascaded(), Cape(12)),
    }[kind]()
    sampling, plain = plain_answers()
    lm = h.perturbed(h.small_params(), 0.1)
    got = h.decode(DecodeLoop(h.SMALL, made), params(lm=lm), h.prompts_of([1, 3, 8, 13]), sampling)
    h.assert_identical(got, plain)
    accepted, drafted = got.stats.accepted.sum(axis=0), got.stats.drafted.sum(axis=0)
    assert 0 < accepted[1:].sum() < drafted[1:].sum()
    if kind == "static":
        assert accepted[2] > 0, "nothing beside the chain was ever accepted"
    if kind == "cascade":
        medusa_alone = made.info.sources.index("medusa") + 1
        assert drafted[medusa_alone] > 0


def test_the_rejection_rule_takes_trees():
    """Its law is enumerated elsewhere; where nothing is random it is plain decoding."""
    sampling, plain = plain_answers()
    loop = DecodeLoop(h.SMALL, Expand(drafter(3), TREE), acceptance.Reject())
    got = h.decode(loop, params(), h.prompts_of([1, 3, 8, 13]), sampling)
    assert got.tokens[0] == plain.tokens[0]
    assert (got.stats.accepted.sum(axis=0)[1:] > 0).all()


def test_cascades_that_reach_too_far_are_refused():
    lm = LmDrafter(h.SMALL, 1)
    inner = Cascade(lm, (drafter(3),), (3,))
    with pytest.raises(UserError, match="'medusa' drafts up to 6 places behind the text"):
        Horizontal((inner, drafter(3)), (1, 3))
    assert Horizontal((inner, drafter(3)), (1, 3), cut=True).info.depth == 4


def test_more_tokens_than_heads():
    assert drafter(4).info.depth == 4
    with pytest.raises(UserError, match=r"has 4 heads.*asked for 5: draft 4 tokens or fewer"):
        drafter(5)


# The static tree


def value_of(path, accuracies):
    return float(np.prod([accuracies[i][rank] for i, rank in enumerate(path)]))


@pytest.mark.parametrize("seed", range(4))
def test_the_tree_of_most_value(seed):
    """Of all trees that hold the chain, by the value of all nodes; accuracies need not fall with the rank."""
    rng = np.random.default_rng(seed)
    depth, ranks = ((3, 3), (2, 4), (3, 2), (1, 8))[seed]
    accuracies = tuple(tuple(rng.dirichlet(np.ones(ranks)).tolist()) for _ in range(depth))
    chain_nodes = {(0,) * d for d in range(1, depth + 1)}
    others = [
        path
        for d in range(1, depth + 1)
        for path in itertools.product(range(ranks), repeat=d)
        if path not in chain_nodes
    ]
    for count in range(1, 6 if len(others) > 12 else len(others) + 1):
        got = choose_tree(accuracies, count)
        assert got[:depth] == tuple((0,) * d for d in range(1, depth + 1))
        assert len(set(got)) == len(got) == depth + count
        for i, path in enumerate(got):
            assert path[:-1] in ((), *got[:i]), "a parent comes first"
        closed = (
            some
            for some in itertools.combinations(others, count)
            if all(p[:-1] in ((), *chain_nodes, *some) for p in some)
        )
        best = max(sum(value_of(p, accuracies) for p in some) for some in closed)
        assert sum(value_of(p, accuracies) for p in got[depth:]) == pytest.approx(best)


def test_equal_nodes_and_nodes_of_no_value():
    flat = ((1.0, 0.5, 0.0), (0.5, 0.25, 0.0))
    assert choose_tree(flat, 3) == ((0,), (0, 0), (1,), (0, 1), (1, 0))
    assert len(choose_tree(flat, 10)) == 12 == len(set(choose_tree(flat, 10)))


def test_a_tree_takes_its_tokens_from_the_heads():
    """Below every node the same candidates; one that a filter leaves none is invalid, and all below it."""
    text = Text(jnp.asarray([[5, 7, 0, 0]], jnp.int32), jnp.asarray([2], jnp.int32))
    ids = jnp.asarray([[[10, 11, 12], [20, 21, 22], [0, 0, 0]]], jnp.int32)
    probs = jnp.asarray([[[0.6, 0.4, 0.0], [0.5, 0.3, 0.2], [0, 0, 0]]], jnp.float32)
    draft = chain(text, ids[:, :2, 0], top_ids=ids, top_probs=probs)
    paths = ((0,), (0, 0), (1,), (2,), (1, 2), (2, 0), (0, 1))
    got = StaticTree(8).widen(draft, text, paths)
    assert got.tokens.tolist() == [[7, 10, 20, 11, 12, 22, 20, 21]]
    assert got.valid.tolist() == [[True, True, True, True, False, True, False, True]]
    assert got.parent is not None and got.parent.tolist() == [[0, 0, 1, 0, 0, 3, 4, 1]]
    assert got.depths().tolist() == [[0, 1, 2, 1, 1, 2, 2, 2]]
    np.testing.assert_allclose(got.probability[0, 1:], [0.6, 0.5, 0.4, 0, 0.2, 0.5, 0.3])


def test_trees_that_are_refused():
    with pytest.raises(UserError, match="'lm' has no static tree"):
        Expand(LmDrafter(h.SMALL, 3), TREE)
    with pytest.raises(
        UserError, match="accuracies of the heads, which this Medusa checkpoint lacks"
    ):
        Expand(MedusaDrafter(MODEL, 3), TREE)
    with pytest.raises(UserError, match=r"chain of 3 takes 5 to 64 nodes.*got 4"):
        Expand(drafter(3), StaticTree(4))
    few = MedusaDrafter(MODEL, 2, accuracies=((0.5, 0.2),) * 4)
    with pytest.raises(UserError, match=r"of 2 heads with 2 candidates each has 7 nodes.*than 8"):
        Expand(few, StaticTree(8))
    for text, message in (
        ("lm:4+static:16", r"'lm' takes no \+static: .*\+tree or \+beam expand it"),
        ("medusa:3+tree:16", r"'medusa' takes no \+tree: .*\+path or \+static expand it"),
        ("medusa:3+static:3", "takes 5 to 64 nodes"),
        ("medusa:40+static:8", "takes 42 to 64 nodes"),
        ("medusa[max-gram:3]", "'medusa' cannot verify"),
    ):
        with pytest.raises(UserError, match=message):
            parse_drafter(text)
    spec = parse_drafter("cascade(lm[medusa:2]:1, medusa:3)+cape:16")
    assert str(spec) == "cascade(lm[medusa:2]:1, medusa:3)+cape:16"


# The lossy rule


def random_tree(rng, vocab, parents):
    """A draft of these parents, siblings distinct, some nodes invalid; and laws, some of them certain."""
    nodes = len(parents)
    tokens, valid = np.zeros(nodes, np.int32), rng.random(nodes) > 0.15
    for node in range(1, nodes):
        taken = [tokens[i] for i in range(1, node) if parents[i] == parents[node]]
        tokens[node] = rng.choice([t for t in range(vocab) if t not in taken])
    valid[0] = True
    for node in range(1, nodes):
        valid[node] &= valid[parents[node]]
    p = rng.dirichlet(np.full(vocab, 0.5), nodes)
    p[rng.random(nodes) < 0.2] = np.eye(vocab)[1]
    return tokens, valid, p


def wanted(tokens, valid, parents, p, own, epsilon, delta):
    """Typical acceptance, path by path: the longest, then the likeliest one."""
    best = (0, 0.0, [0])
    for leaf in range(len(parents)):
        path = [leaf]
        while path[0]:
            path.insert(0, parents[path[0]])
        fine, likelihood = True, 0.0
        for above, node in itertools.pairwise(path):
            law = p[above]
            entropy = -sum(x * np.log(x) for x in law if x > 0)
            chance = law[tokens[node]]
            fine &= bool(valid[node] and chance > min(epsilon, delta * np.exp(-entropy)))
            likelihood += np.log(chance) if chance > 0 else 0.0
        if fine and (len(path) - 1, likelihood) > best[:2]:
            best = (len(path) - 1, likelihood, path)
    path = best[2]
    return path, [*tokens[path[1:]], own[path[-1]]]


@pytest.mark.parametrize(
    "parents", [(0, 0, 1, 2), (0, 0, 1, 2, 0, 0, 4, 4, 1, 6)], ids=["chain", "tree"]
)
def test_lossy_typical_in_float64(parents):
    rng, vocab = np.random.default_rng(0), 5
    batch, lossy = 300, acceptance.LossyTypical(0.3, 0.5)
    rows = [random_tree(rng, vocab, parents) for _ in range(batch)]
    tokens, valid, p = (np.stack(x) for x in zip(*rows, strict=True))
    own = rng.integers(0, vocab, tokens.shape).astype(np.int32)
    depths = [0]
    for above in parents[1:]:
        depths.append(depths[above] + 1)
    with jax.enable_x64(True):
        parent = jnp.broadcast_to(jnp.asarray(parents, jnp.int32)[None], tokens.shape)
        depth = jnp.broadcast_to(jnp.asarray(depths, jnp.int32)[None], tokens.shape)
        shape = {
            "parent": parent,
            "depth": depth,
            "ancestors": h.ancestor_bits(parent, max(depths)),
        }
        draft = Draft(
            tokens=jnp.asarray(tokens),
            valid=jnp.asarray(valid),
            source=jnp.ones(tokens.shape, jnp.int32),
            probability=jnp.ones(tokens.shape, jnp.float32),
            depth_limit=max(depths),
            **({} if len(parents) == 4 else shape),
        )
        got = jax.device_get(
            jax.jit(acceptance.lossy_typical, static_argnums=3)(
                draft, jnp.asarray(p), jnp.asarray(own), lossy
            )
        )
    seen = set()
    for row in range(batch):
        path, emitted = wanted(*rows[row][:2], parents, p[row], own[row], 0.3, 0.5)
        count = len(path) - 1
        seen.add(count)
        assert got.accepted[row] == count
        assert got.path[row, : count + 1].tolist() == path
        assert got.tokens[row, : count + 1].tolist() == [int(t) for t in emitted]
    assert seen == set(range(max(depths) + 1)), "every depth occurred"


def test_lossy_typical_is_not_exact():
    """The control: greedy rows are plain decoding's, sampled ones are longer in fewer rounds and differ."""
    sampling, plain = plain_answers()
    prompts = h.prompts_of([1, 3, 8, 13])
    loop = DecodeLoop(h.SMALL, Expand(drafter(3), TREE), acceptance.LossyTypical())
    got = h.decode(loop, params(), prompts, sampling)
    assert got.tokens[0] == plain.tokens[0]
    assert got.tokens[2] != plain.tokens[2] or got.tokens[3] != plain.tokens[3]
    # The law: of (.5, .3, .2) a draft of the second token is always taken.
    p = jnp.asarray([[[0.5, 0.3, 0.2]] * 2], jnp.float32)
    text = Text(jnp.zeros((1, 3), jnp.int32), jnp.ones((1,), jnp.int32))
    draft = chain(text, jnp.ones((1, 1), jnp.int32))
    for own in range(3):
        target = jnp.full((1, 2), own, jnp.int32)
        verdict = acceptance.lossy_typical(draft, p, target, acceptance.LossyTypical())
        assert verdict.tokens[0, 0] == 1


def test_lossy_settings_that_are_refused():
    for fields, message in (
        ({"epsilon": 0.0}, "epsilon of lossy-typical"),
        ({"epsilon": 1.5}, "epsilon of lossy-typical"),
        ({"delta": float("nan")}, "delta of lossy-typical"),
    ):
        with pytest.raises(UserError, match=message):
            acceptance.LossyTypical(**fields)
    assert DecodeLoop(h.SMALL, drafter(2)).rule == acceptance.Match()


# Training


RUN = TrainConfig(
    steps=10,
    batch_size=4,
    sequence_length=16,
    warmup_steps=1,
    learning_rate=3e-2,
    optimizer="muon",
    remat=True,
    eval_every=5,
    save_every=5,
)
PAIR = Medusa(MedusaConfig(2, share=False), h.SMALL_CONFIG)


@pytest.fixture
def ordinary_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(folder, config=RUN, **options):
    recipe, documents = MedusaRecipe(), list(texts())
    args = (PAIR, h.SMALL, h.small_params(), recipe, config, documents, documents[:3], folder)
    medusa.train(*args, progress=False, **options)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("ordinary_promotion")
def test_training_lowers_the_loss_and_resumes_exactly(tmp_path):
    def logged(rows):
        names = ("step", "loss", "heldout_loss", "acceptance", "greedy_match")
        return [tuple(row.get(name) for name in names) for row in rows]

    whole = run(tmp_path / "whole")
    assert whole[-1]["loss"] < 0.97 * whole[0]["loss"]
    cut = run(tmp_path / "cut", stop_after=5)
    assert [row["step"] for row in cut] == [1, 2, 3, 4, 5]
    assert logged(run(tmp_path / "cut", resume=True)) == logged(whole)
    last = whole[-1]
    assert len(last["acceptance"]) == len(last["greedy_match"]) == 2
    assert len(last["heldout_cross_entropy"]) == 2
    with pytest.raises(UserError, match="other settings"):
        run(tmp_path / "cut", resume=True, fingerprint="another target")
    short = dataclasses.replace(RUN, sequence_length=2)
    with pytest.raises(UserError, match="Windows of 2 tokens leave nothing to the last of 2 heads"):
        run(tmp_path / "short", short)


def test_the_loss_and_the_laws_in_float64():
    """Sum over k of 0.8^k times the cross-entropy of head k at token t + k + 1; the target's law of head k is
    that of the same token, once all before it are known."""
    tokens, joined = texts()[:3, :21], trained()[1]
    laws, loss, _, log_p = jax.device_get(
        reading_program()(trained()[0], h.small_params(), jnp.asarray(tokens))
    )
    hidden = medusa.Heads(MODEL, h.SMALL).read(h.small_params(), jnp.asarray(tokens)).hidden
    want = 0.0
    for k in range(1, 5):
        scores = np.asarray(MODEL.head(joined, hidden, k - 1), np.float64)
        log_q = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        places = [(row, t) for row in range(3) for t in range(20 - k)]
        want += 0.8**k * -np.mean([log_q[row, t, tokens[row, t + k + 1]] for row, t in places])
        np.testing.assert_allclose(laws[k - 1][1], log_q[:, : 20 - k], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(laws[k - 1][0], log_p[:, k:])
    assert loss == pytest.approx(want, rel=1e-4)


def test_accuracies_by_rank():
    own, _, accuracies = trained()
    assert len(accuracies) == 4 and all(len(row) == 8 for row in accuracies)
    laws, _, got, _ = jax.device_get(
        reading_program()(own, h.small_params(), jnp.asarray(texts()[:3, :21]))
    )
    for (log_p, log_q), shares in zip(laws, got, strict=True):
        order, best = np.argsort(-log_q, axis=-1), log_p.argmax(-1)
        want = [(order[..., i] == best).mean() for i in range(8)]
        np.testing.assert_allclose(shares, want, atol=1e-6)
    assert min(row[0] for row in accuracies) > 1.2 / h.VOCAB, (
        "they were measured on what was learnt"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"decay": 0.0}, "decay must be above 0"), ({"jensen_shannon_beta": 1.0}, "between 0 and 1")],
)
def test_recipes_that_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        MedusaRecipe(**fields)


# Checkpoints


@pytest.fixture(scope="module")
def target(tiny_checkpoints):
    return load_target(tiny_checkpoints / "target", dtype="float32")


ACCURACIES = ((0.5, 0.25, 0.125), (0.25, 0.125, 0.0625))


@pytest.fixture
def folder(target, tmp_path):
    model = Medusa(MedusaConfig(2), target.config)
    own = model.init(target.params)
    save_medusa(tmp_path / "medusa", model, own, target_fingerprint(target.path), ACCURACIES)
    return tmp_path / "medusa"


def edit_config(folder, **changes):
    path = folder / "config.json"
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in found.items() if v != "absent"}))


@pytest.mark.parametrize("share", [False, True])
def test_round_trip(target, tmp_path, share):
    model = Medusa(MedusaConfig(3, num_layers=2, share=share), target.config, "bfloat16")
    rng = np.random.default_rng(0)
    own = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), model.shapes())
    fingerprint = target_fingerprint(target.path)
    save_medusa(tmp_path / "m", model, own, fingerprint, max_shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    assert read_medusa_config(tmp_path / "m") == (model.config, (), fingerprint)
    got = read_own(tmp_path / "m", model.shapes())
    assert jax.tree.structure(got) == jax.tree.structure(own)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    loaded, joined, accuracies = load_medusa(tmp_path / "m", target)
    assert (loaded.dtype, accuracies) == (jnp.float32, ())
    assert ("head" in joined) == share and joined["norm"] is target.params["norm"]


def test_loading_by_name(target, folder):
    drafts = {"medusa": folder}
    loaded = load_drafter("medusa", target, drafts=drafts)
    assert (loaded.spec, loaded.longest, longest_draft("medusa", folder)) == ("medusa:2", 2, 2)
    loaded = load_drafter("medusa:2+static:7", target, drafts=drafts)
    assert loaded.drafter.info.nodes == 6
    assert loaded.drafter.rule.paths(loaded.drafter.drafter) == (
        (0,),
        (0, 0),
        (1,),
        (2,),
        (0, 1),
        (1, 0),
    )
    assert load_drafter("medusa+static", target, drafts=drafts).spec == "medusa:2+static:9"
    with pytest.raises(UserError, match=r"has 2 heads.*draft 2 tokens or fewer"):
        load_drafter("medusa:3", target, drafts=drafts)
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere: say where .* --draft medusa"):
        load_drafter("medusa:1", target, drafts={"medusa": folder / "nowhere"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "0" * 64}, "was trained for another target.*train medusa"),
        ({"target": "absent"}, "does not say which target"),
        ({"model_type": "glide"}, "holds no Medusa drafter"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": "4"}, "num_heads must be at least 1, got '4'"),
        ({"share": 1}, "share must be true or false"),
        ({"width": 3}, "unexpected keyword argument 'width'"),
        ({"num_heads": 3}, "accuracies in 0 to 1 for each of 3 heads"),
        ({"num_heads": 3, "accuracies": []}, "missing heads.2.0.bias"),
        ({"accuracies": [[0.5], [2.0]]}, "accuracies in 0 to 1"),
        ({"accuracies": [[0.5], [0.2, 0.1]]}, "as many for every head"),
    ],
)
def test_configurations_that_are_refused(target, folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_medusa(folder, target)


def test_damaged_files(target, folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        load_medusa(folder, target)
    path.write_bytes(whole)
    tensors = load_file(path)
    tensors["heads.1.0.weight"] = tensors["heads.1.0.weight"][:-1].copy()
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"heads.1.0.weight has shape \(63, 64\)"):
        load_medusa(folder, target)
    path.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_medusa(folder, target)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="is no Medusa checkpoint: it has no config"):
        load_medusa(folder, target)


@pytest.mark.parametrize("prefix", ["medusa_head.", ""])
def test_import(target, tmp_path, prefix):
    """The published layout: beside the whole model, or in a file of its own."""
    rng, c = np.random.default_rng(0), target.config
    embed, vocab = c.hidden_size, c.vocab_size
    shapes = {}
    for head in range(3):
        shapes |= {
            f"{prefix}{head}.0.linear.weight": (embed, embed),
            f"{prefix}{head}.0.linear.bias": (embed,),
            f"{prefix}{head}.1.weight": (vocab, embed),
        }
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    name = "model" if prefix else "medusa_lm_head"
    more = {"model.norm.weight": np.ones(3, np.float32)} if prefix else {}
    save_file(tensors | more, tmp_path / f"{name}.safetensors")
    assert is_medusa(tmp_path)
    model, own = import_medusa(tmp_path, target)
    assert model.config == MedusaConfig(3, 1, share=False)
    hidden = jnp.asarray(rng.normal(size=(1, 2, embed)), jnp.float32)
    x = np.asarray(target.decoder.head({**target.params, "head": jnp.eye(embed)}, hidden))
    for head in range(3):
        z = (
            x @ tensors[f"{prefix}{head}.0.linear.weight"].T
            + tensors[f"{prefix}{head}.0.linear.bias"]
        )
        want = (x + z / (1 + np.exp(-z))) @ tensors[f"{prefix}{head}.1.weight"].T
        got = model.head(model.join(own, target.params), hidden, head)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    del tensors[f"{prefix}1.1.weight"]
    tensors[f"{prefix}2.0.linear.bias"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"missing .*1\.1\.weight.*bias has shape \(3,\)"):
        import_medusa(tmp_path, target)
    save_file({"lm_head.weight": np.ones(3, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="holds no Medusa heads"):
        import_medusa(tmp_path, target)


def test_shapes_that_are_refused():
    for fields in ({"num_heads": -1}, {"num_layers": 0}, {"num_heads": True}, {"share": "yes"}):
        with pytest.raises(ValueError):
            MedusaConfig(**fields)
