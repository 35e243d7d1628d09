"""GGUF files as checkpoints: what config.json would say of one, and its tensors by Hugging Face's names."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_specdec.checkpoints.gguf_file import GgufFile, open_gguf, row_view
from jax_specdec.checkpoints.tensor_files import Stored, Views
from jax_specdec.errors import UserError, shown
from jax_specdec.models.hf import config_from_hf, weight_names

Json = dict[str, Any]
ROPE_FREQS = "rope_freqs.weight"
# Of Llama 3.1 to 3.3; a file has the frequencies' divisors that follow from them.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class Architecture(NamedTuple):
    """How the files of one `general.architecture` differ.

    Attributes:
      permuted: whether the halves of each rotated head are interleaved, as llama.cpp rotates Llama's.
      more: further keys of config.json.
    """

    permuted: bool = False
    more: Callable[[GgufFile], Json] = lambda file: {}


def _llama(file: GgufFile) -> Json:
    return {"attention_bias": "blk.0.attn_output.bias" in file.tensors}


ARCHITECTURES = {
    "llama": Architecture(permuted=True, more=_llama),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
}


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file and not of a folder."""
    return path.suffix == ".gguf" and path.is_file()


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
    permuted = ARCHITECTURES[_architecture(file)].permuted
    views, left = Views(), dict.fromkeys(file.tensors)
    for name in weight_names(config):
        there = names.get_name(name, (".weight", ".bias"))
        if there not in left:
            continue
        del left[there]
        order = None
        for part, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
            if permuted and f".{part}." in name:
                order = _halves(heads, config.head_dim)
        views[name] = row_view(file, there, order)
    views.update((name, row_view(file, name)) for name in left if name != ROPE_FREQS)
    return views.stored()


def _halves(heads: int, dim: int) -> np.ndarray:
    """Where each row of a projection lies in a file in which pairs of rotated rows are neighbours."""
    return np.arange(heads * dim).reshape(heads, dim // 2, 2).swapaxes(1, 2).ravel()


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
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} lacks token_embd.weight: it holds no language model.")

    if file.metadata.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{file.path} is one of several files of a model, which are not read: join them with `llama-gguf-split "
            "--merge`."
        )

    def value(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{kind}.{key}", default)

    for key, what in (
        ("expert_count", "a mixture of experts"),
        ("attention.sliding_window", "a window"),
    ):
        if value(key):
            raise UserError(
                f"{file.path} has {what} ({kind}.{key}), which is not supported in GGUF."
            )
    heads, hidden = (
        _whole(file, value, "attention.head_count"),
        _whole(file, value, "embedding_length"),
    )
    head_dim = _whole(file, value, "attention.key_length", hidden // heads)
    if value("attention.value_length", head_dim) != head_dim:
        raise UserError(
            f"{file.path} has values of another size than its keys, which is not supported."
        )
    rotated = _whole(file, value, "rope.dimension_count", head_dim)
    return {
        "model_type": kind,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": _whole(file, value, "feed_forward_length"),
        "num_hidden_layers": _whole(file, value, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _whole(file, value, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _whole(file, value, "context_length"),
        "rms_norm_eps": _short(file, value("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(file, value, head_dim),
        "partial_rotary_factor": None if rotated == head_dim else rotated / head_dim,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(file.metadata),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
        **ARCHITECTURES[kind].more(file),
    }


def _ends(metadata: Json) -> list[Any] | None:
    """The ends of a text, a turn and a message, where a file has them apart."""
    ends: list[Any] = []
    for name in ("eos", "eot", "eom"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and index not in ends:
            ends.append(index)
    return ends or None


def _whole(file: GgufFile, value: Callable[..., Any], key: str, default: Any = None) -> int:
    """A size; files whose layers differ list it for each."""
    found = value(key, default)
    if isinstance(found, list) and len(set(map(str, found))) == 1:
        found = found[0]
    if type(found) is not int or not 0 < found < 2**31:
        raise UserError(
            f"{file.path} must give {key} as one positive whole number, not {shown(found)}."
        )
    return found


def _short(file: GgufFile, value: Any) -> float:
    """A float32 as the shortest number that rounds to it, as config.json has it."""
    if type(value) is not float or not math.isfinite(value):
        raise UserError(
            f"{file.path} must give layer_norm_rms_epsilon as a number, not {shown(value)}."
        )
    return float(str(np.float32(value)))


def _rope(file: GgufFile, value: Callable[..., Any], dim: int) -> Json:
    theta = value("rope.freq_base", 10_000.0)
    out: Json = {"rope_theta": _short(file, theta), "rope_type": "default"}
    kind, factor = value("rope.scaling.type", "none"), value("rope.scaling.factor")
    if value("rope.scale_linear", 1.0) != 1.0:  # of older files
        kind, factor = "linear", value("rope.scale_linear")
    if kind != "none":
        out |= {"rope_type": kind, "factor": factor}
        if (original := value("rope.scaling.original_context_length")) is not None:
            out["original_max_position_embeddings"] = original
    if ROPE_FREQS in file.tensors:
        out |= {"rope_type": "llama3", "factor": _llama3_factor(file, theta, dim), **_LLAMA3}
    return out


def _llama3_factor(file: GgufFile, theta: float, dim: int) -> float:
    """The factor whose Llama 3 scaling divides the frequencies by what the file says."""
    if len(file.tensors[ROPE_FREQS].shape) != 1:
        raise UserError(f"{file.path} has a {ROPE_FREQS} that is no vector.")
    found = file.rows(ROPE_FREQS, np.zeros(1, int))[0].astype(np.float64)
    factor = float(found.max())
    length = 2 * np.pi * theta ** (np.arange(0, dim, 2) / dim)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    share = (_LLAMA3["original_max_position_embeddings"] / length - low) / (high - low)
    want = 1 / ((1 - np.clip(share, 0, 1)) / factor + np.clip(share, 0, 1))
    if found.shape != want.shape or not np.allclose(found, want, rtol=1e-4):
        raise UserError(
            f"{file.path} divides its rotary frequencies ({ROPE_FREQS}) otherwise than Llama 3.1 to 3.3, which is not "
            "supported."
        )
    return factor
