"""Loading, saving and converting checkpoints, every bad input, and peak memory."""

import dataclasses
import importlib.util
import json
import runpy
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_specdec.checkpoints import memory, tensor_files
from jax_specdec.checkpoints import targets as checkpoints
from jax_specdec.checkpoints.targets import convert, load_params, load_target, save_pretrained
from jax_specdec.errors import RunError, UserError
from jax_specdec.models import Decoder, ModelConfig, config_to_hf
from jax_specdec.models.hf import weight_names
from pallas_kernels import tuning

TESTS = Path(__file__).parent
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


def tensors_of(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def rewrite(folder, change):
    """Applies `change` to the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_trees_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    save_pretrained(path, CONFIG, random_params(CONFIG), dtype="float32")
    return path


@pytest.fixture
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i + 2 for i in range(46)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>"
    )


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
    if config.tied_head:  # on CPU a transposed copy is kept for speed
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


# Bad input


def test_no_such_folder(tmp_path):
    for load in (load_target, checkpoints.load_config):
        with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
            load(tmp_path / "nowhere")


def test_a_file_is_no_folder(folder):
    with pytest.raises(UserError, match=r"model.safetensors is a file; name the folder"):
        load_target(folder / "model.safetensors")


def test_hub(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(name, *, allow_patterns):
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert load_target("someone/some-model", tokenizer=False).path == folder
    assert asked == {"someone/some-model": list(checkpoints.HUB_PATTERNS)}

    def fail(name, **kwargs):
        raise ConnectionError("Name or service not known\n\nlong explanation")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"someone/x is no folder here and .* not known$"):
        load_target("someone/x")


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"it has no config.json"):
        load_target(folder)


@pytest.mark.parametrize("text, message", [("{", "as JSON"), ("[]", "JSON object")])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_json(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} .*{message}"):
        load_target(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"there is no model.safetensors"):
        load_target(folder)


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="convert them to safetensors first"):
        load_target(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_file(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model.safetensors is truncated or damaged"):
        load_target(folder, tokenizer=False)


def test_missing_shard(tmp_path):
    path = tmp_path / "m"
    save_pretrained(path, CONFIG, random_params(CONFIG), dtype="float32", max_shard_bytes=9000)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks 1 of the .* first {shard.name}"):
        load_target(path, tokenizer=False)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index.json names no files"):
        load_target(path, tokenizer=False)


def test_all_mismatches_are_listed(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["extra.weight"] = np.zeros(3, np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 40), np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((40, 32), np.int8)

    rewrite(folder, change)
    with pytest.raises(UserError) as caught:
        load_target(folder, tokenizer=False)
    for part in (
        "missing model.norm.weight;",
        "unexpected extra.weight;",
        "layers.0.mlp.up_proj.weight has shape (32, 40) instead of (40, 32)",
        "layers.1.mlp.up_proj.weight is stored as I8",
    ):
        assert part in str(caught.value)


def test_lists_are_whole(folder):
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if ".layers." in name])
    with pytest.raises(UserError) as caught:
        load_target(folder, tokenizer=False)
    assert str(caught.value).count("missing model.layers.") == 3 * 9


def test_other_architectures(folder):
    rewrite(folder, lambda t: [t.pop(name) for name in list(t)] and t.update(x=np.zeros(1)))
    with pytest.raises(UserError, match=r"lacks model.embed_tokens.weight"):
        load_params(folder, CONFIG)
    hf = config_to_hf(CONFIG, "float32")
    (folder / "config.json").write_text(json.dumps({**hf, "model_type": "gpt2"}))
    with pytest.raises(UserError, match="'gpt2' are not supported; supported are llama, mistral"):
        load_target(folder)


def test_unsupported_storage(folder):
    def change(tensors):
        tensors["model.embed_tokens.weight"] = np.zeros((48, 32), np.int8)

    rewrite(folder, change)
    with pytest.raises(UserError, match="stores weights as I8; F32, BF16, F16 are supported"):
        load_params(folder, CONFIG)


def test_missing_and_broken_tokenizer(folder):
    with pytest.raises(
        UserError, match=r"no tokenizer: neither tokenizer.json nor tokenizer.model"
    ):
        load_target(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"The tokenizer in .* cannot be loaded"):
        load_target(folder)


def test_code_of_a_checkpoint_is_not_run(folder, tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    (folder / "tokenization_evil.py").write_text(code)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}})
    )
    with pytest.raises(UserError, match="cannot be loaded"):
        load_target(folder)
    assert not (tmp_path / "ran").exists()


def test_bad_options(folder):
    with pytest.raises(UserError, match="cannot be loaded so"):
        load_target(folder, dtype="float33", tokenizer=False)
    with pytest.raises(UserError, match="layer_loop"):
        load_target(folder, layer_loop="roll", tokenizer=False)


def test_header_alone_is_read_before_memory_is_checked(folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"parameters 0.00 GiB.* are free"):
        load_target(folder, tokenizer=False)


# Memory


def test_memory_plan():
    plan = memory.memory_plan(CONFIG, "bfloat16", batch=4, slots=100, width=8)
    assert plan.parameters == 2 * CONFIG.parameter_count()
    assert plan.cache == 2 * 3 * 4 * 2 * 100 * 8 * 2
    assert plan.logits == 4 * 8 * 48 * 4
    assert plan.total == plan.parameters + plan.cache + plan.logits


def test_check_fits():
    plan = memory.MemoryPlan(parameters=13 * 2**30, cache=2**30, logits=0)
    memory.check_fits(plan, None)
    memory.check_fits(plan, plan.total)
    with pytest.raises(UserError) as caught:
        memory.check_fits(plan, 8 * 2**30)
    assert str(caught.value).startswith(
        "This needs 14.00 GiB (parameters 13.00 GiB, cache 1.00 GiB) but 8.00 GiB are free:"
    )


def test_available_memory():
    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    assert memory.available_memory(Device({"bytes_limit": 100, "bytes_in_use": 30})) == 70
    assert memory.available_memory(Device(None)) is None
    if Path("/proc/meminfo").is_file():
        assert memory.available_memory() > 2**20


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
@pytest.mark.parametrize("layer_loop", ["unroll", "scan"])
def test_peak_memory_of_loading(layer_loop, tmp_path, size_mb=256):
    """benchmarks/load_memory.py measures 2 GB the same way."""
    script = runpy.run_path(str(TESTS.parent / "benchmarks/load_memory.py"))
    script["write_checkpoint"](tmp_path, size_mb * 2**20)
    result = script["measure_fresh"](tmp_path, layer_loop)
    assert result["checkpoint_bytes"] > size_mb * 2**20
    assert 1.0 <= result["peak_over_checkpoint"] < 1.3


def test_headers_are_really_what_transformers_wants(folder):
    """The metadata without which transformers refuses a file."""
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}
