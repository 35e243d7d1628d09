"""Expansions: which siblings each rule takes, against plain Python, and exactness of what comes of it."""

import functools
import json

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import enumerate_reject, norm, pair
from loop_runs import MIXED, RAGGED, check_stats
from sampled_laws import LEVEL, chi_square, exact_law, sample

from jax_specdec import DecodeLoop, UserError, load_target
from jax_specdec.core import acceptance
from jax_specdec.core.confidence import best_children
from jax_specdec.core.draft import Text, chain
from jax_specdec.core.sampling import make_sampling
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.expand import Expand
from jax_specdec.expansions.select import select
from jax_specdec.expansions.siblings import Fixed, PathProbability
from jax_specdec.specs.build import load_drafter
from jax_specdec.specs.defaults import LENGTHS_FILE
from jax_specdec.specs.language import Spec
from jax_specdec.specs.whole import complete, parse_drafter
from jax_specdec.testing import check_drafter

RULES = {"cape": Cape, "fixed": Fixed, "path": PathProbability}

# Which siblings


def paper_bins(p: float) -> int:
    return 7 if p <= 0.3 else 5 if p <= 0.6 else 3 if p <= 0.8 else 1


def code_bins(p: float) -> int:
    return [8, 8, 8, 6, 6, 6, 4, 4, 2, 2, 2, 2][int(10 * p)] - 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_bins_and_their_boundaries(dtype):
    """(0, .3] (.3, .6] (.6, .8] (.8, 1] in the paper, closed on the left in the authors' code."""
    kind = np.dtype(dtype).type
    edges = [kind(e) for e in (0.3, 0.6, 0.8)]
    values = [kind(1e-6), kind(0.5), kind(0.7), kind(1.0)]
    for edge in edges:
        values += [np.nextafter(edge, kind(0)), edge, np.nextafter(edge, kind(1))]
    values = np.asarray(values, dtype)
    with jax.enable_x64(dtype == "float64"):
        confidence = jnp.asarray(values)
        paper = Cape(6).siblings(confidence).tolist()
        code = Cape(6, boundary="code").siblings(confidence).tolist()
    assert paper == [7, 5, 3, 1, 7, 7, 5, 5, 5, 3, 3, 3, 1]
    assert code == [7, 5, 3, 1, 7, 5, 5, 5, 3, 3, 3, 1, 1]
    inside = np.linspace(0.005, 0.995, 100)  # between the boundaries the two agree
    assert [paper_bins(p) for p in inside] == [code_bins(p) for p in inside]
    got = Cape(6).siblings(jnp.asarray(inside, jnp.float32)).tolist()
    assert got == [paper_bins(p) for p in inside]


def random_probs(rng, batch, depth, ties):
    """Falling probabilities of 8 children at each depth; `ties` makes many of them equal."""
    law = rng.dirichlet(np.full(12, 0.3), (batch, depth))
    if ties:
        law = np.round(law * 8) / 8
    return np.sort(law, axis=-1)[..., ::-1][..., :8].astype(np.float32)


def expected_siblings(rule, probs, count):
    """The (depth, rank) of the siblings that a rule takes for one row, `probs [P, 8]`, in order."""
    depth = len(probs)
    places = [(d, r) for d in range(depth) for r in range(1, 8) if probs[d, r] > 0]
    if isinstance(rule, Cape):
        places = [(d, r) for d, r in places if r <= paper_bins(probs[d, 0])]
    elif isinstance(rule, Fixed):
        places.sort(key=lambda at: (at[1], at[0]))
    else:
        reach = np.concatenate([[1.0], np.cumprod(probs[:, 0].astype(np.float64))])
        places.sort(key=lambda at: -reach[at[0]] * probs[at])
    return sorted(places[:count])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_rules_take_what_they_say(name, ties):
    rng = np.random.default_rng(3)
    batch, depth = 200, 4
    probs = random_probs(rng, batch, depth, ties)
    ids = np.stack([rng.permutation(50)[:8] for _ in range(batch * depth)])
    ids = ids.reshape(batch, depth, 8).astype(np.int32)
    pad = ((0, 0), (0, 1), (0, 0))
    text = Text(jnp.full((batch, 9), 3, jnp.int32), jnp.full((batch,), 5, jnp.int32))
    drafted = chain(
        text,
        jnp.asarray(ids[..., 0]),
        probability=jnp.asarray(probs[..., 0]),
        top_ids=jnp.asarray(np.pad(ids, pad)),
        top_probs=jnp.asarray(np.pad(probs, pad)),
    )
    for nodes in (6, 11, 33):
        rule = RULES[name](nodes)
        draft = jax.device_get(jax.jit(lambda d, rule=rule: rule.widen(d, text, 2))(drafted))
        assert draft.tokens.shape == (batch, nodes) and draft.top_ids is None
        assert (draft.tokens[:, : depth + 1] == np.asarray(drafted.tokens)).all()
        for b in range(batch):
            got = {}
            for i in range(depth + 1, nodes):
                if draft.valid[b, i]:
                    got[int(draft.parent[b, i]), int(draft.tokens[b, i])] = i
            want = expected_siblings(rule, probs[b], nodes - 1 - depth)
            if (
                ties and name == "path"
            ):  # of equal ones any may be taken: compare what they are worth
                assert len(got) == len(want)
                reach = np.concatenate([[1.0], np.cumprod(probs[b, :, 0])])
                worth = sorted(reach[d] * draft.probability[b, i] for (d, _), i in got.items())
                np.testing.assert_allclose(
                    worth, sorted(reach[d] * probs[b, d, r] for d, r in want), rtol=1e-5
                )
                continue
            assert list(got) == [(d, ids[b, d, r]) for d, r in want]
            for (d, r), i in zip(want, got.values(), strict=True):
                assert draft.probability[b, i] == probs[b, d, r]
                assert draft.depth[b, i] == d + 1 and draft.source[b, i] == 2


def test_select_against_sorting():
    rng = np.random.default_rng(0)
    values = rng.integers(-3, 4, (300, 20)).astype(np.float32)
    values[values == -3] = -np.inf
    for count in (1, 7, 20):
        places, some = map(np.asarray, select(jnp.asarray(values), count))
        for row in range(len(values)):
            order = np.argsort(-values[row], kind="stable")[:count]
            assert places[row].tolist() == sorted(order)
            assert some[row].tolist() == np.isfinite(values[row, sorted(order)]).tolist()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Expand(LmDrafter(h.TARGET, 4), Cape(5)), "takes 6 to 33 nodes.* got 5"),
        (lambda: Expand(LmDrafter(h.TARGET, 4), Fixed(3)), "takes 6 to 33 nodes.* got 3"),
        (lambda: Expand(LmDrafter(h.TARGET, 1), PathProbability(10)), "takes 3 to 9 nodes"),
        (lambda: Expand(LmDrafter(h.TARGET, 20), Cape(65)), "takes 22 to 64 nodes"),
    ],
)
def test_budgets_that_do_not_fit(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("drafter", "sentence"),
    [
        (MaxGram(4), "max-gram.* cannot be expanded: it has no distribution"),
        (Expand(LmDrafter(h.SMALL, 2), Cape(5)), "it proposes trees"),
    ],
)
@pytest.mark.parametrize("rule", [Cape(7), Fixed(7), PathProbability(7)], ids=list(RULES))
def test_drafters_that_cannot_be_expanded(drafter, rule, sentence):
    with pytest.raises(UserError, match=sentence):
        Expand(drafter, rule)


# Exactness


@functools.cache
def plain():
    return h.decode(h.plain_loop(), h.all_params(), h.prompts_of(RAGGED), h.sampling_of(4, **MIXED))


# Budgets that hold every sibling, and budgets that do not; lengths 1 to 6 with the contract's below.
@pytest.mark.parametrize(
    ("name", "length", "nodes"), [("cape", 4, 33), ("fixed", 6, 11), ("path", 5, 12)]
)
def test_ragged_batch_is_plain_decoding(name, length, nodes):
    """Greedy and sampled rows, with filters of their own."""
    loop = DecodeLoop(h.TARGET, Expand(LmDrafter(h.TARGET, length), RULES[name](nodes)))
    params = h.all_params(lm=h.close_params())
    got = h.decode(loop, params, h.prompts_of(RAGGED), h.sampling_of(4, **MIXED))
    h.assert_identical(got, plain())
    check_stats(got, loop)
    assert (got.stats.accepted[:, 1:].sum(axis=0) > 0).all(), "no sibling was ever accepted"


@pytest.mark.parametrize(
    ("name", "length", "nodes"), [("cape", 1, 4), ("fixed", 2, 7), ("path", 3, 12)]
)
def test_contract(name, length, nodes):
    drafter = Expand(LmDrafter(h.SMALL, length), RULES[name](nodes))
    params = {"lm": h.perturbed(h.small_params(), 0.25)}
    check_drafter(drafter, params, h.SMALL, h.small_params())


def rule_siblings(rule, vocab):
    """`(q at each depth, chain) -> siblings at each depth`, by the rule's own code."""
    sampling = make_sampling(1, max_new_tokens=1, temperature=1.0)

    @jax.jit
    def widen(scores, tokens):
        ids, probs = best_children(scores, tokens, sampling)
        pad = ((0, 0), (0, 1), (0, 0))
        text = Text(jnp.zeros((1, 9), jnp.int32), jnp.full((1,), 5, jnp.int32))
        probs = probs.astype(jnp.float32)
        fields = {"top_ids": jnp.pad(ids, pad), "top_probs": jnp.pad(probs, pad)}
        drafted = chain(text, tokens, probability=probs[..., 0], **fields)
        return rule.widen(drafted, text, 2)

    @functools.cache
    def of(chain_tokens, laws):
        q = np.asarray(laws).reshape(1, -1, vocab)
        with np.errstate(divide="ignore"):
            draft = widen(jnp.asarray(np.log(q)), jnp.asarray([chain_tokens], jnp.int32))
        parent, tokens, valid = (
            np.asarray(x)[0] for x in (draft.parent, draft.tokens, draft.valid)
        )
        leaves = range(len(chain_tokens) + 1, len(tokens))
        return [
            [int(tokens[i]) for i in leaves if valid[i] and parent[i] == d]
            for d in range(len(chain_tokens))
        ]

    return lambda q, drawn: of(tuple(drawn), tuple(np.concatenate(q)))


@pytest.mark.parametrize("kind", ["dense", "q with zeros", "both with zeros", "greedy drafter"])
@pytest.mark.parametrize("name", RULES)
def test_rejection_with_siblings_of_a_rule_is_exact(name, kind):
    """Whole paths enumerated in float64: the chain drawn from q, the residual matched to siblings."""
    with jax.enable_x64(True):
        for seed, vocab, depth, nodes in [(0, 3, 2, 5), (1, 3, 2, 7), (2, 4, 1, 4)]:
            p, q = pair(kind, seed, vocab, depth)
            choose = rule_siblings(RULES[name](nodes), vocab)
            joint, verdict = enumerate_reject(p, q, vocab, depth, choose)
            assert joint.distance() < 1e-12
            if kind == "dense":
                assert (verdict.path[:, 1:] > depth).any(), "no sibling was ever accepted"


def test_ratio_test_on_candidates_is_caught():
    """Candidates that are the best of q, accepted by p/q one after the other: not the target's law."""
    p, q = pair("dense", 2, 4, 1)
    p, q = p[()], q[()]
    for wrong in (True, False):
        left, alive, law = p.copy(), 1.0, np.zeros(4)
        for token in np.argsort(-q)[:3]:
            # The sound test takes a candidate that is fixed as drawn from a law that is sure of it.
            ratio = min(1.0, left[token] / (q[token] if wrong else 1.0))
            law[token] += alive * ratio
            alive *= 1 - ratio
            left = np.maximum(left - (q if wrong else left * np.eye(4)[token]), 0)
            left = p if norm(left) is None else norm(left)
        law += alive * left
        distance = 0.5 * abs(law - p).sum()
        assert distance > 1e-2 if wrong else distance < 1e-12


def test_a_sibling_that_is_believed_is_caught(monkeypatch):
    """The first sibling of a rejected token taken for the residual's draw."""
    right = acceptance.reject

    def wrong(draft, p, q, *noise):
        verdict = right(draft, p, q, *noise)
        first = draft.tokens[:, draft.depth_limit + 1]
        missed = (verdict.accepted == 0)[:, None] & (jnp.arange(verdict.tokens.shape[1]) == 0)[None]
        return verdict._replace(tokens=jnp.where(missed, first[:, None], verdict.tokens))

    monkeypatch.setattr(acceptance, "reject", wrong)
    with jax.enable_x64(True):
        p, q = pair("dense", 0, 3, 2)
        choose = rule_siblings(PathProbability(5), 3)
        assert enumerate_reject(p, q, 3, 2, choose)[0].distance() > 1e-2


def test_chi_square_of_the_rejection_rule():
    """The first two tokens of whole generations, temperatures and filters mixed in each batch."""
    drafter = Expand(LmDrafter(h.TARGET, 2), PathProbability(9))
    counts = sample(drafter, "reject", lm=h.close_params())
    for case in range(4):
        assert chi_square(counts[case], exact_law(case)) > LEVEL


# Specifications


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("lm:4+cape:16", Spec("lm", 4, "cape", 16)),
        ("lm+path", Spec("lm", None, "path", None)),
        (" lm : 5 + tree : 20 ", Spec("lm", 5, "tree", 20)),
        ("lm:2+beam:9", Spec("lm", 2, "beam", 9)),
        ("lm+fixed:12", Spec("lm", None, "fixed", 12)),
        ("max-gram:7", Spec("max-gram", 7)),
        ("none", Spec("none")),
    ],
)
def test_specifications(text, want):
    assert parse_drafter(text) == want
    assert parse_drafter(str(want)) == want


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lm:4+cpae:16", "Unknown expansion 'cpae': did you mean cape"),
        ("lm:4+xy", "Unknown expansion 'xy': known are cape, fixed, path, tree, beam"),
        ("lm:4+", "Unknown expansion ''"),
        ("lmm:4+cape", "Unknown drafter 'lmm': did you mean lm"),
        ("lm:4+cape:4", "takes 6 to 33 nodes.*got 4"),
        ("lm:4+cape:-1", "takes 6 to 33 nodes.*got -1"),
        ("lm+cape:0", "takes 3 to 64 nodes.*got 0"),
        ("lm+beam:65", "takes 3 to 64 nodes.*got 65"),
        ("lm:4+beam:8", "takes 9 to 33 nodes.*got 8"),
        ("lm:2+path:64", "takes 4 to 17 nodes.*got 64"),
        ("lm:63+cape", "leaves no room"),
        ("max-gram:4+cape", "'max-gram' has no distribution to expand: leave out \\+cape"),
        ("none+cape", "'none' has no distribution"),
        ("lm:4+cape:16+cape:16", "Unknown expansion"),
    ],
)
def test_specifications_that_are_wrong(text, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        parse_drafter(text)
    assert "\n" not in str(error.value)


def test_loaded_expansions(tiny_checkpoints, tmp_path):
    """The specification of a loaded drafter loads it again; defaults are those that were measured."""
    target = load_target(tiny_checkpoints / "target", dtype="float32")
    loaded = load_drafter("lm:3+cape:12", target)
    assert loaded.drafter == Expand(load_drafter("lm:3", target).drafter, Cape(12))
    assert loaded.spec == "lm:3+cape:12" and set(loaded.params) == {"lm"}
    assert load_drafter("lm+path", target).spec == "lm:4+path:17"
    assert load_drafter("lm:2+tree", target).spec == "lm:2+tree:9"
    found = {"lengths": {"lm": 2, "lm+cape": 5}, "nodes": {"lm+cape": 20}}
    (tmp_path / LENGTHS_FILE).write_text(json.dumps(found))
    assert str(complete(parse_drafter("lm+cape"), tmp_path)) == "lm:5+cape:20"
    assert str(complete(parse_drafter("lm+path"), tmp_path)) == "lm:2+path:9"
    assert str(complete(parse_drafter("lm:3+cape"), tmp_path)) == "lm:3+cape:13"
    assert str(complete(parse_drafter("lm+cape:12"), tmp_path)) == "lm:5+cape:12"
