"""A table to sort and search by hand in JupyterLab, and a plain one everywhere else."""

from __future__ import annotations

import html
from collections.abc import Collection
from dataclasses import dataclass

import pandas as pd

from hybridlab.charts.tables import Table
from hybridlab.panel.progress import in_jupyterlab

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

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, str]:
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
