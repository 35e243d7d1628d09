"""Writes the golden logits: transformers on PyTorch, float32, one tiny random checkpoint a case.

    python tests/goldens/make.py [CASE ...]

Weights are drawn again from their names wherever they are needed, so only the configuration, the
tokens and the logits are stored. Of most cases the tokens are a prompt and what `generate` says to it, and
there are controls beside them: configurations in which one thing is switched off, whose logits must be others.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PHI4 = {
    "model_type": "phi3",
    "partial_rotary_factor": 0.75,  # 6 of 8 dimensions
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.3],
        "long_factor": [1.0, 4.0, 9.0],
    },
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,  # of 4 wavelengths 1 is kept, 1 on the ramp
        },
    },
    "vicuna": {  # as transformers 4 wrote it
        "model_type": "llama",
        "num_key_value_heads": 4,
        "rope_theta": 5000,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "llama_bias": {"model_type": "llama", "attention_bias": True, "head_dim": 16},
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "ministral": {  # as Ministral 8B is published; transformers reads it as that family
        "model_type": "mistral",
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_bias": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "llama_gelu": {"model_type": "llama", "mlp_bias": True, "hidden_act": "gelu"},
    "yarn": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 8,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
    },
    "gemma": {"model_type": "gemma", "head_dim": 16, "hidden_act": "gelu"},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": 6,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 24,
        "rope_theta": 1000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {"model_type": "phi3", "sliding_window": 7, "pad_token_id": 0},
    "phi4": {**_PHI4, "original_max_position_embeddings": 32},  # read with short factors
    "phi4_long": {**_PHI4, "original_max_position_embeddings": 12},
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2, "pad_token_id": 0},
    "gpt_neox": {
        "model_type": "gpt_neox",
        "num_key_value_heads": 4,
        "rotary_pct": 0.5,
        "rotary_emb_base": 1000,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "granite": {
        "model_type": "granite",
        "attention_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.25,
        "logits_scaling": 4.0,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": 7},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    },
    "qwen3_moe_mixed": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0],
    },
}
# What is switched off, by case: changes of its configuration.
CONTROLS: dict[str, list[dict[str, Any]]] = {
    "llama_gelu": [{"mlp_bias": False}, {"hidden_act": "silu"}],
    "yarn": [
        {"rope_scaling": None},
        {"rope_scaling": {**CASES["yarn"]["rope_scaling"], "attention_factor": 1.0}},
        {"rope_scaling": {**CASES["yarn"]["rope_scaling"], "truncate": False}},
        {"rope_scaling": {**CASES["yarn"]["rope_scaling"], "beta_slow": 0.5}},
    ],
    "dynamic": [{"rope_scaling": None}],
    "gemma": [{"hidden_act": "silu"}],
    "gemma2": [
        {"sliding_window": 64},
        {"query_pre_attn_scalar": 16},
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"hidden_activation": "silu"},
    ],
    "gemma3": [
        {"sliding_window": 64},
        {"query_pre_attn_scalar": 16},
        {"rope_scaling": None},
        {"rope_local_base_freq": 1000.0},
        {"final_logit_softcapping": 8.0},
    ],
    "phi3": [{"sliding_window": None}],
    "phi4": [{"original_max_position_embeddings": 12}],
    "phi4_long": [
        {"rope_scaling": {**_PHI4["rope_scaling"], "attention_factor": 1.0}},
        {"partial_rotary_factor": 1.0, "rope_scaling": None},
    ],
    "olmo2": [{"attention_bias": False}],
    "smollm3": [{"no_rope_layers": [1, 1]}],
    "gpt_neox": [
        {"use_parallel_residual": False},
        {"attention_bias": False},
        {"rotary_pct": 1.0},
        {"rotary_emb_base": 10_000},
        {"hidden_act": "relu"},
    ],
    "gpt2": [{"scale_attn_weights": False}, {"activation_function": "relu"}],
    "granite": [{key: 1.0} for key in CASES["granite"] if key.endswith(("multiplier", "scaling"))],
    "mixtral": [{"num_experts_per_tok": 1}, {"sliding_window": None}],
    "qwen3_moe": [{"num_experts_per_tok": 2}, {"norm_topk_prob": False}],
    "qwen3_moe_mixed": [{"norm_topk_prob": True}],
}
PROMPT, LENGTH = 14, 20


def hf_config(case: str) -> dict[str, Any]:
    """The `config.json` of a case."""
    own = CASES[case]
    return own if own["model_type"] == "gpt2" else {**_COMMON, **own}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 weight called `name`; RandomState's stream is the same in every version."""
    value = np.random.RandomState(zlib.crc32(name.encode())).rand(*shape) - 0.5
    value = value + 1 if "norm" in name else value  # layer, query and key norms
    return value.astype(np.float32)


def tokens() -> np.ndarray:
    """`int32[2, 20]`, longer than every window."""
    return np.random.RandomState(0).randint(3, 64, (2, 20)).astype(np.int32)


def torch_model(config: dict[str, Any]):
    """The transformers model with the weights of `weight`, in float32."""
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"attn_implementation": "eager", "dtype": torch.float32}
    with tempfile.TemporaryDirectory() as folder:  # parsed as a file is, old spellings included
        Path(folder, "config.json").write_text(json.dumps(config))
        parsed = AutoConfig.from_pretrained(folder)
        names = torch_names(AutoModelForCausalLM.from_config(parsed, **options))
        tensors = {name: weight(name, shape) for name, shape in names.items()}
        save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def torch_names(model) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers writes of a model."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder, "model.safetensors"), "np") as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    """`float32[B, T, V]` of one causal pass; where rotations depend on a text's length, token by token."""
    import torch
    from transformers import DynamicCache

    ids = torch.from_numpy(ids).long()
    rope = getattr(model.config, "rope_parameters", None) or {}
    with torch.no_grad():
        if rope.get("rope_type") != "dynamic":
            return model(ids, use_cache=False).logits.numpy()
        cache = DynamicCache(config=model.config)
        # The cache is the fourth argument; versions differ in its name.
        steps = [model(ids[:, i : i + 1], None, None, cache) for i in range(ids.shape[1])]
        return torch.cat([step.logits for step in steps], 1).numpy()


def torch_text(model, prompt: np.ndarray) -> np.ndarray:
    """A prompt and what `generate` says to it, greedily, `int32[B, LENGTH]`."""
    import torch

    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.from_numpy(prompt).long(),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_length=LENGTH,
        do_sample=False,
    )
    return out.numpy().astype(np.int32)


def main() -> None:
    weak = []
    for case in sys.argv[1:] or CASES:
        config, more = hf_config(case), {}
        model, ids = torch_model(config), tokens()
        if case in CONTROLS:
            more["prompt"] = 7 if case == "dynamic" else PROMPT
            ids = torch_text(model, ids[:, : more["prompt"]])
        logits = torch_logits(model, ids)
        for i, changes in enumerate(CONTROLS.get(case, [])):
            off = torch_logits(torch_model({**config, **changes}), ids)
            change = np.abs(off - logits).max() / np.abs(logits).max()
            if change < 1e-3:
                weak.append(f"{case} with {changes} differs by {change} alone")
            more[f"control{i}"] = off[:, -1]
        np.savez_compressed(
            HERE / f"{case}.npz", config=json.dumps(config), tokens=ids, logits=logits, **more
        )
        print(f"{case:14s} logits up to {np.abs(logits).max():.2f}", flush=True)
    assert not weak, weak


if __name__ == "__main__":
    main()
