"""What a model takes in memory, before anything is allocated."""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_specdec._types import Params
from jax_specdec.checkpoints.dtypes import check_dtype
from jax_specdec.checkpoints.int8 import check_parts
from jax_specdec.core.sharding import held_per_device, shapes_at
from jax_specdec.errors import UserError, a_kind
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.decoder import Decoder
from jax_specdec.models.quantized import quantize
from jax_specdec.text.inputs import check_count
from pallas_kernels import tuning


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes that decoding needs, activations left out."""

    parameters: int
    cache: int
    logits: int

    @property
    def total(self) -> int:
        return self.parameters + self.cache + self.logits


def memory_plan(
    config: ModelConfig,
    dtype: Any,
    batch: int,
    slots: int,
    *,
    width: int = 1,
    int8: Collection[str] = (),
) -> MemoryPlan:
    """What a model takes, before anything is allocated.

    Args:
      dtype: as in `load_target`.
      batch: rows. slots: cache slots of each row; 0 of either leaves the cache out. width: new tokens or tree
        nodes of a row in one forward.
      int8: of which parts, as in `load_target`.

    Raises:
      UserError: a value that is none of these.
    """
    if not isinstance(config, ModelConfig):
        raise UserError(f"A memory plan is of a ModelConfig, not {a_kind(config)}.")
    dtype = check_dtype(dtype)
    check_parts(int8)
    for name, value, least in (("batch", batch, 0), ("slots", slots, 0), ("width", width, 1)):
        check_count(name, value, least)
    size = jnp.dtype(dtype).itemsize
    values = 2 * config.num_layers * batch * config.num_kv_heads * slots * config.head_dim
    parameters = config.parameter_count() * size
    if "weights" in int8:
        parameters = bytes_per_device(Decoder(config, dtype, quantized=True))
    return MemoryPlan(
        parameters=parameters,
        cache=values * (1 if "cache" in int8 else size),
        logits=batch * width * config.vocab_size * 4,
    )


def sizes_of(config: ModelConfig) -> dict[str, Any]:
    """What `info` says of a model, as JSON."""
    names = (
        "family",
        "vocab_size",
        "hidden_size",
        "mlp_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "context",
        "tied_head",
    )
    if config.num_experts:
        names += ("num_experts", "experts_per_token", "expert_size")
    return {
        "num_parameters": config.parameter_count(),
        **{name: getattr(config, name) for name in names},
    }


def parameter_bytes(shapes: Params, int8: Collection[str] = ()) -> int:
    """Of a tree of shapes, with its matrices in int8 where these are wanted so."""
    if "weights" in int8:
        shapes = jax.eval_shape(quantize, shapes)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def bytes_per_device(decoder: Decoder) -> int:
    """Of the parameters of a decoder, on a mesh, or of int8, what one device holds."""
    shapes = jax.eval_shape(decoder.init, jax.random.key(0))
    if decoder.sharding is None:
        return parameter_bytes(shapes)
    return held_per_device(shapes_at(shapes, decoder.sharding.tree(decoder.axes()[0])))


def available_memory(device: Any = None) -> int | None:
    """Free bytes of a jax device (default: the default one), or None where it does not say."""
    device = device or tuning.default_device()
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_memory() if device.platform == "cpu" else None


def host_memory() -> int | None:
    """Free bytes of this machine, or None where it does not say."""
    if not Path("/proc/meminfo").is_file():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else None


def check_fits(plan: MemoryPlan, available: int | None) -> None:
    """Raises UserError where `plan` needs more than `available` bytes; None, unknown, passes."""
    if available is None or plan.total <= available:
        return
    parts = {"parameters": plan.parameters, "cache": plan.cache, "logits": plan.logits}
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
    raise UserError(
        f"This needs {_gib(plan.total)} ({listed}) but {_gib(available)} are free: use a narrower "
        "dtype, a smaller batch or a shorter context."
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
