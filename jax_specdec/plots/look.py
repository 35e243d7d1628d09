"""What all figures share: colours, style, new Axes."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jax_specdec.errors import UserError, a_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Without the palette's yellow and black, which white and black pages hide.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
INK = "#7a7a7a"
STYLE: dict[str, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 9,
}


def matplotlib_or_say() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("Plots are drawn by matplotlib: `pip install matplotlib`.") from None
    return matplotlib


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of these figures, for figures of your own: `with sd.plots.style(): ...`."""
    matplotlib = matplotlib_or_say()
    settings = matplotlib.rcParams
    look = {**STYLE, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)}
    before = {name: settings[name] for name in look}
    settings.update(look)
    try:
        yield
    finally:
        # No `rc_context`: a notebook turns itself interactive with its first figure, and must stay so.
        settings.update(before)


def axes_or_new(ax: "Axes | None", size: tuple[float, float] = (6.0, 3.4)) -> "Axes":
    """`ax`, or that of a new figure, which a notebook shows by itself."""
    matplotlib_or_say()
    if ax is not None:
        from matplotlib.axes import Axes

        if not isinstance(ax, Axes):
            raise UserError(f"ax must be Axes of matplotlib, not {a_kind(ax)}.")
        return ax
    from matplotlib import pyplot as plt

    with style():
        return plt.subplots(figsize=size, layout="constrained")[1]


def legend(ax: "Axes", **place: Any) -> None:
    """A legend in the colour of the axes' own words, whatever style is in force now."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, labelcolor=ax.xaxis.label.get_color(), **place)


def whole_numbers(ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def colours(count: int) -> Iterator[str]:
    return (COLOURS[i % len(COLOURS)] for i in range(count))
