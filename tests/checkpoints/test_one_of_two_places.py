"""Checkpoints that say a thing in two places: what is read, and what a conversion keeps.

The right values are transformers 5.24's, whose logits were compared for every case here.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_checkpoint import CONFIG, rewrite

from jax_specdec.checkpoints import targets as checkpoints
from jax_specdec.checkpoints.generation_config import GenerationDefaults, read_generation
from jax_specdec.checkpoints.target_bound import target_fingerprint
from jax_specdec.checkpoints.targets import (
    convert,
    default_dtype,
    load_config,
    load_params,
    load_target,
    save_pretrained,
)
from jax_specdec.errors import UserError
from jax_specdec.models import Decoder
from pallas_kernels import tuning

LLAMA = dataclasses.replace(CONFIG, num_layers=2, windows=())
TIED = dataclasses.replace(LLAMA, tied_head=True)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def tied_params():
    return Decoder(TIED, "float32").init(jax.random.key(0))


@pytest.fixture
def tied(tied_params, tmp_path):
    """A checkpoint with a tied head."""
    save_pretrained(tmp_path / "tied", TIED, tied_params, dtype="float32")
    return tmp_path / "tied"


def edit(folder, name="config.json", **keys):
    path = folder / name
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**found, **keys}))


def as_gpu(monkeypatch):
    monkeypatch.setattr(tuning, "device", lambda: tuning.Device("gpu", "some GPU"))


# The output matrix


def test_a_stored_head_that_differs_is_kept(tied, tmp_path):
    before = target_fingerprint(tied)
    head = np.full((48, 32), 0.5, np.float32)
    rewrite(tied, lambda t: t.update({HEAD: head}))
    assert not load_config(tied).tied_head
    assert not checkpoints.inspect_checkpoint(tied)[0].tied_head
    assert target_fingerprint(tied) != before
    np.testing.assert_array_equal(load_target(tied, tokenizer=False).params["head"], head.T)
    convert(tied, tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(tmp_path / "again/model.safetensors")[HEAD], head)
    with pytest.raises(UserError, match="head of its own"):
        load_params(tied, TIED)


def test_a_stored_head_that_is_the_embedding_stays_tied(tied):
    rewrite(tied, lambda t: t.update({HEAD: t[EMBED]}))
    assert load_config(tied).tied_head
    rewrite(tied, lambda t: t.update({HEAD: t[EMBED].astype(ml_dtypes.bfloat16)}))
    assert not load_config(tied).tied_head  # rounded: other values


@pytest.mark.parametrize("case", ["head alone", "without prefix", "buffers"])
def test_names_that_transformers_loads(case, tied, tied_params):
    def change(tensors):
        if case == "head alone":
            tensors[HEAD] = tensors.pop(EMBED)
        elif case == "without prefix":
            for name in list(tensors):
                tensors[name.removeprefix("model.")] = tensors.pop(name)
        else:
            names = ["model.rotary_emb.inv_freq"]
            for part in ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "k_scale", "v_scale"):
                names += [f"model.layers.{i}.self_attn.{part}" for i in range(2)]
            names += ["model.layers.0.self_attn.k_proj.k_scale"]
            tensors.update({name: np.ones(4, np.float32) for name in names})

    before = target_fingerprint(tied)
    rewrite(tied, change)
    got = load_params(tied, load_config(tied))
    jax.tree.map(np.testing.assert_array_equal, got, tied_params)
    assert target_fingerprint(tied) == before


# The dtype


def test_dtype_of_config_json_is_what_a_model_is_loaded_in(tied, tmp_path, monkeypatch):
    edit(tied, dtype="bfloat16", torch_dtype="float16")  # stored as float32
    convert(tied, tmp_path / "again")
    for folder in (tied, tmp_path / "again"):
        assert default_dtype(folder) == "float32"  # on CPU
    as_gpu(monkeypatch)
    for folder in (tied, tmp_path / "again"):
        assert default_dtype(folder) == "bfloat16"
        assert load_file(folder / "model.safetensors")[EMBED].dtype == np.float32
    edit(tied, dtype=None)
    assert default_dtype(tied) == "float16"
    edit(tied, torch_dtype="float64")
    assert default_dtype(tied) == "float32"


def test_weights_of_two_dtypes_are_converted_without_loss(tied, tmp_path):
    norm = np.full(32, 1.00001, np.float32)

    def change(tensors):
        for name in list(tensors):
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
        tensors["model.norm.weight"] = norm

    rewrite(tied, change)
    convert(tied, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    np.testing.assert_array_equal(again["model.norm.weight"], norm)
    assert {value.dtype for value in again.values()} == {np.dtype(np.float32)}


# The platform


def test_platform_is_that_of_the_default_device(tied, monkeypatch):
    """Weights are laid out for the device that kernels are traced for, whatever else the host has."""
    config = dataclasses.replace(TIED, num_layers=1, windows=())
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with jax.default_device(jax.local_devices(backend="cpu")[-1]):
        assert tuning.device().platform == "cpu"
        assert checkpoints._faster_loop(config) == "unroll"
        target = load_target(tied, tokenizer=False)
    assert target.decoder.dtype == jnp.float32 and not target.decoder.stacked_cache


# Decoding defaults

QWEN = {
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [2, 5],
    "pad_token_id": 1,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "transformers_version": "4.37.0",
}


def test_generation_config_is_read_and_kept_whole(tied, tmp_path):
    more = {
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [4, 7],
        "min_new_tokens": 2,
        "typical_p": 0.9,
        "num_beams": 1,
        "some_future_key": {"x": [1]},
    }
    (tied / "generation_config.json").write_text(json.dumps({**QWEN, **more}))
    target = load_target(tied, tokenizer=False)
    assert target.generation == GenerationDefaults(
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.05,
        no_repeat_ngram_size=3,
        min_new_tokens=2,
        suppress_tokens=(4, 7),
        others=("typical_p",),
    )
    assert target.config.eos_ids == (2, 5)
    convert(tied, tmp_path / "again")
    save_pretrained(
        tmp_path / "saved",
        target.config,
        target.params,
        dtype="float32",
        generation=target.generation,
    )
    for name in ("again", "saved"):
        written = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert written == {**QWEN, **more}


def test_generation_settings_of_config_json_count_where_there_is_no_other_file(tied, tmp_path):
    edit(tied, temperature=0.5, do_sample=True, repetition_penalty=1.3)
    assert read_generation(tied) == GenerationDefaults()
    (tied / "generation_config.json").unlink()
    found = read_generation(tied)
    assert (found.temperature, found.do_sample, found.repetition_penalty) == (0.5, True, 1.3)
    convert(tied, tmp_path / "again")
    assert read_generation(tmp_path / "again") == found


def test_end_of_text_of_config_json_counts_where_the_other_file_has_none(tied, tmp_path):
    """transformers goes on there; texts without an end are nobody's wish. The file stays as it is."""
    (tied / "generation_config.json").write_text('{"temperature": 0.6}')
    assert load_config(tied).eos_ids == (2,)
    convert(tied, tmp_path / "again")
    assert load_config(tmp_path / "again").eos_ids == (2,)
    written = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert "eos_token_id" not in written and written["temperature"] == 0.6


def test_stop_strings_and_bad_words(tied):
    edit(
        tied,
        "generation_config.json",
        stop_strings="\n",
        bad_words_ids=[[5, 6]],
        suppress_tokens=[4],
    )
    found = read_generation(tied)
    assert found.options() == {"bad_words": ((4,), (5, 6)), "stop": ("\n",)}
    assert found.unheeded(64) == ()


def test_end_of_text_ids_outside_of_the_vocabulary(tied, tmp_path):
    """None of them can come. Where no other is left, those of config.json count."""
    edit(tied, "generation_config.json", eos_token_id=[5, 99999, -1])
    said = r"The end-of-text ids \[99999, -1\] of generation_config.json are outside of the vocab"
    with pytest.warns(UserWarning, match=said):
        assert load_config(tied).eos_ids == (5,)
    edit(tied, "generation_config.json", eos_token_id=99999)
    with pytest.warns(UserWarning, match=r"\[99999\] of generation_config.json"):
        assert load_config(tied).eos_ids == (2,)
    edit(tied, "generation_config.json", eos_token_id=None)
    edit(tied, eos_token_id=48)
    with pytest.warns(
        UserWarning, match=r"\[48\] of config.json are outside of the vocabulary of 48"
    ):
        assert load_config(tied).eos_ids == ()


def test_other_end_of_text_ids_are_written(tied, tied_params, tmp_path):
    (tied / "generation_config.json").write_text(json.dumps(QWEN))
    config = dataclasses.replace(TIED, eos_ids=(9,))
    save_pretrained(
        tmp_path / "m", config, tied_params, dtype="float32", generation=read_generation(tied)
    )
    assert load_config(tmp_path / "m").eos_ids == (9,)


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("temperature", "hot", "a number, not 'hot'"),
        ("repetition_penalty", float("inf"), "a number, not inf"),
        ("top_k", 0.5, "a whole number, not 0.5"),
        ("top_k", True, "a whole number, not True"),
        ("do_sample", 1, "true or false, not 1"),
        ("suppress_tokens", [1, None], r"a list of token ids, not \[1, None\]"),
        ("suppress_tokens", 3, "a list of token ids, not 3"),
        ("bad_words_ids", [5], r"lists of token ids, not \[5\]"),
        ("bad_words_ids", [[]], r"lists of token ids, not \[\[\]\]"),
        ("stop_strings", [""], r"a list of texts, not \[''\]"),
    ],
)
def test_bad_generation_settings(key, value, expected, tied):
    edit(tied, "generation_config.json", **{key: value})
    with pytest.raises(UserError, match=f"generation_config.json must give {key} as {expected}"):
        load_target(tied, tokenizer=False)
