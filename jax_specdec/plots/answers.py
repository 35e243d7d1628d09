"""Figures of answers and of what `tune` measured."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_specdec.errors import UserError, a_kind, shown
from jax_specdec.plots.look import COLOURS, INK, axes_or_new, colours, legend, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from jax_specdec.generation import Generation
    from jax_specdec.tuning.costs import Costs


def _arms(arms: Any, one: type | tuple[type, ...]) -> dict[str, Any]:
    """`{label: something}`; one thing, or a list that is one, has no label."""
    found = dict(arms) if isinstance(arms, Mapping) else {"": arms}
    found = {str(label): [arm] if isinstance(arm, one) else arm for label, arm in found.items()}
    if not found or not all(isinstance(arm, Sequence) and len(arm) for arm in found.values()):
        raise UserError("There is nothing to plot: give answers, or {label: answers}.")
    return found


def _answers(arms: Any) -> "dict[str, Sequence[Generation]]":
    from jax_specdec.generation import Generation

    found = _arms(arms, Generation)
    for label, answers in found.items():
        if not all(isinstance(answer, Generation) for answer in answers):
            kind = next(type(a).__name__ for a in answers if not isinstance(a, Generation))
            where = f" of {shown(label)}" if label else ""
            raise UserError(f"Answers of a decoder are plotted, and one{where} is of type {kind}.")
    return found


def _generation() -> type:
    from jax_specdec.generation import Generation

    return Generation


def acceptance(arms: Any, ax: "Axes | None" = None) -> "Axes":
    """How often the token at each place of a draft is accepted.

    A token counts as accepted if all before it were, so that one plus the sum of a line is tau (Figure 2 of
    arXiv 2312.11462).

    Args:
      arms: an answer, a list of them, or `{label: answers}`; or shares by place, `{label: [0.8, 0.6, ...]}`.
    """
    found = {}
    for label, arm in _arms(arms, _generation()).items():
        if all(isinstance(value, (int, float)) for value in arm):
            found[label] = list(arm)
        else:
            from jax_specdec.tuning.measure import acceptance_by_position

            found[label] = acceptance_by_position(_answers({label: arm})[label])
    ax = axes_or_new(ax)
    markers = "osD^vP"
    for i, (label, shares) in enumerate(found.items()):
        tau = 1 + sum(shares)
        name = f"{label} (τ = {tau:.2f})" if label else f"τ = {tau:.2f}"
        ax.plot(
            range(1, len(shares) + 1),
            shares,
            color=COLOURS[i % len(COLOURS)],
            marker=markers[i % len(markers)],
            markersize=4,
            label=name,
        )
    ax.set(xlabel="place in the draft", ylabel="share of rounds that accept it", ylim=(0, 1))
    whole_numbers(ax)
    legend(ax)
    return ax


def _measured(record: Any) -> Mapping[str, Any]:
    """The drafters of a record of `tune`: what `tuning.tune` returns, or the file it writes."""
    if isinstance(record, (str, Path)):
        try:
            record = json.loads(Path(record).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{shown(record)} cannot be read: there is no such file.") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{shown(record)} cannot be read as JSON ({error!s:.200}).") from None
    if isinstance(record, Mapping) and isinstance(record.get("records"), list):
        record = next(iter(record["records"]), {})
    found = record.get("measured", {}) if isinstance(record, Mapping) else {}
    if not (isinstance(found, Mapping) and found.get("drafters") and found.get("verify_s")):
        raise UserError(
            f"Budgets are plotted from what `tune` measured: its record, or its file, not {a_kind(record)} of "
            "something else."
        )
    return {**found, "lengths": record.get("lengths", {})}


def _curves(found: Mapping[str, Any]) -> list[tuple[str, list[float], "Costs", int]]:
    """Of each drafter its name, its shares by place, its costs, and the longest draft that both cover."""
    from jax_specdec.tuning.costs import Costs

    try:
        verify = {int(nodes): float(seconds) for nodes, seconds in found["verify_s"].items()}
        curves = []
        for name, drafter in found["drafters"].items():
            # An expansion adds nodes as well as length: its line would not be over lengths alone.
            if "+" not in name:
                shares = [float(share) for share in drafter["accepted_per_pos"]]
                costs = Costs(verify, {int(g): float(s) for g, s in drafter["draft_s"].items()})
                longest = min(len(shares), max(costs.draft, default=0), max(verify) - 1)
                curves.append((name, shares, costs, longest))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"The record of `tune` is not whole: {error!r:.100}.") from None
    return curves


def tau(record: Any, ax: "Axes | None" = None, *, speed: bool = False) -> "Axes":
    """Tokens a round (tau) by draft length, for each drafter that `tune` measured; a ring is the length it chose.

    Args:
      record: what `tuning.tune.tune` returned, or `draft_lengths.json`; of a file of several, the first.
      speed: instead of tau the speed against plain decoding that follows from it and from what verifying and
        drafting cost: why longer is not always better.
    """
    found = _measured(record)
    curves = _curves(found)
    ax = axes_or_new(ax)
    ring: dict[str, Any] = {"markersize": 9, "fillstyle": "none", "markeredgewidth": 1.5}
    for (name, shares, costs, longest), colour in zip(curves, colours(len(curves)), strict=True):
        lengths = range(0, longest + 1)
        line = [costs.speedup(shares, g) if speed else 1 + sum(shares[:g]) for g in lengths]
        ax.plot(lengths, line, color=colour, marker=".", label=name)
        chosen = found["lengths"].get(name)
        if chosen is not None and chosen <= longest:
            ax.plot(chosen, line[chosen], color=colour, marker="o", **ring)
    ax.plot([], [], color=INK, marker="o", linestyle="none", label="chosen", **ring)
    ylabel = "predicted speed (plain decoding = 1)" if speed else "tokens a round, τ"
    ax.set(xlabel="draft length (tokens)", ylabel=ylabel)
    if speed:
        ax.axhline(1, color=INK, linewidth=0.8, linestyle="--")
    whole_numbers(ax)
    legend(ax, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def time(arms: Any, ax: "Axes | None" = None, *, compiling: bool = False) -> "Axes":
    """Where the time of answers went: reading the prompt, and rounds; the total and its speed beside each bar.

    Args:
      arms: as in `acceptance`; the bar of several answers is their sum. Rows of one batch ran together: their time
        counts for each of them.
      compiling: also what was compiled on the way.
    """
    found = _answers(arms)
    parts = {
        "compiling": lambda s: s.compile_time_s,
        "reading the prompt": lambda s: s.prefill_time_s,
        "rounds": lambda s: s.wall_time_s - s.prefill_time_s,
    }
    if not compiling:
        del parts["compiling"]
    ax = axes_or_new(ax, (6.0, 0.9 + 0.45 * len(found)))
    totals = [0.0] * len(found)
    colours = {"compiling": COLOURS[4], "reading the prompt": COLOURS[1], "rounds": COLOURS[0]}
    for name, of in parts.items():
        widths = [sum(of(answer.stats) for answer in answers) for answers in found.values()]
        places = range(len(found))
        ax.barh(places, widths, left=totals, height=0.6, color=colours[name], label=name)
        totals = [total + width for total, width in zip(totals, widths, strict=True)]
    for place, (total, answers) in enumerate(zip(totals, found.values(), strict=True)):
        rate = sum(a.stats.num_tokens for a in answers) / max(
            sum(a.stats.wall_time_s for a in answers), 1e-9
        )
        ax.text(total, place, f"  {total:.2f} s, {rate:.0f} tokens/s", va="center", color=INK)
    ax.set_yticks(range(len(found)), list(found))
    ax.invert_yaxis()
    ax.set(xlabel="seconds", xlim=(0, max(totals) * 1.35 or 1))
    ax.grid(visible=False, axis="y")
    legend(ax, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return ax
