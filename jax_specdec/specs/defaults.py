"""What stands in for what a specification leaves out: measured lengths, or a fallback."""

import json
from pathlib import Path
from typing import Any

from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.draft import MAX_NODES
from jax_specdec.errors import UserError
from jax_specdec.specs.language import (
    CASCADE,
)

# Where nothing was measured for a checkpoint: see `jax-specdec tune`.
FALLBACK_LENGTHS = {
    "lm": 4,
    "glide": 4,
    "medusa": 3,
    "max-gram": 6,
    "prompt-lookup": 6,
    "bigram": 2,
}


LENGTHS_FILE = "draft_lengths.json"


def default_spec(target: Target | str | Path) -> str:
    """The drafter that was measured to be the fastest for a target, or one that needs no checkpoint.

    Args:
      target: a loaded one, or its folder; the measurements lie beside it.
    """
    folder = target.path if isinstance(target, Target) else Path(target)
    return _measured(folder.parent).get("default") or "prompt-lookup"


def _measured(folder: Path) -> dict[str, Any]:
    """What `jax-specdec tune` found for the checkpoints in a folder: `{}` where it never ran.

    Raises:
      UserError: the file is not what `tune` writes.
    """
    path = folder / LENGTHS_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        counts = [*found.get("lengths", {}).values(), *found.get("nodes", {}).values()]
        good = all(n is None or 0 <= n <= MAX_NODES for n in counts)
        good = good and all(isinstance(found.get(k, ""), str) for k in ("default", CASCADE))
    except (OSError, ValueError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{path} is damaged: write it again with `jax-specdec tune`, or delete it.")
    return found
