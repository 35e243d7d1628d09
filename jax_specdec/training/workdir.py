"""The folder that a training run writes: its lock, the states to resume from, metrics and plot."""

import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jax_specdec import plots
from jax_specdec.core.sharding import everywhere
from jax_specdec.errors import RunError, UserError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds a folder for one run, in its first process. The system lets go of it however the process ends."""
    if workdir.is_file():
        raise UserError(f"{workdir} is a file, and a run needs a folder.")
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("a") as file:
        free = True
        if jax.process_index() == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
        if not everywhere(free):
            raise UserError(f"Another training is running in {workdir}: use a new folder.")
        yield


@contextlib.contextmanager
def written(workdir: Path) -> Iterator[None]:
    """Says so where the disk is full, which orbax reports as an exhausted resource."""
    try:
        yield
    except (OSError, ValueError) as error:
        if "No space left" not in str(error):
            raise
        raise RunError(f"{workdir} could not be written: the disk is full.") from error


def restore_newest(
    manager: ocp.CheckpointManager, like: Any, settings: dict[str, Any], workdir: Path
) -> tuple[Any, int]:
    """The newest state that can be read, and its step; damaged ones above it are deleted."""
    damaged: list[int] = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = _restore(manager, step, like, settings, workdir)
        except UserError:
            raise
        except Exception as error:  # orbax raises what its parts raise, of many types
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("The training state of step %d is damaged: %.200s", step, reason)
            damaged.append(step)
            continue
        for later in damaged:  # orbax saves no step twice
            manager.delete(later)
        return state, step
    raise RunError(f"No training state in {workdir / 'state'} can be read: use a new folder.")


def _restore(
    manager: ocp.CheckpointManager, step: int, like: Any, settings: dict[str, Any], workdir: Path
) -> Any:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    # The settings first: with another model not even the shapes of the state would fit.
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    meta = {"data": settings["data"], **meta}  # runs of earlier versions do not say
    changed = "data" if {**meta, "data": settings["data"]} == settings else "settings"
    if meta != settings:
        raise UserError(
            f"{workdir} was started with other {changed}{_differences(meta, settings)}; resume with the same ones or "
            "use a new folder."
        )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    return manager.restore(step, args=args)["state"]


def _differences(before: Any, now: Any) -> str:
    """The settings of a run that are others now, as ` (steps: 4, now 6)`; '' where they are not named."""
    found = []

    def compare(name: str, a: Any, b: Any) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                compare(key, a.get(key), b.get(key))
        elif a != b and name != "data":
            found.append(f"{name}: {a}, now {b}")

    compare("", before, now)
    return f" ({'; '.join(found[:4])})" if found else ""


def read_metrics(path: Path, up_to_step: int) -> list[dict]:
    """The rows up to a step; a damaged line, as a killed run may leave it, is left out with a warning."""
    if not path.is_file():
        return []
    rows: list[dict] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if row["step"] <= up_to_step and row["tokens"] >= 0:
                rows.append(row)
        except (ValueError, TypeError, KeyError):
            logger.warning("%s, line %d is damaged and is left out.", path, number)
    return rows


def plot_metrics(rows: Sequence[dict], path: Path) -> None:
    """A PNG of training and held-out loss over tokens and, where measured, agreement by place in the draft."""
    try:
        plots.training_figure(rows).savefig(path, dpi=120)
    except UserError as error:  # a run needs no picture
        logger.warning("%s was not drawn. %s", path.name, error)
