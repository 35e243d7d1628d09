"""GGUF files as checkpoints: what config.json would say of one, and its tensors by Hugging Face's names."""

import functools
import re
from pathlib import Path

import numpy as np

from jax_specdec.checkpoints.gguf_architectures import (
    ARCHITECTURES,
    LONG_ROPE,
    ROPE_FREQS,
    Keys,
    read_common,
)
from jax_specdec.checkpoints.gguf_file import GgufFile, open_gguf, row_view
from jax_specdec.checkpoints.tensor_files import RowView, Stored, Views
from jax_specdec.errors import UserError, shown
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.families import FAMILIES
from jax_specdec.models.hf import Json, config_from_hf
from jax_specdec.models.hf_tensors import Weight, weight_names

_EXPERT = re.compile(r"(?<=\.experts)\.\d+")


def read_config(path: Path) -> Json:
    """The config.json that a file stands for.

    Raises:
      UserError: the file is damaged, or of an architecture that is not read.
    """
    return _config(open_gguf(path))


def tensor_types(path: Path) -> list[str]:
    """The types that a file stores tensors in, the most frequent one first."""
    kinds = [tensor.kind for tensor in open_gguf(path).tensors.values()]
    return sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind))


def open_gguf_tensors(path: Path) -> dict[str, Stored]:
    """The tensors by the names of Hugging Face; what has none keeps the file's. Nothing is read but the header.

    Raises:
      UserError: as `read_config`.
    """
    file = open_gguf(path)
    config = config_from_hf(_config(file))
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[_architecture(file)], config.num_layers)
    views, left = Views(), set(file.tensors)
    for name, weight in weight_names(config).items():
        # Experts' matrices are one tensor there.
        there = names.get_name(_EXPERT.sub("", name), (".weight", ".bias"))
        if there in file.tensors:
            left.discard(there)
            views[name] = _view(file, there, name, weight, config)
    unread = left - {ROPE_FREQS, *LONG_ROPE}
    views.update((name, row_view(file, name)) for name in sorted(unread))
    return views.stored()


def _view(file: GgufFile, there: str, name: str, weight: Weight, config: ModelConfig) -> RowView:
    """A tensor as Hugging Face has it."""
    architecture = ARCHITECTURES[_architecture(file)]
    if weight.expert is not None:
        shape = file.tensors[there].shape
        if len(shape) != 3 or shape[0] != config.num_experts:
            raise UserError(
                f"{file.path} stores {there} in shape {shape}, which is no matrix for each of {config.num_experts} experts."
            )
        return row_view(file, there, expert=weight.expert)
    order = weight.order  # of GPT-NeoX: head by head in Hugging Face alone
    if order is not None:
        order = np.argsort(order)
    for part, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
        if architecture.permuted and f".{part}." in name:
            order = _halves(heads, config.head_dim)
    view = row_view(file, there, order)
    if architecture.shifted and name.endswith("norm.weight"):
        return RowView(view.shape, "F32", lambda start, stop: view[start:stop] - np.float32(1))
    if FAMILIES[config.family].untransposed and weight.path[0] == "layers" and len(view.shape) == 2:
        return _transposed(view)
    return view


def _halves(heads: int, dim: int) -> np.ndarray:
    """Where each row of a projection lies in a file in which pairs of rotated rows are neighbours."""
    return np.arange(heads * dim).reshape(heads, dim // 2, 2).swapaxes(1, 2).ravel()


def _transposed(view: RowView) -> RowView:
    """Its columns as rows; read whole, since it is stored by rows, and kept for the rows that follow."""

    @functools.lru_cache(maxsize=1)
    def whole() -> np.ndarray:
        return np.ascontiguousarray(view[...].T)

    def read(start: int, stop: int) -> np.ndarray:
        part = whole()[start:stop]
        if stop == view.shape[1]:
            whole.cache_clear()
        return part

    return RowView(view.shape[::-1], view.dtype, read)


def _architecture(file: GgufFile) -> str:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(
            f"{file.path} is a GGUF of architecture {shown(name)}, which is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    return name


def _config(file: GgufFile) -> Json:
    kind = _architecture(file)
    architecture, keys = ARCHITECTURES[kind], Keys(file, kind)
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} lacks token_embd.weight: it holds no language model.")
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{file.path} is one of several files of a model, which are not read: join them with `llama-gguf-split "
            "--merge`."
        )
    for key, what, read in (
        ("expert_count", "a mixture of experts", architecture.mixture),
        ("attention.sliding_window", "a window", architecture.windows),
    ):
        if keys.get(key) and not read:
            raise UserError(
                f"{file.path} has {what} ({kind}.{key}), which is not supported in GGUF of this architecture."
            )
    found = {"model_type": architecture.family, **read_common(keys), **architecture.more(keys)}
    own = FAMILIES[found["model_type"]].keys
    return {own.get(key, key): value for key, value in found.items()}
