"""Figures of training runs."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from jax_specdec.errors import UserError, shown_value
from jax_specdec.plots.look import (
    COLOURS,
    axes_or_new,
    legend,
    matplotlib_or_say,
    style,
    whole_numbers,
)
from jax_specdec.progress import in_notebook

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def training_rows(run: Any) -> list[dict[str, Any]]:
    """The metrics of a run: its folder, its `metrics.jsonl`, or the rows themselves.

    Raises:
      UserError: nothing of these, or no rows.
    """
    if isinstance(run, (str, Path)):
        from jax_specdec.text.jsonl import read_jsonl

        path = Path(run)
        path = path / "metrics.jsonl" if path.is_dir() else path
        run = [row for _, row in read_jsonl(path)]
    if not isinstance(run, Sequence) or not all(isinstance(row, Mapping) for row in run):
        raise UserError(
            f"A run is its folder, its metrics.jsonl or a list of rows, not of type {type(run).__name__}."
        )
    if not run:
        raise UserError("There is nothing to plot: the run has no steps yet.")
    return [dict(row) for row in run]


def training(run: Any, ax: "Axes | None" = None) -> "Axes":
    """Training and held-out loss over the tokens trained on.

    Args:
      run: a run's folder, its `metrics.jsonl`, or rows such as a callback is given.
    """
    rows = training_rows(run)
    if not any(_is_number(row.get("loss")) and _is_number(row.get("tokens")) for row in rows):
        raise UserError("There is nothing to plot: no row of the run has a loss and its tokens.")
    ax = axes_or_new(ax)
    lines = (
        ("loss", "training", {"alpha": 0.8, "linewidth": 1, "color": COLOURS[0]}),
        ("heldout_loss", "held out", {"marker": "o", "markersize": 4, "color": COLOURS[3]}),
    )
    for key, label, look in lines:
        points = [(row.get("tokens"), row.get(key)) for row in rows]
        points = [point for point in points if all(map(_is_number, point))]
        if points:
            ax.plot(*zip(*points, strict=True), label=label, **look)
    highest = max(row["loss"] for row in rows if _is_number(row.get("loss")))
    ax.set(xlabel="training tokens", ylabel="loss (nats per token)")
    ax.set_ylim(0, min(6.0, highest) if math.isfinite(highest) else 6.0)
    legend(ax)
    return ax


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def agreement(run: Any, ax: "Axes | None" = None) -> "Axes":
    """How well a drafter in training agrees with its target on held-out text, by place in the draft.

    `acceptance` is the chance that a token drawn from the drafter is accepted, the sum of min(p, q); `same best
    token` how often both would choose the same greedily. The faint lines are earlier measurements.

    Args:
      run: as in `training`.
    """
    names = ("acceptance", "greedy_match", "step")
    kinds = (list, list, int)
    measured = [
        row for row in training_rows(run) if all(map(isinstance, map(row.get, names), kinds))
    ]
    if not measured:
        raise UserError("Nothing was measured in this run: see eval_every.")
    ax = axes_or_new(ax)
    names = (("acceptance", "acceptance", "o"), ("greedy_match", "same best token", "s"))
    for (key, label, marker), colour in zip(names, COLOURS, strict=False):
        for age, row in enumerate(reversed(measured[-4:])):
            look: dict[str, Any] = {"label": label, "marker": marker}
            if age:
                look = {"alpha": 0.25, "linewidth": 1}
            line = row[key]
            ax.plot(range(1, len(line) + 1), line, color=colour, markersize=4, **look)
    step = measured[-1]["step"]
    ax.set(xlabel="place in the draft", ylabel=f"share of held-out tokens, step {step}")
    ax.set_ylim(0, 1)
    whole_numbers(ax)
    legend(ax)
    return ax


def training_figure(run: Any) -> "Figure":
    """`training`, and `agreement` where it was measured, on one figure that belongs to no window or notebook."""
    matplotlib_or_say()
    from matplotlib.figure import Figure

    rows = training_rows(run)
    both = any("acceptance" in row for row in rows)
    with style():
        figure = Figure(figsize=(9.6 if both else 5.6, 3.4), layout="constrained")
        axes = figure.subplots(1, 1 + both, squeeze=False)[0]
        training(rows, axes[0])
        if both:
            agreement(rows, axes[1])
    return figure


class Live:
    """A callback for training that draws its curves in a notebook while it runs, and nothing in a terminal.

    Attributes:
      rows: the metrics so far, for `training` and `agreement`.
    """

    def __init__(self, every: float = 2.0):
        if not _is_number(every) or not every >= 0:
            raise UserError(f"every must be a number of seconds, got {shown_value(every)}.")
        self.rows: list[dict[str, Any]] = []
        self._every, self._drawn, self._handle = every, 0.0, None
        self._notebook = in_notebook()
        if self._notebook:
            matplotlib_or_say()  # say so before training begins

    def __call__(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.rows.append(dict(metrics))
        measured = "heldout_loss" in metrics  # the last step among them
        if self._notebook and (measured or monotonic() - self._drawn > self._every):
            self._draw()

    def _draw(self) -> None:
        from IPython.display import Image, display  # type: ignore[import-not-found]

        file = io.BytesIO()
        training_figure(self.rows).savefig(file, format="png", dpi=90)
        image = Image(file.getvalue())
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)
        self._drawn = monotonic()


def live(every: float = 2.0) -> Live:
    """A callback for `train_lm`, `train_glide` and `train_medusa`: the curves of the run, redrawn in a notebook.

    Args:
      every: seconds between two drawings, at least; whatever is measured on held-out text is drawn at once.
    """
    return Live(every)
