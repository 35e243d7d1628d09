"""What a training folder can hold when a run begins: damage, another run, a full disk, other data."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from test_training import MODEL, RUN, losses

from jax_specdec import Decoder, RunError, UserError
from jax_specdec.cli import _describe
from jax_specdec.training import workdir
from jax_specdec.training.data import Mixed, fingerprint
from jax_specdec.training.lm import train

pytestmark = pytest.mark.usefixtures("two_devices")
CONFIG = dataclasses.replace(RUN, steps=6, eval_every=6)


@pytest.fixture(autouse=True, scope="module")
def ordinary_promotion():
    """Optax schedules do not pass under strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def documents():
    return [(np.arange(5 + 7 * i % 25) * 3 % 37).astype(np.int32) for i in range(40)]


def run(documents, folder, heldout=None, **options):
    heldout = documents[:8] if heldout is None else heldout
    train(Decoder(MODEL), CONFIG, documents, heldout, folder, progress=False, **options)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def killed(documents, tmp_path_factory):
    """A run of six steps and the folder of one that was killed after the fifth; do not write to it."""
    home = tmp_path_factory.mktemp("runs")
    whole = run(documents, home / "whole")
    run(documents, home / "cut", stop_after=5)
    return whole, home / "cut"


@pytest.fixture
def cut(killed, tmp_path):
    shutil.copytree(killed[1], tmp_path / "cut")
    return tmp_path / "cut"


def test_half_a_line_of_metrics_is_left_out(documents, killed, cut, caplog):
    with (cut / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "tokens": 3\xc3')
    with caplog.at_level(logging.WARNING):
        assert losses(run(documents, cut, resume=True)) == losses(killed[0])
    assert "metrics.jsonl, line 6 is damaged" in caplog.text


@pytest.mark.parametrize("damage", ["data", "meta", "both"])
def test_a_damaged_state_gives_way_to_the_one_before(documents, killed, cut, damage, caplog):
    states = sorted((cut / "state").iterdir(), key=lambda path: int(path.name))
    assert [path.name for path in states] == ["2", "4"]
    parts = {"data": ["state"], "meta": ["meta"], "both": ["state", "meta"]}[damage]
    for part in parts:
        for path in (states[-1] / part).rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        assert losses(run(documents, cut, resume=True)) == losses(killed[0])
    assert "state of step 4 is damaged" in caplog.text
    assert {path.name for path in (cut / "state").iterdir()} == {"4", "6"}


def test_no_state_that_can_be_read(documents, cut):
    for path in (cut / "state").glob("*/state/**/*"):
        if path.is_file():
            path.write_bytes(b"")
    before = sorted(path.name for path in (cut / "state").iterdir())
    with pytest.raises(RunError, match=r"No training state .* can be read"):
        run(documents, cut, resume=True)
    assert sorted(path.name for path in (cut / "state").iterdir()) == before


def test_other_data_is_refused(documents, cut):
    for data, heldout in ((documents[1:], documents[:8]), (documents, documents[:7])):
        with pytest.raises(UserError, match="started with other data"):
            run(data, cut, heldout, resume=True)


def test_runs_that_did_not_write_down_their_data_go_on(documents, killed, cut):
    for path in (cut / "state").glob("*/meta/metadata"):
        found = json.loads(path.read_text())
        del found["data"]
        path.write_text(json.dumps(found))
    assert losses(run(documents, cut, resume=True)) == losses(killed[0])


def test_what_differs_is_named(documents, cut):
    other = dataclasses.replace(CONFIG, steps=7, seed=3)
    with pytest.raises(UserError, match=r"other settings \(seed: 0, now 3; steps: 6, now 7\)"):
        train(Decoder(MODEL), other, documents, documents[:8], cut, resume=True, progress=False)


def test_no_folder_and_no_run(documents, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file, and a run needs a folder"):
        run(documents, tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        run(documents, tmp_path / "new", resume=True)
    assert "holds no run to go on with" in caplog.text


def test_fingerprint_of_data():
    a, b = np.arange(5, dtype=np.int32), np.arange(5, 9, dtype=np.int32)
    joined = [np.concatenate([a, b])]
    prints = {
        fingerprint([a, b], [a]),
        fingerprint([b, a], [a]),
        fingerprint(joined, [a]),
        fingerprint([a, b], [b]),
        fingerprint(Mixed(([a], [b]), (1.0, 1.0)), [a]),
    }
    assert len(prints) == 5
    assert fingerprint([a, b], [a]) == fingerprint([a.astype(np.int64), b.copy()], [a])


def test_a_second_run_in_a_folder_is_refused(documents, cut):
    before = (cut / "metrics.jsonl").read_bytes()
    with (
        workdir.locked(cut),
        pytest.raises(UserError, match=r"Another training is running in .*cut"),
    ):
        run(documents, cut, resume=True)
    assert (cut / "metrics.jsonl").read_bytes() == before
    with workdir.locked(cut):  # let go of
        pass


FULL = 'RESOURCE_EXHAUSTED: Error writing "0.a/0": No space left on device [os_error_code=28]'


@pytest.mark.parametrize("error", [ValueError(FULL), OSError(28, "No space left on device")])
def test_a_full_disk_is_called_that(error, tmp_path):
    """Tensorstore reports it as an exhausted resource, like memory."""
    message = "out could not be written: the disk is full"
    with pytest.raises(RunError, match=message), workdir.written(tmp_path / "out"):
        raise error
    assert _describe(error) == (1, "The disk is full.")
    assert "memory ran out" in _describe(ValueError("RESOURCE_EXHAUSTED: out of memory"))[1]
    with pytest.raises(ValueError, match="else"), workdir.written(tmp_path):
        raise ValueError("something else")
