"""GGUF files: the header, checked against the file's size, and tensors as float32.

The header is read here, because the package `gguf` goes on for as long as a forged count says, and makes an
array of every token. What the bytes of a type mean is the package's.
"""

import dataclasses
import functools
import math
import mmap
import os
import struct
import weakref
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_specdec.checkpoints.tensor_files import DTYPES, RowView
from jax_specdec.errors import UserError, shown

SUFFIX, _MAGIC = ".gguf", b"GGUF"
VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_AXES = 4


class _Damaged(ValueError):
    """What is wrong with a header, as the end of a sentence."""


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    Attributes:
      shape: in numpy's order, so that a row is contiguous. kind: its type's name, such as `Q4_1`.
      start: of its first byte in the file. row_bytes: of one row.
    """

    shape: tuple[int, ...]
    kind: str
    start: int
    row_bytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class GgufFile:
    """An open file.

    Attributes:
      metadata: values by key; lists for arrays.
      tensors: by the file's names.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    _descriptor: int

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Some rows of a tensor; a vector is one row. float32, or as stored where that is F16 or BF16."""
        tensor = self.tensors[name]
        first, last = int(rows.min()), int(rows.max()) + 1
        start = tensor.start + first * tensor.row_bytes
        raw = os.pread(self._descriptor, (last - first) * tensor.row_bytes, start)
        found = np.frombuffer(raw, np.uint8).reshape(last - first, tensor.row_bytes)[rows - first]
        if tensor.kind in DTYPES:
            return found.view(jnp.dtype(DTYPES[tensor.kind]))
        return _package().dequantize(found, _type(tensor.kind))


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file: called so, or beginning so under another name."""
    if not path.is_file():
        return False
    if path.suffix == SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def open_gguf(path: Path) -> GgufFile:
    """Opens a file and reads its header; the last ones are kept, since several readers ask.

    Raises:
      UserError: it is no GGUF, or one that is truncated, damaged, or of a version or type that is not known.
    """
    about = path.stat()
    return _open(path.resolve(), about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _open(path: Path, size: int, changed: int) -> GgufFile:
    del changed
    _package()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if size < 24:
            raise _Damaged("it is shorter than a header")
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data:
            metadata, tensors = _read(data, size, path)
    except (_Damaged, ValueError, OverflowError, struct.error) as error:
        os.close(descriptor)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is truncated or damaged ({error!s:.200}).") from error
    file = GgufFile(path, metadata, tensors, descriptor)
    weakref.finalize(file, os.close, descriptor)
    return file


@functools.cache
def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "GGUF files need the package gguf: pip install 'jax-specdec[gguf]'."
        ) from error
    return gguf


def _type(name: str) -> Any:
    return _package().GGMLQuantizationType[name]


@functools.cache
def _kind(number: int) -> tuple[str, int, int] | None:
    """Name, block size and bytes of a block; None for a type that the package cannot turn into numbers."""
    gguf = _package()
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        return None
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if kind.name not in DTYPES:
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            return None
    return kind.name, block, size


class _Cursor:
    """A place in a file that never leaves it."""

    def __init__(self, data: mmap.mmap, size: int):
        self.data, self.size, self.at = data, size, 0

    def room(self, count: int) -> int:
        """Where `count` bytes start, and steps behind them."""
        start = self.at
        if count > self.size - start:
            raise _Damaged(f"{count} bytes are wanted at {start} of {self.size}")
        self.at = start + count
        return start

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.room(struct.calcsize(f"<{form}")))
        return value

    def text(self) -> str:
        length = self.number("Q")
        start = self.room(length)
        return self.data[start : start + length].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise _Damaged(f"a value is of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            if count > (self.size - self.at) // 8:
                raise _Damaged(f"an array has {count} strings")
            return [self.text() for _ in range(count)]
        if inner not in _SCALARS:
            raise _Damaged(f"an array is of type {inner}")
        form = np.dtype(_SCALARS[inner]).newbyteorder("<")
        start = self.room(count * form.itemsize)
        return np.frombuffer(self.data[start : self.at], form).tolist()


def _read(data: mmap.mmap, size: int, path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    if data[: len(_MAGIC)] != _MAGIC:
        raise UserError(f"{path} is no GGUF file: it does not begin with GGUF.")
    cursor = _Cursor(data, size)
    cursor.room(4)
    version = cursor.number("I")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        which = f"version {version}" if version & 0xFFFF else "big-endian numbers"
        raise UserError(f"{path} is a GGUF of {which}; versions {known}, little-endian, are read.")
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(_at_most(key_count, cursor, 13)):
        key = cursor.text()
        if key in metadata:
            raise _Damaged(f"it has two values of {shown(key)}")
        metadata[key] = cursor.value(cursor.number("I"))
    found = {}
    for _ in range(_at_most(tensor_count, cursor, 32)):
        name = cursor.text()
        if name in found:
            raise _Damaged(f"it has two tensors {shown(name)}")
        axes = cursor.number("I")
        if not 1 <= axes <= _MAX_AXES:
            raise _Damaged(f"{shown(name)} has {axes} axes")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        found[name] = shape, cursor.number("I"), cursor.number("Q")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise _Damaged(f"general.alignment is {shown(alignment)}")
    start = -(-cursor.at // alignment) * alignment
    return metadata, {
        name: _tensor(path, name, *about, start=start, size=size) for name, about in found.items()
    }


def _at_most(count: int, cursor: _Cursor, each: int) -> int:
    """`count` items of at least `each` bytes must fit into what is left."""
    if count > (cursor.size - cursor.at) // each:
        raise _Damaged(f"a count is {count}")
    return count


def _tensor(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    number: int,
    offset: int,
    *,
    start: int,
    size: int,
) -> GgufTensor:
    known = _kind(number)
    if known is None:
        raise UserError(
            f"{path} stores {shown(name)} in a type, number {number}, that the installed gguf package cannot read."
        )
    kind, block, block_bytes = known
    if not all(shape) or shape[-1] % block:
        raise _Damaged(f"{shown(name)} of shape {shape} is no {kind}")
    row_bytes = shape[-1] // block * block_bytes
    end = start + offset + math.prod(shape[:-1]) * row_bytes
    if end > size:
        raise _Damaged(f"{shown(name)} ends at byte {end} of {size}")
    return GgufTensor(shape, kind, start + offset, row_bytes)


def row_view(
    file: GgufFile, name: str, order: np.ndarray | None = None, expert: int | None = None
) -> RowView:
    """A tensor whose rows, or elements where it is a vector, are those of `order` (None: the file's).

    Args:
      expert: of a tensor with a matrix for each, the one that is wanted.
    """
    tensor = file.tensors[name]
    vector = len(tensor.shape) == 1
    first = 0 if expert is None else expert * tensor.shape[-2]

    def read(start: int, stop: int) -> np.ndarray:
        if vector:
            whole = file.rows(name, np.zeros(1, int))[0]
            return (whole if order is None else whole[order])[start:stop]
        wanted = np.arange(start, stop) + first if order is None else order[start:stop]
        return file.rows(name, wanted)

    shape = tensor.shape if expert is None else tensor.shape[-2:]
    return RowView(shape, tensor.kind if tensor.kind in DTYPES else "F32", read)
