"""What the parts of a round cost: given, kept from before, measured on first use, or computed.

The program that decodes is the one that is measured: its rounds can be forced to draft so deep and to verify
so wide (`Budget.forced`), so nothing is compiled for it. A table belongs to all that times depend on, and is
kept as a file of its own in the user's cache.
"""

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_specdec
from jax_specdec import progress
from jax_specdec.checkpoints.target_bound import target_fingerprint
from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.budget import RoundCosts
from jax_specdec.core.drafter import ways_of
from jax_specdec.core.loop import DecodeLoop, LoopState
from jax_specdec.errors import UserError, shown, shown_value
from jax_specdec.specs.build import LoadedDrafter
from jax_specdec.tuning import hardware, plan
from jax_specdec.user_cache import cache_folder, write_whole
from pallas_kernels import tuning

# Seconds that measuring may take, unless one pass over all widths and depths takes longer; of one timing.
SECONDS, SLICE = 2.5, 0.03
MOST_PASSES = 9
COMPUTED = "computed"
# What a table that is given must agree on, and how another one is called; a kept one must agree on everything.
CHECKED = {
    "device": "the device",
    "model": "another model",
    "drafter": "the drafter",
    "parameters": "a drafter of other sizes",
    "widths": "the widths",
    "rule": "the rule",
    "dtype": "the dtype",
    "int8": "parts in int8",
    "rows": "a batch of",
}

_DIGESTS = ("model", "parameters")

Given = RoundCosts | str | os.PathLike[str] | None
Kind = tuple[
    int, int, int
]  # a way of drafting, a depth and the index of a width, as `Budget.forced`
Begin = Callable[[Any, RoundCosts], LoopState]
Run = Callable[[LoopState, Any], LoopState]


class CostTables:
    """The costs of a decoder's rounds, by the rows of a batch.

    Args:
      loop: of several widths.
      given: a table, or its file; `computed` for one from bytes and operations; None for one that is kept or
        measured. Decoding on a mesh takes computed ones, which are the same in all processes.

    Raises:
      UserError: a table that is damaged, or of something else.
    """

    def __init__(
        self, target: Target, loop: DecodeLoop, loaded: LoadedDrafter, given: Given = None
    ):
        self._target, self._loop, self._loaded = target, loop, loaded
        self._known: dict[int, RoundCosts] = {}
        self._given: RoundCosts | None = None
        self._file: tuple[Path, dict[str, Any]] | None = None
        self._computed = isinstance(given, str) and given == COMPUTED
        if isinstance(given, RoundCosts):
            loop.check_costs(given)
            self._given = given
        elif given is not None and not self._computed:
            if not isinstance(given, (str, os.PathLike)):
                raise UserError(
                    f"costs are `RoundCosts`, a file of them or {COMPUTED!r}, not {shown_value(given)}."
                )
            file = Path(given).expanduser()
            self._file = (file, read_table(file))
            self._check_file(None)

    def get(self, arrays: Any, begin: Begin, run: Run, progress: bool | None = None) -> RoundCosts:
        """The costs for a batch of these rows.

        Args:
          arrays: tokens, lengths, sampling and request ids, as `DecodeLoop.start` takes them.
          begin, run: the programs that decode it, with their parameters: arrays and costs to a state, and a
            state, which is given away, with a number of rounds to the next one.
          progress: whether to say what was measured; default: where people look.

        Raises:
          UserError: the table that was given is of other rows.
        """
        rows = arrays[0].shape[0]
        if rows not in self._known:
            self._known[rows] = self._find(rows, arrays, begin, run, progress)
        return self._known[rows]

    def _find(self, rows: int, arrays: Any, begin: Begin, run: Run, shown: bool | None) -> Any:
        if self._given is not None:
            return self._given
        if self._file is not None:
            self._check_file(rows)
            return _costs(self._loop, self._file[1])
        if self._computed or self._target.sharding is not None:
            capacity = arrays[0].shape[1]
            return computed_costs(self._target, self._loop, self._loaded, rows, capacity)
        owner = self._owner(rows)
        file = kept_file(owner)
        kept = None if file is None else _kept(file, owner, self._loop)
        if kept is not None:
            return kept
        began = time.perf_counter()
        found = measure(self._loop, arrays, begin, run)
        line = _line(owner, found, self._loop.widths, time.perf_counter() - began)
        place = keep(owner, found)
        if progress.watched(shown):
            progress.say(f"{line}{f', kept in {place}' if place else ''}")
        return found

    def _owner(self, rows: int) -> dict[str, Any]:
        return owner_of(self._target, self._loop, self._loaded, rows)

    def _check_file(self, rows: int | None) -> None:
        """Raises a UserError where the file is of something else; rows are not known at first."""
        assert self._file is not None
        file, table = self._file
        mine, its = self._owner(rows or 0), table["of"]
        for name, what in CHECKED.items():
            if mine[name] == its[name] or (name == "rows" and rows is None):
                continue
            if name not in _DIGESTS:
                what = f"{what} {_said(its[name])}, not {_said(mine[name])}"
            raise UserError(
                f"The costs in {shown(file)} were measured for {what}: leave them out to measure what is used here."
            )
        _costs(self._loop, table)


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.80}" if isinstance(value, str) else f"{value}"


def owner_of(target: Target, loop: DecodeLoop, loaded: LoadedDrafter, rows: int) -> dict[str, Any]:
    """All that the times in a table depend on, as JSON; `model` is None where it has no files."""
    here = tuning.device()
    return {
        "model": _fingerprint(target.path),
        "drafter": loaded.spec,
        "parameters": _sizes(loaded.params),
        "widths": list(loop.widths),
        "rule": loop.rule.name,
        "dtype": str(target.decoder.dtype),
        "int8": list(target.int8),
        "rows": rows,
        "device": here.kind,
        "machine": progress.machine(),
        "kernels": tuning.NATIVE.get(here.platform, "xla"),
        "version": jax_specdec.__version__,
    }


@functools.lru_cache(maxsize=8)
def _fingerprint(folder: Path) -> str | None:
    try:
        return target_fingerprint(folder)
    except UserError:  # made in this process
        return None


def _sizes(params: Mapping[str, Any]) -> str:
    """A digest of the names, shapes and dtypes of parameters: times do not depend on their values."""
    leaves = jax.tree_util.tree_leaves_with_path(dict(params))
    shapes = [f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}" for path, x in leaves]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]


# Measuring


def measure(loop: DecodeLoop, arrays: Any, begin: Begin, run: Run) -> RoundCosts:
    """Times rounds that verify one width and draft nothing, and rounds that draft and verify the root alone.

    Either emits one token a row. All kinds take turns, forwards and backwards. Whatever else runs makes
    something slower, never faster: so each value is the lower quartile over these passes, and a wider
    verification or a longer draft that took less says what the shorter one takes at most.
    """
    rounds, ways = _Rounds(loop, arrays, begin, run), ways_of(loop.drafter)
    verifying = [(0, 0, index) for index in range(len(loop.widths))]
    drafting = [(n, depth, 0) for n, way in enumerate(ways) for depth in _depths(way.info.depth)]
    kinds = verifying + drafting
    first = [rounds.seconds(kind, 1) for kind in kinds]  # nothing was in any cache
    each = max(1, min(16, math.ceil(SLICE / max(first[0], 1e-6))))
    passes = max(1, min(MOST_PASSES, int(SECONDS / (each * sum(first)))))
    taken: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    for number in range(passes):
        for kind in kinds[:: -1 if number % 2 else 1]:
            taken[kind].append(rounds.seconds(kind, each))
    usual = {kind: float(np.quantile(times, 0.25)) for kind, times in taken.items()}
    verify = _rising([usual[kind] for kind in verifying])
    draft = []
    for n, way in enumerate(ways):
        depths = _depths(way.info.depth)
        more = [max(0.0, usual[n, depth, 0] - verify[0]) for depth in depths]
        draft.append(np.interp(range(way.info.depth + 1), [0, *depths], [0.0, *_rising(more)]))
    return _as_costs(loop, verify, draft)


def _depths(most: int) -> list[int]:
    """The draft lengths that are measured, those between them interpolated."""
    return sorted({1, (most + 1) // 2, most} - {0})


def _rising(values: Sequence[float]) -> list[float]:
    """The largest values that rise and are nowhere larger.

    >>> _rising([1.0, 4.0, 3.0, 5.0])
    [1.0, 3.0, 3.0, 5.0]
    """
    return np.minimum.accumulate(np.asarray(values)[::-1])[::-1].tolist()


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
        self._costs = loop.unknown_costs()
        self._room = capacity - int(np.asarray(lengths).max()) - 1
        self._state: LoopState | None = None
        self._left, self._way = 0, None

    def seconds(self, kind: Kind, count: int) -> float:
        """Of one round of a kind, the mean of `count`."""
        count = max(1, min(count, self._room - 1))
        way = kind[0] if kind[1] else None
        behind = way is not None and way != self._way  # it reads what it has missed
        if self._state is None or self._left < count + behind:
            self._state = self._begin(self._arrays, self._costs)
            self._left, behind = self._room, way is not None
        budget = self._state.budget
        assert budget is not None
        forced = _like(budget.forced, np.asarray(kind))
        state = self._state.replace(budget=budget.replace(forced=forced))
        if behind:
            state = self._run(state, jnp.int32(1))
        state = jax.block_until_ready(state)
        began = time.perf_counter()
        self._state = jax.block_until_ready(self._run(state, jnp.int32(count)))
        took = time.perf_counter() - began
        self._left, self._way = self._left - count - behind, way
        return took / count


def _like(old: Any, value: Any) -> Any:
    """A value in the shape, dtype and place of an array."""
    new = np.broadcast_to(np.asarray(value, old.dtype), old.shape)
    return jax.device_put(new, getattr(old, "sharding", None))


# Computing


def computed_costs(
    target: Target, loop: DecodeLoop, loaded: LoadedDrafter, rows: int, context: int
) -> RoundCosts:
    """Costs by the roofline of the device's data sheet (`tuning.plan`), where nothing may be measured.

    Args:
      context: tokens of a row's cache.
    """
    here, sharding = tuning.device(), target.sharding
    chip = hardware.by_kind(here.platform, here.kind)
    data = 1 if sharding is None else sharding.size("batch")
    devices = 1 if sharding is None else sharding.mesh.size
    sizes = {"data": data, "tensor": max(1, devices // data)}
    question = plan.Question(
        target.config,
        hardware.Topology(here.kind, chip, data * sizes["tensor"]),
        sizes,
        rows,
        min(context, target.config.context),
        str(target.decoder.dtype),
        target.int8,
    )
    verify = [
        plan.seconds(question, plan.parts_by_arithmetic(question, 0, width))["total"]
        for width in loop.widths
    ]
    draft = []
    for way in ways_of(loop.drafter):  # each token of a draft reads the parameters once
        used = [loaded.params.get(use.name, ()) for use in way.info.models]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(used))
        draft.append(np.arange(way.info.depth + 1) * (size / chip.bandwidth))
    return _as_costs(loop, verify, draft)


def _as_costs(loop: DecodeLoop, verify: Sequence[float], draft: Sequence[Any]) -> RoundCosts:
    """A table from lists; what a way of drafting has no value for, it cannot do."""
    table = np.full((len(draft), loop.window), np.inf, np.float32)
    for row, values in zip(table, draft, strict=True):
        row[: len(values)] = values[: loop.window]
    return RoundCosts(jnp.asarray(verify, jnp.float32), jnp.asarray(table))


# Files


def kept_file(of: Mapping[str, Any]) -> Path | None:
    """Where the table of an owner is kept; None where nothing can be kept."""
    folder = cache_folder()
    if folder is None or of["model"] is None:
        return None
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return folder / "costs" / f"{digest[:16]}.json"


def keep(of: Mapping[str, Any], costs: RoundCosts) -> Path | None:
    """Keeps a table, and says so where it cannot be written."""
    file = kept_file(of)
    if file is None:
        return None
    verify = np.asarray(costs.verify).tolist()
    draft = [row[np.isfinite(row)].tolist() for row in np.asarray(costs.draft)]
    try:
        write_whole(file, json.dumps({"of": of, "verify_s": verify, "draft_s": draft}) + "\n")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        progress.say_once(
            f"what rounds cost is measured by each run: {file.parent} cannot be written ({reason})",
            always=True,
        )
        return None
    return file


def read_table(file: Path) -> dict[str, Any]:
    """A table with what it belongs to.

    Raises:
      UserError: it is not there, or not what `keep` writes.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"The costs in {shown(file)} cannot be read: {reason}.") from error
    try:
        table = json.loads(text)
        numbers = [*table["verify_s"], *(x for row in table["draft_s"] for x in row)]
        good = set(CHECKED) <= set(table["of"])
        good = good and all(type(x) in (int, float) for x in numbers)
    except (ValueError, TypeError, KeyError, RecursionError):
        good, table = False, {}
    if not good:
        raise UserError(
            f"{shown(file)} is damaged, or does not hold what rounds cost: leave it out to measure that."
        )
    return table


def _kept(file: Path, of: Mapping[str, Any], loop: DecodeLoop) -> RoundCosts | None:
    """The table of a kept file; None where there is none that is sound and of this owner."""
    try:
        table = read_table(file)
        return _costs(loop, table) if table["of"] == of else None
    except UserError:
        return None


def _costs(loop: DecodeLoop, table: Mapping[str, Any]) -> RoundCosts:
    """The costs in a table of the loop; raises a UserError where they are none."""
    costs = _as_costs(loop, table["verify_s"], table["draft_s"])
    loop.check_costs(costs)
    return costs


def _line(of: Mapping[str, Any], costs: RoundCosts, widths: Sequence[int], took: float) -> str:
    """What was measured, for people."""
    v, c = 1e3 * np.asarray(costs.verify), 1e3 * np.asarray(costs.draft[0])
    several = ", ".join(f"{time:.3g} for {width}" for time, width in zip(v, widths, strict=True))
    return (
        f"measured what rounds with {of['drafter']} cost at batch {of['rows']}, in {took:.1f} s: {several} nodes (ms), "
        f"and {c[1]:.2g} to {c[-1]:.2g} for a draft"
    )
