"""GGUF files of every family that llama.cpp writes: what is read of one is its folder."""

import importlib.util
import json
import runpy

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_checkpoint import QWEN, TESTS, tensors_of, write_random

from jax_specdec.checkpoints.target_tensors import open_target
from jax_specdec.checkpoints.targets import convert, load_config, load_target
from jax_specdec.errors import UserError
from jax_specdec.models import config_from_hf

gguf = pytest.importorskip("gguf")
from gguf_files import converted, write_gguf  # noqa: E402

make = runpy.run_path(str(TESTS / "goldens" / "make.py"))
# By golden case, what such a file cannot say otherwise.
FILES = {
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "phi3": {},
    "phi4": {},
    "olmo2": {"attention_bias": False},
    "smollm3": {"no_rope_layer_interval": 4},
    "granite": {},
    "gpt_neox": {},
    "gpt2": {},
    "mixtral": {"sliding_window": None},
    "qwen3_moe": {},
}
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)


def written(case, where, **options):
    """A random model of a case as a folder and as a file, and its configuration."""
    config = config_from_hf({**make["hf_config"](case), **FILES[case]})
    folder = write_random(where / "model", config)
    return folder, write_gguf(where / "model.gguf", folder, **options), config


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_its_folder(case, tmp_path):
    """Rows are permuted, matrices transposed or joined by expert there, and Gemma's norms hold the 1 that is added."""
    folder, path, config = written(case, tmp_path)
    assert load_config(path) == load_config(folder) == config.within(None)
    convert(path, tmp_path / "again")
    got, want = tensors_of(tmp_path / "again"), tensors_of(folder)
    assert got.keys() == want.keys()
    for name, value in want.items():
        exact = not (case.startswith("gemma") and name.endswith("norm.weight"))
        np.testing.assert_allclose(got[name], value, rtol=0, atol=0 if exact else 3e-7)


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "mixtral"])
def test_quantized_matrices_that_lie_otherwise(case, tmp_path):
    folder, _, _ = written(case, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    hf = json.loads((folder / "config.json").read_text())
    hf |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    kind = gguf.GGMLQuantizationType.Q8_0
    whole = [x for x, v in converted(hf, tensors).items() if v.ndim > 1 and not v.shape[-1] % 32]
    path = write_gguf(tmp_path / "q.gguf", folder, change=dict.fromkeys(whole, kind))
    changed = 0
    for name, stored in open_target(path, load_config(path)).items():
        got, want = stored.view()[...], tensors[name]
        assert np.abs(got - want).max() < 0.01 * np.abs(want).max(), name
        changed += bool((got != want).any())
    assert changed > 6


# Those whose files it reads; of others it refuses the architecture.
@needs_torch
@pytest.mark.parametrize("case", ["gemma2", "gemma3", "phi3", "gpt2", "qwen3_moe"])
def test_transformers_reads_the_same(case, tmp_path):
    """Given the configuration: of a file without a tokenizer it takes sizes from its defaults."""
    pytest.importorskip("accelerate")
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    folder, path, _ = written(case, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=path.name,
        config=AutoConfig.from_pretrained(folder),
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(tmp_path / "torch")
    want = tensors_of(tmp_path / "torch")
    for name, stored in open_target(path, load_config(path)).items():
        np.testing.assert_array_equal(stored.view()[...], want[name], name)


@pytest.mark.parametrize(
    ("count", "message"),
    [(8, "no matrix for each of 8 experts"), (None, "lacks llama.expert_used_count")],
)
def test_experts_that_are_not_there(count, message, tmp_path):
    folder, path, _ = written("mixtral", tmp_path)
    if count is None:
        path = write_gguf(
            tmp_path / "x.gguf",
            write_random(tmp_path / "llama", config_from_hf(make["hf_config"]("llama"))),
            more=[("llama.expert_count", 4)],
        )
    else:
        hf = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**hf, "num_local_experts": count}))
        path = write_gguf(tmp_path / "x.gguf", folder)
    with pytest.raises(UserError, match=message):
        load_target(path, tokenizer=False)


def test_experts_of_another_architecture(tmp_path):
    folder = write_random(tmp_path / "model", QWEN)
    path = write_gguf(tmp_path / "x.gguf", folder, more=[("qwen2.expert_count", 8)])
    with pytest.raises(UserError, match=r"a mixture of experts .*not supported in GGUF of this"):
        load_target(path, tokenizer=False)
