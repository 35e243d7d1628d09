"""The families of checkpoints: how a config.json becomes a `ModelConfig`, and how its tensors are called.

A further family is one entry in `FAMILIES`; `ModelConfig` has a field for each way in which they differ.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax_specdec.models.config import ModelConfig
from jax_specdec.models.hf_read import (
    Json,
    activation,
    bias_flags,
    flag,
    integers,
    layer_types,
    number,
    refuse,
    size,
    window_of,
    windows_by_type,
)

Names = Mapping[str, str | tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` differs from the keys that all share.

    Attributes:
      architecture: the class that transformers loads it with.
      read: `config.json` -> the fields of `ModelConfig` that only this family sets.
      write: the inverse, `ModelConfig` -> keys of `config.json`.
      defaults: what transformers assumes where an optional key is left out.
      fields: of `ModelConfig`, the same for every model of the family.
      keys: its own names of common keys.
      names: the module that holds each parameter, or the modules of those that are joined; `layer` is what
        stands before those of a layer.
      untransposed: matrices are stored `[in, out]`.
      by_head: the joined projections of queries, keys and values are stored head by head.
      partial: a part of each head may be rotated.
      mlp_ratio: width of the MLP by that of the model, where the file does not say it.
    """

    architecture: str
    read: Callable[[Json], Json] = lambda hf: {}
    write: Callable[[ModelConfig], Json] = lambda c: {}
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    names: Names = dataclasses.field(default_factory=lambda: _LLAMA_NAMES)
    untransposed: bool = False
    by_head: bool = False
    partial: bool = False
    mlp_ratio: int | None = None


_LLAMA_NAMES: Names = {
    "embed": "model.embed_tokens",
    "layer": "model.layers.{}.",
    "attention_norm": "input_layernorm",
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": "mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
_NORMS_BEHIND: Names = {
    **_LLAMA_NAMES,
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


# Fields that several families share


def _read_biases(hf: Json) -> Json:
    return {**bias_flags(hf), "mlp_bias": flag(hf, "mlp_bias")}


def _write_biases(c: ModelConfig) -> Json:
    return {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def _write_attention_bias(c: ModelConfig) -> Json:
    return {"attention_bias": c.qkv_bias}


def _read_everywhere(hf: Json) -> Json:
    """A window that holds in every layer."""
    return {"windows": (window_of(hf),) * hf["num_hidden_layers"]}


def _write_everywhere(c: ModelConfig) -> Json:
    return {"sliding_window": c.windows[0]}


def _read_ministral(hf: Json) -> Json:
    """Mistral whose window holds in the layers that `layer_types` names, or in all."""
    window = window_of(hf)
    kind = "full_attention" if window is None else "sliding_attention"
    types = hf.get("layer_types") or [kind] * hf["num_hidden_layers"]
    return {"windows": windows_by_type(hf, types, window)}


def _write_layer_types(c: ModelConfig) -> Json:
    sizes, types = layer_types(c)
    return {"sliding_window": sizes[0] if sizes else None, "layer_types": types}


def _read_qwen_windows(hf: Json) -> Json:
    """Qwen's window holds from layer `max_window_layers` on, unless `layer_types` says where."""
    window = window_of(hf) if hf.get("use_sliding_window") else None
    types = hf.get("layer_types")
    if types is None:
        first = hf["max_window_layers"] if window is not None else hf["num_hidden_layers"]
        types = [
            "sliding_attention" if i >= first else "full_attention"
            for i in range(hf["num_hidden_layers"])
        ]
    return {"windows": windows_by_type(hf, types, window)}


def _write_qwen_windows(c: ModelConfig) -> Json:
    return {
        **_write_layer_types(c),
        "use_sliding_window": any(c.windows),
        "max_window_layers": next((i for i, w in enumerate(c.windows) if w), c.num_layers),
    }


def _read_qwen3(hf: Json) -> Json:
    return {**bias_flags(hf), **_read_qwen_windows(hf)}


def _write_qwen3(c: ModelConfig) -> Json:
    return {"attention_bias": c.qkv_bias, **_write_qwen_windows(c)}


# Gemma


def _gemma(hf: Json) -> Json:
    if hf.get("use_bidirectional_attention"):
        refuse("Attention to later tokens (use_bidirectional_attention) is not supported.")
    return {"embed_scale": size(hf, "hidden_size") ** 0.5, **bias_flags(hf)}


def _read_gemma(hf: Json) -> Json:
    """Files of Gemma 1 say gelu and mean its approximation."""
    named = "gelu_tanh" if hf["hidden_act"] == "gelu" else activation(hf)
    return {**_gemma(hf), "activation": named}


def _read_gemma2(hf: Json) -> Json:
    """Gemma 2 and 3: a window in all layers but each `sliding_window_pattern`-th."""
    count, pattern = hf["num_hidden_layers"], size(hf, "sliding_window_pattern")
    types = hf.get("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)
    ]
    return {
        **_gemma(hf),
        "attention_scale": number(hf, "query_pre_attn_scalar") ** -0.5,
        "attention_cap": number(hf, "attn_logit_softcapping", None),
        "logit_cap": number(hf, "final_logit_softcapping", None),
        "windows": windows_by_type(hf, types, window_of(hf)),
    }


def _write_gemma2(c: ModelConfig) -> Json:
    return {
        **_write_attention_bias(c),
        **_write_layer_types(c),
        "query_pre_attn_scalar": round(c.scale**-2),
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.logit_cap,
    }


def _read_gemma3(hf: Json) -> Json:
    # transformers never caps the scores of Gemma 3.
    return {**_read_gemma2(hf), "attention_cap": None}


_GEMMA_DEFAULTS = {
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA2_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3_DEFAULTS = {
    **_GEMMA2_DEFAULTS,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


# Others


def _read_smollm3(hf: Json) -> Json:
    """Every fourth layer has no rotary embedding, and where windows are used it has one."""
    count = hf["num_hidden_layers"]
    rotated = hf.get("no_rope_layers")
    if rotated is None:
        interval = size(hf, "no_rope_layer_interval")
        rotated = [int((i + 1) % interval != 0) for i in range(count)]
    rotated = integers(hf, "no_rope_layers", rotated, count)
    window = window_of(hf) if hf.get("use_sliding_window") else None
    types = hf.get("layer_types") or [
        "sliding_attention" if window is not None and not turned else "full_attention"
        for turned in rotated
    ]
    return {
        **_read_biases(hf),
        "unrotated": tuple(i for i, turned in enumerate(rotated) if not turned),
        "windows": windows_by_type(hf, types, window),
    }


def _write_smollm3(c: ModelConfig) -> Json:
    return {
        **_write_biases(c),
        **_write_layer_types(c),
        "use_sliding_window": any(c.windows),
        "no_rope_layers": [int(i not in c.unrotated) for i in range(c.num_layers)],
    }


def _read_granite(hf: Json) -> Json:
    return {
        **_read_biases(hf),
        "embed_scale": number(hf, "embedding_multiplier", 1.0),
        "residual_scale": number(hf, "residual_multiplier", 1.0),
        "attention_scale": number(hf, "attention_multiplier", 1.0),
        "logit_divisor": number(hf, "logits_scaling", 1.0),
    }


def _write_granite(c: ModelConfig) -> Json:
    return {
        **_write_biases(c),
        "embedding_multiplier": c.embed_scale,
        "residual_multiplier": c.residual_scale,
        "attention_multiplier": c.scale,
        "logits_scaling": c.logit_divisor,
    }


def _read_neox(hf: Json) -> Json:
    return {
        **bias_flags(hf),
        "parallel": flag(hf, "use_parallel_residual"),
        "num_kv_heads": size(hf, "num_attention_heads"),
    }


def _write_neox(c: ModelConfig) -> Json:
    return {**_write_attention_bias(c), "use_parallel_residual": c.parallel}


def _read_gpt2(hf: Json) -> Json:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if hf.get(key):
            refuse(f"A GPT-2 with {key} is not supported.")
    return {
        "attention_scale": None if flag(hf, "scale_attn_weights") else 1.0,
        "num_kv_heads": size(hf, "num_attention_heads"),
    }


def _write_gpt2(c: ModelConfig) -> Json:
    return {"scale_attn_weights": c.attention_scale is None}


def _read_mixtral(hf: Json) -> Json:
    return {
        **_read_everywhere(hf),
        "num_experts": size(hf, "num_local_experts"),
        "experts_per_token": size(hf, "num_experts_per_tok"),
        "expert_size": size(hf, "intermediate_size"),
    }


def _write_mixtral(c: ModelConfig) -> Json:
    return {
        **_write_everywhere(c),
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
    }


def _read_qwen3_moe(hf: Json) -> Json:
    count, step = hf["num_hidden_layers"], size(hf, "decoder_sparse_step")
    plain = integers(hf, "mlp_only_layers", hf.get("mlp_only_layers") or [])
    window = window_of(hf) if hf.get("use_sliding_window") else None
    key = "num_experts" if hf.get("num_experts") is not None else "num_local_experts"
    return {
        **bias_flags(hf),
        "num_experts": size(hf, key),
        "experts_per_token": size(hf, "num_experts_per_tok"),
        "expert_size": size(hf, "moe_intermediate_size"),
        "norm_experts": flag(hf, "norm_topk_prob"),
        "dense_layers": tuple(i for i in range(count) if i in plain or (i + 1) % step),
        "windows": (window,) * count,
    }


def _write_qwen3_moe(c: ModelConfig) -> Json:
    return {
        **_write_attention_bias(c),
        **_write_everywhere(c),
        "use_sliding_window": c.windows[0] is not None,
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "moe_intermediate_size": c.expert_size,
        "norm_topk_prob": c.norm_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(c.dense_layers),
    }


_MISTRAL_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_DEFAULTS = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_LLAMA_DEFAULTS = {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
_LAYER_NORMS = {"norm": "layer", "gated": False, "mlp_bias": True}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _read_biases, _write_biases, _LLAMA_DEFAULTS),
    "mistral": Family("MistralForCausalLM", _read_everywhere, _write_everywhere, _MISTRAL_DEFAULTS),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _read_qwen_windows,
        _write_qwen_windows,
        {**_QWEN_DEFAULTS, "num_key_value_heads": 32},
        fields={"qkv_bias": True},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _read_qwen3,
        _write_qwen3,
        {**_QWEN_DEFAULTS, "num_key_value_heads": 32, "head_dim": 128},
        fields={"qk_norm": True},
    ),
    "ministral": Family(
        "MinistralForCausalLM", _read_ministral, _write_layer_types, _MISTRAL_DEFAULTS
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        _read_gemma,
        _write_attention_bias,
        {**_GEMMA_DEFAULTS, "num_key_value_heads": 16},
        fields={"norm": "rms1"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _read_gemma2,
        _write_gemma2,
        _GEMMA2_DEFAULTS,
        fields={"norm": "rms1", "norms": "both"},
        keys={"hidden_act": "hidden_activation"},
        names=_NORMS_BEHIND,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _read_gemma3,
        _write_gemma2,
        _GEMMA3_DEFAULTS,
        fields={"norm": "rms1", "norms": "both", "qk_norm": True},
        keys={"hidden_act": "hidden_activation"},
        names=_NORMS_BEHIND,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _read_everywhere,
        _write_everywhere,
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        names={**_LLAMA_NAMES, "qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"},
        partial=True,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        bias_flags,
        _write_attention_bias,
        {
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 50279,
            "pad_token_id": 1,
        },
        fields={"norms": "post", "qk_norm": True, "wide_qk_norm": True},
        names=_NORMS_BEHIND,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _read_smollm3,
        _write_smollm3,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "rope_theta": 2_000_000.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
        },
    ),
    "granite": Family("GraniteForCausalLM", _read_granite, _write_granite, _LLAMA_DEFAULTS),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        _read_neox,
        _write_neox,
        {
            "max_position_embeddings": 2048,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "use_parallel_residual": True,
            "partial_rotary_factor": 0.25,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        fields=_LAYER_NORMS,
        keys={
            "rms_norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        },
        names={
            "embed": "gpt_neox.embed_in",
            "layer": "gpt_neox.layers.{}.",
            "attention_norm": "input_layernorm",
            "qkv": "attention.query_key_value",
            "out": "attention.dense",
            "mlp_norm": "post_attention_layernorm",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
            "norm": "gpt_neox.final_layer_norm",
            "head": "embed_out",
        },
        by_head=True,
        partial=True,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _read_gpt2,
        _write_gpt2,
        {
            "max_position_embeddings": 1024,
            "hidden_act": "gelu_new",
            "rms_norm_eps": 1e-5,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
        fields={
            **_LAYER_NORMS,
            "qkv_bias": True,
            "out_bias": True,
            "rope": None,
            "learned_positions": True,
        },
        keys={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
        },
        names={
            "embed": "transformer.wte",
            "positions": "transformer.wpe",
            "layer": "transformer.h.{}.",
            "attention_norm": "ln_1",
            "qkv": "attn.c_attn",
            "out": "attn.c_proj",
            "mlp_norm": "ln_2",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
            "norm": "transformer.ln_f",
            "head": "lm_head",
        },
        untransposed=True,
        mlp_ratio=4,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _read_mixtral,
        _write_mixtral,
        {
            **_MISTRAL_DEFAULTS,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        names={
            **_LLAMA_NAMES,
            "router": "block_sparse_moe.gate",
            "experts_up": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
            "experts_down": "block_sparse_moe.experts.{}.w2",
        },
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _read_qwen3_moe,
        _write_qwen3_moe,
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
        },
        fields={"qk_norm": True},
        names={
            **_LLAMA_NAMES,
            "router": "mlp.gate",
            "experts_up": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
            "experts_down": "mlp.experts.{}.down_proj",
        },
    ),
}
