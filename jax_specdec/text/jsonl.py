"""Reading JSONL, with the number of every line that is wrong."""

import json
from collections.abc import Iterator
from pathlib import Path

from jax_specdec.errors import UserError


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """The objects of a JSONL file with their line numbers; blank lines are skipped.

    Raises:
      UserError: no such file, or a line that is no JSON object, named by its number.
    """
    path = Path(path)
    if path.is_dir() or not path.exists():  # a pipe, such as /dev/stdin or <(...), is read, too
        raise UserError(f"There is no file {path}.")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{path}, line {number}: not UTF-8 ({error}).") from None
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}: not valid JSON ({error!s:.200})."
                ) from None
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object.")
            yield number, record
