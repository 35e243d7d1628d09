"""Hugging Face's `config.json` and tensor names, in both directions.

A further family is one entry in `FAMILIES`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jax_specdec.errors import UserError
from jax_specdec.models.config import MAX_LAYERS, ModelConfig
from jax_specdec.models.hf_rope import read_rope, write_rope

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` differs from the keys that all share.

    Attributes:
      architecture: the class that transformers loads it with.
      read: `config.json` -> the fields of `ModelConfig` that only this family sets.
      write: the inverse, `ModelConfig` -> keys of `config.json`.
      defaults: what transformers assumes where an optional key is left out.
    """

    architecture: str
    read: Callable[[Json], Json]
    write: Callable[[ModelConfig], Json]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _read_llama(hf: Json) -> Json:
    bias = bool(hf.get("attention_bias"))
    return {"qkv_bias": bias, "out_bias": bias}


def _write_llama(c: ModelConfig) -> Json:
    return {"attention_bias": c.qkv_bias, "mlp_bias": False}


def _read_mistral(hf: Json) -> Json:
    return {"windows": (_window(hf),) * hf["num_hidden_layers"]}


def _write_mistral(c: ModelConfig) -> Json:
    return {"sliding_window": c.windows[0]}


def _read_ministral(hf: Json) -> Json:
    """Mistral whose window holds in the layers that `layer_types` names, or in all."""
    window = _window(hf)
    kind = "full_attention" if window is None else "sliding_attention"
    types = hf.get("layer_types") or [kind] * hf["num_hidden_layers"]
    return {"windows": _windows(hf, types, window)}


def _write_ministral(c: ModelConfig) -> Json:
    sizes, types = _layer_types(c)
    return {"sliding_window": sizes[0] if sizes else None, "layer_types": types}


def _read_qwen_windows(hf: Json) -> Json:
    """Qwen's window holds from layer `max_window_layers` on, unless `layer_types` says where."""
    window = _window(hf) if hf.get("use_sliding_window") else None
    types = hf.get("layer_types")
    if types is None:
        first = hf["max_window_layers"] if window is not None else hf["num_hidden_layers"]
        types = [
            "sliding_attention" if i >= first else "full_attention"
            for i in range(hf["num_hidden_layers"])
        ]
    return {"windows": _windows(hf, types, window)}


def _window(hf: Json) -> int | None:
    return None if hf["sliding_window"] is None else _size(hf, "sliding_window")


def _windows(hf: Json, types: list[str], window: int | None) -> tuple[int | None, ...]:
    """The window of each layer from its type."""
    count = hf["num_hidden_layers"]
    if len(types) != count:
        raise UserError(
            f"config.json lists {len(types)} layer_types for {count} layers (num_hidden_layers)."
        )
    types = ["full_attention" if t == "attention" else t for t in types]  # the old spelling
    unknown = [t for t in types if t not in ("sliding_attention", "full_attention")]
    if unknown:
        raise UserError(f"Layers of type {unknown[0]!r:.80} are not supported (layer_types).")
    if window is None and "sliding_attention" in types:
        raise UserError(
            "config.json has layers of sliding attention (layer_types) and no sliding_window for them."
        )
    return tuple(window if t == "sliding_attention" else None for t in types)


def _layer_types(c: ModelConfig) -> tuple[list[int], list[str]]:
    """The windows that there are, and the type of each layer."""
    sizes = [w for w in c.windows if w is not None]
    return sizes, ["full_attention" if w is None else "sliding_attention" for w in c.windows]


def _write_qwen_windows(c: ModelConfig) -> Json:
    sizes, types = _layer_types(c)
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": sizes[0] if sizes else None,
        "max_window_layers": next((i for i, w in enumerate(c.windows) if w), c.num_layers),
        "layer_types": types,
    }


def _read_qwen2(hf: Json) -> Json:
    return {"qkv_bias": True, **_read_qwen_windows(hf)}


def _read_qwen3(hf: Json) -> Json:
    return {"qk_norm": True, **_read_llama(hf), **_read_qwen_windows(hf)}


def _write_qwen3(c: ModelConfig) -> Json:
    return {"attention_bias": c.qkv_bias, **_write_qwen_windows(c)}


_QWEN_DEFAULTS = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}

_MISTRAL_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        _read_llama,
        _write_llama,
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mistral": Family("MistralForCausalLM", _read_mistral, _write_mistral, _MISTRAL_DEFAULTS),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _read_qwen2,
        _write_qwen_windows,
        {**_QWEN_DEFAULTS, "num_key_value_heads": 32},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _read_qwen3,
        _write_qwen3,
        {**_QWEN_DEFAULTS, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "ministral": Family(
        "MinistralForCausalLM", _read_ministral, _write_ministral, _MISTRAL_DEFAULTS
    ),
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
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"Models of type {name!r:.80} are not supported; supported are {', '.join(FAMILIES)}."
        )
    family = FAMILIES[name]
    hf = {**family.defaults, **hf}
    _refuse_unsupported(hf)
    sizes = {
        field: _size(hf, key)
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
    head_dim = _size(hf, "head_dim") if hf.get("head_dim") is not None else hidden // heads
    kv_heads = hf.get("num_key_value_heads")
    named = _ids(generation or {}, "generation_config.json", "eos_token_id")
    eos = _ids(hf, "config.json", "eos_token_id") if named is None else named
    try:
        return ModelConfig(
            **sizes,
            num_kv_heads=heads if kv_heads is None else _size(hf, "num_key_value_heads"),
            head_dim=head_dim,
            family=name,
            rope=read_rope(hf),
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            tied_head=bool(hf.get("tie_word_embeddings", False)),
            bos_id=_id(hf, "bos_token_id"),
            eos_ids=eos or (),
            pad_id=_id(hf, "pad_token_id"),
            **family.read(hf),
        )
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
    family = FAMILIES[config.family]
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
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": write_rope(config.rope),
        "tie_word_embeddings": config.tied_head,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **token_ids(config),
        **family.write(config),
    }
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


def _refuse_unsupported(hf: Json) -> None:
    if hf.get("quantization_config") is not None:
        how = hf["quantization_config"]
        method = how.get("quant_method", "an unnamed method") if isinstance(how, dict) else how
        raise UserError(
            f"This checkpoint is quantized ({method!s:.80}), which is not supported; use the original."
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"The activation {hf['hidden_act']!r:.80} is not supported; only silu is.")
    if hf.get("mlp_bias"):
        raise UserError("Biases in the MLP (mlp_bias) are not supported.")


def _size(hf: Json, key: str) -> int:
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config.json must give {key} as a positive integer, not {value!r:.80}.")
    return value


def _ids(hf: Json, file: str, key: str) -> tuple[int, ...] | None:
    """Token ids, one or a list; None where there is no such key."""
    value = hf.get(key)
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise UserError(
            f"{file} must give {key} as a token id or a list of them, not {value!r:.80}."
        )
    return tuple(ids)


def _id(hf: Json, key: str) -> int | None:
    value = hf.get(key)
    if value is not None and type(value) is not int:
        raise UserError(f"config.json must give {key} as a token id, not {value!r:.80}.")
    return value


# What follows from the configuration, or serves a quantized cache alone: transformers reads none of it.
IGNORED = re.compile(
    r"(.*\.)?rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)"
    r"|.*\.self_attn\.([qkv]_proj\.|attn\.)?(q|k|v|kv|prob)_scale"
)


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where a Hugging Face tensor lies in the parameter tree of `Decoder`, unrolled.

    Attributes:
      path: keys into the tree, such as `("layers", 3, "qkv")`.
      shape: the tensor's shape in the file; matrices are `[out, in]`.
      transposed: ours is `[in, out]`; embeddings `[V, E]` and vectors are stored as they are.
      start: first index of its part of our last axis, where ours joins several tensors.
    """

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    start: int = 0

    @property
    def part(self) -> tuple[int, ...]:
        """Shape of its part of our array."""
        return self.shape[::-1] if self.transposed else self.shape


def weight_names(config: ModelConfig) -> dict[str, Weight]:
    """Every tensor of a checkpoint, by its Hugging Face name.

    Tensors of one fused parameter follow each other, in the order of their parts.
    """
    return dict(_weights(config))


def _weights(c: ModelConfig) -> Iterator[tuple[str, Weight]]:
    embed, dim = c.hidden_size, c.head_dim
    heads = (("q", c.num_heads * dim), ("k", c.num_kv_heads * dim), ("v", c.num_kv_heads * dim))
    yield "model.embed_tokens.weight", Weight(("embed",), (c.vocab_size, embed))
    for layer in range(c.num_layers):
        at, base = ("layers", layer), f"model.layers.{layer}."

        def fused(name: str, parts, template: str, at=at):
            start = 0
            for part, size in parts:
                shape = (size,) if name.endswith("bias") else (size, embed)
                yield template.format(part), Weight((*at, name), shape, len(shape) == 2, start)
                start += size

        yield base + "input_layernorm.weight", Weight((*at, "attention_norm"), (embed,))
        yield from fused("qkv", heads, base + "self_attn.{}_proj.weight")
        if c.qkv_bias:
            yield from fused("qkv_bias", heads, base + "self_attn.{}_proj.bias")
        if c.qk_norm:
            yield base + "self_attn.q_norm.weight", Weight((*at, "q_norm"), (dim,))
            yield base + "self_attn.k_norm.weight", Weight((*at, "k_norm"), (dim,))
        out = Weight((*at, "out"), (embed, c.num_heads * dim), transposed=True)
        yield base + "self_attn.o_proj.weight", out
        if c.out_bias:
            yield base + "self_attn.o_proj.bias", Weight((*at, "out_bias"), (embed,))
        yield base + "post_attention_layernorm.weight", Weight((*at, "mlp_norm"), (embed,))
        gate_up = (("gate", c.mlp_size), ("up", c.mlp_size))
        yield from fused("gate_up", gate_up, base + "mlp.{}_proj.weight")
        down = Weight((*at, "down"), (embed, c.mlp_size), transposed=True)
        yield base + "mlp.down_proj.weight", down
    yield "model.norm.weight", Weight(("norm",), (embed,))
    if not c.tied_head:
        yield "lm_head.weight", Weight(("head",), (c.vocab_size, embed), transposed=True)
