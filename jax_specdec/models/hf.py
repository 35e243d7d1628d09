"""Hugging Face's `config.json`, in both directions, by the table of `families`."""

import dataclasses
import warnings
from typing import Any

from jax_specdec.errors import UserError, shown_value
from jax_specdec.models import hf_read
from jax_specdec.models.config import MAX_LAYERS, ModelConfig
from jax_specdec.models.families import FAMILIES
from jax_specdec.models.hf_read import Json, size
from jax_specdec.models.hf_rope import read_ropes, write_ropes
from jax_specdec.models.hf_tensors import IGNORED, Weight, weight_names

__all__ = [
    "FAMILIES",
    "IGNORED",
    "Json",
    "Weight",
    "config_from_hf",
    "config_to_hf",
    "token_ids",
    "weight_names",
]


# The name that transformers has for each activation.
_ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


def config_from_hf(hf: Json, generation: Json | None = None) -> ModelConfig:
    """Reads a `config.json`.

    Args:
      hf: the parsed `config.json`, as transformers 5 or any older version wrote it.
      generation: the parsed `generation_config.json`, whose `eos_token_id` wins where it has one;
        that of `config.json` ends a text otherwise.

    Raises:
      UserError: the architecture, or something that changes its arithmetic, is not supported.
    """
    name = hf.get("model_type")
    if name == "mistral" and "layer_types" in hf:  # transformers reads it as this, too
        name = "ministral"
    if name is None:
        raise UserError("config.json does not say what model it is of (model_type).")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"Models of type {name!r:.80} are not supported; supported are {', '.join(FAMILIES)}."
        )
    family = FAMILIES[name]
    common = {key: hf[own] for key, own in family.keys.items() if own in hf}
    others = {key: value for key, value in hf.items() if key not in family.keys}
    hf = {**family.defaults, **others, **common}
    _refuse_quantized(hf)
    if family.mlp_ratio and hf.get("intermediate_size") is None:
        hf["intermediate_size"] = family.mlp_ratio * size(hf, "hidden_size")
    sizes = {
        field: size(hf, key)
        for field, key in {
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "mlp_size": "intermediate_size",
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "context": "max_position_embeddings",
        }.items()
    }
    if sizes["num_layers"] > MAX_LAYERS:
        raise UserError(
            f"config.json gives num_hidden_layers as {sizes['num_layers']}, above {MAX_LAYERS}."
        )
    heads, hidden = sizes["num_heads"], sizes["hidden_size"]
    if hf.get("head_dim") is None and hidden % heads:
        raise UserError(
            f"config.json has no head_dim, and {heads} heads do not divide hidden_size {hidden}."
        )
    head_dim = size(hf, "head_dim") if hf.get("head_dim") is not None else hidden // heads
    kv_heads = hf.get("num_key_value_heads")
    vocab = sizes["vocab_size"]
    ends = _ends(generation or {}, "generation_config.json", vocab)
    ends = ends or _ends(hf, "config.json", vocab)
    try:
        fields = {
            **sizes,
            "num_kv_heads": heads if kv_heads is None else size(hf, "num_key_value_heads"),
            "head_dim": head_dim,
            "family": name,
            "norm_eps": hf_read.number({"rms_norm_eps": 1e-6, **hf}, "rms_norm_eps"),
            "tied_head": bool(hf.get("tie_word_embeddings", False)),
            "activation": hf_read.activation(hf),
            "bos_id": hf_read.token_id(hf, "bos_token_id"),
            "eos_ids": ends,
            "pad_id": hf_read.token_id(hf, "pad_token_id"),
            **({} if "rope" in family.fields else read_ropes(hf, name, family.partial)),
            **family.fields,
            **family.read(hf),
        }
        rope = fields["rope"]
        if (
            rope is not None and rope.kind == "dynamic"
        ):  # made to be read beyond what is given there
            fields["context"] = int(rope.factor * rope.original_context)
        return ModelConfig(**fields)
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError) as error:  # a value of the wrong type
        raise UserError(f"config.json does not describe a model: {error!s:.200}.") from error


def config_to_hf(config: ModelConfig, dtype: Any) -> Json:
    """Writes a `config.json` as transformers 5 does; `config_from_hf` gives `config` back.

    Raises:
      UserError: the family cannot express this configuration.
    """
    if config.family not in FAMILIES:
        raise UserError(
            f"Models of type {config.family!r} cannot be written; there are {', '.join(FAMILIES)}."
        )
    family, rope = FAMILIES[config.family], config.rope
    dynamic = rope is not None and rope.kind == "dynamic"
    longest = config.context if rope is None or not dynamic else rope.original_context
    hf = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "dtype": str(dtype.name if hasattr(dtype, "name") else dtype),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": _ACTIVATIONS[config.activation],
        "max_position_embeddings": longest,
        "rms_norm_eps": config.norm_eps,
        **write_ropes(config),
        "tie_word_embeddings": config.tied_head,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **token_ids(config),
        **family.write(config),
    }
    hf = {family.keys.get(key, key): value for key, value in hf.items()}
    back = config_from_hf(hf)
    if back != config:
        fields = [f.name for f in dataclasses.fields(config)]
        lost = [f for f in fields if getattr(back, f) != getattr(config, f)]
        raise UserError(
            f"A {config.family} config.json cannot express this model's {' and '.join(lost)}."
        )
    return hf


def token_ids(config: ModelConfig) -> Json:
    """The special ids, as `config.json` and `generation_config.json` both spell them."""
    eos = config.eos_ids
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": config.pad_id,
    }


def _ends(hf: Json, file: str, vocab_size: int) -> tuple[int, ...]:
    """End-of-text ids. Those outside of the vocabulary, which no text can come to, are left out with a warning."""
    ids = hf_read.token_ids(hf, file, "eos_token_id") or ()
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        warnings.warn(
            f"The end-of-text ids {shown_value(outside)} of {file} are outside of the vocabulary of "
            f"{vocab_size} and left out.",
            stacklevel=2,
        )
    return tuple(i for i in ids if i not in outside)


def _refuse_quantized(hf: Json) -> None:
    if hf.get("quantization_config") is not None:
        how = hf["quantization_config"]
        method = how.get("quant_method", "an unnamed method") if isinstance(how, dict) else how
        raise UserError(
            f"This checkpoint is quantized ({method!s:.80}), which is not supported; use the original."
        )
