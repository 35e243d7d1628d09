"""The collectives of a compiled program, counted in its text."""

import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) (?:\([^)]*\)|\(.*\)) -> .*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|calls|to_apply|condition|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|%?([\w.-]+))"
)
_TRIPS = re.compile(r"known_trip_count[^\d]*(\d+)")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`. size: bytes of its result on one device.
      times: how often it runs, by the trip counts that the compiler knows; other loops count once.
      depth: how many loops of unknown length it is in; where there are draft loops in a loop over rounds.
    """

    kind: str
    size: int
    times: int
    depth: int


def collectives(text: str) -> list[Collective]:
    """All collectives of an optimised program's text, those of untaken branches too."""
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

    def walk(name: str, times: int, depth: int) -> None:
        for line in lines.get(name, ()):
            match = _COLLECTIVE.search(line)
            if match:
                found.append(Collective(match[2], _bytes(match[1]), times, depth))
                continue  # what it applies is a sum
            called = [
                x.strip().lstrip("%")
                for many, one in _CALLED.findall(line)
                for x in (many or one).split(",")
            ]
            if not called:
                continue
            loop, trips = " while(" in line, _TRIPS.search(line)
            for inner in called:
                if loop and trips:
                    walk(inner, times * int(trips[1]), depth)
                else:
                    walk(inner, times, depth + loop)

    if entry is not None:
        walk(entry, 1, 0)
    return found


def summed(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Count and bytes by kind."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for one in found:
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
