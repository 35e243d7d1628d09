"""Checkpoint folders of Medusa heads, see `drafters.own_files`: with the accuracies of the heads."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from jax_specdec._types import Params
from jax_specdec.checkpoints.draft_vocabulary import narrowed
from jax_specdec.checkpoints.target_bound import (
    SHARD_BYTES,
    Kind,
    check_target,
    make_config,
    read_fields,
    read_own,
    save_own,
)
from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.draft import TOP
from jax_specdec.errors import UserError
from jax_specdec.models.medusa import Medusa, MedusaConfig

KIND = Kind("medusa", "Medusa")
# Per head and rank, see `MedusaDrafter.accuracies`.
Accuracies = tuple[tuple[float, ...], ...]


def save_medusa(
    folder: str | os.PathLike[str],
    model: Medusa,
    params: Params,
    fingerprint: str,
    accuracies: Accuracies = (),
    *,
    dtype: Any = "bfloat16",
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a drafter; a folder that exists keeps its other files.

    Args:
      params: its own, as `Medusa.init` returns them. fingerprint: of its target.
      accuracies: of its heads; without them it has no static tree.

    Raises:
      RunError: the disk is full or read-only.
    """
    rows = [[round(value, 5) for value in row] for row in accuracies]
    fields = {**dataclasses.asdict(model.config), "accuracies": rows}
    save_own(KIND, folder, fields, model.shapes(), params, fingerprint, dtype, max_shard_bytes)


def load_medusa(
    folder: str | os.PathLike[str],
    target: Target,
    dtype: Any = None,
    read: tuple[MedusaConfig, Accuracies, str] | None = None,
) -> tuple[Medusa, Params, Accuracies]:
    """A drafter, its parameters, joined with the target's (see `Medusa.join`), and its accuracies.

    Args:
      dtype: of parameters and computation; None is the target's.
      read: `read_medusa_config` of the folder, where it was called before.

    Raises:
      UserError: no such checkpoint, one that is damaged, or one for another target.
    """
    folder = Path(folder)
    read = read or read_medusa_config(folder)
    model = fitted_medusa(folder, target, dtype, read)
    shapes, where = model.shapes(), target.sharding
    places = None if where is None else where.whole(shapes)
    joined = model.join(read_own(folder, shapes, places), target.params)
    return model, narrowed(folder, target, joined, where), read[1]


def fitted_medusa(
    folder: Path, target: Target, dtype: Any, read: tuple[MedusaConfig, Accuracies, str]
) -> Medusa:
    """`load_medusa` without parameters, the target's among them."""
    config, _, fingerprint = read
    check_target(KIND, folder, fingerprint, target)
    return Medusa(config, target.config, dtype or target.decoder.dtype)


def read_medusa_config(folder: Path) -> tuple[MedusaConfig, Accuracies, str]:
    """The configuration, accuracies and the target's fingerprint in a folder's config.json.

    Raises:
      UserError: it is missing, broken, or not a Medusa drafter's.
    """
    found, fingerprint = read_fields(KIND, folder)
    where = str(folder / "config.json")
    rows = found.pop("accuracies", [])
    config = make_config(KIND, MedusaConfig, found, where)
    return config, _accuracies(rows, config.num_heads, where), fingerprint


def _accuracies(rows: Any, heads: int, where: str) -> Accuracies:
    def good(row: Any) -> bool:
        return isinstance(row, list) and all(
            isinstance(value, (int, float)) and 0 <= value <= 1 for value in row
        )

    if rows == []:
        return ()
    if not isinstance(rows, list) or len(rows) != heads or not all(map(good, rows)):
        raise UserError(
            f"{where} must list accuracies in 0 to 1 for each of {heads} heads, or none."
        )
    if len({len(row) for row in rows}) > 1 or not 1 <= len(rows[0]) <= TOP:
        raise UserError(
            f"{where} must list accuracies of 1 to {TOP} ranks, as many for every head."
        )
    return tuple(tuple(map(float, row)) for row in rows)
