"""What the parts of a round cost: given, kept from before, measured on first use, or computed.

A table belongs to all that times depend on, and is kept as a file of its own in the user's cache; for an hour only
where the machine was too busy for it to mean much.
"""

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jax_specdec
from jax_specdec import progress
from jax_specdec.checkpoints.hub import local_path
from jax_specdec.checkpoints.target_bound import target_fingerprint
from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.budget import RoundCosts
from jax_specdec.core.drafter import ways_of
from jax_specdec.core.loop import DecodeLoop
from jax_specdec.errors import UserError, shown, shown_value
from jax_specdec.specs.build import LoadedDrafter
from jax_specdec.tuning import hardware, plan
from jax_specdec.tuning.forced_rounds import Begin, Run, as_costs, measure
from jax_specdec.user_cache import cache_folder, write_whole
from pallas_kernels import tuning

COMPUTED = "computed"
# Of how rounds are timed: what was timed otherwise is not used.
TIMING = 3
# How long what a busy machine measured is used: runs in between are alike, and none waits for it again.
UNSURE_SECONDS = 3600.0
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
            self._given = loop.check_costs(given)
        elif given is not None and not self._computed:
            if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
                raise UserError(
                    f"costs are `RoundCosts`, a file of them or {COMPUTED!r}, not {shown_value(given)}."
                )
            file = local_path(given)
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
            return _costs(self._loop, table=self._file[1], file=self._file[0])
        if self._computed or self._target.sharding is not None:
            capacity = arrays[0].shape[1]
            return computed_costs(self._target, self._loop, self._loaded, rows, capacity)
        owner = self._owner(rows)
        file = kept_file(owner)
        kept = None if file is None else _kept(file, owner, self._loop)
        if kept is not None:
            return kept
        began = time.perf_counter()
        found, sure = measure(self._loop, arrays, begin, run)
        line = _line(owner, found, self._loop.widths, time.perf_counter() - began)
        place = keep(owner, found, sure=sure)
        end = f", kept in {place}" if place else ""
        if not sure:
            end += "; the machine is busy, and so they are measured again in an hour"
        if progress.watched(shown):
            progress.say(f"{line}{end}")
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
        _costs(self._loop, table, file)


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.80}" if isinstance(value, str) and value.isprintable() else shown_value(value)


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
        "timing": TIMING,
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
    sizes = {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        for name, params in loaded.params.items()
    }
    draft = [
        np.arange(way.info.depth + 1) * plan.bytes_per_draft_token(way, sizes) / chip.bandwidth
        for way in ways_of(loop.drafter)
    ]
    return as_costs(loop, verify, draft)


# Files


def kept_file(of: Mapping[str, Any]) -> Path | None:
    """Where the table of an owner is kept; None where nothing can be kept."""
    folder = cache_folder()
    if folder is None or of["model"] is None:
        return None
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return folder / "costs" / f"{digest[:16]}.json"


def keep(of: Mapping[str, Any], costs: RoundCosts, *, sure: bool) -> Path | None:
    """Keeps a table, for an hour if it is not to be trusted, and says so where it cannot be written."""
    file = kept_file(of)
    if file is None:
        return None
    verify = np.asarray(costs.verify).tolist()
    draft = [row[np.isfinite(row)].tolist() for row in np.asarray(costs.draft)]
    try:
        table = {"of": of, "verify_s": verify, "draft_s": draft}
        if not sure:
            table["until"] = time.time() + UNSURE_SECONDS
        write_whole(file, json.dumps(table) + "\n")
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
        lists = [table["verify_s"], *table["draft_s"]]
        good = isinstance(table["of"], dict) and set(CHECKED) <= set(table["of"])
        good = (
            good and isinstance(table["draft_s"], list) and all(isinstance(x, list) for x in lists)
        )
        good = good and type(table["of"]["rows"]) is int
        numbers = [table.get("until", 0), *(x for some in lists for x in some)]
        good = good and all(type(x) in (int, float) and abs(x) < 1e30 for x in numbers)
    except (ValueError, TypeError, KeyError, RecursionError):
        good, table = False, {}
    if not good:
        raise UserError(
            f"{shown(file)} is damaged, or does not hold what rounds cost: leave it out to measure that."
        )
    return table


def _kept(file: Path, of: Mapping[str, Any], loop: DecodeLoop) -> RoundCosts | None:
    """The table of a kept file; None where there is none that is sound, of this owner, and still to be used."""
    try:
        table = read_table(file)
        good = table["of"] == of and time.time() < table.get("until", math.inf)
        return _costs(loop, table, file) if good else None
    except UserError:
        return None


def _costs(loop: DecodeLoop, table: Mapping[str, Any], file: Path) -> RoundCosts:
    """The costs in a file's table of the loop; raises a UserError where they are none."""
    wanted = [len(loop.widths), *(way.info.depth + 1 for way in ways_of(loop.drafter))]
    if [len(table["verify_s"]), *map(len, table["draft_s"])] != wanted:
        verify, *draft = wanted
        raise UserError(
            f"{shown(file)} must have {verify} costs of verification, and of drafting "
            f"{' and '.join(map(str, draft))}: leave it out to measure them."
        )
    costs = as_costs(loop, table["verify_s"], table["draft_s"])
    try:
        loop.check_costs(costs)
    except UserError as error:
        raise UserError(f"{shown(file)}: {error}") from None
    return costs


def _line(of: Mapping[str, Any], costs: RoundCosts, widths: Sequence[int], took: float) -> str:
    """What was measured, for people."""
    v, ways = 1e3 * np.asarray(costs.verify), 1e3 * np.asarray(costs.draft)
    several = ", ".join(f"{time:.3g} for {width}" for time, width in zip(v, widths, strict=True))
    known = [c[np.isfinite(c)] for c in ways]
    drafts = " or ".join(f"{c[1]:.2g} to {c[-1]:.2g}" for c in known)
    return (
        f"measured what rounds with {of['drafter']} cost at batch {of['rows']}, in {took:.1f} s: {several} nodes (ms), "
        f"and {drafts} for a draft"
    )
