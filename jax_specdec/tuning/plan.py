"""What a round takes on hardware that is not here: compiled for a described topology, or by arithmetic alone.

Nothing is loaded: a model is its configuration, a program its shapes.
"""

import contextlib
import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jax_specdec.checkpoints import layouts
from jax_specdec.core.cache import KVScales
from jax_specdec.core.drafter import Drafter
from jax_specdec.core.loop import DecodeLoop
from jax_specdec.core.sampling import make_sampling
from jax_specdec.core.sharding import Sharding, held_per_device, row_places, shapes_at
from jax_specdec.errors import RunError, UserError
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.decoder import Decoder
from jax_specdec.tuning.collectives import collectives, summed
from jax_specdec.tuning.hardware import LATENCY_S, Topology

PROMPT = 256  # tokens of the prompts that the prefill is compiled for


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to be planned.

    Attributes:
      config: of the target. sizes: of the mesh axes `data` and `tensor`.
      batch: rows. context: tokens of a row, all cached. dtype: of parameters and cache, where they are not
        in `int8`, as in `load_target`.
    """

    config: ModelConfig
    topology: Topology
    sizes: dict[str, int]
    batch: int
    context: int
    dtype: str
    int8: tuple[str, ...] = ()

    def __post_init__(self):
        wanted = math.prod(self.sizes.values())
        if wanted != self.topology.devices:
            shown = ",".join(f"{name}={size}" for name, size in self.sizes.items())
            raise UserError(
                f"The mesh {shown} has {wanted} devices and {self.topology.name} {self.topology.devices}."
            )
        if self.batch % self.sizes["data"]:
            raise UserError(
                f"A batch of {self.batch} does not divide over data={self.sizes['data']} devices: choose "
                "another --batch-size or --mesh."
            )
        if self.context > self.config.context:
            raise UserError(
                f"The model's context is {self.config.context} tokens, fewer than {self.context}."
            )


def bytes_per_draft_token(way: Drafter, sizes: Mapping[str, int]) -> int:
    """What drafting a token reads: the parameters of the drafter's models, once.

    Args:
      way: see `core.drafter.ways_of`. sizes: bytes of the models' own parameters, by name.
    """
    return sum(sizes.get(use.name, 0) for use in way.info.models)


def parts_by_arithmetic(question: Question, drafter: int, nodes: int) -> dict[str, float]:
    """Bytes of each device for parameters and cache, and what a verification moves and computes there.

    Args:
      drafter: bytes of a drafter's own parameters, which every device holds. nodes: of a verification.
    """
    c, tensor, data = question.config, question.sizes["tensor"], question.sizes["data"]
    size, rows = jnp.dtype(question.dtype).itemsize, question.batch // data
    kv_heads = max(c.num_kv_heads // tensor, 1)
    embedding = c.vocab_size * c.hidden_size
    per_weight = 1 if "weights" in question.int8 else size
    own = ((c.parameter_count() - embedding) * per_weight + embedding * size) / tensor
    # Of a mixture, each token goes through a few experts, and those of all tokens are read.
    active, touched = None, None
    if c.num_experts:
        active = c.experts_per_token
        touched = c.parameter_count(min(c.num_experts, active * rows * nodes))
    unread = 0 if touched is None else (c.parameter_count() - touched) * per_weight / tensor
    per_value = 1 if "cache" in question.int8 else size
    slot = 2 * c.num_layers * kv_heads * c.head_dim * per_value
    cache = slot * rows * (question.context + nodes)
    # The embedding is not read but for a few of its rows.
    read = own - unread - (0 if c.tied_head else embedding * size / tensor)
    read = read + slot * rows * question.context
    # Scores in float32, with the noise, twice: before and after the law.
    scratch = 4 * 4 * rows * nodes * c.vocab_size / tensor
    products = 2 * (c.parameter_count(active) - embedding) / tensor * rows * nodes
    attention = (
        4 * c.num_layers * c.num_heads / tensor * c.head_dim * rows * nodes * question.context
    )
    reduced = (2 * c.num_layers + 1) * rows * nodes * c.hidden_size * size if tensor > 1 else 0
    return {
        "parameters": own + drafter,
        "cache": cache,
        "scratch": scratch,
        "bytes": read,
        "flops": products + attention,
        "reduced": reduced,
        "collectives": (2 * c.num_layers + 2) if tensor > 1 else 0,
    }


def seconds(question: Question, parts: dict[str, float]) -> dict[str, float]:
    """A verification's time by the roofline: memory, arithmetic, links, none of them overlapping the links."""
    hardware = question.topology.hardware
    memory, arithmetic = parts["bytes"] / hardware.bandwidth, parts["flops"] / hardware.flops
    # A ring moves twice what is reduced.
    links = 2 * parts["reduced"] / hardware.link + parts["collectives"] * LATENCY_S
    total = max(memory, arithmetic) + links
    return {"memory": memory, "arithmetic": arithmetic, "links": links, "total": total}


def by_arithmetic(question: Question, drafter: int, nodes: int) -> dict[str, Any]:
    """A plan without a compiler."""
    parts = parts_by_arithmetic(question, drafter, nodes)
    need = parts["parameters"] + parts["cache"] + parts["scratch"]
    capacity = question.topology.hardware.memory
    return {
        "memory": {
            "parameters": int(parts["parameters"]),
            "cache": int(parts["cache"]),
            "temporaries": int(parts["scratch"]),
            "total": int(need),
            "capacity": int(capacity),
        },
        "fits": need <= capacity,
        "verification": {
            "bytes": int(parts["bytes"]),
            "flops": int(parts["flops"]),
            "seconds": seconds(question, parts),
        },
    }


def alternatives(question: Question, drafter: int, nodes: int) -> list[str]:
    """The nearest changes that fit by arithmetic: more devices, a shorter context, a smaller batch, int8."""

    def fits(changed: Question) -> bool:
        parts = parts_by_arithmetic(changed, drafter, nodes)
        need = parts["parameters"] + parts["cache"] + parts["scratch"]
        return need <= 0.97 * changed.topology.hardware.memory

    found = []
    c, sizes = question.config, question.sizes
    for factor in (2, 4, 8, 16, 32, 64):
        tensor = sizes["tensor"] * factor
        if any(size % tensor for size in (c.num_heads, c.vocab_size, *c.mlp_sizes)):
            continue
        devices = question.topology.devices * factor
        larger = dataclasses.replace(
            question,
            topology=dataclasses.replace(question.topology, devices=devices),
            sizes={**sizes, "tensor": tensor},
        )
        if fits(larger):
            found.append(f"{devices} devices as data={sizes['data']},tensor={tensor}")
            break
    context = question.context // 2
    while context >= 256 and not fits(dataclasses.replace(question, context=context)):
        context //= 2
    if context >= 256:
        found.append(f"a context of {context}")
    batch = question.batch // 2
    while batch >= sizes["data"] and not fits(dataclasses.replace(question, batch=batch)):
        batch //= 2
    if batch >= sizes["data"] and batch % sizes["data"] == 0:
        found.append(f"a batch of {batch}")
    for int8 in (("weights",), ("cache",), ("weights", "cache")):
        if not set(int8) <= set(question.int8) and fits(dataclasses.replace(question, int8=int8)):
            found.append(f"{' and '.join(int8)} in int8")
            break
    return found


@contextlib.contextmanager
def _compiler() -> Iterator[None]:
    """The TPU compiler may be loaded by several processes, and asks neither a cloud nor a host for its machine."""
    quiet = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    }
    beside = Path(sys.prefix) / "aot/libtpu/libtpu.so"  # where a checkout's tests have it
    if beside.is_file() and "TPU_LIBRARY_PATH" not in os.environ:
        quiet["TPU_LIBRARY_PATH"] = str(beside)
    kept = {name: os.environ.get(name) for name in quiet}
    os.environ.update(quiet)
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def described_mesh(question: Question) -> Mesh:
    """The devices of the topology, which need not be here.

    Raises:
      RunError: the compiler for them is not installed. UserError: it does not know the topology.
    """
    name, count = question.topology.name, question.topology.devices
    shape = tuple(question.sizes.values())
    axes = {"axis_names": tuple(question.sizes), "axis_types": (AxisType.Auto,) * len(shape)}
    if question.topology.hardware.platform == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < count:
            raise RunError(
                f"JAX shows {len(devices)} CPU devices here, fewer than {count}: set JAX_NUM_CPU_DEVICES={count}."
            )
        return Mesh(np.array(devices[:count]).reshape(shape), **axes)
    from jax.experimental import topologies

    jax.devices()  # this machine's own come first, so that none of the described ones is looked for
    try:
        with _compiler():
            found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "not installed" in reason or "libtpu" in reason:
            raise RunError(
                "The TPU compiler is not installed: `pip install libtpu`, or plan by arithmetic with --arithmetic."
            ) from error
        raise UserError(
            f"The compiler does not know the topology {name}: {reason[:200]}."
        ) from error
    return Mesh(np.array(found.devices[:count]).reshape(shape), **axes)


def compiled(question: Question, make: Any) -> dict[str, Any]:
    """A plan by the real compiler: prefill and one round, at full depth.

    Args:
      make: `(decoder) -> (drafter, {name: shapes of its parameters}, {name: their shardings})`.
    """
    mesh = described_mesh(question)
    sharding = Sharding(mesh)
    kind = mesh.devices.flat[0].device_kind
    same = question.config.uniform
    loop_of_layers = "scan" if same and question.topology.hardware.platform != "cpu" else "unroll"
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        decoder = Decoder(
            question.config, question.dtype, loop_of_layers, stacked_cache=True, sharding=sharding
        )
        decoder = in_int8(decoder, question.int8)
        shapes = jax.eval_shape(decoder.init, jax.random.key(0))
        drafter, own, places = make(decoder)
        params = {
            "target": layouts.shapes_of(shapes, sharding.tree(decoder.axes()[0]), kind),
            "drafters": {name: layouts.shapes_of(own[name], places[name], kind) for name in own},
        }
        loop = DecodeLoop(decoder, drafter)
        sampling = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
            make_sampling(question.batch, max_new_tokens=128, temperature=1.0),
        )
        rows = jax.ShapeDtypeStruct((question.batch,), "int32")
        longest = min(PROMPT, (question.context + 1) // 2)
        tokens = jax.ShapeDtypeStruct((question.batch, longest), "int32")
        given = (tokens, rows, sampling, rows)
        args = shapes_at(given, row_places(given, sharding))
        start = jax.jit(loop.start, static_argnames="capacity")
        capacity = question.context
        state = start.eval_shape(params, *args, capacity=capacity)
        began = time.perf_counter()
        prefill = _compile(start.lower(params, *args, capacity=capacity))
        state = shapes_at(state, prefill.output_shardings)
        run = jax.jit(loop.run, donate_argnums=1, out_shardings=prefill.output_shardings)
        one = jax.ShapeDtypeStruct((), "int32")
        round_ = _compile(run.lower(params, state, one))
    parameters = held_per_device(params)
    found = {
        "compile_s": round(time.perf_counter() - began, 1),
        "prefill": _memory(prefill, parameters),
        "round": _memory(round_, parameters),
        "collectives": summed(collectives(round_.as_text())),
    }
    cost = round_.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    found["round"] |= {
        "bytes_accessed": int(cost.get("bytes accessed", 0)),
        "flops": int(cost.get("flops", 0)),
    }
    return found


def in_int8(decoder: Decoder, parts: tuple[str, ...]) -> Decoder:
    """The decoder with weights and cache in int8, as `load_target` would make it, with scales of 1."""
    ones = np.ones((decoder.config.num_layers, decoder.config.num_kv_heads), np.float32)
    scales = KVScales(ones, ones) if "cache" in parts else None
    return dataclasses.replace(decoder, quantized="weights" in parts, kv_scales=scales)


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Kept in JAX's cache, a program of devices that are not here could not be read back: that takes one of them."""
    shortest = jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)


def _compile(lowered: Any) -> Any:
    try:
        with uncached():
            return lowered.compile()
    except Exception as error:
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error))
        if used is None:
            raise
        raise TooLarge(
            f"the compiler would use {used[1]} of {used[2]} of a device's memory"
        ) from error


class TooLarge(Exception):
    """A program that does not fit, by the compiler."""


def _memory(program: Any, parameters: int) -> dict[str, int]:
    """What the compiler says one device needs, in bytes."""
    found = program.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    read = min(parameters, found.argument_size_in_bytes)  # a prefill has no use for some
    return {
        "parameters": read,
        "state": held - read,
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
        "total": held + found.temp_size_in_bytes + found.generated_code_size_in_bytes,
    }
