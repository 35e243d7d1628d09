"""The figure of a draft."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jax_specdec.errors import UserError, a_kind
from jax_specdec.plots.look import COLOURS, INK, axes_or_new, legend
from jax_specdec.text.inputs import is_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def tree(
    parents: Sequence[int],
    labels: Sequence[str],
    *,
    sources: Sequence[str | None] | None = None,
    accepted: Sequence[int] = (),
    ax: "Axes | None" = None,
) -> "Axes":
    """A draft as a tree of tokens, the root on the left, and the path that was accepted in it.

    Args:
      parents: of each node by its number; the root is node 0 and its own parent.
      labels: what stands in each node.
      sources: which drafter each node is from, for its colour; None for the root.
      accepted: nodes that became text, drawn bold.
    """
    for given in (parents, labels, accepted, sources or ()):
        if not hasattr(given, "__len__"):
            raise UserError(f"A tree is drawn from a list for each argument, not {a_kind(given)}.")
    count = len(parents)
    if not count or len(labels) != count or (sources is not None and len(sources) != count):
        raise UserError(f"A tree has a parent, a label and a source for each node, got {count}.")
    if any(
        not (is_whole(parent) and 0 <= parent < max(1, node)) for node, parent in enumerate(parents)
    ):
        raise UserError("The parent of a node comes before it, and the root is node 0.")
    depth, heights = layout(parents)
    ax = axes_or_new(ax, (1.1 + 1.25 * (1 + max(depth)), 0.8 + 0.42 * (1 + max(heights))))
    names = [name for name in dict.fromkeys(sources or ()) if name is not None]
    colours = dict(zip(names, (COLOURS[i % len(COLOURS)] for i in range(len(names))), strict=True))
    kept = {0, *accepted}
    for node in range(1, count):
        parent, on = parents[node], node in kept
        ax.plot(
            [depth[parent], depth[node]],
            [-heights[parent], -heights[node]],
            color=INK,
            linewidth=2.5 if on else 0.8,
            alpha=1.0 if on else 0.5,
            zorder=1,
        )
    for node in range(count):
        source = sources[node] if sources is not None else None
        colour, on = colours.get(source or "", INK), node in kept
        box = {
            "boxstyle": "round,pad=0.3",
            "facecolor": colour if on else "white",
            "edgecolor": colour,
            "linewidth": 1.5,
        }
        ax.text(
            depth[node],
            -heights[node],
            labels[node],
            ha="center",
            va="center",
            fontsize=8,
            family="monospace",
            color="white" if on else "#333333",
            bbox=box,
            zorder=2,
            parse_math=False,
        )
    for name, colour in colours.items():
        ax.plot([], [], color=colour, marker="s", linestyle="none", label=name)
    ax.set_xlim(-0.5, max(depth) + 0.5)
    ax.set_ylim(-max(heights) - 0.6, 0.6)
    ax.set_axis_off()
    if colours:
        legend(ax, loc="upper left", bbox_to_anchor=(0, 0), ncols=len(colours))
    return ax


def layout(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """Depth and height of each node: the first child is level with its parent, the others below it."""
    children: list[list[int]] = [[] for _ in parents]
    for node in range(1, len(parents)):
        children[parents[node]].append(node)
    depth, heights, lowest = [0] * len(parents), [0] * len(parents), -1
    stack = [(0, 0)]
    while stack:
        node, level = stack.pop()
        depth[node] = level
        first = node and children[parents[node]][0] == node
        if first:
            heights[node] = heights[parents[node]]
        else:
            lowest += 1
            heights[node] = lowest
        stack += [(child, level + 1) for child in reversed(children[node])]
    return depth, heights
