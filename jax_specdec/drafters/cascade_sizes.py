"""How long the drafts of a cascade can get."""

from collections.abc import Sequence


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
