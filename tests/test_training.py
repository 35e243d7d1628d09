"""The training recipe: exact resume, accumulation, data parallelism, packing."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jax_specdec import Decoder, ModelConfig, UserError
from jax_specdec.training.data import Mixed, PackedWindows, training_batches
from jax_specdec.training.lm import TrainConfig, train
from jax_specdec.training.trainer import make_optimizer

pytestmark = pytest.mark.usefixtures("two_devices")

MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    mlp_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    context=64,
    tied_head=True,
)
RUN = TrainConfig(
    steps=6, batch_size=4, sequence_length=16, warmup_steps=2, eval_every=3, save_every=2
)


@pytest.fixture(autouse=True, scope="module")
def ordinary_promotion():
    """Optax schedules do not pass under strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [(np.arange(rng.integers(5, 30)) * 3 % 37).astype(np.int32) for _ in range(40)]


def run(documents, folder, config=RUN, **options):
    train(Decoder(MODEL), config, documents, documents[:8], folder, progress=False, **options)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(rows):
    return [(row["step"], row["loss"], row.get("heldout_loss")) for row in rows]


@pytest.mark.smoke
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_and_resumed_run_logs_the_losses_of_one_that_was_not(
    documents, tmp_path, optimizer
):
    config = dataclasses.replace(RUN, optimizer=optimizer)
    whole = run(documents, tmp_path / "whole", config)
    # Step 3 is logged but not saved: the resumed run goes back to step 2 and logs it again.
    cut = run(documents, tmp_path / "cut", config, stop_after=3)
    assert [row["step"] for row in cut] == [1, 2, 3]
    resumed = run(documents, tmp_path / "cut", config, resume=True)
    assert losses(resumed) == losses(whole)
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert (tmp_path / "whole" / "loss.png").stat().st_size > 1000


def test_muon_turns_inner_matrices_and_projections_and_no_other():
    """Its updates are orthogonal up to a factor: all singular values are about equal."""
    rng = np.random.default_rng(0)

    def matrix():
        low = rng.standard_normal((12, 2)) @ rng.standard_normal((2, 12))
        return (low + 0.3 * rng.standard_normal((12, 12))).astype(np.float32)

    params = {"layers": ({"out": matrix()},), "hidden_in": matrix(), "embed": matrix()}
    optimizer = make_optimizer(dataclasses.replace(RUN, optimizer="muon", weight_decay=0.0))
    state = optimizer.init(params)
    for _ in range(3):  # the first step of the warm-up is of size 0
        updates, state = optimizer.update(params, state, params)
    spread = {
        name: np.divide(*np.linalg.svd(update, compute_uv=False)[[0, -1]])
        for name, update in {**updates, "layers": updates["layers"][0]["out"]}.items()
    }
    assert spread["layers"] < 3 and spread["hidden_in"] < 3 < 10 < spread["embed"]


def test_a_used_folder_and_other_settings_are_refused(documents, tmp_path):
    config = dataclasses.replace(RUN, steps=2, eval_every=2)
    run(documents, tmp_path, config)
    with pytest.raises(UserError, match="--resume"):
        run(documents, tmp_path, config)
    with pytest.raises(UserError, match="other settings"):
        run(documents, tmp_path, dataclasses.replace(config, learning_rate=1.0), resume=True)


def test_accumulated_gradients_are_those_of_the_whole_batch(documents, tmp_path):
    config = dataclasses.replace(RUN, steps=3, eval_every=3)
    whole = run(documents, tmp_path / "whole", config)
    parts = run(documents, tmp_path / "parts", dataclasses.replace(config, accumulate=2))
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_data_parallel_training_gives_the_losses_of_one_device(documents, tmp_path, monkeypatch):
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("one device")
    config = dataclasses.replace(RUN, steps=3, eval_every=3)
    several = run(documents, tmp_path / "several", config)
    monkeypatch.setattr(jax, "devices", lambda *args: devices[:1])
    alone = run(documents, tmp_path / "alone", config)
    for a, b in zip(several, alone, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_bfloat16_and_rematerialisation_train(documents, tmp_path):
    config = dataclasses.replace(RUN, dtype="bfloat16", remat=True)
    rows = run(documents, tmp_path, config)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_mixed_sources_get_their_shares(tmp_path):
    """A small file and a large one at 3 to 1, the same after a resume; other weights are refused."""
    mixed = Mixed(([np.full(40, 1, np.int32)], [np.full(4000, 2, np.int32)]), (3.0, 1.0))
    batches = training_batches(mixed, 16, 4, 50, seed=0)
    drawn = np.stack([batches[i] for i in range(50)])
    assert drawn.shape == (50, 4, 17)
    np.testing.assert_array_equal((drawn[..., 0] == 1).sum(axis=1), 3)
    again = training_batches(mixed, 16, 4, 50, seed=0)
    np.testing.assert_array_equal(again[37], drawn[37])

    def go(folder, documents=mixed, **options):
        heldout = mixed.sources[0]
        train(Decoder(MODEL), RUN, documents, heldout, folder, progress=False, **options)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    whole = go(tmp_path / "whole")
    go(tmp_path / "cut", stop_after=3)
    assert losses(go(tmp_path / "cut", resume=True)) == losses(whole)
    with pytest.raises(UserError, match="other settings"):
        go(tmp_path / "cut", dataclasses.replace(mixed, weights=(1.0, 1.0)), resume=True)


def test_every_epoch_holds_every_window_once_in_another_order(documents):
    source = PackedWindows(documents, 16, seed=3, items=1000)
    windows = source.tokens_per_epoch // 17
    first = np.stack([source[i] for i in range(windows)])
    second = np.stack([source[windows + i] for i in range(windows)])
    assert first.shape == (windows, 17)
    assert not np.array_equal(first, second)
    again = PackedWindows(documents, 16, seed=3, items=1000)
    assert np.array_equal(again[windows], second[0])  # random access, any order
    batches = training_batches(documents, 16, 4, 10, seed=3)
    assert np.asarray(batches[1]).shape == (4, 17)
    assert np.array_equal(np.asarray(batches[0])[0], first[0])


def test_too_little_data_is_refused():
    with pytest.raises(UserError, match="fewer than one window"):
        PackedWindows([np.zeros((5,), np.int32)], 16, seed=0, items=1)
