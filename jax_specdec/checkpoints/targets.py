"""Checkpoints in Hugging Face format, and GGUF files: load, save, convert, and what they take in memory.

Tensors are read in pieces into the array that they end in, so loading takes little more memory than
the parameters. Only safetensors are read: no pickles, and no code from a checkpoint.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_specdec._types import Array, Params
from jax_specdec.checkpoints import layouts, sharded
from jax_specdec.checkpoints.dtypes import check_dtype
from jax_specdec.checkpoints.generation_config import (
    GenerationDefaults,
    read_generation,
    write_generation,
)
from jax_specdec.checkpoints.gguf_file import is_gguf
from jax_specdec.checkpoints.hub import find_checkpoint
from jax_specdec.checkpoints.int8 import PARTS, check_parts
from jax_specdec.checkpoints.memory import (
    available_memory,
    bytes_per_device,
    check_fits,
    host_memory,
    memory_plan,
)
from jax_specdec.checkpoints.target_tensors import (
    check_target_tensors,
    load_config,
    named_dtype,
    open_target,
    settle_head,
    stored_config,
    stored_dtype,
)
from jax_specdec.checkpoints.tensor_files import (
    MAX_SHARD_BYTES,
    Stored,
    aligned,
    new_folder,
    read_weight,
    write_json,
    write_tensors,
)
from jax_specdec.checkpoints.tokenizer_files import (
    TOKENIZER_FILES,
    has_tokenizer,
    load_tokenizer,
)
from jax_specdec.core.sharding import Sharding, ShardingRules
from jax_specdec.display import model_line
from jax_specdec.errors import UserError
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.decoder import Decoder
from jax_specdec.models.hf import config_to_hf
from jax_specdec.models.hf_tensors import Weight, weight_names
from jax_specdec.models.parameters import shape_at
from jax_specdec.models.quantized import quantize
from jax_specdec.models.tensor_parallel import fused_order
from pallas_kernels import tuning

LayerLoop = Literal["unroll", "scan"]
Place = Callable[[tuple[str | int, ...], np.ndarray], Array]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Target:
    """A loaded model.

    Attributes:
      tokenizer: of transformers, None where none was asked for. path: its folder or GGUF file.
      generation: what the checkpoint asks of decoding; only its end-of-text ids, in `config`, are applied.
    """

    decoder: Decoder
    params: Params
    tokenizer: Any
    path: Path
    generation: GenerationDefaults = dataclasses.field(default_factory=GenerationDefaults)

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    @property
    def sharding(self) -> Sharding | None:
        """Where it lies on a mesh, None on one device."""
        return self.decoder.sharding

    @property
    def int8(self) -> tuple[str, ...]:
        """The parts that are in int8."""
        there = (self.decoder.quantized, self.decoder.kv_scales is not None)
        return tuple(part for part, rounded in zip(PARTS, there, strict=True) if rounded)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def __repr__(self) -> str:
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        return f"Target({self.path.name or '.'}: {model_line(self.decoder, held)})"


def load_target(
    source: str | os.PathLike[str],
    *,
    dtype: Any = None,
    layer_loop: LayerLoop | None = None,
    tokenizer: bool = True,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    int8: Collection[str] = (),
    context: int | None = None,
) -> Target:
    """Loads a model and its tokenizer.

    Args:
      source: a folder, a GGUF file or a folder with one, or a model id of the Hugging Face hub.
      dtype: of parameters and computation, float32, bfloat16 or float16; None is the checkpoint's on
        accelerators, see `default_dtype`, and float32 on CPU.
      layer_loop: see `Decoder`; None is `unroll`, the faster one for decoding.
      tokenizer: False leaves it out.
      mesh: divides the model, by default over its axis `tensor`, and batches over `data`. Each process
        reads the parts of its own devices.
      rules: what is divided over which axis of the mesh.
      int8: `weights` rounds the matrices that are multiplied, one after the other while they are read
        (`models.quantized`); `cache` the keys and values of decoding, whose scales are measured on a text that
        the target writes (`checkpoints.kv_scales`).
      context: the longest text in tokens, None for all that the model takes. A model with two sets of rotary
        factors (Phi with `longrope`) is read with the short ones, up to their context, unless more is asked for.

    Raises:
      UserError: nothing there, or something that is not supported or does not fit together.
    """
    sharding = make_sharding(mesh, rules)
    check_parts(int8)
    dtype = None if dtype is None else check_dtype(dtype, "The model cannot be loaded so: dtype")
    folder = find_checkpoint(source)
    config, generation = load_config(folder, context), read_generation(folder)
    tensors = open_target(folder, config)
    if dtype is None:
        dtype = default_dtype(folder, tensors)
    decoder = _make_decoder(config, dtype, layer_loop or _faster_loop(config), sharding)
    decoder = dataclasses.replace(decoder, quantized="weights" in int8)
    loaded = load_tokenizer(folder) if tokenizer else None  # first, because it is quick to fail
    plan = memory_plan(config, decoder.dtype, batch=0, slots=0)
    if sharding is not None or decoder.quantized:
        plan = dataclasses.replace(plan, parameters=bytes_per_device(decoder))
    check_fits(plan, available_memory())
    params = _read_params(folder, tensors, decoder, None, config)
    if config.tied_head and tuning.device().platform == "cpu" and decoder.dtype != jnp.bfloat16:
        # XLA's CPU products of a few rows take up to ten times as long with a transposed matrix, in bfloat16 half as long.
        params["head"] = params["embed"].T
        params = quantize(params) if decoder.quantized else params
    target = Target(decoder, params, loaded, folder, generation)
    if "cache" not in int8:
        return target
    from jax_specdec.checkpoints.kv_scales import measure_scales

    scales = measure_scales(target)
    return dataclasses.replace(target, decoder=dataclasses.replace(decoder, kv_scales=scales))


def make_sharding(mesh: Mesh | None, rules: ShardingRules | None) -> Sharding | None:
    """Rules on a mesh; None without a mesh.

    Raises:
      UserError: rules without a mesh, or that do not fit it.
    """
    if mesh is None:
        if rules is not None:
            raise UserError("Sharding rules need a mesh.")
        return None
    return Sharding(mesh, ShardingRules() if rules is None else rules)


def inspect_checkpoint(folder: str | os.PathLike[str]) -> tuple[ModelConfig, str]:
    """The configuration and stored dtype of a checkpoint, checked against its headers.

    Raises:
      UserError: as `load_target`, except for what only the values show.
    """
    folder = Path(folder)
    config = load_config(folder)
    tensors = open_target(folder, config)
    check_target_tensors(folder, tensors, config)
    return config, stored_dtype(folder, tensors, config)


def default_dtype(folder: Path, tensors: dict[str, Stored] | None = None) -> str:
    """The dtype that a checkpoint is loaded in unless told otherwise.

    float32 on CPU. Elsewhere what its config.json names as `dtype`, or `torch_dtype` in older ones, as in
    transformers 5; where that is neither float32, bfloat16 nor float16, what its weights are stored in.

    Args:
      tensors: as `open_target` returns them, opened here where they are None.
    """
    if tuning.device().platform == "cpu":
        return "float32"
    named = named_dtype(folder)
    if named is not None:
        return named
    config = load_config(folder)
    return stored_dtype(folder, tensors or open_target(folder, config), config)


def load_params(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    dtype: Any = None,
    layer_loop: LayerLoop = "unroll",
    *,
    place: Place | None = None,
) -> Params:
    """Loads parameters alone.

    Args:
      dtype: None is the checkpoint's.
      place: puts one array of the tree on its devices, given its path (`("layers", 3, "qkv")`, or
        `("layers", "qkv")` where layers are scanned) and its value; default `layouts.put`.

    Raises:
      UserError: keys or shapes differ from what `config` needs; all of them are listed.
    """
    folder = Path(folder)
    if settle_head(folder, config) != config:
        raise UserError(f"{folder} holds a head of its own, and the given configuration ties it.")
    tensors = open_target(folder, config)
    decoder = _make_decoder(config, dtype or stored_dtype(folder, tensors, config), layer_loop)
    return _read_params(folder, tensors, decoder, place)


def save_pretrained(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    dtype: Any,
    tokenizer: Any = None,
    generation: GenerationDefaults | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    load_dtype: Any = None,
) -> None:
    """Writes a folder that transformers loads.

    A folder that exists keeps its other files; its weights are replaced. Everything is written
    beside it first, so that a failure leaves what was there.

    Args:
      params: in either layer layout. dtype: of the file.
      tokenizer: a transformers tokenizer, or a folder whose tokenizer files are copied as they are.
      generation: written whole to `generation_config.json`, such as `Target.generation`.
      max_shard_bytes: larger checkpoints are split, with an index.
      load_dtype: what config.json tells readers to compute in; default `dtype`.

    Raises:
      UserError: the family cannot express `config`, or another dtype than float32, bfloat16 and float16.
      RunError: the disk is full or read-only.
    """
    dtype = jnp.dtype(check_dtype(dtype, of_files=True))
    hf = config_to_hf(config, dtype if load_dtype is None else jnp.dtype(load_dtype))
    from transformers import __version__

    version = {"transformers_version": __version__}
    with new_folder(Path(folder), stale=() if tokenizer is None else TOKENIZER_FILES) as new:
        write_json(new / "config.json", {**hf, **version})
        written = {**version, **write_generation(config, generation)}
        write_json(new / "generation_config.json", written)
        write_tensors(new, weight_names(config), params, dtype, max_shard_bytes)
        if isinstance(tokenizer, (str, os.PathLike)):
            for name in TOKENIZER_FILES:
                if (Path(tokenizer) / name).is_file():
                    shutil.copyfile(Path(tokenizer) / name, new / name)
        elif tokenizer is not None:
            tokenizer.save_pretrained(str(new))


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Loads a checkpoint into host memory and writes it again, in `dtype` (None: as it is) and new shards.

    Of quantized weights `as it is` is float32, which holds them exactly.

    Raises:
      UserError: as `load_target`. RunError: as `save_pretrained`.
    """
    dtype = None if dtype is None else check_dtype(dtype, of_files=True)
    folder = find_checkpoint(source)
    config, generation = stored_config(folder), read_generation(folder)
    tensors = open_target(folder, config)
    stored = dtype or stored_dtype(folder, tensors, config)
    decoder = _make_decoder(config, stored, "unroll")
    check_fits(memory_plan(config, decoder.dtype, batch=0, slots=0), host_memory())
    params = _read_params(folder, tensors, decoder, lambda path, value: value)
    tokenizer: Any = folder
    if is_gguf(folder):
        tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    save_pretrained(
        out,
        config,
        params,
        dtype=decoder.dtype,
        tokenizer=tokenizer,
        generation=generation,
        max_shard_bytes=max_shard_bytes,
        load_dtype=dtype or named_dtype(folder),
    )


def _faster_loop(config: ModelConfig) -> LayerLoop:
    return "scan" if tuning.device().platform == "tpu" and config.uniform else "unroll"


def _make_decoder(
    config: ModelConfig, dtype: Any, layer_loop: LayerLoop, sharding: Sharding | None = None
) -> Decoder:
    if layer_loop not in ("unroll", "scan"):
        raise UserError(f"layer_loop is unroll or scan, not {layer_loop!r}.")
    try:
        stacked = tuning.device().platform != "cpu"
        return Decoder(config, dtype, layer_loop, stacked_cache=stacked, sharding=sharding)
    except (TypeError, ValueError) as error:
        raise UserError(f"The model cannot be loaded so: {error}.") from error


def _read_params(
    folder: Path,
    tensors: dict[str, Stored],
    decoder: Decoder,
    place: Callable[[tuple[str | int, ...], np.ndarray], Any] | None,
    config: ModelConfig | None = None,
) -> Params:
    """`config` is the checkpoint's, where that of the decoder is divided over a mesh."""
    config = config or decoder.config
    sharding = decoder.sharding
    axes = dataclasses.replace(decoder, quantized=False).axes()[0]
    check_target_tensors(folder, tensors, config)
    place = place or layouts.put
    scan = decoder.layer_loop == "scan"

    def kept(path: tuple[Any, ...], value: Any) -> Any:
        return quantize({path[-1]: value})[path[-1]] if decoder.quantized else value

    leaves: dict[tuple, dict[str, Weight]] = {}  # our arrays, and the tensors that each is made of
    for name, weight in weight_names(config).items():
        path = ("layers", weight.path[2]) if scan and len(weight.path) == 3 else weight.path
        leaves.setdefault(path, {})[name] = weight

    params: Params = {"layers": {} if scan else tuple({} for _ in range(config.num_layers))}
    for path, parts in leaves.items():
        shape = shape_at(config, path)
        stacked = scan and path[0] == "layers"
        parent: Any = params
        for key in path[:-1]:
            parent = parent[key]
        if sharding is not None:
            names: Any = axes
            for key in path:
                names = names[key]
            order = fused_order(str(path[-1]), config, sharding)
            whole = shape if order is None else (*shape[:-1], len(order))
            whole = (config.num_layers, *whole) if stacked else whole
            read = sharded.reader(parts, tensors, order)
            where = sharding.of(*names)
            value = sharded.place(path, whole, decoder.dtype, where, read)
            parent[path[-1]] = kept(path, value)
            continue
        host = aligned((config.num_layers, *shape) if stacked else shape, decoder.dtype)
        for name, weight in parts.items():
            read_weight(host, weight, tensors[name], stacked)
        # Transfers run ahead of us otherwise, and each holds its host buffer.
        parent[path[-1]] = kept(path, jax.block_until_ready(place(path, host)))
    return params
