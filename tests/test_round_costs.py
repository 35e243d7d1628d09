"""What rounds cost: measured through forced rounds, kept, given as a file, or computed."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import helpers as h
import jax.numpy as jnp
import numpy as np
import pytest

from jax_specdec import DecodeLoop, UserError, make_sampling
from jax_specdec.checkpoints.targets import load_target
from jax_specdec.cli import main
from jax_specdec.core.budget import RoundCosts, usual_widths
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.specs.build import load_drafter
from jax_specdec.tuning import forced_rounds, round_costs
from jax_specdec.tuning.round_costs import CostTables, computed_costs, measure

pytestmark = pytest.mark.usefixtures("budgets")

REAL = {"measure": measure, "computed_costs": computed_costs}
CALL = 0.8  # what calling the program takes, however many rounds it makes
VERIFY, DRAFT = (
    (5.0, 5.5, 6.0, 7.0, 8.0),
    (0.5, 0.25),
)  # of 1, 2, 3, 5 and 8 nodes; of a draft, and of each of its tokens


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache is a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(round_costs.progress, "_said", set())
    for name, function in REAL.items():  # which the other tests have not
        monkeypatch.setattr(round_costs, name, function)
    return tmp_path / "cache"


@dataclasses.dataclass
class State:
    """As much of a state as measuring looks at."""

    budget: Any
    length: int

    def replace(self, **fields):
        return dataclasses.replace(self, **fields)


class Machine:
    """Programs that take a known time by a clock of their own, and are disturbed now and then."""

    def __init__(
        self, monkeypatch, loop, capacity=64, disturbed=0.0, noise=0.0, busy=0.0, calls=0.0
    ):
        self.now, self.begun, self.rounds, self.noise = 0.0, 0, [], noise
        self.capacity, self.disturbed, self.busy, self.loop = capacity, disturbed, busy, loop
        self.calls = calls
        self.rng = np.random.default_rng(0)
        monkeypatch.setattr(forced_rounds, "time", SimpleNamespace(perf_counter=lambda: self.now))
        rows = 2
        sampling = make_sampling(rows, max_new_tokens=3, stop_ids=(5,))
        lengths = jnp.asarray([9, 60], jnp.int32)
        tokens = jnp.zeros((rows, capacity), jnp.int32)
        self.arrays = (tokens, lengths, sampling, jnp.arange(rows, dtype=jnp.int32))

    def begin(self, arrays, costs):
        _, lengths, sampling, _ = arrays
        assert (sampling.stop_ids == -1).all() and (sampling.max_new_tokens >= self.capacity).all()
        costs.check(len(self.loop.widths), 1, self.loop.window - 1)
        self.now, self.begun = self.now + 1000, self.begun + 1  # none of this counts
        free = SimpleNamespace(forced=jnp.full((3,), -1, jnp.int32))
        free.replace = lambda **fields: SimpleNamespace(replace=free.replace, **fields)
        return State(free, int(lengths.max()))

    def run(self, state, rounds):
        _, depth, index = map(int, state.budget.forced)
        count = int(rounds)
        slow = self.calls and self.rng.uniform() < self.calls
        self.now += (CALL + (4 if slow else 0)) * 1e-3
        if not count:
            return state
        self.rounds.append((depth, index, count))
        one = VERIFY[index] + (DRAFT[0] + DRAFT[1] * depth if depth else 0)
        slow = 1 + self.noise * self.rng.uniform() + 2 * (self.rng.uniform() < self.disturbed)
        lost = (self.rng.uniform(size=count) < self.busy) * (1 + 2 * index)
        self.now += one * (count * slow + lost.sum()) * 1e-3
        assert state.length + count <= self.capacity, "a row is full and ends"
        return state.replace(length=state.length + count)


def loop_of(drafter):
    loop = DecodeLoop(h.TARGET, drafter)
    return dataclasses.replace(loop, widths=usual_widths(loop.nodes))


@pytest.mark.parametrize(("disturbed", "runs", "least"), ((0.0, 1, 1), (0.05, 30, 16), (0.2, 6, 1)))
def test_measured_costs(monkeypatch, disturbed, runs, least):
    """Interleaved, never past the end of a row; what is slow now and then is not seen wherever the costs are trusted."""
    loop, trusted = loop_of(MaxGram(7)), 0
    for run in range(runs):
        machine = Machine(monkeypatch, loop, disturbed=disturbed)
        machine.rng = np.random.default_rng(run)
        found, sure = measure(loop, machine.arrays, machine.begin, machine.run)
        assert machine.begun > 1
        kinds = [kind[:2] for kind in machine.rounds]
        assert {kinds.index((0, i)) for i in range(5)} == {0, 1, 2, 3, 4}
        assert (np.diff(found.verify) >= 0).all() and (np.diff(found.draft[0]) >= 0).all()
        if not sure:
            continue
        trusted += 1
        np.testing.assert_allclose(found.verify, np.asarray(VERIFY) * 1e-3, rtol=1e-4)
        want = [0, *(1e-3 * (DRAFT[0] + DRAFT[1] * d) for d in range(1, 8))]
        np.testing.assert_allclose(found.draft, [want], rtol=1e-3, atol=1e-7)
    assert trusted >= least


def test_noise_is_measured_for_longer_and_distrusted(monkeypatch):
    """Even so no draft is free, and what is wider or deeper costs no less."""
    loop, rounds = loop_of(MaxGram(7)), []
    monkeypatch.setitem(globals(), "DRAFT", (0.001, 0.0))
    for noise, wanted in ((0.0, True), (0.1, True), (3.0, False)):
        machine = Machine(monkeypatch, loop, noise=noise)
        found, sure = measure(loop, machine.arrays, machine.begin, machine.run)
        assert sure == wanted
        verify, draft = np.asarray(found.verify), np.asarray(found.draft[0])
        assert (np.diff(verify) >= 0).all() and (np.diff(draft) >= 0).all()
        assert draft[0] == 0 and draft[1] >= 0.0099 * verify[0]
        rounds.append(len(machine.rounds))
    assert rounds[0] < rounds[2]


def test_slow_calls_do_not_make_rounds_look_short(monkeypatch):
    """Of most calls 4 ms are lost, nearly as much as a plain round takes."""
    loop = loop_of(MaxGram(7))
    machine = Machine(monkeypatch, loop, noise=0.05, calls=0.6)
    found, _ = measure(loop, machine.arrays, machine.begin, machine.run)
    np.testing.assert_allclose(found.verify, 1e-3 * np.asarray(VERIFY), rtol=0.1)


def test_what_rounds_cost_on_a_busy_machine(monkeypatch):
    """Two rounds of three lose their turn, wide ones more: the costs are nearly those of a quiet machine."""
    loop = loop_of(MaxGram(7))
    machine = Machine(monkeypatch, loop, noise=0.1, busy=0.67)
    found, sure = measure(loop, machine.arrays, machine.begin, machine.run)
    assert not sure
    np.testing.assert_allclose(found.verify / found.verify[0], np.asarray(VERIFY) / 5, rtol=0.1)
    want = [(DRAFT[0] + DRAFT[1] * d) / 5 for d in range(1, 8)]
    np.testing.assert_allclose(found.draft[0, 1:] / found.verify[0], want, atol=0.05)


def tables(target, monkeypatch, spec="max-gram:7", noise=0.0, **fields):
    loaded = load_drafter(spec, target)
    loop = dataclasses.replace(loop_of(loaded.drafter), target=target.decoder)
    machine = Machine(monkeypatch, loop, noise=noise)
    return CostTables(target, loop, loaded, **fields), machine


@pytest.fixture(scope="module")
def target(tiny_checkpoints):
    return load_target(tiny_checkpoints / "target", dtype="float32")


def get(costs, machine, **fields):
    return costs.get(machine.arrays, machine.begin, machine.run, **fields)


def equal(one, other):
    return np.array_equal(one.verify, other.verify) and np.array_equal(one.draft, other.draft)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(round_costs.progress, "say", lines.append)
    return lines


def test_measured_once_and_said(target, monkeypatch, said, cache):
    costs, machine = tables(target, monkeypatch)
    first = get(costs, machine, progress=True)
    (line,), ran = said, len(machine.rounds)
    assert (
        "max-gram:7" in line
        and "5 for 1, 5.5 for 2, 6 for 3, 7 for 5, 8 for 8 nodes" in line
        and str(cache) in line
    )
    assert get(costs, machine) is first and len(machine.rounds) == ran
    (file,) = (cache / "jax_specdec" / "costs").iterdir()
    assert str(file) in line
    # Another run reads it, and so does one that is given the file.
    for fields in ({}, {"given": file}, {"given": str(file)}):
        again, machine = tables(target, monkeypatch, **fields)
        assert equal(get(again, machine, progress=True), first) and not machine.rounds
    assert len(said) == 1


@pytest.mark.parametrize(
    "change", ["", "{", "[]", '{"of": 3}', "other", "negative", "short", "until"]
)
def test_a_kept_table_that_is_not_sound_is_measured_again(target, monkeypatch, cache, change):
    costs, machine = tables(target, monkeypatch)
    first = get(costs, machine)
    (file,) = (cache / "jax_specdec" / "costs").iterdir()
    table = json.loads(file.read_text())
    if change == "other":
        table["of"]["machine"] = "another"
    elif change == "negative":
        table["verify_s"][1] = -1.0
    elif change == "short":
        table["draft_s"] = []
    elif change == "until":
        table["until"] = "soon"
    changed = change in ("other", "negative", "short", "until")
    file.write_text(json.dumps(table) if changed else change)
    again, machine = tables(target, monkeypatch)
    assert equal(get(again, machine), first) and machine.rounds
    assert json.loads(file.read_text())["verify_s"][1] > 0


def test_a_folder_that_cannot_be_written(target, monkeypatch, said, cache):
    cache.write_text("a file")
    for _ in range(2):
        costs, machine = tables(target, monkeypatch)
        get(costs, machine, progress=False)
    (line,) = said
    assert "cannot be written" in line and str(cache) in line


def test_what_a_busy_machine_measured_is_kept_for_an_hour(target, monkeypatch, said, cache):
    costs, machine = tables(target, monkeypatch, noise=3.0)
    first = get(costs, machine, progress=True)
    (line,) = said
    assert line.endswith("the machine is busy, and so they are measured again in an hour")
    again, machine = tables(target, monkeypatch, noise=3.0)
    assert equal(get(again, machine), first) and not machine.rounds
    (file,) = (cache / "jax_specdec" / "costs").iterdir()
    table = json.loads(file.read_text())
    file.write_text(json.dumps({**table, "until": table["until"] - 3601}))
    again, machine = tables(target, monkeypatch)
    get(again, machine)
    assert machine.rounds and "until" not in json.loads(file.read_text())


def test_files_of_something_else(target, monkeypatch, cache, tmp_path):
    costs, machine = tables(target, monkeypatch)
    get(costs, machine)
    (file,) = (cache / "jax_specdec" / "costs").iterdir()
    good, other = file.read_text(), tmp_path / "costs.json"
    for name, value, sentence in (
        ("model", "0" * 64, "for another model: leave them out"),
        ("device", "TPU v5 lite", "for the device TPU v5 lite, not cpu"),
        ("drafter", "lm:4", "for the drafter lm:4, not max-gram:7"),
        ("parameters", "0", "for a drafter of other sizes"),
        ("widths", [1, 8], "for the widths 1, 8, not 1, 2, 3, 5, 8"),
        ("dtype", "bfloat16", "for the dtype bfloat16, not float32"),
        ("int8", ["cache"], "for parts in int8 cache, not none"),
    ):
        table = json.loads(good)
        table["of"][name] = value
        other.write_text(json.dumps(table))
        with pytest.raises(UserError, match=sentence):
            tables(target, monkeypatch, given=other)
    table = json.loads(good)
    table["of"]["rows"] = 8
    other.write_text(json.dumps(table))
    costs, machine = tables(target, monkeypatch, given=other)
    with pytest.raises(UserError, match="for a batch of 8, not 2"):
        get(costs, machine)
    other.write_text(good[: len(good) // 2])
    with pytest.raises(UserError, match="is damaged, or does not hold what rounds cost"):
        tables(target, monkeypatch, given=other)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        tables(target, monkeypatch, given=tmp_path / "none.json")
    other.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read: it is no text"):
        tables(target, monkeypatch, given=other)
    with pytest.raises(UserError, match="or 'computed', not 5"):
        tables(target, monkeypatch, given=5)


def test_the_command_refuses_such_files(tiny_checkpoints, tmp_path, capsys):
    args = ["generate", "--model", str(tiny_checkpoints / "target"), "--drafter", "max-gram:7"]
    args += ["--prompt", "the cat", "--costs", str(tmp_path / "costs.json")]
    assert main(args) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "costs.json").write_text("{")
    assert main(args) == 2
    assert "is damaged, or does not hold what rounds cost" in capsys.readouterr().err


def test_given_costs(target, monkeypatch):
    mine = RoundCosts(jnp.asarray([1.0, 1.5, 2.0, 2.5, 3.0]), jnp.zeros((1, 8)))
    costs, machine = tables(target, monkeypatch, given=mine)
    assert get(costs, machine) is mine and not machine.rounds
    with pytest.raises(UserError, match="shape"):
        tables(target, monkeypatch, given=RoundCosts(jnp.ones((2,)), jnp.zeros((1, 8))))


def test_a_model_without_files_is_measured_by_each_run(target, monkeypatch, cache, tmp_path):
    costs, machine = tables(dataclasses.replace(target, path=tmp_path), monkeypatch)
    get(costs, machine)
    assert machine.rounds and not (cache / "jax_specdec" / "costs").exists()


def test_computed_costs(target, monkeypatch):
    """A roofline: wider is never cheaper, and a draft costs the reading of its model."""
    costs, machine = tables(target, monkeypatch, "lm:7", given="computed")
    found = get(costs, machine)
    assert not machine.rounds
    assert (np.diff(found.verify) >= 0).all() and (np.diff(found.draft[0]) > 0).all()
    lm = load_drafter("lm:7", target)
    loop = dataclasses.replace(loop_of(lm.drafter), target=target.decoder)
    more = computed_costs(target, loop, lm, 64, 256)
    assert (np.asarray(more.verify) > np.asarray(found.verify)).all()
    free, _ = tables(target, monkeypatch, given="computed")
    assert not np.any(get(free, machine).draft)
