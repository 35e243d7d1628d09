"""Checkpoints of Medusa's heads: round trips, damage, and the import of others'."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_specdec import UserError, load_drafter, load_target
from jax_specdec.checkpoints.import_medusa import import_medusa, is_medusa
from jax_specdec.checkpoints.medusa import (
    load_medusa,
    read_medusa_config,
    save_medusa,
)
from jax_specdec.checkpoints.target_bound import read_own, target_fingerprint
from jax_specdec.drafters.registry import longest as longest_draft
from jax_specdec.models.medusa import Medusa, MedusaConfig


@pytest.fixture(scope="module")
def target(tiny_checkpoints):
    return load_target(tiny_checkpoints / "target", dtype="float32")


ACCURACIES = ((0.5, 0.25, 0.125), (0.25, 0.125, 0.0625))


@pytest.fixture
def folder(target, tmp_path):
    model = Medusa(MedusaConfig(2), target.config)
    own = model.init(target.params)
    save_medusa(tmp_path / "medusa", model, own, target_fingerprint(target.path), ACCURACIES)
    return tmp_path / "medusa"


def edit_config(folder, **changes):
    path = folder / "config.json"
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in found.items() if v != "absent"}))


@pytest.mark.parametrize("share", [False, True])
def test_round_trip(target, tmp_path, share):
    model = Medusa(MedusaConfig(3, num_layers=2, share=share), target.config, "bfloat16")
    rng = np.random.default_rng(0)
    own = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), model.shapes())
    fingerprint = target_fingerprint(target.path)
    save_medusa(tmp_path / "m", model, own, fingerprint, max_shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    assert read_medusa_config(tmp_path / "m") == (model.config, (), fingerprint)
    got = read_own(tmp_path / "m", model.shapes())
    assert jax.tree.structure(got) == jax.tree.structure(own)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    loaded, joined, accuracies = load_medusa(tmp_path / "m", target)
    assert (loaded.dtype, accuracies) == (jnp.float32, ())
    assert ("head" in joined) == share and joined["norm"] is target.params["norm"]


def test_loading_by_name(target, folder):
    drafts = {"medusa": folder}
    loaded = load_drafter("medusa", target, drafts=drafts)
    assert (loaded.spec, loaded.longest, longest_draft("medusa", folder)) == ("medusa:2", 2, 2)
    loaded = load_drafter("medusa:2+static:7", target, drafts=drafts)
    assert loaded.drafter.info.nodes == 6
    assert loaded.drafter.rule.paths(loaded.drafter.drafter) == (
        (0,),
        (0, 0),
        (1,),
        (2,),
        (0, 1),
        (1, 0),
    )
    assert load_drafter("medusa+static", target, drafts=drafts).spec == "medusa:2+static:9"
    with pytest.raises(UserError, match=r"has 2 heads.*draft 2 tokens or fewer"):
        load_drafter("medusa:3", target, drafts=drafts)
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere: say where .* --draft medusa"):
        load_drafter("medusa:1", target, drafts={"medusa": folder / "nowhere"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "0" * 64}, "was trained for another target.*train medusa"),
        ({"target": "absent"}, "does not say which target"),
        ({"model_type": "glide"}, "holds no Medusa drafter"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": "4"}, "num_heads must be at least 1, got '4'"),
        ({"share": 1}, "share must be true or false"),
        ({"width": 3}, "unexpected keyword argument 'width'"),
        ({"num_heads": 3}, "accuracies in 0 to 1 for each of 3 heads"),
        ({"num_heads": 3, "accuracies": []}, "missing heads.2.0.bias"),
        ({"accuracies": [[0.5], [2.0]]}, "accuracies in 0 to 1"),
        ({"accuracies": [[0.5], [0.2, 0.1]]}, "as many for every head"),
    ],
)
def test_configurations_that_are_refused(target, folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_medusa(folder, target)


def test_damaged_files(target, folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        load_medusa(folder, target)
    path.write_bytes(whole)
    tensors = load_file(path)
    tensors["heads.1.0.weight"] = tensors["heads.1.0.weight"][:-1].copy()
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"heads.1.0.weight has shape \(63, 64\)"):
        load_medusa(folder, target)
    path.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_medusa(folder, target)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="is no Medusa checkpoint: it has no config"):
        load_medusa(folder, target)


@pytest.mark.parametrize("prefix", ["medusa_head.", ""])
def test_import(target, tmp_path, prefix):
    """The published layout: beside the whole model, or in a file of its own."""
    rng, c = np.random.default_rng(0), target.config
    embed, vocab = c.hidden_size, c.vocab_size
    shapes = {}
    for head in range(3):
        shapes |= {
            f"{prefix}{head}.0.linear.weight": (embed, embed),
            f"{prefix}{head}.0.linear.bias": (embed,),
            f"{prefix}{head}.1.weight": (vocab, embed),
        }
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    name = "model" if prefix else "medusa_lm_head"
    more = {"model.norm.weight": np.ones(3, np.float32)} if prefix else {}
    save_file(tensors | more, tmp_path / f"{name}.safetensors")
    assert is_medusa(tmp_path)
    model, own = import_medusa(tmp_path, target)
    assert model.config == MedusaConfig(3, 1, share=False)
    hidden = jnp.asarray(rng.normal(size=(1, 2, embed)), jnp.float32)
    x = np.asarray(target.decoder.head({**target.params, "head": jnp.eye(embed)}, hidden))
    for head in range(3):
        z = (
            x @ tensors[f"{prefix}{head}.0.linear.weight"].T
            + tensors[f"{prefix}{head}.0.linear.bias"]
        )
        want = (x + z / (1 + np.exp(-z))) @ tensors[f"{prefix}{head}.1.weight"].T
        got = model.head(model.join(own, target.params), hidden, head)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)
    del tensors[f"{prefix}1.1.weight"]
    tensors[f"{prefix}2.0.linear.bias"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"missing .*1\.1\.weight.*bias has shape \(3,\)"):
        import_medusa(tmp_path, target)
    save_file({"lm_head.weight": np.ones(3, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="holds no Medusa heads"):
        import_medusa(tmp_path, target)


def test_shapes_that_are_refused():
    for fields in ({"num_heads": -1}, {"num_layers": 0}, {"num_heads": True}, {"share": "yes"}):
        with pytest.raises(ValueError):
            MedusaConfig(**fields)
