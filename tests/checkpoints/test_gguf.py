"""GGUF files: every type, the model and the tokenizer in one, and what is no such file."""

import dataclasses
import json
import struct
import sys

import numpy as np
import pytest
from small_checkpoint import CONFIG, QWEN, assert_trees_equal, write_random

from jax_specdec.checkpoints import gguf_file
from jax_specdec.checkpoints.gguf_file import open_gguf, row_view
from jax_specdec.checkpoints.gguf_model import open_gguf_tensors, read_config
from jax_specdec.checkpoints.hub import find_checkpoint
from jax_specdec.checkpoints.target_bound import target_fingerprint
from jax_specdec.checkpoints.targets import (
    convert,
    inspect_checkpoint,
    load_config,
    load_target,
    load_tokenizer,
)
from jax_specdec.cli import main
from jax_specdec.errors import UserError

gguf = pytest.importorskip("gguf")
from gguf_files import finish, write_gguf  # noqa: E402

KINDS = gguf.GGMLQuantizationType
QWEN3 = dataclasses.replace(CONFIG, family="qwen3", qk_norm=True)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoints, tmp_path_factory):
    """The tiny target with its tokenizer as one file, and its folder."""
    folder = tiny_checkpoints / "target"
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, folder, tokenizer=load_tokenizer(folder)), folder


def model(tmp_path, config=CONFIG, name="model", **options):
    """A random model as a folder and as a file."""
    folder = write_random(tmp_path / name, config)
    return folder, write_gguf(tmp_path / f"{name}.gguf", folder, **options)


# Tensors


@np.errstate(all="ignore")  # random bytes are scales of any size, too
def test_every_type_is_the_packages(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "types.gguf"
    writer, want = gguf.GGUFWriter(path, "llama"), {}
    for kind in KINDS:
        _block, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            raw = rng.integers(0, 256, (5, 2 * size), np.uint8)
            want[kind.name] = gguf.dequantize(raw, kind)
        except NotImplementedError:
            continue
        writer.add_tensor(kind.name, raw, raw_dtype=kind)
    finish(writer)
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"} < want.keys()
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0"} < want.keys()
    file, order = open_gguf(path), np.array([4, 0, 2, 1, 3])
    for name, values in want.items():
        view = row_view(file, name)
        assert view.get_shape() == list(values.shape)
        assert view.get_dtype() == (name if name in ("F16", "BF16") else "F32")
        for got, part in (
            (view[1:4], values[1:4]),
            (view[(slice(0, 2), slice(3, 9))], values[:2, 3:9]),
            (row_view(file, name, order)[1:4], values[[0, 2, 1]]),
        ):
            np.testing.assert_array_equal(got.astype(np.float32), part, name)


@pytest.mark.parametrize("config", [CONFIG, QWEN, QWEN3], ids=lambda c: c.family)
def test_a_file_is_its_folder(config, tmp_path):
    """Rows of Llama's q and k lie in another order there; a tied head is not stored."""
    folder, path = model(tmp_path, config)
    got, want = (load_target(p, tokenizer=False) for p in (path, folder))
    assert got.config == want.config == config and got.path == path
    assert_trees_equal(got.params, want.params)
    assert target_fingerprint(path) == target_fingerprint(folder)


def test_quantized_tensors_become_what_they_stand_for(tmp_path, capsys):
    names = {
        "model.embed_tokens.weight": KINDS.Q8_0,
        "model.layers.1.self_attn.k_proj.weight": KINDS.Q4_1,
        "model.layers.0.mlp.gate_proj.weight": KINDS.BF16,
    }
    folder, path = model(tmp_path, change=names)
    got, want = (load_target(p, tokenizer=False).params for p in (path, folder))
    change = np.abs(got["embed"] - want["embed"]).max()
    assert 0 < change < 0.01 * np.abs(want["embed"]).max()
    convert(path, tmp_path / "again")
    assert_trees_equal(load_target(tmp_path / "again", tokenizer=False).params, got)
    assert inspect_checkpoint(path) == (CONFIG, "float32")
    assert main(["info", "--model", str(path), "--max-new-tokens", "8"]) == 0
    assert "stored as F32, BF16, Q4_1, Q8_0, read as float32" in capsys.readouterr().out


def test_scaled_frequencies(tmp_path):
    """Llama 3's are stored as the divisors that follow from its scaling."""
    long = dataclasses.replace(CONFIG, head_dim=64)
    folder, _ = model(tmp_path, long, "plain")
    path = write_gguf(
        tmp_path / "x.gguf",
        folder,
        more=[("llama.rope.scaling.type", "linear"), ("llama.rope.scaling.factor", 4.0)],
    )
    assert (load_config(path).rope.kind, load_config(path).rope.factor) == ("linear", 4.0)
    scaling = {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 16.0, "yarn_ext_factor": 1.0}
    more = [(f"llama.rope.scaling.{key}", value) for key, value in scaling.items()]
    rope = load_config(write_gguf(tmp_path / "yarn.gguf", folder, more=more)).rope
    assert (rope.kind, rope.beta_fast, rope.beta_slow) == ("yarn", 16.0, 1.0)
    hf = json.loads((folder / "config.json").read_text())
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    (folder / "config.json").write_text(json.dumps({**hf, "rope_parameters": rope}))
    for scale, message in ((1.0, None), (1.1, "rope_freqs.weight")):
        divisors = [divisor(10_000.0 ** -(i / 32)) * scale for i in range(32)]
        path = with_tensor(folder, tmp_path / f"{scale}.gguf", "rope_freqs.weight", divisors)
        if message is None:
            assert load_config(path) == load_config(folder)
            assert load_target(path, tokenizer=False).config.rope.kind == "llama3"
            continue
        with pytest.raises(UserError, match=message):
            load_config(path)


def divisor(frequency):
    """As llama.cpp's converter writes it."""
    length, low, high = 2 * np.pi / frequency, 8192 / 1.0, 8192 / 4.0
    if length < high:
        return 1.0
    if length > low:
        return 8.0
    smooth = (8192 / length - 1.0) / (4.0 - 1.0)
    return 1 / ((1 - smooth) / 8.0 + smooth)


def with_tensor(folder, path, name, values):
    real = gguf.GGUFWriter.write_header_to_file

    def more(writer):
        writer.add_tensor(name, np.array(values, np.float32))
        real(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", more)
        return write_gguf(path, folder)


# Where they are found


def test_a_folder_with_one_file(tmp_path):
    folder, path = model(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    path.rename(home / "a.gguf")
    assert find_checkpoint(home) == home / "a.gguf" == find_checkpoint(home / "a.gguf")
    (home / "b.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"several GGUF files; name one, as .*a.gguf"):
        find_checkpoint(home)
    (folder / "a.gguf").write_bytes(b"")
    assert find_checkpoint(folder) == folder, "which has weights of its own"


def test_a_file_of_another_name(tmp_path):
    _, path = model(tmp_path)
    other = path.rename(tmp_path / "sha256-abc")
    assert load_target(other, tokenizer=False).config == CONFIG
    with pytest.raises(UserError, match=r"There is no file .*model.gguf"):
        load_target(path)


def test_files_of_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: f"/hub/{name}/{file}")
    files = ["README.md", "x-Q4_0.gguf"]
    monkeypatch.setattr(hub, "list_repo_files", lambda name: files)
    assert str(find_checkpoint("org/x")) == "/hub/org/x/x-Q4_0.gguf"
    assert str(find_checkpoint("org/x/some/x-Q8_0.gguf")) == "/hub/org/x/some/x-Q8_0.gguf"
    files.append("x-Q8_0.gguf")
    with pytest.raises(UserError, match="org/x holds several GGUF files; name one"):
        find_checkpoint("org/x")


# What is refused


def test_without_the_package(tmp_path, monkeypatch):
    gguf_file._package.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"pip install 'jax-specdec\[gguf\]'"):
        load_target(tmp_path / "x.gguf")
    gguf_file._package.cache_clear()


def test_every_truncation_is_refused(tiny, tmp_path):
    whole = tiny[0].read_bytes()
    start = min(tensor.start for tensor in open_gguf(tiny[0]).tensors.values())
    path = tmp_path / "x.gguf"
    for size in (*range(0, start, 97), start - 1, start, len(whole) // 2):
        path.write_bytes(whole[:size])
        gguf_file._open.cache_clear()
        with pytest.raises(UserError, match=r"truncated or damaged|no GGUF"):
            open_gguf(path)


@pytest.mark.filterwarnings("ignore:The end-of-text ids")
def test_forged_headers_are_refused_or_read(tmp_path):
    """No other error, no endless loop and no huge allocation, whatever a byte says."""
    _, good = model(tmp_path, dataclasses.replace(CONFIG, num_layers=1, windows=()))
    whole = good.read_bytes()
    start = min(tensor.start for tensor in open_gguf(good).tensors.values())
    path, refused = tmp_path / "x.gguf", 0
    for at in range(0, start, 3):
        forged = bytearray(whole)
        forged[at] ^= 0xFF
        path.write_bytes(forged)
        gguf_file._open.cache_clear()  # it goes by the time of the file's change
        try:
            read_config(path)
            open_gguf_tensors(path)
        except UserError as error:
            refused += 1
            assert len(str(error)) < 500 + len(str(path))
    assert refused > start / 6


def patched(path, out, at, form, value):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, value)
    out.write_bytes(data)
    return out


@pytest.mark.parametrize(
    ("at", "form", "value", "message"),
    [
        (0, "<I", 0, "no GGUF file"),
        (4, "<I", 1, "GGUF of version 1; versions 2 and 3"),
        (4, "<I", 4, "GGUF of version 4; versions 2 and 3"),
        (4, ">I", 3, "GGUF of big-endian numbers"),
        (8, "<Q", 2**40, "a count is 1099511627776"),
        (16, "<Q", 2**63, "a count is"),
        (24, "<Q", 2**62, "bytes are wanted at"),
    ],
)
def test_forged_numbers(tiny, tmp_path, at, form, value, message):
    path = patched(tiny[0], tmp_path / "x.gguf", at, form, value)
    with pytest.raises(UserError, match=message):
        load_target(path)


def test_unknown_types(tmp_path):
    _, good = model(tmp_path)
    data = good.read_bytes()
    # Behind a tensor's name: the number of axes, both of them, the type.
    at = data.index(b"token_embd.weight") + 17 + 4 + 16
    for number in (gguf.GGMLQuantizationType.Q8_K, 250):
        path = patched(good, tmp_path / "x.gguf", at, "<I", number)
        with pytest.raises(UserError, match=f"in a type, number {int(number)}, that"):
            load_target(path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([("llama.attention.sliding_window", 8)], "has a window"),
        ([("llama.attention.value_length", 4)], "another size than its keys"),
        ([("split.count", 3)], "join them with"),
        ([("llama.rope.scaling.type", "spiral")], "'spiral' are not supported"),
        ([("llama.rope.scaling.attn_factor", 1.5)], "rope.scaling.attn_factor '1.5'"),
    ],
)
def test_models_that_are_not_supported(tmp_path, more, message):
    _, path = model(tmp_path, more=more)
    with pytest.raises(UserError, match=message):
        load_target(path, tokenizer=False)


def test_other_architectures(tmp_path):
    path = tmp_path / "x.gguf"
    finish(gguf.GGUFWriter(path, "rwkv7"))
    with pytest.raises(UserError, match=r"architecture 'rwkv7', .* supported are llama, qwen2"):
        load_target(path)
