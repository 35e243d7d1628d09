"""A target's configuration and tensors, by the names that the decoder knows, whatever else transformers reads."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from jax_specdec.checkpoints.gguf_file import is_gguf
from jax_specdec.checkpoints.gguf_model import open_gguf_tensors, read_config, tensor_types
from jax_specdec.checkpoints.packed import read_packing
from jax_specdec.checkpoints.tensor_files import (
    DTYPES,
    Stored,
    check_tensors,
    open_tensors,
    read_json,
)
from jax_specdec.errors import UserError
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.hf import Json, config_from_hf
from jax_specdec.models.hf_tensors import IGNORED, name_of, weight_names

_ROWS = 1024  # compared at a time


def load_config(folder: str | os.PathLike[str], context: int | None = None) -> ModelConfig:
    """`stored_config` for texts of up to `context` tokens, see `ModelConfig.within`.

    Raises:
      UserError: as `stored_config`, or a longer context than the model's.
    """
    config = stored_config(folder)
    try:
        return config.within(context)
    except ValueError as error:
        raise UserError(f"{folder} cannot be read so: {error}.") from None


def stored_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Reads `config.json`, the end-of-text ids of `generation_config.json`, and whether a head is stored.

    Raises:
      UserError: it is missing, broken or describes something that is not supported.
    """
    folder = Path(folder)
    return settle_head(folder, config_from_hf(*_read_configs(folder)))


def open_target(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """The open tensors of a target, those of quantized files as what they stand for. Nothing is read but headers.

    A model without a head, saved on its own, lacks the first part of its names, such as `model.`; of a tied
    pair one may be stored.

    Raises:
      UserError: as `open_tensors`.
    """
    tensors = _open(folder, config)
    if config.tied_head:
        head = tensors.pop(name_of(config, "head"), None)
        if head is not None:
            tensors.setdefault(name_of(config, "embed"), head)
    return tensors


def _read_configs(folder: Path) -> tuple[Json, Json | None]:
    """What a checkpoint's config.json and generation_config.json say."""
    if is_gguf(folder):
        return read_hf_config(folder), None
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no checkpoint: it has no config.json, and no GGUF file.")
    generation = folder / "generation_config.json"
    return read_hf_config(folder / "config.json"), (
        read_json(generation) if generation.is_file() else None
    )


def read_hf_config(file: Path) -> Json:
    """What a config.json says, or would say of a GGUF file, less a quantization that is undone while tensors are read.

    Raises:
      UserError: it is broken, or names a quantization that is not supported.
    """
    if is_gguf(file):
        return read_config(file)
    hf = read_json(file)
    if read_packing(file) is not None:
        hf.pop("quantization_config", None)
    return hf


def named_dtype(folder: Path) -> str | None:
    """The dtype that config.json names, where it is one that can be computed in."""
    if is_gguf(folder):
        return None
    hf = read_json(folder / "config.json")
    named = hf.get("dtype") if hf.get("dtype") is not None else hf.get("torch_dtype")
    return named if isinstance(named, str) and named in DTYPES.values() else None


def settle_head(folder: Path, config: ModelConfig) -> ModelConfig:
    """`config`, its head not tied if the files hold one that differs from the embedding.

    As in transformers: `tie_word_embeddings` is a wish, and a stored head of other values overrules it.
    """
    if not config.tied_head:
        return config
    try:
        tensors = _open(folder, config)
    except UserError:  # whoever reads the weights says so
        return config
    pair = [tensors.get(name_of(config, name)) for name in ("embed", "head")]
    if pair[0] is None or pair[1] is None or _equal(pair[0], pair[1]):
        return config
    return dataclasses.replace(config, tied_head=False)


def check_target_tensors(folder: Path, tensors: dict[str, Stored], config: ModelConfig) -> None:
    """Raises `UserError` unless the files hold what `config` describes."""
    check_tensors(folder, tensors, weight_names(config))


def stored_dtype(folder: Path, tensors: dict[str, Stored], config: ModelConfig) -> str:
    """The dtype that holds every stored weight exactly: theirs, or float32 where they differ.

    Raises:
      UserError: no embedding, or one of a dtype that is not supported.
    """
    embed = name_of(config, "embed")
    if embed not in tensors:
        raise UserError(f"{folder} lacks {embed}: it holds no {config.family} language model.")
    stored = tensors[embed].view().get_dtype()
    if stored not in DTYPES:
        raise UserError(f"{folder} stores weights as {stored}; {', '.join(DTYPES)} are supported.")
    found = {tensor.view().get_dtype() for tensor in tensors.values()} & DTYPES.keys()
    return DTYPES[stored] if len(found) == 1 else "float32"


def packing_of(folder: Path) -> str | None:
    """How weights are stored, where it is not as they are; for people."""
    if is_gguf(folder):
        return ", ".join(tensor_types(folder))
    packing = read_packing(folder / "config.json")
    return None if packing is None else packing.name


def _open(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    if is_gguf(folder):
        return open_gguf_tensors(folder)
    tensors, packing = open_tensors(folder), read_packing(folder / "config.json")
    return _named(tensors if packing is None else packing.unpack(folder, tensors), config)


def _named(tensors: dict[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    kept = {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(name)}
    embed, head = name_of(config, "embed"), name_of(config, "head")
    prefix, _, rest = embed.partition(".")
    if rest not in kept:
        return kept
    return {
        name if name.startswith(f"{prefix}.") or name == head else f"{prefix}.{name}": tensor
        for name, tensor in kept.items()
    }


def _equal(one: Stored, other: Stored) -> bool:
    a, b = one.view(), other.view()
    if a.get_shape() != b.get_shape():
        return False
    length = a.get_shape()[0]
    for start in range(0, length, _ROWS):
        rows = slice(start, min(start + _ROWS, length))
        x, y = a[rows], b[rows]
        if x.dtype != y.dtype:
            x, y = x.astype(np.float32), y.astype(np.float32)
        if x.tobytes() != y.tobytes():
            return False
    return True
