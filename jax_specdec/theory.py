"""What the papers predict: acceptance, tokens a round, speed.

Everything is plain arithmetic on NumPy arrays in float64; measured costs take the place of the constant
c in `costs`.
"""

from collections.abc import Sequence

import numpy as np


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


def comb_tau(chain: Sequence[float], covered: Sequence[float]) -> float:
    """Tokens a round of a comb: a main chain with siblings that nothing follows.

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
