"""Writes the golden logits: transformers on PyTorch, float32, one tiny random checkpoint a case.

    python tests/goldens/make.py

Weights are drawn again from their names wherever they are needed, so only the configuration, the
tokens and the logits are stored.
"""

import json
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
}


def hf_config(case: str) -> dict[str, Any]:
    """The `config.json` of a case."""
    return {**_COMMON, **CASES[case]}


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
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:  # parsed as a file is, old spellings included
        Path(folder, "config.json").write_text(json.dumps(config))
        parsed = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(
        parsed, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return model


def torch_logits(model, ids: np.ndarray) -> np.ndarray:
    """`float32[B, T, V]` of one causal pass."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids).long(), use_cache=False).logits.numpy()


def main() -> None:
    for case in CASES:
        config = hf_config(case)
        logits = torch_logits(torch_model(config), tokens())
        np.savez_compressed(
            HERE / f"{case}.npz", config=json.dumps(config), tokens=tokens(), logits=logits
        )
        print(f"{case:14s} logits up to {np.abs(logits).max():.2f}")


if __name__ == "__main__":
    main()
