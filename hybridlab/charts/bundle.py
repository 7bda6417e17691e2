"""One display bundle for a chart: interactive, a picture, and text that can be compared."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

import plotly.graph_objects as go

PLOTLY_MIME = "application/vnd.plotly.v1+json"


class Bundle(ABC):
    """A chart that a notebook shows as plotly JSON, PNG and text at once.

    JupyterLab draws the JSON, pages without JavaScript show the picture, and the text and the JSON hold
    rounded numbers only, so that two runs can be compared exactly.
    """

    @abstractmethod
    def plotly(self) -> go.Figure:
        """The interactive figure."""

    @abstractmethod
    def png(self) -> bytes:
        """The picture: the same bytes for the same chart."""

    @abstractmethod
    def text(self) -> str:
        """The chart in a few lines of text."""

    def __str__(self) -> str:
        return self.text()

    def _repr_mimebundle_(
        self, include: Collection[str] | None = None, exclude: Collection[str] | None = None
    ) -> dict[str, Any]:
        figure = self.plotly().to_plotly_json()
        return {
            PLOTLY_MIME: {**figure, "config": {"responsive": True, "displaylogo": False}},
            "image/png": base64.b64encode(self.png()).decode("ascii"),
            "text/plain": self.text(),
        }
