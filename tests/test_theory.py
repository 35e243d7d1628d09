"""The formulas, against the paper's numbers and against enumeration."""

import itertools

import numpy as np
import pytest

from jax_specdec.errors import UserError
from jax_specdec.tuning import theory

pytestmark = pytest.mark.smoke

# GliDe's rows of Table 1 (arXiv 2402.02082): cost in percent, then acceptance in percent and expected
# speedup on GSM8K, Finance-Alpaca, Spider and Code-Python, at draft length 5.
TABLE_1 = {
    "vicuna-7b": (6.7, (64.8, 1.97), (63.2, 1.90), (55.7, 1.64), (67.0, 2.06)),
    "vicuna-13b": (5.5, (67.1, 2.16), (65.0, 2.07), (57.1, 1.77), (68.6, 2.24)),
    "vicuna-33b": (6.8, (69.3, 2.16), (64.3, 1.94), (62.7, 1.87), (68.9, 2.14)),
    "mistral-7b": (6.6, (60.1, 1.80), (56.4, 1.67), (59.8, 1.79), (62.6, 1.89)),
}


@pytest.mark.parametrize("model", TABLE_1)
def test_table_1_of_the_paper(model):
    cost, *sets = TABLE_1[model]
    for rate, speedup in sets:
        assert abs(theory.expected_speedup(rate / 100, 5, cost / 100) - speedup) <= 0.01


def test_chain():
    assert theory.chain_tau(1.0, 5) == 6 and theory.chain_tau(0.0, 5) == 1
    for rate, length in [(0.3, 1), (0.7, 4), (0.95, 8)]:
        tau = 1 + sum(rate**i for i in range(1, length + 1))
        assert abs(theory.chain_tau(rate, length) - tau) < 1e-12
        assert abs(theory.siblings_tau([rate] * length, [rate] * length) - tau) < 1e-12
    assert theory.expected_speedup(0.6, 3, 0.0) == theory.chain_tau(0.6, 3)


def test_comb_against_enumeration():
    """Every outcome of a comb of three levels: chain accepted, sibling accepted, nothing."""
    a, c = [0.6, 0.5, 0.4], [0.8, 0.5, 0.9]
    mean = 0.0
    for outcome in itertools.product(("chain", "sibling", "none"), repeat=3):
        chance, tokens, on = 1.0, 1, True
        for i, what in enumerate(outcome):
            chance *= {"chain": a[i], "sibling": c[i] - a[i], "none": 1 - c[i]}[what]
            tokens += on and what != "none"
            on = on and what == "chain"
        mean += chance * tokens
    assert abs(theory.siblings_tau(a, c) - mean) < 1e-12
    assert theory.siblings_tau([], []) == 1


@pytest.mark.parametrize(
    ("chain", "covered"), [([0.5], [0.4]), ([0.5], [1.1]), ([0.5], [0.6, 0.7])]
)
def test_combs_that_cannot_be(chain, covered):
    with pytest.raises(ValueError):
        theory.siblings_tau(chain, covered)


def test_rates():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6), 2)
    tv = 0.5 * abs(p - q).sum()
    assert abs(theory.acceptance_rate(p, q) - (1 - tv)) < 1e-12
    both = theory.acceptance_rate(np.stack([p, p]), np.stack([q, p]))
    assert both.shape == (2,) and abs(both[1] - 1) < 1e-12


# Cascades: Table 1 of arXiv 2312.11462, costs by parameters of FLAN-T5 small, base and XXL.
SMALL, BASE = 77 / 11300, 250 / 11300
CASCADE_TABLE_1 = [
    (2.65, theory.expected_speedup(0.65, 9, SMALL)),
    (2.96, theory.expected_speedup(0.73, 8, BASE)),
    (3.03, theory.two_segment_speedup(0.73, 5, BASE, 0.65, 3, SMALL)),
    (3.61, theory.expected_speedup(0.75, 12, SMALL)),
    (3.75, theory.expected_speedup(0.80, 11, BASE)),
    (3.93, theory.two_segment_speedup(0.80, 5, BASE, 0.75, 8, SMALL)),
]


@pytest.mark.parametrize(("paper", "ours"), CASCADE_TABLE_1)
def test_table_1_of_cascades(paper, ours):
    assert abs(ours - paper) <= 0.01


def test_generating_function():
    """Against the distribution of a round's tokens, and its mean."""
    rate, length = 0.6, 4
    chance = [rate**i * (1 - rate) for i in range(length)] + [rate**length]
    for x in (0.0, 0.3, 0.9, 1.0, 1.2):
        want = sum(p * x ** (i + 1) for i, p in enumerate(chance))
        assert abs(theory.tokens_generating(rate, length, x) - want) < 1e-12
    for a, b in itertools.product((0.2, 0.5, 0.9), repeat=2):  # corollary 4.4
        assert theory.tokens_generating(b, 3, a) < a


def test_horizontal():
    rates, costs = [0.8] * 3 + [0.4] * 2, [0.1] * 3 + [0.02] * 2
    want = theory.two_segment_speedup(0.8, 3, 0.1, 0.4, 2, 0.02)
    assert abs(theory.horizontal_speedup(rates, costs) - want) < 1e-12
    assert (
        abs(theory.horizontal_speedup([0.7] * 4, [0.1] * 4) - theory.expected_speedup(0.7, 4, 0.1))
        < 1e-12
    )
    with pytest.raises(ValueError):
        theory.horizontal_speedup([0.5], [])


RATES = {
    ("target", "lm"): 0.7,
    ("target", "lm2"): 0.5,
    ("target", "max-gram"): 0.4,
    ("lm", "lm2"): 0.6,
    ("lm", "max-gram"): 0.5,
    ("lm2", "max-gram"): 0.5,
}
COSTS = {"lm": 0.1, "lm2": 0.03}


@pytest.mark.parametrize(
    ("spec", "formula"),
    [
        ("lm:4", theory.expected_speedup(0.7, 4, 0.1)),
        ("cascade(lm:3, lm2:2)", theory.two_segment_speedup(0.7, 3, 0.1, 0.5, 2, 0.03)),
        ("lm[lm2:3]", theory.vertical_speedup(0.7, 0.6, 1, 3, 0.1, 0.03)),
    ],
)
def test_simulator_against_formulas(spec, formula):
    from jax_specdec.specs.language import parse

    found = theory.simulate(parse(spec), RATES, COSTS, rounds=40_000)
    assert abs(found.speedup / formula - 1) < 0.015


def test_simulator_of_a_nesting():
    from jax_specdec.specs.language import parse

    three = parse("cascade(lm[lm2[max-gram:4]:1, max-gram:2]:3, lm2[max-gram:4]:2, max-gram:5)")
    found = theory.simulate(three, RATES, COSTS)
    assert 1 < found.forwards["lm"] <= 3 and found.forwards["lm2"] >= found.forwards["lm"]
    assert 1 < found.tau < found.width and found.speedup < found.tau
    wide = theory.simulate(three, RATES, COSTS, verify=lambda width: 1 + 0.05 * width)
    assert wide.tau == found.tau and wide.speedup < found.speedup
    certain = dict.fromkeys(RATES, 1.0)
    assert theory.simulate(parse("cascade(lm[max-gram:10]:2, max-gram:10)"), certain, {}).tau == 22
    assert (
        theory.simulate(parse("cascade(lm[max-gram:10]:2, max-gram:10; cut)"), certain, {}).tau
        == 13
    )


def test_what_depends_on_the_text_is_not_simulated():
    from jax_specdec.specs.language import parse

    with pytest.raises(UserError, match="depends on the text"):
        theory.simulate(parse("first(max-gram:4, lm:3)"), {}, {})
