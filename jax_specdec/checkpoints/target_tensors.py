"""A target's tensors by the names that the decoder knows, whatever transformers also loads them from."""

import dataclasses
from pathlib import Path

import numpy as np

from jax_specdec.checkpoints.tensor_files import DTYPES, Stored, check_tensors, open_tensors
from jax_specdec.errors import UserError
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.hf import IGNORED, weight_names

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 1024  # compared at a time


def open_target(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """The open tensors of a target. Nothing is read but headers.

    A model without a head, saved on its own, lacks the prefix `model.`; of a tied pair one may be stored.

    Raises:
      UserError: as `open_tensors`.
    """
    tensors = _named(open_tensors(folder))
    if config.tied_head:
        head = tensors.pop(HEAD, None)
        if head is not None:
            tensors.setdefault(EMBED, head)
    return tensors


def settle_head(folder: Path, config: ModelConfig) -> ModelConfig:
    """`config`, its head not tied if the files hold one that differs from the embedding.

    As in transformers: `tie_word_embeddings` is a wish, and a stored head of other values overrules it.
    """
    if not config.tied_head:
        return config
    try:
        tensors = _named(open_tensors(folder))
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
