"""Training Medusa's heads."""

import dataclasses
import json

import helpers as h
import jax
import pytest
from medusa_drafts import texts

from jax_specdec import UserError
from jax_specdec.models.medusa import Medusa, MedusaConfig
from jax_specdec.training import medusa
from jax_specdec.training.config import MedusaRecipe, TrainConfig

pytestmark = pytest.mark.usefixtures("two_devices")

RUN = TrainConfig(
    steps=10,
    batch_size=4,
    sequence_length=16,
    warmup_steps=1,
    learning_rate=3e-2,
    optimizer="muon",
    remat=True,
    eval_every=5,
    save_every=5,
)
PAIR = Medusa(MedusaConfig(2, share=False), h.SMALL_CONFIG)


@pytest.fixture
def ordinary_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(folder, config=RUN, **options):
    recipe, documents = MedusaRecipe(), list(texts())
    args = (PAIR, h.SMALL, h.small_params(), recipe, config, documents, documents[:3], folder)
    medusa.train(*args, progress=False, **options)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("ordinary_promotion")
def test_training_lowers_the_loss_and_resumes_exactly(tmp_path):
    def logged(rows):
        names = ("step", "loss", "heldout_loss", "acceptance", "greedy_match")
        return [tuple(row.get(name) for name in names) for row in rows]

    whole = run(tmp_path / "whole")
    assert whole[-1]["loss"] < 0.97 * whole[0]["loss"]
    cut = run(tmp_path / "cut", stop_after=5)
    assert [row["step"] for row in cut] == [1, 2, 3, 4, 5]
    assert logged(run(tmp_path / "cut", resume=True)) == logged(whole)
    last = whole[-1]
    assert len(last["acceptance"]) == len(last["greedy_match"]) == 2
    assert len(last["heldout_cross_entropy"]) == 2
    with pytest.raises(UserError, match="other settings"):
        run(tmp_path / "cut", resume=True, fingerprint="another target")
    short = dataclasses.replace(RUN, sequence_length=2)
    with pytest.raises(UserError, match="Windows of 2 tokens leave nothing to the last of 2 heads"):
        run(tmp_path / "short", short)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"decay": 0.0}, "decay must be above 0"), ({"jensen_shannon_beta": 1.0}, "between 0 and 1")],
)
def test_recipes_that_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        MedusaRecipe(**fields)
