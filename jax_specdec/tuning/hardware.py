"""What accelerators can do, by the makers' data sheets; per device as JAX counts devices."""

import dataclasses
import math
import re

from jax_specdec.errors import UserError


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
      memory: bytes that a program may use. bandwidth: bytes/s of its memory.
      flops: bfloat16 operations/s. link: bytes/s to other devices, all links together, one direction.
      platform: "tpu", "gpu" or "cpu".
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    link: float
    platform: str = "tpu"


_GIB = 2**30
# cloud.google.com/tpu/docs (system architecture) and NVIDIA's data sheets (dense bfloat16). A v4 or TPU7x
# chip has two cores, which v4 shows as two devices here and TPU7x always does.
TPUS = {
    "v4": Hardware("TPU v4 core", 15.25 * _GIB, 614e9, 137e12, 135e9),
    "v5e": Hardware("TPU v5e", 15.75 * _GIB, 819e9, 197e12, 200e9),
    "v5p": Hardware("TPU v5p", 95 * _GIB, 2765e9, 459e12, 600e9),
    "v6e": Hardware("TPU v6e", 31.25 * _GIB, 1640e9, 918e12, 400e9),
    "tpu7x": Hardware("TPU7x core", 94.75 * _GIB, 3690e9, 1153e12, 600e9),
}
GPUS = {
    "a100": Hardware("NVIDIA A100 80GB", 79 * _GIB, 2039e9, 312e12, 300e9, "gpu"),
    "h100": Hardware("NVIDIA H100 80GB HBM3", 79 * _GIB, 3350e9, 989e12, 450e9, "gpu"),
    "h200": Hardware("NVIDIA H200", 139 * _GIB, 4800e9, 989e12, 450e9, "gpu"),
    "b200": Hardware("NVIDIA B200", 178 * _GIB, 8000e9, 2250e12, 900e9, "gpu"),
}
# A desktop's; only shares of it mean anything.
CPU = Hardware("CPU", 16 * _GIB, 50e9, 0.5e12, 10e9, "cpu")
LATENCY_S = 3e-6  # of one collective
LARGEST = 16384  # devices that are planned for: more than any slice has


@dataclasses.dataclass(frozen=True)
class Topology:
    """A described machine: `v5e:2x4`, `cpu:8` or `h100:8`."""

    name: str
    hardware: Hardware
    devices: int


def parse_topology(text: str) -> Topology:
    """A topology by its name.

    >>> parse_topology("v5e:2x4").devices, parse_topology("tpu7x:2x2x1").devices
    (8, 8)

    Raises:
      UserError: none of these.
    """
    kind, colon, shape = text.partition(":")
    known = {**TPUS, **GPUS, "cpu": CPU}
    sizes = [int(size) for size in shape.split("x") if size.isdecimal()]
    if kind not in known or not colon or not re.fullmatch(r"\d+(x\d+){0,2}", shape) or 0 in sizes:
        raise UserError(
            f"There is no topology {text[:40]!r}: name one of {', '.join(known)} with its shape, as in "
            "v5e:2x4, tpu7x:2x2x1, h100:8 or cpu:8."
        )
    if kind in TPUS and len(sizes) != (2 if kind in ("v5e", "v6e") else 3):
        axes = "2x4" if kind in ("v5e", "v6e") else "2x2x1"
        raise UserError(f"A topology of {kind} has a shape like {axes}, not {shape}.")
    count = math.prod(sizes)
    if count > LARGEST:
        raise UserError(f"{text[:40]!r} has {count} devices, and plans end at {LARGEST}.")
    return Topology(text, known[kind], count * (2 if kind in ("v4", "tpu7x") else 1))


def by_kind(platform: str, kind: str) -> Hardware:
    """A device that JAX shows, by its platform and kind; one like it where the kind is not known.

    >>> by_kind("tpu", "TPU v5 lite").name, by_kind("gpu", "NVIDIA H200").name, by_kind("cpu", "cpu").name
    ('TPU v5e', 'NVIDIA H200', 'CPU')
    """
    if platform == "tpu":
        return TPUS[_TPU_KINDS.get(kind, "v5e")]
    if platform == "gpu":
        return next((GPUS[name] for name in GPUS if name in kind.lower()), GPUS["h100"])
    return CPU


_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}
