"""What was measured for a model by `jax-specdec tune`: where it is kept, and which of it counts.

A record belongs to a model, a device, a dtype, a batch size and what is in int8. It lies beside the model's folder with
those of other models, or, where that is the hub's own cache, in the user's.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from jax_specdec.checkpoints.int8 import PARTS
from jax_specdec.checkpoints.smollm2 import drafters_of
from jax_specdec.checkpoints.target_bound import target_fingerprint
from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.draft import MAX_NODES
from jax_specdec.errors import UserError, shown_value
from jax_specdec.text.inputs import check_count
from jax_specdec.user_cache import cache_folder, write_whole

LENGTHS_FILE = "draft_lengths.json"
# What one record is filed under, and where it is absent nothing is in int8.
KEY = ("model", "device", "dtype", "batch_size")
INT8_KEY = ("int8", "draft_int8")
# Where nothing was measured: it needs no checkpoint.
USUAL = "prompt-lookup"


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What a decoding runs with, as far as it is known.

    Attributes:
      path: the target's folder. dtype: None where it is not settled yet.
      int8, draft_int8: parts of the target, and of its drafter.
    """

    path: Path
    dtype: str | None = None
    batch_size: int = 1
    int8: Collection[str] = ()
    draft_int8: Collection[str] = ()

    @functools.cached_property
    def model(self) -> str:
        """The target's fingerprint, for which its files are read."""
        return target_fingerprint(self.path)

    @functools.cached_property
    def device(self) -> str:
        return jax.devices()[0].device_kind

    @property
    def folder(self) -> Path:
        """Where drafters and measurements lie by default."""
        return drafters_of(self.path)


def setting_of(target: Target, batch_size: int = 1, draft_int8: Collection[str] = ()) -> Setting:
    return Setting(target.path, str(target.decoder.dtype), batch_size, target.int8, draft_int8)


def default_spec(target: Target | str | Path, batch_size: int = 1) -> str:
    """The drafter that was measured to be the fastest for a target, or one that needs no checkpoint.

    Args:
      target: a loaded one, or its folder; the measurements lie beside it.
      batch_size: rows that are decoded together: of several measurements on this device the nearest counts.

    Raises:
      UserError: a target that is neither, or a batch size below 1.
    """
    check_count("batch_size", batch_size)
    if isinstance(target, Target):
        setting = setting_of(target, batch_size)
    elif isinstance(target, str | os.PathLike) and Path(target).exists():
        setting = Setting(Path(target), batch_size=batch_size)
    else:
        raise UserError(f"A target is a loaded one or its folder, not {shown_value(target)}.")
    return measured(setting.folder, setting).get("default") or USUAL


def lengths_file(folder: Path) -> Path:
    """The file of measurements for the models in a folder; the hub's cache takes no files of others."""
    if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
        folder = cache_folder() or folder
    return folder / LENGTHS_FILE


def measured(folder: Path, setting: Setting | None = None) -> dict[str, Any]:
    """The record for the models in a folder that fits a setting best: `{}` where there is none.

    It is of the same model, or names none. Of several, the device decides, then the dtype, then
    what is in int8, then the nearest batch size, which on another device is 1.

    Raises:
      UserError: the file is not what `tune` writes.
    """
    records = read_records(lengths_file(folder))
    named = any("model" in record for record in records)
    model = setting.model if setting is not None and named else None
    fitting = [record for record in records if record.get("model") in (None, model)]

    def nearness(record: dict[str, Any]) -> tuple[bool, bool, bool, bool, float]:
        if setting is None:
            return (False, False, False, False, 0.0)
        here = record.get("device") == setting.device
        # What does not pay for a batch on one device may well pay on another: there a single row's record tells more.
        ratio = record.get("batch_size", 1) / (setting.batch_size if here else 1)
        return (
            "model" in record,
            here,
            record.get("dtype") == setting.dtype,
            _int8(record) == [set(setting.int8), set(setting.draft_int8)],
            -abs(math.log(ratio)),
        )

    return max(fitting, key=nearness, default={})


def measured_on(record: dict[str, Any]) -> str:
    """Where a record is from, for people."""
    if "device" not in record:
        return "measured"
    rounded = [*record.get("int8", ()), *(f"drafter's {x}" for x in record.get("draft_int8", ()))]
    eight = f", {' and '.join(rounded)} in int8" if rounded else ""
    return f"measured on {record['device']} in {record.get('dtype')} at batch {record.get('batch_size')}{eight}"


def _int8(record: dict[str, Any]) -> list[set[str]]:
    return [set(record.get(name, ())) for name in INT8_KEY]


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file, none where it does not exist; a file may be one record alone.

    Raises:
      UserError: the file is not what `tune` writes.
    """
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        records = found.get("records", [found])
        good = isinstance(records, list) and all(map(_good, records))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        good, records = False, []
    if not good:
        raise UserError(f"{path} is damaged: write it again with `jax-specdec tune`, or delete it.")
    return records


def _good(record: dict[str, Any]) -> bool:
    counts = [*record.get("lengths", {}).values(), *record.get("nodes", {}).values()]
    texts = ("default", "cascade", "first", "model", "device", "dtype")
    return (
        all(n is None or 0 <= n <= MAX_NODES for n in counts)
        and all(isinstance(record.get(name, ""), str) for name in texts)
        and record.get("batch_size", 1) >= 1
        and all(parts <= set(PARTS) for parts in _int8(record))
    )


def add_record(path: Path, record: dict[str, Any]) -> None:
    """Adds what `tune` measured to a file, in place of an older record of the same key.

    Raises:
      UserError: the file is there and damaged.
    """

    def key(one: dict[str, Any]) -> list[Any]:
        return [*(one.get(name) for name in KEY), *_int8(one)]

    others = [old for old in read_records(path) if key(old) != key(record)]
    write_whole(path, json.dumps({"records": [*others, record]}, indent=1) + "\n")
