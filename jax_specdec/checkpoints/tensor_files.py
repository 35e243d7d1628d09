"""Folders of safetensors: their shards, their index and JSON beside them, read and written in pieces."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_specdec._types import Params
from jax_specdec.errors import RunError, UserError
from jax_specdec.models.hf_tensors import Weight

MAX_SHARD_BYTES = 2 * 10**9
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Of a byte each: what weights are quantized to.
NARROW = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
# Rows copied at a time: few enough that the strided side of a transposition stays in cache, six
# times as fast as one assignment.
_ROWS = 32
# Differences that a message lists; three where their cause is known.
_LISTED = 32
_QUANTIZED = re.compile(
    r".*\.(weight_scale(_inv|_2)?|input_scale|weight_packed|weight_shape|qweight|qzeros|scales|g_idx"
    r"|weight\.(absmax|quant_map|quant_state\..*))"
)


class Stored(NamedTuple):
    """A tensor in an open file."""

    file: Any
    name: str

    def view(self) -> Any:
        """A safetensors slice: shape and dtype from the header, values where it is indexed."""
        return self.file.get_slice(self.name)


@dataclasses.dataclass(frozen=True)
class RowView:
    """A tensor that is computed when it is read, indexed like a safetensors slice.

    Attributes:
      dtype: a key of `DTYPES`, or what else safetensors calls it.
      read: gives the part between two indices of the first axis.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], np.ndarray]

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        first, *rest = (slice(None), *index[1:]) if index[0] is Ellipsis else index
        start, stop, _ = first.indices(self.shape[0])
        return self.read(start, stop)[(slice(None), *rest)]


class Views(dict[str, RowView]):
    """Computed tensors by name, in the place of a file."""

    def get_slice(self, name: str) -> RowView:
        return self[name]

    def stored(self) -> dict[str, Stored]:
        return {name: Stored(self, name) for name in self}


class _File:
    """An open safetensors file, also of types that its library has no numpy array for."""

    def __init__(self, path: Path):
        self._path, self._file = path, safe_open(path, "np")
        self.keys = self._file.keys

    def get_slice(self, name: str) -> Any:
        view = self._file.get_slice(name)
        if view.get_dtype() not in NARROW:
            return view
        with self._path.open("rb") as file:  # the library has checked the header
            begin = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(begin - 8))
        start = begin + header[name]["data_offsets"][0]
        shape = tuple(view.get_shape())
        raw = np.memmap(self._path, np.uint8, "r", start, shape)
        found = raw.view(jnp.dtype(NARROW[view.get_dtype()]))
        return RowView(shape, view.get_dtype(), lambda start, stop: np.asarray(found[start:stop]))


def open_tensors(folder: Path, stem: str = "model") -> dict[str, Stored]:
    """Every tensor of a folder by its name. Nothing is read but headers.

    Args:
      stem: what the file is called, or the index of several.

    Raises:
      UserError: no weights, a shard that is missing, or a file that is broken.
    """
    index = folder / f"{stem}.safetensors.index.json"
    where: dict[str, str] = {}
    if (folder / f"{stem}.safetensors").is_file():
        files = [f"{stem}.safetensors"]
    elif index.is_file():
        where = _weight_map(index)
        files = sorted(set(where.values()))
    elif any(any(folder.glob(f"*.{kind}")) for kind in ("bin", "pth", "pt")):
        raise UserError(
            f"{folder} holds pickled weights, which can run code and are not read: convert them to "
            "safetensors first (save_pretrained of transformers writes them)."
        )
    else:
        raise UserError(f"{folder} holds no weights: there is no {stem}.safetensors.")
    if not files:
        raise UserError(f"{index} names no files.")
    absent = absent_shards(folder, stem)
    if absent:
        raise UserError(
            f"{folder} lacks {len(absent)} of the {len(files)} files that its index names, first "
            f"{absent[0]}."
        )
    tensors = {}
    for name in files:
        try:
            file = _File(folder / name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name} is truncated or damaged ({error!s:.200}).") from error
        for key in file.keys():  # noqa: SIM118 (no mapping)
            if (
                where.get(key, name) == name
            ):  # of two files that hold it, the one that the index names
                tensors[key] = Stored(file, key)
    return tensors


def absent_shards(folder: Path, stem: str = "model") -> list[str]:
    """The files that a folder's index names and that are not there."""
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file() or not index.is_file():
        return []
    names = sorted(set(_weight_map(index).values()))
    return [name for name in names if not (folder / name).is_file()]


def _weight_map(index: Path) -> dict[str, str]:
    where = read_json(index).get("weight_map", {})
    if not isinstance(where, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in where.values()
    ):
        raise UserError(f"{index} must map tensors to files beside it in its weight_map.")
    return where


def check_tensors(folder: Path, tensors: dict[str, Stored], weights: dict[str, Weight]) -> None:
    """Compares open files with the tensors that there should be, by name, shape and dtype.

    Raises:
      UserError: the differences, and their cause where the names tell it.
    """
    problems = [f"missing {name}" for name in weights if name not in tensors]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - weights.keys())]
    for name in sorted(weights.keys() & tensors.keys()):
        view = tensors[name].view()
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if shape != weights[name].shape:
            problems.append(f"{name} has shape {shape} instead of {weights[name].shape}")
        elif dtype not in DTYPES:
            problems.append(f"{name} is stored as {dtype} instead of {', '.join(DTYPES)}")
    if not problems:
        return
    cause = _cause(folder, tensors, weights)
    shown = problems[: 3 if cause else _LISTED]
    more = len(problems) - len(shown)
    listed = "; ".join(shown) + (f"; and {more} more" if more else "")
    if cause:
        raise UserError(f"{folder} {cause} ({listed}).")
    described = "its config.json describes" if folder.is_dir() else "its header describes"
    raise UserError(f"{folder} does not hold what {described}: {listed}.")


def _cause(folder: Path, tensors: dict[str, Stored], weights: dict[str, Weight]) -> str | None:
    """Why a folder's tensors are others than they should be, where that can be told."""
    narrow = any(tensor.view().get_dtype().startswith(("F8", "F4")) for tensor in tensors.values())
    if (
        narrow
        or any(map(_QUANTIZED.fullmatch, tensors))
        or (folder / "hf_quant_config.json").is_file()
    ):
        return "is quantized, which is not supported: use the original"
    embed = "embed_tokens.weight"
    if f"model.{embed}" in weights and f"model.{embed}" not in tensors:
        prefix = next((n.removesuffix(embed) for n in tensors if n.endswith(f".{embed}")), None)
        if prefix:
            return f"holds a language model inside another one, under {prefix:.80}*, which is not supported"
    return None


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that the CPU back-end takes over as it is, without a copy."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def read_into(
    part: np.ndarray, file_slice: Any, transposed: bool, index: tuple[slice, ...] | None = None
) -> None:
    """Copies a tensor of a file into `part`, some rows at a time.

    Args:
      index: the piece of it that is wanted, as it lies in `part`; None for all.
    """
    if index is None:
        index = tuple(map(slice, file_slice.get_shape()))
    elif transposed:
        index = index[::-1]
    first, last, _ = index[0].indices(file_slice.get_shape()[0])
    for start in range(first, last, _ROWS):
        rows = slice(start, min(start + _ROWS, last))
        here = slice(rows.start - first, rows.stop - first)
        piece = file_slice[(rows, *index[1:])]
        _assign(part[:, here] if transposed else part[here], piece.T if transposed else piece)


def read_weight(array: np.ndarray, weight: Weight, stored: Stored, stacked: bool = False) -> None:
    """Copies a tensor of a file into its part of our array.

    Args:
      stacked: the array's first axis is that of layers.
    """
    part, order, view = weight.within(array, stacked), weight.order, stored.view()
    if order is None:
        read_into(part, view, weight.transposed)
        return
    for to, start, length in runs(order):
        index = (*map(slice, part.shape[:-1]), slice(start, start + length))
        read_into(part[..., to : to + length], view, weight.transposed, index)


def runs(columns: np.ndarray, places: np.ndarray | None = None) -> Iterator[tuple[int, int, int]]:
    """Pieces of columns that follow each other: where each begins, its first column, its length.

    Args:
      places: where each column goes, default 0, 1, ...
    """
    places = np.arange(len(columns)) if places is None else places
    breaks = np.flatnonzero((np.diff(columns) != 1) | (np.diff(places) != 1)) + 1
    for piece in np.split(np.arange(len(columns)), breaks):
        if len(piece):
            yield int(places[piece[0]]), int(columns[piece[0]]), len(piece)


def _assign(to: np.ndarray, value: np.ndarray) -> None:
    if to.dtype == value.dtype and to.itemsize == 2:
        # As integers: numpy moves bfloat16, which it does not know, element by element.
        to, value = to.view(np.uint16), value.view(np.uint16)
    to[...] = value


def write_tensors(
    folder: Path,
    weights: dict[str, Weight],
    params: Params,
    dtype: Any,
    max_shard_bytes: int,
) -> None:
    sizes = {name: math.prod(weight.shape) * dtype.itemsize for name, weight in weights.items()}
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        values = {name: _tensor(params, name, weights[name], dtype) for name in names}
        save_file(values, folder / file, metadata={"format": "pt"})
        # safetensors makes its files readable by their owner alone, whatever the umask.
        shutil.copymode(folder / "config.json", folder / file)
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = {"total_size": sum(sizes.values())}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": total, "weight_map": where}
        )


def _tensor(params: Params, name: str, weight: Weight, dtype: Any) -> np.ndarray:
    """One tensor as the file has it, from either layer layout."""
    leaf: Any = params
    stacked = len(weight.path) == 3 and not isinstance(params.get("layers", ()), tuple)
    for key in (weight.path[0], weight.path[2]) if stacked else weight.path:
        leaf = leaf[key]
    part = weight.within(np.asarray(leaf), stacked)
    if part.shape != weight.part:
        raise ValueError(f"{name} would be {part.shape}, but its configuration says {weight.part}")
    if weight.order is not None:
        part = part[..., np.argsort(weight.order)]
    out = np.empty(weight.shape, dtype)
    for start in range(0, len(out), _ROWS):
        rows = slice(start, start + _ROWS)
        _assign(out[rows], part[:, rows].T if weight.transposed else part[rows])
    return out


@contextlib.contextmanager
def new_folder(folder: Path, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write in, which becomes `folder`, or moves into it, when all went well.

    Args:
      stale: names of old files to remove beside old weights, even if they are not written again.

    Raises:
      UserError: `folder` has no name, as `/` has none. RunError: it cannot be written; what was there
        is as it was.
    """
    folder = folder.expanduser().resolve()  # "." has no name
    if not folder.name:
        raise UserError(f"{folder} cannot be written as a checkpoint: name a folder in it.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder to write to.")
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            _move_into(new, folder, stale)
        else:
            new.rename(folder)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _move_into(new: Path, folder: Path, stale: Iterable[str]) -> None:
    """Moves what is in `new` into `folder`, and what it replaces away, or back where that fails.

    Whoever is killed in between finds the old files in `.NAME.PID.old`: a mixture of old and new
    weights would load.
    """
    old = new.with_name(f"{new.name}.old")
    old.mkdir()
    names = {path.name for path in new.iterdir()}
    replaced = names | set(stale) | {path.name for path in folder.glob("model*.safetensors*")}
    try:
        for name in sorted(replaced):
            if (folder / name).exists():
                (folder / name).rename(old / name)
        for name in sorted(names):
            (new / name).rename(folder / name)
    except OSError:
        for name in names:
            if (folder / name).exists() and not (new / name).exists():
                (folder / name).rename(new / name)
        for path in old.iterdir():
            path.rename(folder / path.name)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error!s:.200}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
