"""Medusa's drafts: the contract, identity, the static tree, and what is refused."""

import itertools

import helpers as h
import jax.numpy as jnp
import numpy as np
import pytest
from medusa_drafts import MODEL, TREE, drafter, params, plain_answers, trained

from jax_specdec import DecodeLoop, UserError
from jax_specdec.core import acceptance
from jax_specdec.core.draft import Text, chain
from jax_specdec.drafters.cascade import Cascade, Horizontal
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.medusa import MedusaDrafter
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.expand import Expand
from jax_specdec.expansions.static_tree import StaticTree, choose_tree
from jax_specdec.specs.whole import parse_drafter
from jax_specdec.testing import check_drafter

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
