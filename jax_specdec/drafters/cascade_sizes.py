"""How long the drafts of a cascade can get, and what is refused of its numbers.

A specification is judged by this before anything is loaded, and the drafters themselves are.
"""

import math
from collections.abc import Iterable, Sequence

from jax_specdec.core.draft import MAX_NODES
from jax_specdec.errors import UserError


def check_depth(depth: int) -> None:
    """Raises `UserError` for a draft of more tokens than a verification takes."""
    if depth >= MAX_NODES:
        raise UserError(
            f"This cascade may draft {depth} tokens at once, and a draft has at most {MAX_NODES - 1}: "
            "lower its budgets and lengths, or cut."
        )


def check_budget(budget: int) -> None:
    """Raises `UserError` for a budget that asks for nothing."""
    if budget < 1:
        raise UserError(f"A budget must be at least 1, got {budget}.")


def check_lenience(lenience: float) -> None:
    """Raises `UserError` for a lenience that would refuse a verifier's own tokens, or take all."""
    if not 1 <= lenience < math.inf:
        raise UserError(f"A lenience must be finite and at least 1, got {lenience:g}.")


def verified(sizes: Iterable[int]) -> tuple[int, ...]:
    """Sizes of a draft that a drafter has verified, its own next token included."""
    return tuple(range(1, max(sizes) + 2))


def ended_early(length: int) -> tuple[int, ...]:
    """Sizes of a draft that may end behind any of its tokens."""
    return tuple(range(1, length + 1))


def turns(
    sizes: Sequence[Sequence[int]], budgets: Sequence[int], stops: Sequence[bool], *, cut: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What can happen in a `Horizontal` of drafters whose drafts have these sizes.

    Args:
      stops: whether a draft that is shorter than the drafter's longest ends its turn; one of no token
        always does.

    Returns:
      Per drafter, the most tokens before one of its calls, -1 if it is never called; and the sizes that
      the whole draft may have.
    """
    counts, latest, budget = {0}, [], 0
    for some, more, stop in zip(sizes, budgets, stops, strict=True):
        budget += more
        ended = {n for n in counts if n >= budget}
        waiting = sorted(counts - ended)
        called: set[int] = set()
        while waiting:
            n = waiting.pop()
            if n in called:
                continue
            called.add(n)
            for size in some:
                new = min(n + size, budget) if cut else n + size
                if size == 0 or new >= budget or (stop and size < max(some)):
                    ended.add(new)
                else:
                    waiting.append(new)
        counts = ended
        latest.append(max(called, default=-1))
    return tuple(latest), tuple(sorted(counts))
