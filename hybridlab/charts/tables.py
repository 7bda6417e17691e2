"""A table for a notebook: HTML and aligned text; in JupyterLab one to sort and search."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd

from hybridlab.base.errors import printable
from hybridlab.base.front_end import in_jupyterlab
from hybridlab.study.statistics import formatted

MISSING = "–"

INTERVAL = re.compile(r"\[[^][,]+, [^][,]+\]")
"""Two bounds, which stay on one line."""

CAPTION = "text-align: left; min-width: min(36em, 100%)"
"""A sentence is not broken for a narrow table."""

COLORS = {"holds": "#2a9d4a", "fails": "#d64545", "open": "#b8860b", "predicted nothing": "#808890"}
COLORS |= {"better than stopping earlier": COLORS["holds"], "worse than stopping earlier": COLORS["fails"]}
COLORS |= {"no difference shown": COLORS["open"]}
"""Of cells that are a verdict; readable on white and on black."""


def table(
    rows: Iterable[Mapping[str, Any]], caption: str | None = None, formats: Mapping[str, str] | None = None
) -> Table:
    """Show records as a table, a column for each key in order of appearance.

    rows: the records; a missing key or None is shown as a dash
    caption: the sentence above the table
    formats: format specifications by column, such as `{"lr": "g", "parameters": ","}`; floats without one show four
        decimals

    Raises ValueError where there are no rows, or `formats` names a column that is not there.
    """
    return Table(tuple(dict(row) for row in rows), caption, dict(formats or {}))


@dataclass(frozen=True)
class Table:
    """Rows under headings; numbers stand right, text left."""

    rows: tuple[Mapping[str, Any], ...]
    caption: str | None
    formats: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("the table has no rows: give at least one")
        if unknown := set(self.formats) - set(self.columns):
            raise ValueError(f"formats name {sorted(unknown)}, the columns are {self.columns}")

    @cached_property
    def columns(self) -> list[str]:
        """The headings, in order of appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def cells(self) -> list[list[str]]:
        """What the table shows, row by row."""
        return [[self._cell(row.get(c), self.formats.get(c)) for c in self.columns] for row in self.rows]

    def html(self, unbroken: Collection[str] = ()) -> str:
        """A plain `<table>` that inherits the page's colors; cells of the `unbroken` columns stay on one line."""
        caption = f'<caption style="{CAPTION}">{html.escape(self.caption)}</caption>\n' if self.caption else ""
        lines = ["; white-space: nowrap" if c in unbroken else "" for c in self.columns]
        sides = [side + line for side, line in zip(self._sides, lines, strict=True)]
        head = "".join(_tag("th", c, side, "col") for c, side in zip(self.columns, sides, strict=True))
        body = "\n".join(f"<tr>{_row(cells, sides)}</tr>" for cells in self.cells())
        return f"<table>\n{caption}<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    def __str__(self) -> str:
        grid = [list(map(printable, self.columns)), *self.cells()]
        widths = [max(len(row[i]) for row in grid) for i in range(len(self.columns))]
        grid.insert(1, ["-" * width for width in widths])
        places = [">" if side == "right" else "<" for side in self._sides]
        cells = ([f"{cell:{at}{n}}" for cell, at, n in zip(row, places, widths, strict=True)] for row in grid)
        lines = ["  ".join(row).rstrip() for row in cells]
        return "\n".join([printable(self.caption), *lines] if self.caption else lines)

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": str(self)}

    @cached_property
    def _sides(self) -> list[str]:
        columns = ([row.get(c) for row in self.rows] for c in self.columns)
        return ["right" if all(v is None or _is_number(v) for v in values) else "left" for values in columns]

    @staticmethod
    def _cell(value: Any, spec: str | None) -> str:
        if value is None:
            return MISSING
        if isinstance(value, bool | np.bool_):
            return "yes" if value else "no"
        if not _is_number(value):
            return printable(str(value))
        if spec is not None:
            return formatted(value, spec)
        return str(int(value)) if isinstance(value, Integral) else f"{round(float(value), 4) + 0.0:.4f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def _row(cells: Sequence[str], sides: Sequence[str]) -> str:
    """One row; its first cell, if it is text, heads the row."""
    first = _tag("th", cells[0], sides[0], "row") if sides[0].startswith("left") else _tag("td", cells[0], sides[0])
    return first + "".join(_tag("td", c, side) for c, side in zip(cells[1:], sides[1:], strict=True))


def _tag(name: str, text: str, side: str, scope: str = "") -> str:
    scoped = f' scope="{scope}"' if scope else ""
    verdict = text.partition(" (")[0]
    color = f"; color: {COLORS[verdict]}; font-weight: 600" if verdict in COLORS else ""
    shown = INTERVAL.sub(r'<span style="white-space: nowrap">\g<0></span>', html.escape(text))
    return f'<{name}{scoped} style="text-align: {side}{color}">{shown}</{name}>'


def known_columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same records without the columns that are None in all of them."""
    known = {key for row in rows for key, value in row.items() if value is not None}
    return [{key: value for key, value in row.items() if key in known} for row in rows]


FOLDED_ROWS = 40
"""Where no DataTables pages it, a table with more rows is folded."""


@dataclass(frozen=True)
class LiveTable:
    """Shows a table through DataTables in JupyterLab; in batch as plain HTML, which needs no JavaScript.

    table: None where there is nothing to show; empty: the sentence that says so
    brief: the table as text, where it has fewer columns
    """

    table: Table | None
    empty: str
    brief: str = ""

    def __str__(self) -> str:
        return self.brief or (str(self.table) if self.table else self.empty)

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        if not self.table:
            return {"text/plain": self.empty}
        return {"text/html": _live(self.table) if in_jupyterlab() else _folded(self.table), "text/plain": str(self)}


def _folded(table: Table) -> str:
    """A long table opens at a click."""
    if len(table.rows) <= FOLDED_ROWS:
        return table.html()
    return f"<details>\n<summary>{html.escape(table.caption or 'the table')}</summary>\n{table.html()}\n</details>"


def _live(table: Table) -> str:
    """DataTables, whose code is brought along: nothing is fetched."""
    import itables

    itables.init_notebook_mode(connected=False)
    frame = pd.DataFrame(table.rows, columns=table.columns).round(4)
    texts = [i for i, column in enumerate(frame) if not pd.api.types.is_numeric_dtype(frame[column])]
    return itables.to_html_datatable(
        frame,
        table.caption,
        connected=False,
        showIndex=False,
        allow_html=False,
        classes="display compact",  # long sentences wrap
        columnDefs=[{"targets": texts, "className": "dt-left"}],
    )
