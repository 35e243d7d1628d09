"""What cannot be loaded is refused in one sentence."""

import json

import numpy as np
import pytest
from small_checkpoint import CONFIG, random_params, rewrite

from jax_specdec.checkpoints import targets as checkpoints
from jax_specdec.checkpoints.hub import HUB_PATTERNS, fetch_config
from jax_specdec.checkpoints.targets import convert, load_params, load_target, save_pretrained
from jax_specdec.errors import UserError
from jax_specdec.models import config_to_hf


def test_no_such_folder(tmp_path):
    for load in (load_target, checkpoints.load_config):
        with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
            load(tmp_path / "nowhere")


def test_a_file_is_no_folder(folder):
    with pytest.raises(
        UserError, match=r"model.safetensors is a file and no GGUF; name the folder"
    ):
        load_target(folder / "model.safetensors")


def test_hub(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(name, *, allow_patterns):
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert load_target("someone/some-model", tokenizer=False).path == folder
    assert asked == {"someone/some-model": list(HUB_PATTERNS)}

    def fail(name, **kwargs):
        raise ConnectionError("Name or service not known\n\nlong explanation")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"someone/x is no folder here and .* not known$"):
        load_target("someone/x")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            "LocalEntryNotFoundError",
            "the Hugging Face hub cannot be reached: .*`hf download org/x`",
        ),
        ("OfflineModeIsEnabled", "the Hugging Face hub cannot be reached: .*HF_HUB_OFFLINE"),
        ("RepositoryNotFoundError", "the Hugging Face hub has no such model, or a private one"),
        ("GatedRepoError", "the hub gives it only to those it knows: ask on its page"),
    ],
)
def test_why_a_model_of_the_hub_is_not_here(kind, sentence, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def fail(name, *args, **kwargs):
        raise getattr(errors, kind).__new__(getattr(errors, kind), "long explanation")

    for function, load in (
        ("snapshot_download", load_target),
        ("hf_hub_download", fetch_config),
    ):
        monkeypatch.setattr(huggingface_hub, function, fail)
        with pytest.raises(UserError, match=f"org/x is no folder here and {sentence}") as caught:
            load("org/x")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("dtype", ["int32", "int4", "float8_e4m3fn", "float64", bool, 5, "x" * 500])
def test_other_dtypes(folder, dtype, tmp_path):
    """Before anything is read, and before anything is written."""
    for use in (
        lambda: load_target(folder, dtype=dtype),
        lambda: convert(folder, tmp_path / "out", dtype=dtype),
        lambda: save_pretrained(tmp_path / "out", CONFIG, {}, dtype=dtype),
    ):
        with pytest.raises(UserError, match="dtype must be float32, bfloat16 or flo") as caught:
            use()
        assert len(str(caught.value)) < 200 and not (tmp_path / "out").exists()


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": None}, "does not say what model it is of"),
        ({"rms_norm_eps": "1e-5"}, "must give rms_norm_eps as a number"),
        ({"rope_parameters": "x"}, "must give rope_parameters as an object"),
    ],
)
def test_values_of_another_type(folder, values, message):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises(UserError, match=message):
        load_target(folder)


def test_out_is_a_file(folder, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file: name a folder"):
        checkpoints.convert(folder, tmp_path / "out")
    assert (tmp_path / "out").read_text() == ""


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
    (folder / "config.json").write_text(json.dumps({**hf, "model_type": "bloom"}))
    with pytest.raises(UserError, match="'bloom' are not supported; supported are llama, mistral"):
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
    with pytest.raises(UserError, match=r"The tokenizer in .* cannot be loaded: its files are not"):
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
