"""Figures: what they show, on new Axes and on given ones, and what they refuse. Nothing is compiled."""

import json
import sys

import matplotlib
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jax_specdec as sd
from jax_specdec.generation import Generation, Stats
from jax_specdec.plots.trees import layout
from jax_specdec.training.workdir import plot_metrics

ROWS = [
    {"step": i, "tokens": 16 * i, "loss": 4 / i}
    | (
        {"heldout_loss": 3.0, "acceptance": [0.8, 0.5], "greedy_match": [0.7, 0.4]}
        if i == 3
        else {}
    )
    for i in range(1, 4)
]
RECORD = {
    "lengths": {"lm": 2, "max-gram": 0, "lm+cape": 2},
    "measured": {
        "verify_s": {"1": 1.0, "2": 1.1, "3": 1.2, "4": 1.3},
        "drafters": {
            "lm": {"draft_s": {"1": 0.1, "3": 0.3}, "accepted_per_pos": [0.8, 0.5, 0.1]},
            "max-gram": {"draft_s": {"1": 0.0}, "accepted_per_pos": [0.1]},
            "lm+cape": {"draft_s": {"2": 0.1}, "accepted_per_pos": [0.9, 0.6]},
        },
    },
}


def answer(accepted, rounds=10):
    stats = Stats(
        num_tokens=20,
        num_spec_steps=rounds,
        num_draft_tokens=20,
        num_accepted_tokens=sum(accepted),
        draft_acceptance_rate=0.5,
        mean_acceptance_length=2.0,
        accepted_per_pos=accepted,
        per_drafter={},
        wall_time_s=2.0,
        prefill_time_s=0.5,
        compile_time_s=3.0,
        tokens_per_second=10.0,
        near_ties=None,
    )
    return Generation(0, "a", "b", [1], "length", stats, None, None, [None])


@pytest.fixture
def ax():
    return Figure().subplots()


def lines(ax):
    return {
        line.get_label(): line.get_ydata().tolist()
        for line in ax.get_lines()
        if not line.get_label().startswith("_")
    }


def test_acceptance(ax):
    arms = {"a": [answer([8, 4]), answer([6, 0])], "b": answer([5, 5]), "c": [0.5, 0.25, 0.125]}
    assert sd.plots.acceptance(arms, ax=ax) is ax
    found = lines(ax)
    assert found["a (τ = 1.90)"] == [0.7, 0.2] and found["c (τ = 1.88)"] == [0.5, 0.25, 0.125]
    assert ax.get_xlabel() and ax.get_ylabel() and ax.get_legend()
    new = sd.plots.acceptance(answer([5, 5]))
    assert isinstance(new, Axes) and lines(new) == {"τ = 2.00": [0.5, 0.5]}


@pytest.mark.parametrize("speed", [False, True])
def test_tau(ax, speed, tmp_path):
    file = tmp_path / "draft_lengths.json"
    file.write_text(json.dumps({"records": [RECORD]}))
    sd.plots.tau(file, ax=ax, speed=speed)
    found = lines(ax)
    want = [1, 1.8 / 1.2, 2.3 / 1.4, 2.4 / 1.6] if speed else [1, 1.8, 2.3, 2.4]
    assert found["lm"] == pytest.approx(want)
    assert set(found) == {"lm", "max-gram", "chosen"}
    rings = [
        line for line in ax.get_lines() if line.get_fillstyle() == "none" and len(line.get_xdata())
    ]
    assert [line.get_xdata()[0] for line in rings] == [2, 0]


def test_time(ax):
    sd.plots.time({"plain": [answer([])] * 2, "drafted": answer([1])}, ax=ax, compiling=True)
    widths = [patch.get_width() for patch in ax.patches]
    assert widths == [6.0, 3.0, 1.0, 0.5, 3.0, 1.5]
    assert [text.get_text().strip() for text in ax.texts] == [
        "10.00 s, 10 tokens/s",
        "5.00 s, 10 tokens/s",
    ]


def test_training(ax, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert lines(sd.plots.training(tmp_path, ax=ax)) == {"training": [4, 2, 4 / 3], "held out": [3]}
    found = lines(sd.plots.agreement(tmp_path / "metrics.jsonl", ax=Figure().subplots()))
    assert found == {"acceptance": [0.8, 0.5], "same best token": [0.7, 0.4]}
    assert len(sd.plots.training_figure(ROWS).axes) == 2
    assert len(sd.plots.training_figure(ROWS[:2]).axes) == 1
    plot_metrics(ROWS, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
    live = sd.plots.live()
    for row in ROWS:
        live(row["step"], row)
    assert live.rows == ROWS


def test_a_tree(ax):
    parents = [0, 0, 1, 0, 2, 1]
    assert layout(parents) == ([0, 1, 2, 1, 3, 2], [0, 0, 0, 2, 0, 1])
    sources = [None, "lm", "lm", "sibling", "lm", "sibling"]
    sd.plots.tree(parents, list("abc$ef"), sources=sources, accepted=[1, 2], ax=ax)
    assert [text.get_text() for text in ax.texts] == list("abc$ef")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["lm", "sibling"]
    widths = [line.get_linewidth() for line in ax.get_lines() if len(line.get_xdata()) == 2]
    assert widths == [2.5, 2.5, 0.8, 0.8, 0.8]


def test_a_style_leaves_other_settings_alone():
    """A notebook turns itself interactive with its first figure, and shows no later one otherwise."""
    before = dict(matplotlib.rcParams)
    with sd.plots.style():
        assert matplotlib.rcParams["axes.spines.top"] is False
        matplotlib.rcParams["interactive"] = not before["interactive"]
    after = dict(matplotlib.rcParams)
    assert {name for name in before if after[name] != before[name]} == {"interactive"}
    matplotlib.rcParams["interactive"] = before["interactive"]


def test_what_cannot_be_drawn(tmp_path, monkeypatch, caplog):
    for call, message in (
        (lambda: sd.plots.acceptance([]), "nothing to plot"),
        (lambda: sd.plots.acceptance({"a": ["text"]}), "one of 'a' is of type str"),
        (lambda: sd.plots.time(3), "nothing to plot"),
        (lambda: sd.plots.tau({}), "what `tune` measured"),
        (lambda: sd.plots.tau("absent.json"), "cannot be read"),
        (lambda: sd.plots.training(3), "not of type int"),
        (lambda: sd.plots.training(tmp_path), "There is no file"),
        (lambda: sd.plots.training([]), "nothing to plot: the run has no steps yet"),
        (lambda: sd.plots.training([{"step": 1, "loss": "low"}]), "nothing to plot: no row"),
        (lambda: sd.plots.training_figure([]), "nothing to plot"),
        (lambda: sd.plots.training(ROWS, ax="x"), "ax must be Axes of matplotlib, not a str"),
        (lambda: sd.plots.live("x"), "every must be a number of seconds, got 'x'"),
        (lambda: sd.plots.live(-1), "every must be a number of seconds, got -1"),
        (lambda: sd.plots.tau("x"), "'x' cannot be read: there is no such file"),
        (lambda: sd.plots.tau(5), "its record, or its file, not an int"),
        (
            lambda: sd.plots.tau({"measured": {"drafters": {"a": {}}, "verify_s": {"1": 1}}}),
            "whole",
        ),
        (lambda: sd.plots.tree(5, []), "a list for each argument, not an int"),
        (lambda: sd.plots.tree("ab", "cd"), "comes before it"),
        (lambda: sd.plots.agreement([{"acceptance": 5}]), "Nothing was measured"),
        (lambda: sd.plots.agreement(ROWS[:2]), "Nothing was measured"),
        (lambda: sd.plots.tree([], []), "for each node"),
        (lambda: sd.plots.tree([0, 2, 0], list("abc")), "comes before it"),
    ):
        with pytest.raises(sd.UserError, match=message):
            call()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(sd.UserError, match="`pip install matplotlib`"):
        sd.plots.training(ROWS)
    plot_metrics(ROWS, tmp_path / "loss.png")
    assert "loss.png was not drawn" in caplog.text and not (tmp_path / "loss.png").exists()


def test_nothing_is_imported_before_something_is_drawn():
    import subprocess

    code = "import sys, jax_specdec as sd; sd.plots.tree; print({'jax', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
