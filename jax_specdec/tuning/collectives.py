"""The collectives of a compiled program, counted in its text."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) (?:\([^)]*\)|\(.*\)) -> .*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(body|calls|to_apply|condition|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%?([\w.-]+))"
)
_CONSTANT = re.compile(r"%?([\w.-]+) = s32\[\]\S* constant\((\d+)\)")
_COUNTING = re.compile(r"ROOT .* pred\[\]\S* compare\(.*%([\w.-]+)\), direction=LT")
_TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`. size: bytes of its result on one device.
      times: how often it runs in one pass of the loops whose lengths do not show: a loop over layers counts
        each, the loop over rounds once.
      optional: whether it is in a branch, such as what only top-p needs.
    """

    kind: str
    size: int
    times: int
    optional: bool


def collectives(text: str) -> list[Collective]:
    """All collectives of an optimised program, by its text."""
    lines: dict[str, list[str]] = {}
    entry, name = None, None
    for line in text.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = start[1]
            lines[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name is not None:
            lines[name].append(line)
    found: list[Collective] = []

    def walk(name: str, times: int, optional: bool) -> None:
        for line in lines.get(name, ()):
            match = _COLLECTIVE.search(line)
            if match:
                found.append(Collective(match[2], _bytes(match[1]), times, optional))
                continue  # what it applies is a sum
            called = {
                key: [x.strip().lstrip("%") for x in (many or one).split(",")]
                for key, many, one in _CALLED.findall(line)
            }
            branch = optional or " conditional(" in line
            trips = 1
            if " while(" in line:
                known = _TRIPS.search(line)
                trips = int(known[1]) if known else _trips(lines.get(called["condition"][0], ()))
            for inner in (x for names in called.values() for x in names):
                walk(inner, times * trips, branch)

    if entry is not None:
        walk(entry, 1, False)
    return found


def _trips(condition: Iterable[str]) -> int:
    """The bound of a counting loop; 1 of any other."""
    constants = {}
    for line in condition:
        constant = _CONSTANT.search(line)
        if constant:
            constants[constant[1]] = int(constant[2])
        root = _COUNTING.search(line)
        if root:
            return constants.get(root[1], 1)
    return 1


def summed(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Count and bytes by kind, of those that always run."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for one in (one for one in found if not one.optional):
        count[one.kind] += one.times
        size[one.kind] += one.times * one.size
    return {kind: {"count": count[kind], "bytes": size[kind]} for kind in KINDS if count[kind]}


def _bytes(types: str) -> int:
    total = 0
    for kind, shape in _ARRAY.findall(types):
        size = _SIZES.get(kind, 4)
        for dim in shape.split(","):
            size *= int(dim) if dim else 1
        total += size
    return total
