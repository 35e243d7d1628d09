"""Block sizes and splits by device kind, from the tables in `tuned/`.

A table is a JSON file named after the device kind. Of its entries the first that fits decides, or else the
widest of the dtype. What a kernel computes, to the last bit, thus depends on the table and on shapes, never
on a timing at run time. `python -m pallas_kernels.autotune` writes a table.
"""

import dataclasses
import functools
import importlib.resources
import json
import logging
from collections.abc import Iterable
from importlib.resources.abc import Traversable
from typing import Any

import jax
from jax.sharding import AxisType

logger = logging.getLogger(__name__)

FOLDER = importlib.resources.files("pallas_kernels") / "tuned"
# The Pallas back-end of a platform.
NATIVE = {"tpu": "mosaic_tpu", "gpu": "triton"}
DEFAULT_TABLE = {"tpu": "tpu.json", "gpu": "gpu.json"}


@dataclasses.dataclass(frozen=True)
class TpuConfig:
    """How `mosaic_tpu` cuts a call.

    Attributes:
      heads: KV heads of a block, at most.
      keys: cache slots of a block.
      rows: query rows (T * G of a head) of a block.
      chunk: slots whose scores are held at a time.
    """

    heads: int = 8
    keys: int = 512
    rows: int = 256
    chunk: int = 512


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """How `triton` cuts a call.

    Attributes:
      keys: cache slots of a step.
      rows: query rows of a program.
      warps, stages: of the compiler.
      waves: programs per multiprocessor that splitting the prefix should reach.
    """

    keys: int = 64
    rows: int = 64
    warps: int = 4
    stages: int = 2
    waves: int = 1


@dataclasses.dataclass(frozen=True)
class Device:
    """The device that a call is traced for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: as the platform names it, "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
      cores: multiprocessors of a GPU, None if unknown.
    """

    platform: str
    kind: str
    cores: int | None = None


def check_exists(backend: str, names: Iterable[str]) -> None:
    """Raises a ValueError that lists `names` if `backend` is not among them."""
    names = list(names)
    if backend not in names:
        exist = ", ".join(map(repr, names))
        raise ValueError(
            f"backend {backend!r} does not exist; there are {exist} and None (automatic)"
        )


def device() -> Device:
    """The device of the abstract mesh that is set, if it names one, or else the default one.

    A program that is compiled for another machine is then traced as it would be on that machine.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        platform = "gpu" if described.platform in ("cuda", "rocm") else described.platform
        return Device(platform, described.device_kind, described.num_cores)
    first = default_device()
    return Device(first.platform, first.device_kind, getattr(first, "core_count", None))


def on_mesh() -> bool:
    """Whether XLA is to divide what is traced over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and AxisType.Auto in mesh.axis_types


def default_device() -> Any:
    """The jax device that arrays go to unless told otherwise."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is None or isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen


def file_of(kind: str) -> Traversable:
    """The file of a device kind's table, whether it exists or not."""
    return FOLDER / (kind.replace(" ", "_").lower() + ".json")


@functools.cache
def table(platform: str, kind: str) -> dict[str, Any]:
    """The table of a device kind, or the platform's default where there is none."""
    file = file_of(kind)
    if not file.is_file():
        logger.debug("no table for %s: %s", kind, DEFAULT_TABLE[platform])
        file = FOLDER / DEFAULT_TABLE[platform]
    return json.loads(file.read_text())


def _entry(platform: str, dtype: Any, head_dim: int, rows: int) -> dict[str, Any]:
    here = device()
    # A kernel in its interpreter is traced on a machine of another platform.
    kind = here.kind if here.platform == platform else "none"
    entries = table(platform, kind)["entries"]
    itemsize = jax.numpy.dtype(dtype).itemsize
    of_kind = [e for e in entries if head_dim <= e["head_dim"] and itemsize <= e["bytes"]]
    for entry in of_kind:
        if rows <= entry["rows"]:
            return entry["config"]
    # Wider calls are cut into blocks like the widest that was measured.
    widest = max(of_kind, key=lambda e: (-e["bytes"], e["rows"], -e["head_dim"]))
    return widest["config"]


def tpu(dtype: Any, head_dim: int, rows: int) -> TpuConfig:
    """Block sizes for `rows` query rows of a KV head, of this dtype and width."""
    return TpuConfig(**_entry("tpu", dtype, head_dim, rows))


def gpu(dtype: Any, head_dim: int, rows: int) -> GpuConfig:
    """Block sizes for `rows` query rows of a KV head, of this dtype and width."""
    return GpuConfig(**_entry("gpu", dtype, head_dim, rows))


def multiprocessors() -> int:
    """Multiprocessors of the GPU that a call is traced for; 1 in an interpreter elsewhere."""
    here = device()
    if here.platform != "gpu":
        return 1
    return here.cores or table("gpu", here.kind)["multiprocessors"]


def has_tensor_cores(gpu: Device) -> bool:
    """Whether a GPU has the compute capability that Triton's products need, 8.0."""
    first = default_device()
    if first.device_kind != gpu.kind:  # only described: whoever compiles for it knows
        return True
    major = str(getattr(first, "compute_capability", "")).partition(".")[0]
    return major.isdigit() and int(major) >= 8
