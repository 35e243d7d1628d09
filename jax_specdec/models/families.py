"""The families of checkpoints: how a config.json becomes a `ModelConfig`, and how its tensors are called.

A further family is one entry in `FAMILIES`; `ModelConfig` has a field for each way in which they differ.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax_specdec.models import family_fields as own
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.hf_read import Json, bias_flags

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
    "llama": Family("LlamaForCausalLM", own.read_biases, own.write_biases, _LLAMA_DEFAULTS),
    "mistral": Family(
        "MistralForCausalLM", own.read_everywhere, own.write_everywhere, _MISTRAL_DEFAULTS
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        own.read_qwen_windows,
        own.write_qwen_windows,
        {**_QWEN_DEFAULTS, "num_key_value_heads": 32},
        fields={"qkv_bias": True},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        own.read_qwen3,
        own.write_qwen3,
        {**_QWEN_DEFAULTS, "num_key_value_heads": 32, "head_dim": 128},
        fields={"qk_norm": True},
    ),
    "ministral": Family(
        "MinistralForCausalLM", own.read_ministral, own.write_layer_types, _MISTRAL_DEFAULTS
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        own.read_gemma,
        own.write_attention_bias,
        {**_GEMMA_DEFAULTS, "num_key_value_heads": 16},
        fields={"norm": "rms1"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        own.read_gemma2,
        own.write_gemma2,
        _GEMMA2_DEFAULTS,
        fields={"norm": "rms1", "norms": "both"},
        keys={"hidden_act": "hidden_activation"},
        names=_NORMS_BEHIND,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        own.read_gemma3,
        own.write_gemma2,
        _GEMMA3_DEFAULTS,
        fields={"norm": "rms1", "norms": "both", "qk_norm": True},
        keys={"hidden_act": "hidden_activation"},
        names=_NORMS_BEHIND,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        own.read_everywhere,
        own.write_everywhere,
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
        own.write_attention_bias,
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
        own.read_smollm3,
        own.write_smollm3,
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
    "granite": Family("GraniteForCausalLM", own.read_granite, own.write_granite, _LLAMA_DEFAULTS),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        own.read_neox,
        own.write_neox,
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
        own.read_gpt2,
        own.write_gpt2,
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
        own.read_mixtral,
        own.write_mixtral,
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
        own.read_qwen3_moe,
        own.write_qwen3_moe,
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
