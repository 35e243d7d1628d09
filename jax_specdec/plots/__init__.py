"""Figures of a decoder's work, as matplotlib Axes.

    import jax_specdec as sd
    sd.plots.acceptance({"glide": answers})

Each function draws on `ax`, or on a new figure whose text and lines can be read on light and dark pages, and
returns the Axes. Colours are those of Okabe and Ito, apart for every kind of colour vision. matplotlib is imported
when something is drawn.
"""

from jax_specdec.plots.answers import acceptance, tau, time
from jax_specdec.plots.curves import Live, agreement, live, training, training_figure
from jax_specdec.plots.look import COLOURS, style
from jax_specdec.plots.trees import tree

__all__ = [
    "COLOURS",
    "Live",
    "acceptance",
    "agreement",
    "live",
    "style",
    "tau",
    "time",
    "training",
    "training_figure",
    "tree",
]
