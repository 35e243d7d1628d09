"""Code blocks of pages: which there are, and what is done with each.

A block is `python`, `sh` or `text`. What cannot run here says so by a comment on the line before it,
`<!-- not run: WHY -->`, or for commands `<!-- parsed only: WHY -->`: then their flags are checked.
"""

import dataclasses
import re
import shlex
from pathlib import Path

FENCE = re.compile(r"^```(\S*)$")
MARK = re.compile(r"^<!-- (not run|parsed only): (.+) -->$")
ASSIGNED = re.compile(r'^([A-Z][A-Z0-9]*)="?(.*?)"?$')


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      line: of its first line of code in the page, from 1. mark: "not run", "parsed only" or None.
    """

    line: int
    language: str
    mark: str | None
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    lines, found, start = page.read_text(encoding="utf-8").splitlines(), [], None
    language, mark = "", None
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if fence and start is None:
            marked = MARK.match(lines[number - 1])
            language, mark, start = fence[1], marked and marked[1], number + 1
        elif fence and start is not None:
            found.append(Block(start + 1, language, mark, "\n".join(lines[start:number]) + "\n"))
            start = None
    assert start is None, f"{page}: a block does not end"
    return found


def commands_of(text: str) -> list[list[str]]:
    """The commands of a shell block as words, comments left out and variables filled in."""
    variables: dict[str, str] = {}

    def filled(part: str) -> str:
        for name, value in variables.items():
            part = re.sub(rf"\${name}\b", value, part)
        return part

    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        if ASSIGNED.match(line):
            for part in line.split("; "):
                found = ASSIGNED.match(filled(part))
                assert found, line
                variables[found[1]] = found[2]
        elif words := shlex.split(filled(line), comments=True):
            commands.append(words)
    return commands
