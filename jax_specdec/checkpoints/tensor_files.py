"""Folders of safetensors: their shards, their index and JSON beside them, read and written in pieces."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_specdec._types import Params
from jax_specdec.errors import RunError, UserError
from jax_specdec.models.hf import Weight

MAX_SHARD_BYTES = 2 * 10**9
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Rows copied at a time: few enough that the strided side of a transposition stays in cache, six
# times as fast as one assignment.
_ROWS = 32


def open_tensors(folder: Path, stem: str = "model") -> dict[str, Any]:
    """Tensor name -> open file that holds it. Nothing is read but headers.

    Args:
      stem: what the file is called, or the index of several.

    Raises:
      UserError: no weights, a shard that is missing, or a file that is broken.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file():
        files = [f"{stem}.safetensors"]
    elif index.is_file():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
    elif any(any(folder.glob(f"*.{kind}")) for kind in ("bin", "pth", "pt")):
        raise UserError(
            f"{folder} holds pickled weights, which can run code and are not read: convert them to "
            "safetensors first (save_pretrained of transformers writes them)."
        )
    else:
        raise UserError(f"{folder} holds no weights: there is no {stem}.safetensors.")
    absent = [name for name in files if not (folder / name).is_file()]
    if not files:
        raise UserError(f"{index} names no files.")
    if absent:
        raise UserError(
            f"{folder} lacks {len(absent)} of the {len(files)} files that its index names, first "
            f"{absent[0]}."
        )
    tensors = {}
    for name in files:
        try:
            file = safe_open(folder / name, "np")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name} is truncated or damaged ({error}).") from error
        tensors.update(dict.fromkeys(file.keys(), file))
    return tensors


def check_tensors(folder: Path, tensors: dict[str, Any], weights: dict[str, Weight]) -> None:
    """Compares open files with the tensors that there should be, by name, shape and dtype.

    Raises:
      UserError: every difference.
    """
    problems = [f"missing {name}" for name in weights if name not in tensors]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - weights.keys())]
    for name in sorted(weights.keys() & tensors.keys()):
        view = tensors[name].get_slice(name)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if shape != weights[name].shape:
            problems.append(f"{name} has shape {shape} instead of {weights[name].shape}")
        elif dtype not in DTYPES:
            problems.append(f"{name} is stored as {dtype} instead of {', '.join(DTYPES)}")
    if problems:
        raise UserError(
            f"{folder} does not hold what its config.json describes: {'; '.join(problems)}."
        )


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that the CPU back-end takes over as it is, without a copy."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def read_into(part: np.ndarray, file_slice: Any, transposed: bool) -> None:
    """Copies a tensor of a file into `part`, some rows at a time."""
    length = file_slice.get_shape()[0]
    for start in range(0, length, _ROWS):
        rows = slice(start, min(start + _ROWS, length))
        piece = file_slice[rows]
        _assign(part[:, rows] if transposed else part[rows], piece.T if transposed else piece)


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
    if len(weight.path) == 3 and not isinstance(params.get("layers", ()), tuple):
        leaf = np.asarray(params["layers"][weight.path[2]])[weight.path[1]]
    else:
        for key in weight.path:
            leaf = leaf[key]
    part = np.asarray(leaf)[..., weight.start : weight.start + weight.part[-1]]
    if part.shape != weight.part:
        raise ValueError(f"{name} would be {part.shape}, but its configuration says {weight.part}")
    out = np.empty(weight.shape, dtype)
    for start in range(0, len(out), _ROWS):
        rows = slice(start, start + _ROWS)
        _assign(out[rows], part[:, rows].T if weight.transposed else part[rows])
    return out


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `folder`, or moves into it, when all went well."""
    new = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        new.mkdir(parents=True)
        yield new
        if not folder.exists():
            new.rename(folder)
        else:
            for old in folder.glob("model*.safetensors*"):  # a mixture of old and new would load
                old.unlink()
            for path in new.iterdir():
                os.replace(path, folder / path.name)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
