"""A small model's checkpoint: parameters to save, and changes to what was saved."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from jax_specdec.models import Decoder, ModelConfig, config_to_hf
from jax_specdec.models.hf import weight_names

TESTS = Path(__file__).parents[1]
CONFIG = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    mlp_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context=64,
    norm_eps=1e-6,
    bos_id=1,
    eos_ids=(2,),
)
QWEN = dataclasses.replace(CONFIG, family="qwen2", qkv_bias=True, tied_head=True)


def random_params(config, dtype="float32", layer_loop="unroll"):
    return Decoder(config, dtype, layer_loop).init(jax.random.key(0))


def write_random(folder, config):
    """A checkpoint of random numbers, written without jax."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, "float32")))
    rng = np.random.default_rng(0)
    shapes = {name: weight.shape for name, weight in weight_names(config).items()}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tensors_of(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def rewrite(folder, change):
    """Applies `change` to the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_trees_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
