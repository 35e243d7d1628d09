"""The cost model: what a round costs, what it yields, and the draft length and budget that follow.

A round of draft length g costs `v(T) + d(g)` seconds, verification of T nodes (1 + g of a chain) and
drafting, and yields `tau = 1 + sum of A_1..A_g` tokens, A_i being how often a token is accepted at
position i. The speed against plain decoding is `tau v(1) / (v(T) + d(g))` (arXiv 2211.17192, section
3.3, with measured costs in place of constants).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jax_specdec.expansions.siblings import LeafSiblings
from jax_specdec.tuning.replay import Record, acceptance


@dataclasses.dataclass(frozen=True)
class Costs:
    """Measured seconds per round at one batch size, medians.

    Attributes:
      verify: by number of nodes T, root included: one round without drafting. `verify[1]` is a token
        of plain decoding.
      draft: by draft length: one call of the drafter and its commit. length 0 costs nothing.
    """

    verify: dict[int, float]
    draft: dict[int, float]

    def round(self, length: int, nodes: int | None = None) -> float:
        """Seconds of a round of this draft length, interpolated between measured ones.

        Args:
          nodes: T, where it is not a chain's.
        """
        verify = interpolate(self.verify, 1 + length if nodes is None else nodes)
        return verify + interpolate({0: 0.0, **self.draft}, length)

    def speedup(self, acceptance: Sequence[float], length: int, nodes: int | None = None) -> float:
        """Predicted speed against plain decoding; `acceptance[i]` is A_{i+1}."""
        tau = 1.0 + sum(acceptance[:length])
        return tau * self.verify[1] / self.round(length, nodes)

    def best_length(self, acceptance: Sequence[float]) -> int:
        """The draft length with the highest predicted speed; 0 where drafting does not pay."""
        return max(range(len(acceptance) + 1), key=lambda g: self.speedup(acceptance, g))

    def best_expansion(self, found: Record, rule: type[LeafSiblings]) -> tuple[float, int, int]:
        """`(predicted speed, draft length, nodes)` of the best leaf siblings over measured widths and lengths."""
        return max(
            (self.speedup(acceptance(found, g, rule(nodes)), g, nodes), g, nodes)
            for g in range(1, found.rank.shape[1] + 1)
            for nodes in self.verify
            if rule(nodes).fits(g)
        )


def interpolate(points: Mapping[int, float], at: int) -> float:
    xs = sorted(points)
    if not xs[0] <= at <= xs[-1]:
        raise ValueError(f"{at} lies outside the measured {xs[0]}..{xs[-1]}")
    return float(np.interp(at, xs, [points[x] for x in xs]))


# Loops are static arguments by their value: arms on several texts share a program.
