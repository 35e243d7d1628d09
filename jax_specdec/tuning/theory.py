"""What the papers predict: acceptance, tokens a round, speed.

Everything is plain arithmetic on NumPy arrays in float64; measured costs take the place of the constant
c in `costs`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jax_specdec.errors import UserError


def acceptance_rate(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Chance that a token drawn from q is accepted for p: the sum of min(p, q), `[..., V] -> [...]`.

    Speculative sampling reaches it (arXiv 2211.17192, theorem 3.5). It is 1 minus total variation.
    """
    return np.minimum(p, q).sum(axis=-1)


def chain_tau(rate: float, length: int) -> float:
    """Tokens a round, the target's own included, where each token is accepted with chance `rate`.

    (1 - a^(g+1)) / (1 - a): arXiv 2211.17192, equation 1.
    """
    return float(length + 1) if rate == 1 else (1 - rate ** (length + 1)) / (1 - rate)


def expected_speedup(rate: float, length: int, cost: float) -> float:
    """Speed against plain decoding if verifying costs what one token costs.

    (1 - a^(g+1)) / ((1 - a)(g c + 1)): arXiv 2211.17192, theorem 3.8, and arXiv 2402.02082, Table 1.

    Args:
      cost: c, a drafter's step in units of a target's.
    """
    return chain_tau(rate, length) / (length * cost + 1)


def siblings_tau(chain: Sequence[float], covered: Sequence[float]) -> float:
    """Tokens a round of leaf siblings: a main chain with siblings that nothing follows.

    1 + the sum over depths i of (a_1 ... a_(i-1)) c_i.

    Args:
      chain: a_i, chance that chain token i is accepted if the chain was up to there. covered: c_i,
        chance that any candidate of depth i is, the chain's own included, c_i >= a_i. With c = a it is
        a chain.

    Raises:
      ValueError: different lengths, or chances outside 0 <= a_i <= c_i <= 1.
    """
    a, c = np.asarray(chain, np.float64), np.asarray(covered, np.float64)
    if a.shape != c.shape or a.ndim != 1:
        raise ValueError(f"chain {a.shape} and covered {c.shape} must be of one length")
    if not ((a >= 0) & (a <= c) & (c <= 1)).all():
        raise ValueError(f"0 <= chain <= covered <= 1 must hold, got {chain} and {covered}")
    reached = np.concatenate([[1.0], np.cumprod(a)[:-1]]) if len(a) else a
    return float(1 + (reached * c).sum())


# Cascades (Chen et al., arXiv 2312.11462, section 4)


def tokens_generating(rate: float, length: int, x: float) -> float:
    """phi(x), the probability generating function of the tokens of one round of a chain.

    1 + (x - 1)(1 - (a x)^(k+1)) / (1 - a x): theorem 4.1. Its derivative at 1 is `chain_tau`.
    """
    return 1 + (x - 1) * chain_tau(rate * x, length)


def vertical_speedup(
    rate: float,
    inner_rate: float,
    rounds: int,
    length: int,
    cost: float,
    inner_cost: float,
) -> float:
    """Speed of a drafter that drafts by speculative decoding of its own.

    (1 - a phi(a)^n) / ((1 - a)(1 + n c_1 + n k c_2)): theorem 4.3.

    Args:
      rate: a, chance that the target accepts a drafted token. inner_rate: that the drafter accepts one of
        the smaller drafter's. rounds: n, of the drafter. length: k, tokens that the smaller one drafts for
        each. cost, inner_cost: steps of both in units of the target's.
    """
    draft = tokens_generating(inner_rate, length, rate) ** rounds
    tokens = 1 + rounds * chain_tau(inner_rate, length) if rate == 1 else None
    tokens = (1 - rate * draft) / (1 - rate) if tokens is None else tokens
    return tokens / (1 + rounds * cost + rounds * length * inner_cost)


def horizontal_speedup(rates: Sequence[float], costs: Sequence[float]) -> float:
    """Speed of a chain whose token i has chance a_i of being accepted and costs c_i to draft.

    (1 + a_1 + a_1 a_2 + ...) / (1 + c_1 + c_2 + ...): theorem 4.5.

    Raises:
      ValueError: different lengths.
    """
    if len(rates) != len(costs):
        raise ValueError(f"{len(rates)} rates and {len(costs)} costs")
    return siblings_tau(rates, rates) / (1 + sum(costs))


def two_segment_speedup(
    rate: float, length: int, cost: float, other_rate: float, other_length: int, other_cost: float
) -> float:
    """`horizontal_speedup` where one drafter drafts the first tokens and another the rest.

    The paper's Table 1. It reports factors of the target's own speed, and differences of them as
    percentages: its "81% additional speedup" is 4.32 - 3.51, a ratio of 1.23.
    """
    rest = chain_tau(other_rate, other_length) - 1
    tokens = chain_tau(rate, length) + rate**length * rest
    return tokens / (1 + length * cost + other_length * other_cost)


class Nesting(Protocol):
    """A drafter as `specs.language.Spec` describes it: see there."""

    @property
    def name(self) -> str: ...

    @property
    def length(self) -> int | None: ...

    @property
    def inner(self) -> Sequence["Nesting"]: ...

    @property
    def cut(self) -> bool: ...


class Simulated(NamedTuple):
    """What `simulate` found.

    Attributes:
      speedup: of plain decoding. tau: tokens a round. width: nodes a verification, the root included.
      forwards: per round, of each drafter.
    """

    speedup: float
    tau: float
    width: float
    forwards: dict[str, float]


def simulate(
    nesting: Nesting,
    rates: Mapping[tuple[str, str], float],
    costs: Mapping[str, float],
    *,
    verify: Callable[[int], float] = lambda width: 1.0,
    rounds: int = 10_000,
    seed: int = 0,
) -> Simulated:
    """Plays the control flow of any cascade, with tokens accepted independently of each other.

    Args:
      nesting: with every length given, `parse_drafter("cascade(lm[max-gram:10]:2, max-gram:10)")` for
        instance.
      rates: chance that a verifier accepts a token of the drafter that handed it on, by (verifier, drafter);
        the last verifier is `target`. A drafter without one is never right.
      costs: of one forward of each drafter in units of the target's; 0 where there is none.
      verify: cost of a verification of so many nodes, in the same units.

    Raises:
      UserError: `first`, since which of its drafters is asked depends on the text.
    """
    if nesting.name == "first":
        raise UserError(
            "`first` cannot be simulated from rates: which drafter is asked depends on the text."
        )
    rng = random.Random(seed)
    forwards: dict[str, int] = {}

    def propose(item: Nesting) -> list[str]:
        """The drafter of each token."""
        if not item.inner:
            forwards[item.name] = forwards.get(item.name, 0) + (item.length or 1)
            return [item.name] * (item.length or 1)
        forwards[item.name] = forwards.get(item.name, 0) + 1
        return [item.name] * (1 + accepted(item.name, turns(item)))

    def turns(item: Nesting) -> list[str]:
        draft: list[str] = []
        budget = 0
        for part in item.inner:
            budget += part.length or 1
            while len(draft) < budget:
                draft += propose(part)
            if item.cut:
                del draft[budget:]
        return draft

    def accepted(verifier: str, draft: list[str]) -> int:
        for place, drafter in enumerate(draft):
            if rng.random() >= rates.get((verifier, drafter), 0.0):
                return place
        return len(draft)

    def whole() -> list[str]:
        if nesting.name == "cascade":
            return turns(nesting)
        draft = propose(nesting)
        while nesting.inner and len(draft) < (nesting.length or 1):
            draft += propose(nesting)
        return draft

    tokens, width, time = 0, 0, 0.0
    for _ in range(rounds):
        draft = whole()
        tokens += 1 + accepted("target", draft)
        width += 1 + len(draft)
        time += verify(1 + len(draft))
    time += sum(costs.get(name, 0.0) * count for name, count in forwards.items())
    per_round = {name: count / rounds for name, count in forwards.items()}
    return Simulated(tokens / time, tokens / rounds, width / rounds, per_round)
