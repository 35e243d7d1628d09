"""Reading a checkpoint onto a mesh: each process reads the bytes of its devices' parts, and no others."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jax_specdec.checkpoints import layouts
from jax_specdec.checkpoints.tensor_files import Stored, aligned, read_into, runs
from jax_specdec.models.hf_tensors import Weight

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
        for name, weight in weights.items():
            part, of_part = host, rows
            leading: list[Any] = [] if weight.expert is None else [weight.expert]
            if len(index) > len(weight.part) + len(leading):  # layers are stacked
                leading.insert(0, weight.path[1])
            for place in leading:
                first = of_part[0].start
                if not first <= place < of_part[0].stop:
                    break
                part, of_part = part[place - first], of_part[1:]
            else:
                to = np.flatnonzero(
                    (wanted >= weight.start) & (wanted < weight.start + weight.part[-1])
                )
                from_file = wanted[to] - weight.start
                from_file = from_file if weight.order is None else weight.order[from_file]
                for at, start, length in runs(from_file, to):
                    there = (*of_part, slice(start, start + length))
                    here = part[..., at : at + length]
                    read_into(here, tensors[name].view(), weight.transposed, there)

    return read
