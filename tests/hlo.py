"""Reading the text of a compiled program."""

import math
import os
import re
from typing import Any


def compiled(lowered: Any) -> Any:
    """Compiled with the fusions that a user's program has; the flags of the suite leave some out."""
    flag = "xla_cpu_use_fusion_emitters"
    known = flag in os.environ.get("XLA_FLAGS", "")
    return lowered.compile(compiler_options={flag: True} if known else None)


def computations(text: str) -> dict[str, list[str]]:
    """Name -> instructions of every computation in an HLO module's text."""
    out, name = {}, None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line.strip())
        if head and " = " not in line.split("->")[0]:
            name = head[1]
            out[name] = []
        elif line.strip() == "}":
            name = None
        elif name is not None:
            out[name].append(line.strip())
    return out


def called(instruction: str) -> list[str]:
    names = re.findall(
        r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)",
        instruction,
    )
    for group in re.findall(
        r"(?:branch_computations|called_computations)=\{([^}]*)\}", instruction
    ):
        names += [n.strip().lstrip("%") for n in group.split(",")]
    return names


def loop_instructions(text: str) -> list[str]:
    """Instructions of every while body, and of what it calls, fusions included."""
    every = computations(text)
    bodies = [
        b for lines in every.values() for x in lines for b in re.findall(r"body=%?([\w.\-]+)", x)
    ]
    seen, queue = set(), list(bodies)
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in every[name]:
            queue += called(line)
    assert seen, "there is no loop in the program"
    return [line for name in sorted(seen) for line in every[name]]


def large_copies(text: str, elements: int) -> list[str]:
    """Copies in a loop of an array with at least so many elements."""
    found = []
    for line in loop_instructions(text):
        m = re.match(r"(?:ROOT )?%?[\w.\-]+ = \(?\w+\[([\d,]*)\].* (copy|copy-start)\(", line)
        if m and math.prod(int(n) for n in m[1].split(",") if n) >= elements:
            found.append(line)
    return found
