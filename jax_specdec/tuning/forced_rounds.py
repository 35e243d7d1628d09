"""Measuring what rounds cost through the very program that decodes.

Its rounds can be forced to draft so deep and to verify so wide (`Budget.forced`), so that nothing is compiled
for it. Machines are disturbed: each kind of round is compared with rounds of plain decoding right before
and behind it, and what the passes disagree by says how far the result can be trusted. Where other work takes turns
with this all the time no long timing is undisturbed, and wide rounds, which use more threads, look dearer than they
are: then short timings are made, and the fastest few of each kind compared.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec.core.budget import RoundCosts
from jax_specdec.core.drafter import ways_of
from jax_specdec.core.loop import DecodeLoop, LoopState

# Seconds that measuring each kind of round takes at most, and takes in addition where passes disagree, unless `FEWEST`
# passes take longer; of one timing, and of one that is short. `ENOUGH` passes that agree end it sooner.
SECONDS, MORE_SECONDS, SLICE, SHORT = 0.5, 0.7, 0.02, 0.006
FEWEST, ENOUGH, USUAL, MOST = 3, 7, 9, 150
FASTEST = 0.03
# The standard error of a cost up to which it is trusted, and the least that a draft is taken to cost, in plain
# rounds.
TRUSTED, LEAST = 0.04, 0.01

Kind = tuple[int, int, int]  # a way of drafting, a depth and the index of a width: `Budget.forced`
Begin = Callable[[Any, RoundCosts], LoopState]
Run = Callable[[LoopState, Any], LoopState]
PLAIN: Kind = (0, 0, 0)


def measure(loop: DecodeLoop, arrays: Any, begin: Begin, run: Run) -> tuple[RoundCosts, bool]:
    """Times rounds that verify one width and draft nothing, and rounds that draft and verify the root alone.

    Either emits one token a row. Each kind is timed between two timings of plain rounds, and counted in them:
    whatever else runs makes something slower, never faster, so the faster of the two is what it is held
    against, and the median over passes is taken; where passes disagree, see above.

    Args:
      arrays, begin, run: see `round_costs.CostTables.get`.

    Returns:
      The costs; and whether they are to be trusted, which on a busy machine they are not.
    """
    rounds, ways = _Rounds(loop, arrays, begin, run), ways_of(loop.drafter)
    wider = [(0, 0, index) for index in range(1, len(loop.widths))]
    drafting = [(n, depth, 0) for n, way in enumerate(ways) for depth in depths(way.info.depth)]
    kinds: list[Kind] = [*wider, *drafting]
    for kind in (PLAIN, *kinds):  # nothing was in any cache
        rounds.seconds(kind, 1)
    plain = min(rounds.seconds(PLAIN, 2) for _ in range(3))
    times = _Passes(rounds, kinds, _count(SLICE, plain))
    while times.goes_on(USUAL, SECONDS) and not (times.passes >= ENOUGH and times.agree):
        times.add()
    sure = times.agree
    if sure:
        one = float(np.quantile(times.plain, 0.25))
        usually = {kind: float(np.median(values)) for kind, values in times.ratios.items()}
    else:
        times = _Passes(rounds, kinds, _count(SHORT, plain))
        while times.goes_on(MOST, MORE_SECONDS):
            times.add()
        one = float(np.quantile(times.plain, FASTEST))
        usually = {kind: times.fastest(kind) for kind in kinds}
    verify = _rising([1.0, *(usually[kind] for kind in wider)])
    draft = []
    for n, way in enumerate(ways):
        known = depths(way.info.depth)
        more = _rising([usually[n, depth, 0] - 1 for depth in known])
        more = np.maximum(more, LEAST)
        draft.append(one * np.interp(range(way.info.depth + 1), [0, *known], [0.0, *more]))
    return as_costs(loop, [one * ratio for ratio in verify], draft), sure


def _count(seconds: float, one: float) -> int:
    """Rounds of a timing that takes so long."""
    return max(1, min(16, round(seconds / max(one, 1e-6))))


class _Passes:
    """Timings of each kind of round between timings of plain ones.

    Attributes:
      of: seconds of a round of each kind, by pass. beside: of plain rounds beside them. ratios: the one in the other.
    """

    def __init__(self, rounds: "_Rounds", kinds: Sequence[Kind], each: int):
        self._rounds, self._each = rounds, each
        self.of: dict[Kind, list[float]] = {kind: [] for kind in kinds}
        self.beside: dict[Kind, list[float]] = {kind: [] for kind in kinds}
        self.ratios: dict[Kind, list[float]] = {kind: [] for kind in kinds}
        self.spent, self.passes = 0.0, 0

    def add(self) -> None:
        """One more, in the other order than the last one."""
        before = self._rounds.seconds(PLAIN, self._each)
        for kind in list(self.of)[:: -1 if self.passes % 2 else 1]:
            took = self._rounds.seconds(kind, self._each)
            behind = self._rounds.seconds(PLAIN, self._each)
            self.of[kind].append(took)
            self.beside[kind].append(behind)
            self.ratios[kind].append(took / min(before, behind))
            self.spent, before = self.spent + self._each * (took + behind), behind
        self.passes += 1

    def goes_on(self, most: int, seconds: float) -> bool:
        """Whether there are fewer than so many passes, and less than so many seconds of each kind."""
        return self.passes < FEWEST or (self.passes < most and self.spent < seconds * len(self.of))

    @property
    def agree(self) -> bool:
        """Whether each kind's cost is known well enough."""
        return all(map(trusted, self.ratios.values()))

    @property
    def plain(self) -> list[float]:
        """Seconds of all plain rounds."""
        return [seconds for some in self.beside.values() for seconds in some]

    def fastest(self, kind: Kind) -> float:
        """Of a kind, in plain rounds: the fastest few of as many timings each, since of more the fastest are faster."""
        one, other = (np.quantile(some[kind], FASTEST) for some in (self.of, self.beside))
        return float(one / other)


def depths(most: int) -> list[int]:
    """The draft lengths that are measured, those between them interpolated."""
    return sorted({1, (most + 1) // 2, most} - {0})


def trusted(values: Sequence[float]) -> bool:
    """Whether the median of timings is known well enough, in parts of it.

    >>> trusted([2.0, 2.01, 2.5, 2.02]), trusted([1.0, 2.0, 3.0, 4.0])
    (True, False)
    """
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    spread = (high - low) / 1.35  # as a normal law's standard deviation
    return bool(1.25 * spread <= TRUSTED * math.sqrt(len(values)) * middle)


def _rising(values: Sequence[float]) -> list[float]:
    """The nearest values that nowhere fall, by least squares.

    >>> _rising([1.0, 4.0, 3.0, 5.0])
    [1.0, 3.5, 3.5, 5.0]
    """
    from scipy.optimize import isotonic_regression

    return isotonic_regression(values).x.tolist() if len(values) else []


def as_costs(loop: DecodeLoop, verify: Sequence[float], draft: Sequence[Any]) -> RoundCosts:
    """A table from lists; what a way of drafting has no value for, it cannot do."""
    table = np.full((len(draft), loop.window), np.inf, np.float32)
    for row, values in zip(table, draft, strict=True):
        row[: len(values)] = values[: loop.window]
    return RoundCosts(jnp.asarray(verify, jnp.float32), jnp.asarray(table))


class _Rounds:
    """Forced rounds of one batch, begun anew where its texts are full."""

    def __init__(self, loop: DecodeLoop, arrays: Any, begin: Begin, run: Run):
        tokens, lengths, sampling, ids = arrays
        capacity = tokens.shape[1]
        # Half of the room at least, whatever the prompts are, and nothing ends a row before.
        lengths = _like(lengths, np.minimum(np.asarray(lengths), max(1, capacity // 2)))
        sampling = sampling.replace(
            max_new_tokens=_like(sampling.max_new_tokens, capacity),
            stop_ids=_like(sampling.stop_ids, -1),
            stop_state=_like(sampling.stop_state, -1),
        )
        self._arrays = (tokens, lengths, sampling, ids)
        self._begin, self._run = begin, run
        self._costs = RoundCosts.unknown(
            len(loop.widths), len(ways_of(loop.drafter)), loop.window - 1
        )
        self._room = capacity - int(np.asarray(lengths).max()) - 1
        self._state: LoopState | None = None
        self._left = 0
        self._idle: list[float] = []  # seconds of calls that make no round

    def seconds(self, kind: Kind, count: int) -> float:
        """Of one round of a kind, the mean of `count`, without what calling the program takes, which decoding pays once."""
        count = max(1, min(count, self._room - 1))
        way = kind[0] if kind[1] else None
        behind = way is not None  # a plain round came before, and it reads what it has missed
        if self._state is None or self._left < count + behind:
            self._state = self._begin(self._arrays, self._costs)
            self._left = self._room
        budget = self._state.budget
        assert budget is not None
        forced = _like(budget.forced, np.asarray(kind))
        state = self._state.replace(budget=budget.replace(forced=forced))
        if behind:
            state = self._run(state, jnp.int32(1))
        state = jax.block_until_ready(state)
        if not self._idle:  # the first call of a program takes longer
            state, _ = self._timed(state, 0)
        state, idle = self._timed(state, 0)
        self._idle.append(idle)
        self._state, took = self._timed(state, count)
        self._left -= count + behind
        # Of the fastest calls, since a short timing may be of one: with a slow call's taken off rounds would look too short.
        return max(took - float(np.quantile(self._idle, FASTEST)), 0.1 * took) / count

    def _timed(self, state: LoopState, count: int) -> tuple[LoopState, float]:
        rounds = jnp.int32(count)
        began = time.perf_counter()
        state = jax.block_until_ready(self._run(state, rounds))
        return state, time.perf_counter() - began


def _like(old: Any, value: Any) -> Any:
    """A value in the shape, dtype and place of an array."""
    new = np.broadcast_to(np.asarray(value, old.dtype), old.shape)
    return jax.device_put(new, getattr(old, "sharding", None))
