"""What each family reads from a `config.json`, and writes to one, beyond what all share."""

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
    used_window,
    window_of,
    windows_by_type,
)

# Fields that several families share


def read_biases(hf: Json) -> Json:
    return {**bias_flags(hf), "mlp_bias": flag(hf, "mlp_bias")}


def write_biases(c: ModelConfig) -> Json:
    return {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def write_attention_bias(c: ModelConfig) -> Json:
    return {"attention_bias": c.qkv_bias}


def read_everywhere(hf: Json) -> Json:
    """A window that holds in every layer."""
    return {"windows": (window_of(hf),) * hf["num_hidden_layers"]}


def write_everywhere(c: ModelConfig) -> Json:
    return {"sliding_window": c.windows[0]}


def read_ministral(hf: Json) -> Json:
    """Mistral whose window holds in the layers that `layer_types` names, or in all."""
    window = window_of(hf)
    kind = "full_attention" if window is None else "sliding_attention"
    types = hf.get("layer_types") or [kind] * hf["num_hidden_layers"]
    return {"windows": windows_by_type(hf, types, window)}


def write_layer_types(c: ModelConfig) -> Json:
    sizes, types = layer_types(c)
    return {"sliding_window": sizes[0] if sizes else None, "layer_types": types}


def read_qwen_windows(hf: Json) -> Json:
    """Qwen's window holds from layer `max_window_layers` on, unless `layer_types` says where."""
    window = used_window(hf)
    types = hf.get("layer_types")
    if types is None:
        first = hf["max_window_layers"] if window is not None else hf["num_hidden_layers"]
        types = [
            "sliding_attention" if i >= first else "full_attention"
            for i in range(hf["num_hidden_layers"])
        ]
    return {"windows": windows_by_type(hf, types, window)}


def write_qwen_windows(c: ModelConfig) -> Json:
    return {
        **write_layer_types(c),
        "use_sliding_window": any(c.windows),
        "max_window_layers": next((i for i, w in enumerate(c.windows) if w), c.num_layers),
    }


def read_qwen3(hf: Json) -> Json:
    return {**bias_flags(hf), **read_qwen_windows(hf)}


def write_qwen3(c: ModelConfig) -> Json:
    return {"attention_bias": c.qkv_bias, **write_qwen_windows(c)}


# Gemma


def _gemma(hf: Json) -> Json:
    if hf.get("use_bidirectional_attention"):
        refuse("Attention to later tokens (use_bidirectional_attention) is not supported.")
    return {"embed_scale": size(hf, "hidden_size") ** 0.5, **bias_flags(hf)}


def read_gemma(hf: Json) -> Json:
    """Files of Gemma 1 say gelu and mean its approximation."""
    named = "gelu_tanh" if hf["hidden_act"] == "gelu" else activation(hf)
    return {**_gemma(hf), "activation": named}


def read_gemma2(hf: Json) -> Json:
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


def write_gemma2(c: ModelConfig) -> Json:
    return {
        **write_attention_bias(c),
        **write_layer_types(c),
        "query_pre_attn_scalar": round(c.scale**-2),
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.logit_cap,
    }


def read_gemma3(hf: Json) -> Json:
    # transformers never caps the scores of Gemma 3.
    return {**read_gemma2(hf), "attention_cap": None}


# Others


def read_smollm3(hf: Json) -> Json:
    """Every fourth layer has no rotary embedding, and where windows are used it has one."""
    count = hf["num_hidden_layers"]
    rotated = hf.get("no_rope_layers")
    if rotated is None:
        interval = size(hf, "no_rope_layer_interval")
        rotated = [int((i + 1) % interval != 0) for i in range(count)]
    rotated = integers(hf, "no_rope_layers", rotated, count)
    window = used_window(hf)
    types = hf.get("layer_types") or [
        "sliding_attention" if window is not None and not turned else "full_attention"
        for turned in rotated
    ]
    return {
        **read_biases(hf),
        "unrotated": tuple(i for i, turned in enumerate(rotated) if not turned),
        "windows": windows_by_type(hf, types, window),
    }


def write_smollm3(c: ModelConfig) -> Json:
    return {
        **write_biases(c),
        **write_layer_types(c),
        "use_sliding_window": any(c.windows),
        "no_rope_layers": [int(i not in c.unrotated) for i in range(c.num_layers)],
    }


def read_granite(hf: Json) -> Json:
    return {
        **read_biases(hf),
        "embed_scale": number(hf, "embedding_multiplier", 1.0),
        "residual_scale": number(hf, "residual_multiplier", 1.0),
        "attention_scale": number(hf, "attention_multiplier", 1.0),
        "logit_divisor": number(hf, "logits_scaling", 1.0),
    }


def write_granite(c: ModelConfig) -> Json:
    return {
        **write_biases(c),
        "embedding_multiplier": c.embed_scale,
        "residual_multiplier": c.residual_scale,
        "attention_multiplier": c.scale,
        "logits_scaling": c.logit_divisor,
    }


def read_neox(hf: Json) -> Json:
    return {
        **bias_flags(hf),
        "parallel": flag(hf, "use_parallel_residual"),
        "num_kv_heads": size(hf, "num_attention_heads"),
    }


def write_neox(c: ModelConfig) -> Json:
    return {**write_attention_bias(c), "use_parallel_residual": c.parallel}


def read_gpt2(hf: Json) -> Json:
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if hf.get(key):
            refuse(f"A GPT-2 with {key} is not supported.")
    return {
        "attention_scale": None if flag(hf, "scale_attn_weights") else 1.0,
        "learned_positions": size(hf, "max_position_embeddings"),
        "num_kv_heads": size(hf, "num_attention_heads"),
    }


def write_gpt2(c: ModelConfig) -> Json:
    return {"scale_attn_weights": c.attention_scale is None}


def read_mixtral(hf: Json) -> Json:
    return {
        **read_everywhere(hf),
        "num_experts": size(hf, "num_local_experts"),
        "experts_per_token": size(hf, "num_experts_per_tok"),
        "expert_size": size(hf, "intermediate_size"),
    }


def write_mixtral(c: ModelConfig) -> Json:
    return {
        **write_everywhere(c),
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
    }


def read_qwen3_moe(hf: Json) -> Json:
    count, step = hf["num_hidden_layers"], size(hf, "decoder_sparse_step")
    plain = integers(hf, "mlp_only_layers", hf.get("mlp_only_layers") or [])
    window = used_window(hf)
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


def write_qwen3_moe(c: ModelConfig) -> Json:
    return {
        **write_attention_bias(c),
        **write_everywhere(c),
        "use_sliding_window": c.windows[0] is not None,
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "moe_intermediate_size": c.expert_size,
        "norm_topk_prob": c.norm_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(c.dense_layers),
    }
