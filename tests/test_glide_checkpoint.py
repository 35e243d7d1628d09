"""Saving, loading and importing GliDe drafters, and every bad input."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_specdec import UserError, load_drafter, load_target
from jax_specdec.checkpoints.glide import (
    from_decoder,
    load_glide,
    load_own_params,
    read_glide_config,
    save_glide,
    target_fingerprint,
)
from jax_specdec.checkpoints.import_glide import import_glide
from jax_specdec.checkpoints.targets import convert, save_pretrained
from jax_specdec.drafters.registry import longest as longest_draft
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig


@pytest.fixture(scope="module")
def target(tiny_checkpoints):
    return load_target(tiny_checkpoints / "target", dtype="float32")


def shape_of(target, **fields):
    names = ("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim")
    return GliDeConfig(**{name: getattr(target.config, name) for name in names} | fields)


@pytest.fixture
def folder(target, tmp_path):
    """A saved drafter of two layers."""
    model = GliDe(shape_of(target, num_layers=2, target_layers=(0, 2)), target.config)
    params = model.init(jax.random.key(0))
    save_glide(tmp_path / "glide", model, params, target_fingerprint(target.path))
    return tmp_path / "glide"


def edit_config(folder, **changes):
    path = folder / "config.json"
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in found.items() if v != "absent"}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"share": False},
        {"hidden_size": 32},
        {"cross_attention": False},
        {"hidden_size": 32, "hidden_input": True},
        {"hidden_input": True, "hidden_delays": 4},
    ],
)
def test_round_trip(target, tmp_path, fields):
    model = GliDe(shape_of(target, **fields), target.config, "bfloat16")
    params = model.init(jax.random.key(1))
    fingerprint = target_fingerprint(target.path)
    save_glide(tmp_path / "g", model, params, fingerprint, max_shard_bytes=20_000)
    assert len(list((tmp_path / "g").glob("model-*.safetensors"))) > 1
    config, trained_for = read_glide_config(tmp_path / "g")
    assert (config, trained_for) == (model.config, fingerprint)
    assert_equal(load_own_params(tmp_path / "g", model), params)
    loaded, joined = load_glide(tmp_path / "g", target)
    assert loaded.config == model.config and loaded.dtype == jnp.float32
    assert (joined["embed"] is target.params["embed"]) == model.config.share


def test_loading_by_name(target, folder):
    loaded = load_drafter("glide:4", target, drafts={"glide": folder})
    assert (loaded.spec, loaded.drafter.name, loaded.drafter.info.depth) == ("glide:4", "glide", 4)
    assert loaded.params["glide"]["head"] is target.params["head"]
    with pytest.raises(UserError, match="trained for at most 16: draft 16 tokens or fewer"):
        load_drafter("glide:17", target, drafts={"glide": folder})
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere"):
        load_drafter("glide", target, drafts={"glide": folder / "nowhere"})


def test_lengths_that_nobody_gave_stop_at_the_trained_delay(target, folder):
    edit_config(folder, trained_delay=2)
    drafts = {"glide": folder}
    assert load_drafter("glide", target, drafts=drafts).spec == "glide:2"
    loaded = load_drafter("glide+tree", target, drafts=drafts)
    assert (loaded.spec, loaded.longest) == ("glide:2+tree:9", 2)
    with pytest.raises(UserError, match="trained for at most 2"):
        load_drafter("glide:3", target, drafts=drafts)
    edit_config(folder, trained_delay=2, cross_attention=False)
    assert longest_draft("glide", folder) == longest_draft("lm", folder) == 63


def test_a_fingerprint_is_of_the_weights_and_not_of_their_dtype(target, tmp_path):
    want = target_fingerprint(target.path)
    convert(target.path, tmp_path / "narrow", dtype="bfloat16", max_shard_bytes=50_000)
    assert target_fingerprint(tmp_path / "narrow") == want
    edit_config(tmp_path / "narrow", max_position_embeddings=128, eos_token_id=5)
    assert target_fingerprint(tmp_path / "narrow") == want
    edit_config(tmp_path / "narrow", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    assert target_fingerprint(tmp_path / "narrow") != want
    layers = [dict(block) for block in target.params["layers"]]
    layers[1]["down"] = layers[1]["down"] * 1.1
    params = {**target.params, "layers": tuple(layers)}
    save_pretrained(tmp_path / "tuned", target.config, params, dtype="float32")
    assert target_fingerprint(tmp_path / "tuned") != want


def test_a_drafter_of_another_target_is_refused(target, folder):
    edit_config(folder, target="0" * 64)
    with pytest.raises(UserError, match="was trained for another target than the model in"):
        load_glide(folder, target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "holds no GliDe drafter"),
        ({"target": "absent"}, "does not say which target"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"num_layers": "absent", "hidden_size": "absent"}, "hidden_size"),
        ({"width": 3}, "unexpected keyword argument 'width'"),
        ({"target_layers": [0, 9]}, "not among the target's 3 layers"),
        ({"hidden_size": 32}, r"norm has shape \(64,\) instead of \(32,\)"),
        ({"cross_norm": False}, "unexpected layers.0.cross.norm"),
    ],
)
def test_configurations_that_are_refused(target, folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_glide(folder, target)


def test_damaged_files(target, folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        load_glide(folder, target)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="truncated or damaged"):
        load_glide(folder, target)
    path.write_bytes(whole)

    def change(tensors):
        tensors["layers.1.cross.out"] = tensors["layers.1.cross.out"].T.copy()[:-1]
        tensors["layers.2.qkv"] = tensors["layers.1.qkv"].copy()
        del tensors["layers.0.down"]

    edit_tensors(folder, change)
    with pytest.raises(UserError) as error:
        load_glide(folder, target)
    for part in (
        "missing layers.0.down",
        "unexpected layers.2.qkv",
        "layers.1.cross.out has shape (63, 64) instead of (64, 64)",
    ):
        assert part in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_glide(folder, target)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_glide(folder, target)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(UserError, match="it has no config"):
        load_glide(folder, target)


# Drafters of other projects


def matrices(rng, shapes):
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def llama_block(prefix, embed, mlp, heads, kv_heads, dim):
    return {
        f"{prefix}self_attn.q_proj.weight": (heads * dim, embed),
        f"{prefix}self_attn.k_proj.weight": (kv_heads * dim, embed),
        f"{prefix}self_attn.v_proj.weight": (kv_heads * dim, embed),
        f"{prefix}self_attn.o_proj.weight": (embed, heads * dim),
        f"{prefix}mlp.gate_proj.weight": (mlp, embed),
        f"{prefix}mlp.up_proj.weight": (mlp, embed),
        f"{prefix}mlp.down_proj.weight": (embed, mlp),
        f"{prefix}input_layernorm.weight": (embed,),
    }


def glide_tensors(target, rng):
    """As GliDe saves a drafter of two layers of 48 with 3 heads."""
    c = target.config
    width = c.num_heads * c.head_dim
    shapes = {"model.embed_tokens.weight": (c.vocab_size, 48), "model.norm.weight": (48,)}
    shapes |= {"lm_head.weight": (c.vocab_size, 48)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= llama_block(prefix, 48, 40, 3, 3, 16)
        shapes |= {
            f"{prefix}post_attention_layernorm.weight": (48,),
            f"{prefix}cross_attn.q_proj.weight": (width, 48),
            f"{prefix}cross_attn.o_proj.weight": (48, width),
            f"{prefix}cross_attn.rotary_emb.inv_freq": (8,),
        }
    return matrices(rng, shapes)


def longspec_tensors(target, rng, bias):
    c = target.config
    width, small = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = llama_block(
        "glide.", c.hidden_size, c.mlp_size, c.num_heads, c.num_kv_heads, c.head_dim
    )
    for place in ("self", "cross"):
        shapes[f"glide.post_{place}_attention_layernorm.weight"] = (c.hidden_size,)
    shapes |= {
        "glide.cross_attn.q_proj.weight": (width, c.hidden_size),
        "glide.cross_attn.o_proj.weight": (c.hidden_size, width),
        "glide.cross_attn.k_proj.weight": (small, c.hidden_size),
        "glide.cross_attn.v_proj.weight": (small, c.hidden_size),
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
    }
    if bias:
        for place in ("self", "cross"):
            for name, size in (("q", width), ("k", small), ("v", small)):
                shapes[f"glide.{place}_attn.{name}_proj.bias"] = (size,)
    return matrices(rng, shapes)


def write(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


GLIDE_CONFIG = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "block_size": 6,
}


def test_import_of_glide(target, tmp_path):
    tensors = glide_tensors(target, np.random.default_rng(0))
    model, params = import_glide(write(tmp_path / "g", tensors, **GLIDE_CONFIG), target)
    c = model.config
    assert (c.num_layers, c.head_dim, c.trained_delay) == (2, 16, 6)
    assert (c.cross_norm, c.final_norm, c.share) == (False, True, False)
    layer, prefix = params["layers"][1], "model.layers.1."
    parts = [tensors[f"{prefix}self_attn.{x}_proj.weight"].T for x in "qkv"]
    np.testing.assert_array_equal(layer["qkv"], np.concatenate(parts, axis=1))
    gate_up = [tensors[f"{prefix}mlp.{x}_proj.weight"].T for x in ("gate", "up")]
    np.testing.assert_array_equal(layer["gate_up"], np.concatenate(gate_up, axis=1))
    np.testing.assert_array_equal(
        layer["mlp_norm"], tensors[f"{prefix}post_attention_layernorm.weight"]
    )
    for name, ours in (("q", "q"), ("o", "out")):
        want = tensors[f"{prefix}cross_attn.{name}_proj.weight"].T
        np.testing.assert_array_equal(layer["cross"][ours], want)
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("bias", [False, True])
def test_import_of_longspec(target, tmp_path, bias):
    tensors = longspec_tensors(target, np.random.default_rng(1), bias)
    model, params = import_glide(write(tmp_path / "g", tensors), target)
    c = model.config
    assert (c.cross_norm, c.final_norm, c.share, c.qkv_bias) == (True, False, True, bias)
    assert (c.window, c.trained_delay) == (512, 4)
    assert set(params) == {"layers"}
    (layer,) = params["layers"]
    for ours, theirs in (
        (layer["attention_norm"], "input_layernorm"),
        (layer["cross"]["norm"], "post_self_attention_layernorm"),
        (layer["mlp_norm"], "post_cross_attention_layernorm"),
    ):
        np.testing.assert_array_equal(ours, tensors[f"glide.{theirs}.weight"])
    want = tensors["glide.cross_attn.q_proj.weight"].T
    np.testing.assert_array_equal(layer["cross"]["q"], want)
    if bias:
        parts = [tensors[f"glide.self_attn.{x}_proj.bias"] for x in "qkv"]
        np.testing.assert_array_equal(layer["qkv_bias"], np.concatenate(parts))
        bias = tensors["glide.cross_attn.q_proj.bias"]
        np.testing.assert_array_equal(layer["cross"]["q_bias"], bias)


def test_imports_that_are_refused(target, tmp_path):
    tensors = glide_tensors(target, np.random.default_rng(0))
    with pytest.raises(UserError, match="num_attention_heads"):
        import_glide(write(tmp_path / "a", tensors, hidden_size=48), target)
    name = "model.layers.0.cross_attn.q_proj.weight"
    wrong = tensors | {name: tensors[name][:-16]}
    with pytest.raises(UserError, match=r"cross_attn.q_proj.weight has shape \(48, 48\)"):
        import_glide(write(tmp_path / "b", wrong, **GLIDE_CONFIG), target)
    only = {"model.norm.weight": tensors["model.norm.weight"]}
    with pytest.raises(UserError, match="neither GliDe nor LongSpec"):
        import_glide(write(tmp_path / "c", only), target)


def test_shapes_that_are_refused():
    good = {"hidden_size": 8, "mlp_size": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 2}
    config = GliDeConfig(**good)
    for change in (
        {"head_dim": 3},
        {"num_kv_heads": 3},
        {"num_kv_heads": 0},
        {"window": 0},
        {"trained_delay": 0},
        {"target_layers": (1, 2)},
    ):
        with pytest.raises(ValueError):
            dataclasses.replace(config, **change)


# Beginning as a decoder


def test_a_drafter_that_begins_as_a_decoder_drafts_as_it(target, tiny_checkpoints):
    """Cross-attention adds nothing at first, whatever it reads."""
    small = load_target(tiny_checkpoints / "lm", dtype="float32")
    model, own = from_decoder(small, target, jax.random.key(0), target_layers=(1,))
    assert not model.config.share
    assert model.config.target_layers == (1,)
    tokens = jnp.asarray([[3, 7, 1, 9, 4]])
    place = jnp.arange(5)[None]
    want = small.decoder.apply(small.params, tokens, place).logits
    got = model.apply(own, tokens, place, lambda q, layer: jnp.ones_like(q)).logits
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_drafter_cannot_begin_as_any_decoder(target, tiny_checkpoints):
    small = load_target(tiny_checkpoints / "lm", dtype="float32")
    key = jax.random.key(0)
    with pytest.raises(UserError, match=r"has num_layers 1, and .* cannot have 2"):
        from_decoder(small, target, key, num_layers=2)
    with pytest.raises(UserError, match="'nonsense'"):
        from_decoder(small, target, key, nonsense=1)
    other = dataclasses.replace(small.config, norm_eps=1e-3)
    other = dataclasses.replace(small.decoder, config=other)
    with pytest.raises(UserError, match=r"has norm_eps 0\.001, and a GliDe drafter"):
        from_decoder(dataclasses.replace(small, decoder=other), target, key)
