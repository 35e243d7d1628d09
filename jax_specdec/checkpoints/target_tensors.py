"""A target's tensors by the names that the decoder knows, whatever transformers also loads them from."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jax_specdec.checkpoints.gguf_model import (
    is_gguf,
    open_gguf_tensors,
    read_config,
    tensor_types,
)
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
from jax_specdec.models.hf import IGNORED, weight_names

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 1024  # compared at a time


def open_target(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """The open tensors of a target, those of quantized files as what they stand for. Nothing is read but headers.

    A model without a head, saved on its own, lacks the prefix `model.`; of a tied pair one may be stored.

    Raises:
      UserError: as `open_tensors`.
    """
    tensors = _open(folder)
    if config.tied_head:
        head = tensors.pop(HEAD, None)
        if head is not None:
            tensors.setdefault(EMBED, head)
    return tensors


def read_configs(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What a checkpoint's config.json and generation_config.json say, or would say of a GGUF file.

    Raises:
      UserError: there is no config.json, one that is broken, or a quantization that is not supported.
    """
    if is_gguf(folder):
        return read_config(folder), None
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no checkpoint: it has no config.json.")
    hf, generation = read_json(folder / "config.json"), folder / "generation_config.json"
    if read_packing(folder) is not None:  # what it says is undone while tensors are read
        hf.pop("quantization_config", None)
    return hf, read_json(generation) if generation.is_file() else None


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
        tensors = _open(folder)
    except UserError:  # whoever reads the weights says so
        return config
    if EMBED not in tensors or HEAD not in tensors or _equal(tensors[EMBED], tensors[HEAD]):
        return config
    return dataclasses.replace(config, tied_head=False)


def check_target_tensors(folder: Path, tensors: dict[str, Stored], config: ModelConfig) -> None:
    """Raises `UserError` unless the files hold what `config` describes."""
    check_tensors(folder, tensors, weight_names(config))


def stored_dtype(folder: Path, tensors: dict[str, Stored]) -> str:
    """The dtype that holds every stored weight exactly: theirs, or float32 where they differ.

    Raises:
      UserError: no embedding, or one of a dtype that is not supported.
    """
    if EMBED not in tensors:
        raise UserError(f"{folder} lacks {EMBED}: it holds no Llama-family language model.")
    stored = tensors[EMBED].view().get_dtype()
    if stored not in DTYPES:
        raise UserError(f"{folder} stores weights as {stored}; {', '.join(DTYPES)} are supported.")
    found = {tensor.view().get_dtype() for tensor in tensors.values()} & DTYPES.keys()
    return DTYPES[stored] if len(found) == 1 else "float32"


def packing_of(folder: Path) -> str | None:
    """How weights are stored, where it is not as they are; for people."""
    if is_gguf(folder):
        return ", ".join(tensor_types(folder))
    packing = read_packing(folder)
    return None if packing is None else packing.name


def _open(folder: Path) -> dict[str, Stored]:
    if is_gguf(folder):
        return open_gguf_tensors(folder)
    tensors, packing = open_tensors(folder), read_packing(folder)
    return _named(tensors if packing is None else packing.unpack(folder, tensors))


def _named(tensors: dict[str, Stored]) -> dict[str, Stored]:
    kept = {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(name)}
    if "embed_tokens.weight" not in kept:
        return kept
    return {
        name if name.startswith(("model.", "lm_head.")) else f"model.{name}": tensor
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
