"""Writes checkpoints as GGUF, with the writer of the package gguf and the permutation of llama.cpp."""

import json

import gguf
import numpy as np
from safetensors.numpy import load_file

from jax_specdec.models.families import FAMILIES

# The architecture of each `model_type`, where it is called otherwise.
NAMES = {
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "gpt_neox": "gptneox",
    "qwen3_moe": "qwen3moe",
}
PERMUTED = ("llama", "mixtral", "smollm3", "granite")


def permuted(weight, heads):
    """llama.cpp's order of a projection's rows, `LlamaModel.permute` of its converter."""
    shape = weight.shape
    halves = weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


def joined(weight, heads):
    """GPT-NeoX's queries, keys and values, which are stored head by head, one after the other."""
    parts = weight.reshape(heads, 3, len(weight) // heads // 3, *weight.shape[1:])
    return parts.swapaxes(0, 1).reshape(weight.shape)


def converted(hf, tensors):
    """A model's tensors as llama.cpp's converter changes them, by names that the package maps."""
    kind, out = hf["model_type"], {}
    for name, value in tensors.items():
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if kind in PERMUTED and f".{part}." in name:
                value = permuted(value, hf[heads])
        if "query_key_value" in name:
            value = joined(value, hf["num_attention_heads"])
        if kind == "gpt2" and value.ndim == 2 and ".h." in name:
            value = value.T
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if ".experts." in name:
            base, _, rest = name.partition(".experts.")
            out.setdefault(f"{base}.experts.{rest.partition('.')[2]}", []).append(value)
        else:
            out[name] = value
    return {name: np.stack(x) if isinstance(x, list) else x for name, x in out.items()}


def write_gguf(path, folder, *, tokenizer=None, pre="smollm", change=None, arch=None, more=()):
    """A checkpoint's folder of float32 as one file.

    Args:
      tokenizer: byte-level, of transformers. change: by Hugging Face's name, a type to quantize a tensor to.
      more: pairs of keys and whole numbers, texts or flags.
    """
    hf = json.loads((folder / "config.json").read_text())
    kind = hf["model_type"]
    hf |= {key: hf[own] for key, own in FAMILIES[kind].keys.items() if own in hf}
    arch = arch or NAMES.get(kind, kind)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    if kind in ("gpt2", "gpt_neox"):
        writer.add_layer_norm_eps(hf["rms_norm_eps"])
    else:
        writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    if kind != "gpt2":
        add_rope(writer, hf)
    add_own(writer, hf)
    for name in ("bos", "eos"):
        if hf.get(f"{name}_token_id") is not None:
            getattr(writer, f"add_{name}_token_id")(hf[f"{name}_token_id"])
    if hf.get("pad_token_id") is not None:
        writer.add_pad_token_id(hf["pad_token_id"])
    for key, value in more:
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](
            key, value
        )
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, pre)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], hf["num_hidden_layers"])
    for name, value in converted(hf, load_file(folder / "model.safetensors")).items():
        there = names.get_name(name, (".weight", ".bias"))
        kind = (change or {}).get(name)
        if kind is not None:
            value = gguf.quantize(value, kind)
        writer.add_tensor(there, np.ascontiguousarray(value), raw_dtype=kind)
    finish(writer)
    return path


def add_rope(writer, hf):
    rope = hf["rope_parameters"]
    if "full_attention" in rope:  # Gemma 3
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    share = rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(share * hf["head_dim"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(hf["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
        for length in ("short", "long"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)


def add_own(writer, hf):
    """What llama.cpp's converter writes of single families."""
    kind = hf["model_type"]
    if kind in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(hf["sliding_window"])
        pattern = [x == "sliding_attention" for x in hf["layer_types"]]
        writer.add_sliding_window_pattern(pattern)
        if hf["attn_logit_softcapping"] is not None:
            writer.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
        if hf["final_logit_softcapping"] is not None:
            writer.add_final_logit_softcapping(hf["final_logit_softcapping"])
    if kind == "phi3":
        writer.add_sliding_window(hf["sliding_window"] or 0)
    if kind == "granite":
        writer.add_attention_scale(hf["attention_multiplier"])
        writer.add_embedding_scale(hf["embedding_multiplier"])
        writer.add_residual_scale(hf["residual_multiplier"])
        writer.add_logit_scale(hf["logits_scaling"])
    if kind == "gpt_neox":
        writer.add_parallel_residual(hf["use_parallel_residual"])
    if kind in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(hf.get("num_local_experts") or hf["num_experts"])
        writer.add_expert_used_count(hf["num_experts_per_tok"])
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(hf["moe_intermediate_size"])


def add_tokenizer(writer, tokenizer, pre):
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    special = set(tokenizer.all_special_tokens)
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_add_bos_token(True)
    writer.add_chat_template(tokenizer.chat_template or "")


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
