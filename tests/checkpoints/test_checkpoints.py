"""Loading, saving and converting checkpoints."""

import dataclasses
import importlib.util
import json
import runpy
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_checkpoint import (
    CONFIG,
    QWEN,
    TESTS,
    assert_trees_equal,
    random_params,
    rewrite,
    tensors_of,
)

from jax_specdec.checkpoints import targets as checkpoints
from jax_specdec.checkpoints import tensor_files
from jax_specdec.checkpoints.targets import convert, load_params, load_target, save_pretrained
from jax_specdec.errors import RunError
from jax_specdec.models.hf import weight_names
from pallas_kernels import tuning

# Round trips


@pytest.mark.parametrize("saved", ["unroll", "scan"])
@pytest.mark.parametrize("loaded", ["unroll", "scan"])
@pytest.mark.parametrize("config", [CONFIG, QWEN], ids=["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(config, dtype, saved, loaded, tmp_path):
    params = random_params(config, dtype, saved)
    save_pretrained(tmp_path / "m", config, params, dtype=dtype)
    target = load_target(tmp_path / "m", dtype=dtype, layer_loop=loaded, tokenizer=False)
    assert (target.config, target.vocab_size, target.path) == (config, 48, tmp_path / "m")
    assert target.decoder.dtype == dtype and target.tokenizer is None
    want = random_params(config, dtype, loaded)
    if config.tied_head and dtype != "bfloat16":  # on CPU a transposed copy is kept for speed
        want["head"] = want["embed"].T
    assert_trees_equal(target.params, want)


def test_shards_and_index(tmp_path):
    params = random_params(CONFIG)
    save_pretrained(tmp_path / "m", CONFIG, params, dtype="float32", max_shard_bytes=9000)
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == 4 * CONFIG.parameter_count()
    assert set(index["weight_map"]) == set(weight_names(CONFIG))
    for name in files:
        tensors = load_file(tmp_path / "m" / name)
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= 9000
    assert_trees_equal(load_params(tmp_path / "m", CONFIG), params)


def test_dtype_defaults_and_casts(tmp_path):
    params = random_params(CONFIG)
    save_pretrained(tmp_path / "m", CONFIG, params, dtype="bfloat16")
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert_trees_equal(load_params(tmp_path / "m", CONFIG), rounded)
    on_cpu = load_target(tmp_path / "m", tokenizer=False)
    assert_trees_equal(on_cpu.params, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))


def test_dtype_default_on_accelerators(folder, tmp_path, monkeypatch):
    convert(folder, tmp_path / "m", dtype="bfloat16")
    monkeypatch.setattr(tuning, "device", lambda: tuning.Device("gpu", "some GPU"))
    assert load_target(tmp_path / "m", tokenizer=False).decoder.dtype == jnp.bfloat16


def test_old_buffers_and_tied_heads_are_tolerated(tmp_path):
    save_pretrained(tmp_path / "m", QWEN, random_params(QWEN), dtype="float32")

    def add(tensors):
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    rewrite(tmp_path / "m", add)
    assert_trees_equal(load_params(tmp_path / "m", QWEN), random_params(QWEN))


def test_parameters_can_be_donated(folder):
    """They take over host buffers without a copy; training must still be able to give them away."""
    params = load_params(folder, CONFIG)
    want = jax.tree.map(lambda x: np.asarray(x) + 1, random_params(CONFIG))
    step = jax.jit(lambda p: jax.tree.map(lambda x: x + jnp.ones_like(x), p), donate_argnums=0)
    assert_trees_equal(step(params), jax.tree.map(jnp.asarray, want))


def test_place_sees_every_array(folder):
    seen = {}

    def place(path, value):
        seen[path] = value.shape
        return jax.device_put(value, jax.devices()[-1])

    params = load_params(folder, CONFIG, layer_loop="scan", place=place)
    assert seen["layers", "qkv"] == (3, 32, 64) and seen["embed",] == (48, 32)
    assert len(seen) == len(jax.tree.leaves(params))
    assert all(x.devices() == {jax.devices()[-1]} for x in jax.tree.leaves(params))


def test_end_of_text_ids(tmp_path):
    config = dataclasses.replace(CONFIG, eos_ids=(2, 7))
    save_pretrained(tmp_path / "m", config, random_params(config), dtype="float32")
    generation = tmp_path / "m/generation_config.json"
    assert json.loads(generation.read_text())["eos_token_id"] == [2, 7]
    assert checkpoints.load_config(tmp_path / "m").eos_ids == (2, 7)
    generation.write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert checkpoints.load_config(tmp_path / "m").eos_ids == (5, 6)


# Saving


def test_saving_again_replaces_weights_and_keeps_other_files(folder):
    (folder / "notes.txt").write_text("mine")
    params = random_params(CONFIG, "bfloat16")
    save_pretrained(folder, CONFIG, params, dtype="bfloat16", max_shard_bytes=9000)
    assert not (folder / "model.safetensors").exists()
    assert_trees_equal(load_params(folder, CONFIG), params)
    save_pretrained(folder, CONFIG, params, dtype="bfloat16")
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(RunError, match=r"m could not be written: .*No space left"):
        save_pretrained(tmp_path / "m", CONFIG, random_params(CONFIG), dtype="float32")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_what_was_there(folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.iterdir()}

    class Broken:
        def save_pretrained(self, folder):
            raise KeyError("no")

    with pytest.raises(KeyError):
        save_pretrained(
            folder, CONFIG, random_params(CONFIG, "bfloat16"), dtype="bfloat16", tokenizer=Broken()
        )
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_parameters_of_another_shape_are_not_written(tmp_path):
    other = dataclasses.replace(CONFIG, vocab_size=50)
    with pytest.raises(ValueError, match=r"embed_tokens.weight would be \(48, 32\)"):
        save_pretrained(tmp_path / "m", other, random_params(CONFIG), dtype="float32")
    assert list(tmp_path.iterdir()) == []


# Conversion


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama", "llama3", "mistral", "qwen2_window", "qwen3_bias"])
def test_convert_is_bit_identical_for_transformers(case, dtype, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    make = runpy.run_path(str(TESTS / "goldens/make.py"))
    model = make["torch_model"](make["hf_config"](case)).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", max_shard_bytes=20_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    again, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", dtype="auto", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    bits = torch.int32 if dtype == "float32" else torch.int16
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert torch.equal(after[name].view(bits), value.view(bits)), name
    ours, theirs = again.config.to_dict(), model.config.to_dict()
    changed = {"initializer_range", "max_window_layers", "_name_or_path", "dtype"}  # no arithmetic
    shared = (ours.keys() & theirs.keys()) - changed
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}


def test_convert_keeps_odd_bits_and_casts(folder, tmp_path):
    odd = np.array([np.inf, -0.0, 1e-42, np.nan], np.float32)
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(slice(0, 4), odd))
    convert(folder, tmp_path / "same")
    for name, value in tensors_of(folder).items():
        assert tensors_of(tmp_path / "same")[name].tobytes() == value.tobytes()
    convert(folder, tmp_path / "narrow", dtype="bfloat16")
    for name, value in tensors_of(folder).items():
        narrow = tensors_of(tmp_path / "narrow")[name]
        assert narrow.tobytes() == value.astype(ml_dtypes.bfloat16).tobytes()


def test_convert_copies_the_tokenizer_as_it_is(tokenizer, tmp_path):
    save_pretrained(
        tmp_path / "a", CONFIG, random_params(CONFIG), dtype="float32", tokenizer=tokenizer
    )
    convert(tmp_path / "a", tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert load_target(tmp_path / "b").tokenizer.encode("w3 w5") == [5, 7]


def test_headers_are_really_what_transformers_wants(folder):
    """The metadata without which transformers refuses a file."""
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}
