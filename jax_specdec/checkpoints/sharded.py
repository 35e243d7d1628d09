"""Reading a checkpoint onto a mesh: each process reads the bytes of its devices' parts, and no others."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jax_specdec.checkpoints import layouts
from jax_specdec.checkpoints.tensor_files import Stored, aligned, read_into
from jax_specdec.models.hf import Weight

Index = tuple[slice, ...]


def place(
    path: tuple[str | int, ...],
    shape: tuple[int, ...],
    dtype: Any,
    sharding: NamedSharding,
    read: Callable[[Index, np.ndarray], None],
) -> jax.Array:
    """An array of a parameter tree, put together from its parts.

    Args:
      read: fills an array with the part that an index of whole slices describes. Each part is read once,
        however many devices of this process hold it, and let go when it is on them.
    """
    parts: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        parts.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in parts.items():
        host = aligned(tuple(end - start for start, end in bounds), dtype)
        read(tuple(slice(*bound) for bound in bounds), host)
        # Transfers run ahead of us otherwise, and each holds its host buffer.
        arrays += jax.block_until_ready([layouts.put(path, host, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def reader(
    weights: Mapping[str, Weight], tensors: Mapping[str, Stored], order: np.ndarray | None
) -> Callable[[Index, np.ndarray], None]:
    """For `place`, a parameter that the tensors of a checkpoint make up.

    Args:
      weights: its tensors by name, those of all layers where layers are stacked. order: see
        `tensor_parallel.fused_order`.
    """

    def read(index: Index, host: np.ndarray) -> None:
        *rows, columns = index
        wanted = np.arange(columns.start, columns.stop)
        wanted = wanted if order is None else order[wanted]
        stacked = len(index) > len(next(iter(weights.values())).part)
        for name, weight in weights.items():
            part: Any = host
            of_layer = rows
            if stacked:
                layer = weight.path[1]
                assert isinstance(layer, int)
                part, of_layer = host[layer - index[0].start], rows[1:]
            for to, start, length in _runs(wanted):
                first = max(start, weight.start)
                last = min(start + length, weight.start + weight.part[-1])
                if first >= last:
                    continue
                here = slice(to + first - start, to + last - start)
                there = (*of_layer, slice(first - weight.start, last - weight.start))
                read_into(part[..., here], tensors[name].view(), weight.transposed, there)

    return read


def _runs(columns: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Pieces of columns that follow each other: where each begins, its first column, its length."""
    breaks = np.flatnonzero(np.diff(columns) != 1) + 1
    for piece in np.split(np.arange(len(columns)), breaks):
        if len(piece):
            yield int(piece[0]), int(columns[piece[0]]), len(piece)
