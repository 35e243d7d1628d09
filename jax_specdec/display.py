"""What people see of answers and models: short descriptions, tables, and HTML for notebooks."""

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# Of sources, in order: told apart by people who are colour-blind (Okabe and Ito), and laid behind text in
# the page's own colour, so that it is readable on light and on dark pages alike.
COLOURS = ("0,158,115", "86,180,233", "204,121,167", "230,159,0", "213,94,0")
MOST_ROWS = 40
MOST_BEFORE = 400  # characters

_STYLE = (
    "<style>.jaxsd{font-family:inherit;max-width:60em;line-height:1.6}"
    ".jaxsd-text{white-space:pre-wrap;overflow-wrap:anywhere}"
    ".jaxsd-text span,.jaxsd-legend span{border-radius:.2em;padding:.1em 0;"
    "-webkit-box-decoration-break:clone;box-decoration-break:clone}"
    ".jaxsd-text i{font-style:normal;opacity:.6}"
    ".jaxsd-legend{font-size:.85em;margin:.6em 0 .3em;opacity:.85}"
    ".jaxsd-legend span{padding:.1em .5em;margin-right:.4em}"
    ".jaxsd table{border-collapse:collapse;font-size:.85em;font-variant-numeric:tabular-nums;"
    "background:none;color:inherit;margin:0}"
    ".jaxsd th,.jaxsd td{border:0;border-bottom:1px solid rgba(128,128,128,.35);padding:.2em .9em;"
    "text-align:left;background:none;color:inherit;white-space:pre}"
    ".jaxsd th{font-weight:600}</style>"
)


def size(count: int) -> str:
    """Bytes for reading.

    >>> size(7 << 20), size(3 << 30)
    ('7.0 MiB', '3.00 GiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def short(count: int) -> str:
    """A number of parameters for reading.

    >>> short(14_012_345), short(7_000_000_000), short(0)
    ('14.0M', '7.0B', '0')
    """
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count)


def model_line(decoder: Any, held: int) -> str:
    """A model in a line.

    Args:
      held: bytes of its parameters.
    """
    config, dtype = decoder.config, "int8" if decoder.quantized else decoder.dtype
    sizes = f"{short(config.parameter_count())} parameters in {dtype}, {size(held)}"
    sizes += f", {config.num_layers} layers of {config.hidden_size}"
    return f"{config.family}, {sizes}, vocabulary {config.vocab_size:,}, context {config.context:,}"


class Table(Sequence[Mapping[str, Any]]):
    """Rows of equal columns, a mapping each: printed as a table, taken by `pandas.DataFrame` as it is.

    >>> print(Table([{"position": 0, "text": " the"}, {"position": 1, "text": " end"}]))
      position   text
     ───────────────────
      0          ' the'
      1          ' end'
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()):
        self.rows = list(rows)
        self.columns = tuple(columns or (self.rows[0] if self.rows else ()))

    def __getitem__(self, index: Any) -> Any:
        return (
            Table(self.rows[index], self.columns) if isinstance(index, slice) else self.rows[index]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def _cells(self) -> list[list[str]]:
        cells = [[_cell(row[name]) for name in self.columns] for row in self.rows[:MOST_ROWS]]
        if len(self.rows) > MOST_ROWS:
            more = f"... {len(self.rows) - MOST_ROWS} more"
            cells.append([more, *[""] * (len(self.columns) - 1)])
        return cells

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(*self.columns, box=box.SIMPLE_HEAD)
        for row in self._cells():
            table.add_row(*map(Text, row))
        return table

    def __repr__(self) -> str:
        from rich.console import Console

        file = io.StringIO()
        Console(file=file, width=100, color_system=None, force_jupyter=False).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines() if line.strip())

    def _repr_html_(self) -> str:
        return f'{_STYLE}<div class="jaxsd">{_html_table(self.columns, self._cells())}</div>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return repr(value) if isinstance(value, str) and value.strip() != value else str(value)


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def facts_html(title: str, facts: Mapping[str, str]) -> str:
    """A title, and names with their values."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()
    )
    return f'{_STYLE}<div class="jaxsd"><b>{escape(title)}</b><table><tbody>{rows}</tbody></table></div>'


def answer_html(
    spans: Sequence[tuple[str, str | None]],
    sources: Sequence[str],
    figures: Mapping[str, str],
    before: str = "",
) -> str:
    """A text coloured by source, what the colours mean, and figures below.

    Args:
      before: what the text follows, shown fainter, its end if it is long.
      spans: pieces of the text with their sources, None for the target's own, which has no colour.
    """
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(sources)}

    def coloured(text: str, source: str | None) -> str:
        colour = colours.get(source or "")
        if colour is None or not text:
            return escape(text)
        return f'<span style="background:rgba({colour},.3)" title="{escape(str(source))}">{escape(text)}</span>'

    text = "".join(coloured(*run) for run in _runs(spans))
    if before:
        before = before if len(before) <= MOST_BEFORE else f"\u2026{before[-MOST_BEFORE:]}"
        text = f"<i>{escape(before)}</i>{text}"
    legend = "".join(
        f'<span style="background:rgba({colour},.3)">{escape(name)}</span>'
        for name, colour in colours.items()
    )
    if legend:
        legend = f'<div class="jaxsd-legend">proposed by {legend} and the rest by the target</div>'
    table = _html_table(list(figures), [list(figures.values())])
    return f'{_STYLE}<div class="jaxsd"><div class="jaxsd-text">{text}</div>{legend}{table}</div>'


def _runs(spans: Sequence[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Neighbours of one source together."""
    runs: list[tuple[str, str | None]] = []
    for text, source in spans:
        if runs and (runs[-1][1] == source or not text):
            runs[-1] = (runs[-1][0] + text, runs[-1][1])
        else:
            runs.append((text, source))
    return runs
