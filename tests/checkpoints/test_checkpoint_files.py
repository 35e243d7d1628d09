"""Checkpoint folders: damaged indices, what is fetched, tokenizers, replacing what is there."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_checkpoint import rewrite
from test_one_of_two_places import EMBED, HEAD, LLAMA, as_gpu, edit

from jax_specdec.checkpoints import targets as checkpoints
from jax_specdec.checkpoints import tokenizer_files
from jax_specdec.checkpoints.hub import find_checkpoint
from jax_specdec.checkpoints.targets import (
    convert,
    load_config,
    load_target,
    load_tokenizer,
    save_pretrained,
)
from jax_specdec.errors import RunError, UserError
from jax_specdec.models import Decoder
from jax_specdec.text.chat import chat_text


@pytest.fixture(scope="module")
def params():
    return Decoder(LLAMA, "float32").init(jax.random.key(0))


@pytest.fixture
def folder(params, tmp_path):
    save_pretrained(tmp_path / "model", LLAMA, params, dtype="float32")
    return tmp_path / "model"


# Tensors


@pytest.mark.parametrize(
    "where", [None, ["model.safetensors"], {EMBED: 3}, {EMBED: None}, {EMBED: "../x.safetensors"}]
)
def test_bad_weight_map(where, folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UserError, match="must map tensors to files beside it"):
        load_target(folder, tokenizer=False)


def test_the_index_says_which_of_two_files_holds_a_tensor(params, tmp_path):
    path = tmp_path / "m"
    save_pretrained(path, LLAMA, params, dtype="float32", max_shard_bytes=9000)
    where = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    for name in set(where.values()) - {where["model.norm.weight"]}:
        tensors = load_file(path / name)
        tensors["model.norm.weight"] = np.zeros(32, np.float32)
        save_file(tensors, path / name)
    got = load_target(path, tokenizer=False).params["norm"]
    np.testing.assert_array_equal(got, params["norm"])


@pytest.mark.parametrize("config_only", [False, True])
def test_quantized_weights_are_called_that(config_only, folder):
    """NVIDIA's tools write hf_quant_config.json and leave config.json as it was."""

    def change(tensors):
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            if config_only:
                tensors.pop(name)
                continue
            tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
            tensors[name.replace("weight", "weight_scale")] = np.ones(1, np.float32)

    rewrite(folder, change)
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UserError, match="is quantized, which is not supported") as caught:
        load_target(folder, tokenizer=False)
    assert str(caught.value).count("model.layers.") == 3
    assert len(str(caught.value)) < 400 + len(str(folder))


def test_a_model_inside_another_one_is_called_that(folder, monkeypatch):
    def change(tensors):
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)

    rewrite(folder, change)
    message = r"inside another one, under language_model\.model\.\*"
    with pytest.raises(UserError, match=message) as caught:
        load_target(folder, tokenizer=False)
    assert str(caught.value).count(".layers.") <= 3
    as_gpu(monkeypatch)
    edit(folder, dtype=None)
    with pytest.raises(UserError, match=f"lacks {EMBED}"):
        load_target(folder, tokenizer=False)


def test_lists_of_tensors_do_not_grow_with_depth(folder):
    rewrite(folder, lambda t: t.update({f"x.{i}": np.ones(1) for i in range(1000)}))
    with pytest.raises(UserError, match=r"unexpected x\.0; .*and 968 more") as caught:
        load_target(folder, tokenizer=False)
    assert len(str(caught.value)) < 1000 + len(str(folder))


# The hub


def test_what_is_fetched(monkeypatch, tmp_path):
    """One form of the weights, all of the tokenizer, and shards by the names in the index."""
    hub = pytest.importorskip("huggingface_hub")
    files = [
        "config.json",
        "model.safetensors.index.json",
        "first.safetensors",
        "consolidated.safetensors",
        "original/model.safetensors",
        "onnx/decoder.json",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
    ]

    def download(name, *, allow_patterns):
        for file in hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text('{"weight_map": {"x": "first.safetensors"}}')
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert find_checkpoint("some/model") == tmp_path
    got = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert got == {
        *("config.json", "model.safetensors.index.json", "first.safetensors"),
        *("tokenizer.json", "vocab.json", "merges.txt"),
    }


# Tokenizers


def test_vocabulary_and_merges_are_a_tokenizer(tmp_path):
    pytest.importorskip("transformers")
    words = {w: i for i, w in enumerate(["<|endoftext|>", "a", "b", "Ġ", "ab", "Ġa"])}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)  # of what kind?
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert load_tokenizer(tmp_path)("ab a")["input_ids"] == [4, 5]


@pytest.mark.parametrize(
    "first, message", [(b"\n\x0e\n", "sentencepiece"), (b"IQ== 0\n", "tiktoken")]
)
def test_the_package_that_a_tokenizer_needs_is_named(first, message, monkeypatch, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(first)
    monkeypatch.setattr(tokenizer_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


class Tokenizer:
    """As far as chat templates go, transformers' own."""

    def __init__(self, template):
        self.chat_template = template

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        import jinja2

        def stop(message):
            raise jinja2.TemplateError(message)

        if isinstance(self.chat_template, dict):
            raise ValueError("This model has multiple chat templates with no default specified!")
        template = jinja2.Environment().from_string(self.chat_template)
        return template.render(messages=messages, raise_exception=stop)


def test_chat_templates():
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    assert chat_text(Tokenizer(plain), " Hi ") == "<user> Hi <assistant>"
    parts = plain.replace("m.content", "m.content[0].text")
    assert chat_text(Tokenizer(parts), "Hi") == "<user>Hi<assistant>"
    looped = "{% for p in messages[0].content %}{{ p.text }}{% endfor %}!"
    assert chat_text(Tokenizer(looped), "Hi") == "Hi!"  # silently empty for plain text
    for template, message in (
        (None, "no chat template: leave out --chat"),
        ("nothing of it", "leaves out what the user says"),
        ("{{ raise_exception('roles must alternate') }}", "fails: roles must alternate"),
        ("{{ messages.x.y }}", "fails: "),
        ({"tool_use": plain}, "fails: This model has multiple chat templates"),
    ):
        with pytest.raises(UserError, match=message):
            chat_text(Tokenizer(template), "Hi")


# Replacing what is there


def test_convert_stays_in_host_memory(folder, tmp_path, monkeypatch):
    def put(*args):
        raise AssertionError("on the device")

    monkeypatch.setattr(checkpoints.layouts, "put", put)
    monkeypatch.setattr(jax, "device_put", put)
    convert(folder, tmp_path / "again")
    assert (
        load_file(tmp_path / "again/model.safetensors").keys()
        == load_file(folder / "model.safetensors").keys()
    )
    monkeypatch.setattr(checkpoints, "host_memory", lambda: 1000)
    with pytest.raises(UserError, match="are free"):
        convert(folder, tmp_path / "again")


def test_convert_into_the_current_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(folder, ".")
    assert load_config(tmp_path / "here") == LLAMA
    convert(".", "../here")
    assert load_config(tmp_path / "here") == LLAMA
    with pytest.raises(UserError, match="cannot be written as a checkpoint"):
        convert(folder, "/")


@pytest.mark.parametrize("fails_at", range(1, 7))
def test_a_replacement_that_fails_half_way_is_undone(fails_at, folder, params, monkeypatch):
    """Old weights stay until the new ones are in place."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real, calls = Path.rename, []

    def rename(self, target):
        calls.append(self)
        if len(calls) == fails_at:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RunError, match=r"could not be written: .*Input/output"):
        save_pretrained(folder, LLAMA, params, dtype="bfloat16")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_whoever_is_killed_while_replacing_loses_nothing(folder, params, monkeypatch):
    real = Path.rename

    def rename(self, target):
        if self.name == "model.safetensors" and target.parent == folder:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(folder, LLAMA, params, dtype="bfloat16")
    (old,) = [path for path in folder.parent.iterdir() if path.name.endswith(".old")]
    assert HEAD in load_file(old / "model.safetensors")


def test_an_old_tokenizer_is_not_mixed_with_a_new_one(folder, params, tmp_path):
    (folder / "chat_template.jinja").write_text("old")
    (folder / "notes.txt").write_text("mine")
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    save_pretrained(folder, LLAMA, params, dtype="float32", tokenizer=source)
    assert not (folder / "chat_template.jinja").exists()
    assert (folder / "notes.txt").exists() and (folder / "tokenizer.json").exists()
