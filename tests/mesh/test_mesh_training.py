"""Training on meshes: the losses of one device, and going on on another mesh from the same state."""

import dataclasses
import json
import math
import shutil

import helpers as h
import jax
import meshes as m
import numpy as np
import pytest

from jax_specdec import Decoder
from jax_specdec.core.sharding import Sharding, held_per_device
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.medusa import Medusa, MedusaConfig
from jax_specdec.models.tensor_parallel import divide
from jax_specdec.training import glide, lm, medusa, trainer
from jax_specdec.training.config import GliDeRecipe, MedusaRecipe, TrainConfig

RUN = TrainConfig(
    steps=4, batch_size=8, sequence_length=16, warmup_steps=1, eval_every=2, save_every=2
)
MESHES = [(2, 1), (1, 2), (2, 4), (8, 1)]


@pytest.fixture(autouse=True, scope="module")
def ordinary_promotion():
    """Optax schedules do not pass under strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def documents():
    rng = np.random.default_rng(0)
    vocab = h.CONFIG.vocab_size
    return [(np.arange(rng.integers(5, 30)) * 3 % vocab).astype(np.int32) for _ in range(60)]


def run(kind, folder, mesh, config=RUN, **options):
    """(losses, parameters at the last save) of a run."""
    sharding = Sharding(m.mesh_of(*mesh))
    saved = []
    options |= {"progress": False, "sharding": sharding, "on_save": saved.append}
    data = (config, documents(), documents()[:24], folder)
    target = Decoder(h.CONFIG, sharding=sharding)
    params = divide(h.target_params(), h.CONFIG, target)
    if kind == "lm":
        lm.train(Decoder(h.CONFIG), *data, **options)
    elif kind == "glide":
        model = GliDe(GliDeConfig.like(h.CONFIG), target.config, sharding=sharding)
        glide.train(model, target, params, GliDeRecipe(), *data, **options)
    else:
        model = Medusa(MedusaConfig(num_heads=2), target.config)
        medusa.train(model, target, params, MedusaRecipe(), *data, **options)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row.get("heldout_loss", 0.0)) for row in rows], saved[-1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    home = tmp_path_factory.mktemp("alone")
    return {kind: run(kind, home / kind, (1, 1))[0] for kind in ("lm", "glide", "medusa")}


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "mesh", [(2, 4), *(pytest.param(x, marks=pytest.mark.slow) for x in MESHES if x != (2, 4))]
)
@pytest.mark.parametrize("kind", ["lm", "glide", "medusa"])
def test_losses_are_those_of_one_device(alone, tmp_path, kind, mesh):
    got, _ = run(kind, tmp_path, mesh)
    close(got, alone[kind])


@pytest.mark.parametrize("kind", ["lm", "glide"])
def test_a_run_goes_on_on_another_mesh(alone, tmp_path, kind):
    """From the very state that was saved; on the mesh of before the losses are equal to the bit."""
    whole, _ = run(kind, tmp_path / "whole", (2, 2))
    _, saved = run(kind, tmp_path / "cut", (2, 2), stop_after=2)
    _, restored = run(kind, tmp_path / "cut", (4, 1), stop_after=2, resume=True)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(got, want)
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    same, _ = run(kind, tmp_path / "cut", (2, 2), resume=True)
    assert same == whole
    other, _ = run(kind, tmp_path / "other", (1, 4), resume=True)
    close(other, alone[kind])


def test_parameters_and_moments_are_divided():
    """Half of them for each of two devices: training takes a model that is larger than one of them."""
    model = Decoder(h.CONFIG)
    sharding = Sharding(m.mesh_of(1, 2))
    params = model.init(jax.random.key(0))
    places = lm._places(model, sharding)
    optimizer = trainer.make_optimizer(dataclasses.replace(RUN, optimizer="muon"))
    state = jax.eval_shape(optimizer.init, params)
    where = trainer.like_params(state, places, sharding.of())
    held = held_per_device(jax.tree.map(jax.device_put, params, places))
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    assert held < 0.55 * whole
    parts = jax.tree.map(lambda x, at: math.prod(at.shard_shape(x.shape)) * 4, state, where)
    moments = sum(x.size * 4 for x in jax.tree.leaves(state))
    assert sum(jax.tree.leaves(parts)) < 0.55 * moments
