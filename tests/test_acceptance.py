"""Every acceptance rule enumerated in float64: exact ones, and wrong ones that the enumeration catches."""

import itertools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
    KINDS,
    NUDGE,
    Joint,
    enumerate_reject,
    model,
    norm,
    pair,
    program,
    random_law,
)

from jax_specdec.core import acceptance, prng
from jax_specdec.core.draft import Draft


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("siblings", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_reject_is_exact(kind, siblings):
    for seed, vocab, depth in [(0, 3, 2), (1, 3, 2), (2, 4, 1), (3, 3, 3)]:
        if depth == 3 and siblings:
            continue
        p, q = pair(kind, seed, vocab, depth)
        joint, _ = enumerate_reject(p, q, vocab, depth, siblings)
        assert joint.distance() < 1e-12


@pytest.mark.parametrize("drafted", [0, 1, 2])
def test_reject_is_exact_where_drafting_ends_early(drafted):
    p, q = pair("dense", 5, 3, 2)
    for siblings in (0, 1):
        joint, _ = enumerate_reject(p, q, 3, 2, siblings, drafted)
        assert joint.distance() < 1e-12


def test_reject_equal_laws_accept_everything():
    p, _ = pair("p with zeros", 1, 3, 2)
    joint, verdict = enumerate_reject(p, p, 3, 2)
    assert joint.distance() < 1e-12
    assert (verdict.accepted == 2).all()


def test_reject_acceptance_is_the_overlap():
    p, q = pair("dense", 3, 4, 1)
    overlap = np.minimum(p[()], q[()]).sum()
    chance = np.asarray(acceptance.accept_probability(jnp.asarray(p[()]), jnp.asarray(q[()])))
    assert abs((q[()] * chance).sum() - overlap) < 1e-15


# Negative controls: the same enumeration must catch these


def test_wrong_residual_is_caught(monkeypatch):
    monkeypatch.setattr(acceptance, "residual", lambda p, q: p)
    p, q = pair("dense", 0, 3, 2)
    assert enumerate_reject(p, q, 3, 2)[0].distance() > 1e-2


def test_unnormalised_difference_is_caught(monkeypatch):
    monkeypatch.setattr(acceptance, "residual", lambda p, q: jnp.abs(p - q))
    p, q = pair("dense", 0, 3, 2)
    assert enumerate_reject(p, q, 3, 2)[0].distance() > 1e-2


def test_accepting_on_equality_is_caught(monkeypatch):
    """`u q <= p` accepts a token of probability 0 when u is 0."""
    p, q = pair("p with zeros", 0, 3, 2)
    assert min(law.min() for law in p.values()) == 0
    assert enumerate_reject(p, q, 3, 2)[0].distance() < 1e-12
    monkeypatch.setattr(acceptance, "accepts", lambda u, p, q: u * q <= p)
    joint, _ = enumerate_reject(p, q, 3, 2)
    assert joint.distance() > 1e-2
    impossible = [s for s in joint.mass if any(p[s[:d]][s[d]] == 0 for d in range(len(s)))]
    assert sum(joint.mass[s] for s in impossible) > 0


def test_ratio_test_on_argmax_drafts_is_caught():
    """p/q with a softmax q on tokens that were not drawn from it (GliDe's repository, keras-hub)."""
    p, q = pair("dense", 2, 3, 2)
    argmax = {prefix: np.eye(3)[law.argmax()] for prefix, law in q.items()}
    assert enumerate_reject(p, q, 3, 2, draw=argmax)[0].distance() > 1e-2
    # The proposer is certain of its token: then it is exact.
    assert enumerate_reject(p, argmax, 3, 2)[0].distance() < 1e-12


def test_raw_q_for_a_warped_draw_is_caught():
    """A proposer that reports the law before top-k (transformers#47932)."""
    p, q = pair("dense", 4, 4, 1)
    warped = {k: norm(np.where(v >= np.sort(v)[-2], v, 0)) for k, v in q.items()}
    assert enumerate_reject(p, q, 4, 1, draw=warped)[0].distance() > 1e-2
    assert enumerate_reject(p, warped, 4, 1)[0].distance() < 1e-12


def shared_uniform_law(p, q):
    """Draft by inverse CDF and accept with one and the same uniform; integrated exactly."""
    cdf = np.concatenate([[0], np.cumsum(q)])
    cuts = np.unique(np.concatenate([cdf, np.clip(p / q, 0, 1)]))
    out = np.zeros_like(p)
    for low, high in itertools.pairwise(cuts):
        middle = (low + high) / 2
        token = int(np.searchsorted(cdf, middle) - 1)
        drawn = (jnp.asarray(x) for x in (middle, p[token], q[token]))
        if bool(acceptance.accepts(*drawn)):
            out[token] += high - low
        else:
            out += (high - low) * np.asarray(acceptance.residual(jnp.asarray(p), jnp.asarray(q)))
    return out


def test_one_uniform_for_drafting_and_accepting_is_biased():
    p = np.array([0.2, 0.3, 0.5])
    biased = shared_uniform_law(p, np.array([0.5, 0.3, 0.2]))
    assert abs(biased.sum() - 1) < 1e-12
    assert 0.5 * abs(biased - p).sum() > 0.1
    roles = (
        prng.ROLE_MATCH,
        prng.ROLE_DRAFT,
        prng.ROLE_ACCEPT,
        prng.ROLE_RESIDUAL,
        prng.ROLE_BONUS,
    )
    assert len(set(roles)) == 5


def test_roles_and_positions_draw_independently():
    """Drafting and accepting never see the same bits: correlations over many rows are noise."""
    keys = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (4000, 2)), jnp.uint32)
    start = jnp.full((4000,), 9, jnp.int32)
    draws = [prng.position_uniform(keys, start, 2, role) for role in range(5)]
    draws = np.concatenate([np.asarray(d) for d in draws], axis=1)
    assert (draws >= 0).all() and (draws < 1).all()
    off = np.corrcoef(draws.T) - np.eye(10)
    assert abs(off).max() < 5 / np.sqrt(4000)


# The pure functions


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_probability_zero_is_never_accepted(dtype):
    u = jnp.asarray([0.0, 1e-38, 0.5, np.nextafter(np.dtype(dtype).type(1), 0)], dtype)
    for q in (0.0, 1e-30, 0.3, 1.0):
        q = jnp.full_like(u, q)
        assert not acceptance.accepts(u, jnp.zeros_like(u), q).any()
        assert acceptance.accepts(u, jnp.maximum(q, jnp.asarray(1e-6, dtype)), q).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_residual(dtype):
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, q = (random_law(rng, 5, 0.3).astype(dtype) for _ in range(2))
        got = np.asarray(acceptance.residual(jnp.asarray(p), jnp.asarray(q)))
        assert got.dtype == dtype
        np.testing.assert_allclose(got, norm(np.maximum(p - q, 0)), rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(acceptance.residual(jnp.asarray(p), jnp.asarray(p)), p)
    # Terms far below the largest are kept: nothing is added to the denominator.
    p = np.array([0.5, 0.5 - 1e-12, 1e-12])
    q = np.array([0.5, 0.5, 0.0])
    np.testing.assert_array_equal(acceptance.residual(jnp.asarray(p), jnp.asarray(q)), [0, 0, 1])


def test_accept_probability_matches_the_draw():
    """The threshold in `accepts` is `accept_probability`, from both sides."""
    rng = np.random.default_rng(1)
    p, q = rng.random(500), rng.random(500)
    p[:50], q[50:100] = 0, 0
    chance = np.asarray(acceptance.accept_probability(jnp.asarray(p), jnp.asarray(q)))
    below, above = np.maximum(chance - NUDGE, 0), np.minimum(chance + NUDGE, np.nextafter(1, 0))
    some = p > 0
    low, high, given, drawn = (jnp.asarray(x) for x in (below, above, p, q))
    assert acceptance.accepts(low, given, drawn)[some].all()
    assert not acceptance.accepts(high, given, drawn)[chance < 1].any()


# Match under shared noise


def enumerate_match(p, tree, tokens, vocab, valid=None):
    """The joint law of a block under `acceptance.match` for a fixed tree, over all target draws."""
    nodes = len(tree)
    prefix, depth = [()], [0]
    for i in range(1, nodes):
        prefix.append((*prefix[tree[i]], int(tokens[i])))
        depth.append(depth[tree[i]] + 1)
    draws = np.asarray(list(itertools.product(range(vocab), repeat=nodes)), np.int32)
    weight = np.prod([p[prefix[i]][draws[:, i]] for i in range(nodes)], axis=0)
    valid = np.ones(nodes, bool) if valid is None else valid

    def rows(x, dtype=jnp.int32):
        return jnp.asarray(np.broadcast_to(np.asarray(x), draws.shape), dtype)

    is_chain = tree == (0, *range(nodes - 1))
    parent = rows(tree)
    draft = Draft(
        tokens=rows(tokens),
        valid=rows(valid, bool),
        source=parent,
        probability=rows(1.0, jnp.float32),
        parent=None if is_chain else parent,
        depth=None if is_chain else rows(depth),
        depth_limit=max(depth),
    )
    verdict = jax.tree.map(np.asarray, program("match")(draft, draws))
    joint = Joint(p, vocab, max(depth) + 1)
    for i, w in enumerate(weight):
        accepted = int(verdict.accepted[i])
        path = verdict.path[i, : accepted + 1]
        assert path[0] == 0 and all(tree[b] == a for a, b in itertools.pairwise(path))
        assert valid[path].all()
        joint.add(verdict.tokens[i, : accepted + 1], w)
    return joint, verdict, weight


@pytest.mark.parametrize("kind", ["dense", "p with zeros", "greedy target"])
@pytest.mark.parametrize("seed", range(6))
def test_match_is_exact_for_any_tree(kind, seed):
    """Any tree that does not look at the target's randomness, duplicates and holes included."""
    rng = np.random.default_rng(seed)
    vocab, depth = 3, 2 + seed % 2
    tree = (0, *range(depth)) if seed == 0 else h.random_parents(rng, depth, 5 - depth)
    tokens = rng.integers(0, vocab, len(tree))
    valid = np.ones(len(tree), bool)
    if seed > 2:
        valid[1:] = rng.random(len(tree) - 1) > 0.3
        for i in range(1, len(tree)):
            valid[i] &= valid[tree[i]]
    p = model(rng, vocab, depth + 1, **KINDS[kind][0])
    joint, verdict, weight = enumerate_match(p, tree, tokens, vocab, valid)
    assert joint.distance() < 1e-12
    # E[accepted] = sum of the target's probabilities of all distinct valid paths (optimal).
    paths, prefix = set(), [()]
    for i in range(1, len(tree)):
        prefix.append((*prefix[tree[i]], int(tokens[i])))
        if valid[i]:
            paths.add(prefix[i])
    chance = sum(np.prod([p[s[:d]][s[d]] for d in range(len(s))]) for s in paths)
    mean = (verdict.accepted * weight).sum()
    # Duplicates fork into independent draws here, so that both may be walked.
    distinct = len(paths) == int(valid[1:].sum())
    assert abs(mean - chance) < 1e-12 if distinct else mean > 0 or chance == 0


def test_resampling_on_a_miss_is_caught(monkeypatch):
    """A target draw that may not be the matched one is replaced: the classic wrong reading of match."""
    p = model(np.random.default_rng(0), 3, 3)
    right = acceptance.match

    def wrong(draft, target):
        verdict = right(draft, target)
        missed = (verdict.accepted == 0)[:, None]
        shifted = jnp.where(missed, (verdict.tokens + 1) % 3, verdict.tokens)
        return verdict._replace(tokens=shifted)

    monkeypatch.setattr(acceptance, "match", wrong)
    assert enumerate_match(p, (0, 0, 1), [0, 1, 2], 3)[0].distance() > 1e-2


def test_shared_noise_accepts_more_than_independent_draws():
    """P(x = y) is at least (1 - TV) / (1 + TV) under shared noise (arXiv 2408.07978)."""
    rng = np.random.default_rng(0)
    p, q = random_law(rng, 6), random_law(rng, 6)
    noise = rng.gumbel(size=(200_000, 6))
    same = ((np.log(p) + noise).argmax(1) == (np.log(q) + noise).argmax(1)).mean()
    tv = 0.5 * abs(p - q).sum()
    assert same > (1 - tv) / (1 + tv) - 0.005
    assert same > (p * q).sum() + 0.05
