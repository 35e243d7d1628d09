"""Writes checkpoints as GGUF, with the writer of the package gguf and the permutation of llama.cpp."""

import json

import gguf
import numpy as np
from safetensors.numpy import load_file

PERMUTED = ("llama",)


def permuted(weight, heads):
    """llama.cpp's order of a projection's rows, `LlamaModel.permute` of its converter."""
    shape = weight.shape
    halves = weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


def write_gguf(path, folder, *, tokenizer=None, pre="smollm", change=None, arch=None, more=()):
    """A checkpoint's folder of float32 as one file.

    Args:
      tokenizer: byte-level, of transformers. change: by Hugging Face's name, a type to quantize a tensor to.
      more: pairs of keys and whole numbers or texts.
    """
    hf = json.loads((folder / "config.json").read_text())
    arch = arch or hf["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(hf["head_dim"])
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
    for name, value in load_file(folder / "model.safetensors").items():
        there = names.get_name(name, (".weight", ".bias"))
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if arch in PERMUTED and f".{part}." in name:
                value = permuted(value, hf[heads])
        kind = (change or {}).get(name)
        if kind is not None:
            value = gguf.quantize(value, kind)
        writer.add_tensor(there, np.ascontiguousarray(value), raw_dtype=kind)
    finish(writer)
    return path


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
