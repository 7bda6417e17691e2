"""A chart on the page: interactive in JupyterLab, a picture where no JavaScript runs, and text to compare.

The interactive figure and the text hold rounded numbers only, so that the outputs of two runs can be compared exactly.
No browser is needed to draw either.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridlab.base.front_end import in_jupyterlab
from hybridlab.charts.model import ChartData

if TYPE_CHECKING:
    import plotly.graph_objects as go


class _Displayed:
    """What a notebook shows as plotly JSON, PNG and text at once."""

    def _grid(self) -> tuple[str | None, tuple[ChartData, ...], int]:
        """The title above all charts, the charts, and how many lie side by side."""
        raise NotImplementedError

    def plotly(self) -> go.Figure:
        """The interactive figure, as wide as its cell."""
        from hybridlab.charts import plotly

        return plotly.figure_of(*self._grid())

    def png(self) -> bytes:
        """The picture, 900 pixels wide: the same bytes for the same chart."""
        from hybridlab.charts import png

        return png.picture_of(*self._grid())

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        figure = self.plotly().to_plotly_json() | {"config": {"responsive": True, "displaylogo": False}}
        if in_jupyterlab():  # which shows a picture first where there is one, and saves its own
            return {"application/vnd.plotly.v1+json": figure, "text/plain": str(self)}
        picture = base64.b64encode(self.png()).decode("ascii")
        return {"application/vnd.plotly.v1+json": figure, "image/png": picture, "text/plain": str(self)}


class Chart(ChartData, _Displayed):
    """One chart that a cell shows by naming it last."""

    def _grid(self) -> tuple[None, tuple[ChartData, ...], int]:
        return None, (self,), 1


@dataclass(frozen=True)
class Panels(_Displayed):
    """Several charts side by side under one title and one legend; a series name looks alike in all.

    Raises ValueError without charts.
    """

    title: str
    charts: tuple[ChartData, ...]
    columns: int = 2

    def __post_init__(self) -> None:
        if not self.charts:
            raise ValueError(f"panels {self.title!r} hold no chart: give at least one")

    def __str__(self) -> str:
        return "\n".join([self.title, *map(str, self.charts)])

    def _grid(self) -> tuple[str, tuple[ChartData, ...], int]:
        return self.title, self.charts, min(self.columns, len(self.charts))
