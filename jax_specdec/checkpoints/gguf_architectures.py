"""What GGUF's metadata says of a model, as keys of config.json: common ones, and each architecture's own."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_specdec.checkpoints.gguf_file import GgufFile
from jax_specdec.errors import UserError, shown
from jax_specdec.models.hf import Json

ROPE_FREQS = "rope_freqs.weight"
LONG_ROPE = ("rope_factors_short.weight", "rope_factors_long.weight")
# Of Llama 3.1 to 3.3; a file has the frequencies' divisors that follow from them.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Of `rope.scaling.`: what is read with these values alone, for which Hugging Face has no names.
_USUAL = {
    "attn_factor": (1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_ext_factor": (1.0, -1.0),  # -1: what the kind says
    "yarn_log_multiplier": (0.0,),
}


class Keys:
    """The values under a file's `general.architecture`, checked.

    Raises:
      UserError: a value of another kind than it must be.
    """

    def __init__(self, file: GgufFile, architecture: str):
        self.file, self._architecture = file, architecture

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self._architecture}.{key}", default)

    def whole(self, key: str, default: int | None = None) -> int:
        """A size; files whose layers differ list it for each."""
        found = self.get(key, default)
        if isinstance(found, list) and len(set(map(str, found))) == 1:
            found = found[0]
        if type(found) is not int or not 0 < found < 2**31:
            raise self._wrong(key, "one positive whole number", found)
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 as the shortest number that rounds to it, as config.json has it."""
        found = self.get(key, default)
        if type(found) is not float or not math.isfinite(found):
            raise self._wrong(key, "a number", found)
        return float(str(np.float32(found)))

    def vector(self, tensor: str) -> list[float]:
        """A tensor of one axis, numbers as `number` gives them."""
        if len(self.file.tensors[tensor].shape) != 1:
            raise UserError(f"{self.file.path} has a {tensor} that is no vector.")
        found = self.file.rows(tensor, np.zeros(1, int))[0].astype(np.float32)
        return [float(str(x)) for x in found]

    def _wrong(self, key: str, what: str, found: Any) -> UserError:
        name = f"{self._architecture}.{key}"
        if found is None:
            return UserError(f"{self.file.path} lacks {name}, {what}.")
        return UserError(f"{self.file.path} must give {name} as {what}, not {shown(found)}.")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How the files of one `general.architecture` become a config.json.

    Attributes:
      family: the `model_type`, unless `more` says another.
      more: further keys of config.json.
      permuted: the halves of each rotated head are interleaved, as llama.cpp rotates Llama's.
      shifted: norms are stored with the 1 that the model adds to them.
      mixture, windows: whether `more` reads experts and sliding windows; otherwise they are refused.
    """

    family: str
    more: Callable[[Keys], Json] = lambda keys: {}
    permuted: bool = False
    shifted: bool = False
    mixture: bool = False
    windows: bool = False


def _biases(keys: Keys) -> Json:
    tensors = keys.file.tensors
    return {
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
    }


def _llama(keys: Keys) -> Json:
    """Llama, Mistral, and Mixtral, whose files differ by their experts alone."""
    if not keys.get("expert_count"):
        return _biases(keys)
    return {
        "model_type": "mixtral",
        "num_local_experts": keys.whole("expert_count"),
        "num_experts_per_tok": keys.whole("expert_used_count"),
    }


def _gemma2(keys: Keys) -> Json:
    return {
        **_gemma_layers(keys, 4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys) -> Json:
    local = {"rope_theta": keys.number("rope.freq_base_swa", 10_000.0), "rope_type": "default"}
    capped = keys.get("final_logit_softcapping") is not None
    return {
        **_gemma_layers(keys, None),
        "final_logit_softcapping": keys.number("final_logit_softcapping") if capped else None,
        "rope_parameters": {"full_attention": read_rope(keys), "sliding_attention": local},
    }


def _gemma_layers(keys: Keys, usual_window: int | None) -> Json:
    """Windows, and the scale of scores, which files leave out: of the largest models it is another one."""
    share = keys.whole("embedding_length") // keys.whole("attention.head_count")
    largest = keys.whole("block_count") in (46, 62)
    scale = share if largest else keys.whole("attention.key_length", share)
    if not keys.get("attention.sliding_window", usual_window):
        return {"query_pre_attn_scalar": scale, "sliding_window_pattern": 1}  # no layer has one
    out: Json = {
        "query_pre_attn_scalar": scale,
        "sliding_window": keys.whole("attention.sliding_window", usual_window),
    }
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        kinds = ("full_attention", "sliding_attention")
        out["layer_types"] = [kinds[bool(slides)] for slides in pattern]
    elif pattern is not None:
        out["sliding_window_pattern"] = keys.whole("attention.sliding_window_pattern")
    return out


def _phi3(keys: Keys) -> Json:
    original = keys.get("rope.scaling.original_context_length")
    return {
        "sliding_window": keys.get("attention.sliding_window") or None,
        **({} if original is None else {"original_max_position_embeddings": original}),
    }


def _granite(keys: Keys) -> Json:
    names = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    return {**_biases(keys), **{name: keys.number(key, 1.0) for name, key in names.items()}}


def _neox(keys: Keys) -> Json:
    return {
        "attention_bias": "blk.0.attn_qkv.bias" in keys.file.tensors,
        "use_parallel_residual": bool(keys.get("use_parallel_residual", True)),
    }


def _qwen3_moe(keys: Keys) -> Json:
    return {
        "num_experts": keys.whole("expert_count"),
        "num_experts_per_tok": keys.whole("expert_used_count"),
        "moe_intermediate_size": keys.whole("expert_feed_forward_length"),
        "norm_topk_prob": True,  # files do not say it, and llama.cpp does it
    }


ARCHITECTURES = {
    "llama": Architecture("llama", _llama, permuted=True, mixture=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe, mixture=True),
    "gemma": Architecture("gemma", shifted=True),
    "gemma2": Architecture("gemma2", _gemma2, shifted=True, windows=True),
    "gemma3": Architecture("gemma3_text", _gemma3, shifted=True, windows=True),
    "phi3": Architecture("phi3", _phi3, windows=True),
    "olmo2": Architecture("olmo2"),
    "smollm3": Architecture("smollm3", _biases, permuted=True),
    "granite": Architecture("granite", _granite, permuted=True),
    "gptneox": Architecture("gpt_neox", _neox),
    "gpt2": Architecture("gpt2"),
}


def read_common(keys: Keys) -> Json:
    """What files of every architecture say alike."""
    file, metadata = keys.file, keys.file.metadata
    heads, hidden = keys.whole("attention.head_count"), keys.whole("embedding_length")
    head_dim = keys.whole("attention.key_length", hidden // heads)
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise UserError(
            f"{file.path} has values of another size than its keys, which is not supported."
        )
    rotated = keys.whole("rope.dimension_count", head_dim)
    rms = keys.get("attention.layer_norm_rms_epsilon") is not None
    return {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.number(f"attention.layer_norm_{'rms_' if rms else ''}epsilon"),
        "rope_parameters": read_rope(keys),
        "partial_rotary_factor": None if rotated == head_dim else rotated / head_dim,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _ends(metadata: Json) -> list[Any] | None:
    """The ends of a text, a turn and a message, where a file has them apart."""
    ends: list[Any] = []
    for name in ("eos", "eot", "eom"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and index not in ends:
            ends.append(index)
    return ends or None


def read_rope(keys: Keys) -> Json:
    """The rotary embedding, as `rope_parameters` of config.json."""
    tensors = keys.file.tensors
    out: Json = {"rope_theta": keys.number("rope.freq_base", 10_000.0), "rope_type": "default"}
    kind, factor = keys.get("rope.scaling.type", "none"), keys.get("rope.scaling.factor")
    if keys.get("rope.scale_linear", 1.0) != 1.0:  # of older files
        kind, factor = "linear", keys.get("rope.scale_linear")
    original = keys.get("rope.scaling.original_context_length")
    if kind != "none":
        out |= {"rope_type": kind, "factor": factor}
        if original is not None:
            out["original_max_position_embeddings"] = original
    if all(name in tensors for name in LONG_ROPE):
        short, long = map(keys.vector, LONG_ROPE)
        out |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        if keys.get("rope.scaling.attn_factor") is not None:  # of cosines and sines
            out["attention_factor"] = keys.number("rope.scaling.attn_factor")
    if out["rope_type"] == "yarn":
        for name in ("beta_fast", "beta_slow"):
            if keys.get(f"rope.scaling.yarn_{name}") is not None:
                out[name] = keys.number(f"rope.scaling.yarn_{name}")
    if ROPE_FREQS in tensors:
        out |= {"rope_type": "llama3", "factor": _llama3_factor(keys), **_LLAMA3}
    for name, usual in _USUAL.items():
        found = keys.get(f"rope.scaling.{name}", usual[0])
        if found not in usual and "attention_factor" not in out:
            raise UserError(
                f"{keys.file.path} has rope.scaling.{name} {shown(found)}, which is not supported."
            )
    return out


def _llama3_factor(keys: Keys) -> float:
    """The factor whose Llama 3 scaling divides the frequencies by what the file says."""
    found, theta = keys.vector(ROPE_FREQS), keys.number("rope.freq_base", 10_000.0)
    dim, factor = 2 * len(found), max(found)
    length = 2 * np.pi * theta ** (np.arange(0, dim, 2) / dim)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    share = (_LLAMA3["original_max_position_embeddings"] / length - low) / (high - low)
    want = 1 / ((1 - np.clip(share, 0, 1)) / factor + np.clip(share, 0, 1))
    if not np.allclose(found, want, rtol=1e-4):
        raise UserError(
            f"{keys.file.path} divides its rotary frequencies ({ROPE_FREQS}) otherwise than Llama 3.1 to 3.3, which "
            "is not supported."
        )
    return factor
