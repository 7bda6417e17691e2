"""The pictures of the documents, drawn from published numbers."""

from __future__ import annotations

import hashlib
import io
import json
import math
from contextlib import suppress

import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hybridlab.charts.builders import interval_chart
from hybridlab.charts.display import Chart
from hybridlab.charts.model import Line
from hybridlab.charts.tables import LiveTable, Table, table
from hybridlab.notebook.views.memory_charts import SAFE_PEAK, memory_breakdown, memory_timeline, quality_against_memory
from hybridlab.notebook.views.study_charts import losses_chart
from hybridlab.report.criteria import everywhere
from hybridlab.report.evidence import Evidence, Published
from hybridlab.results.claims import Quantity
from hybridlab.results.words import quantities_in_words

DIGEST = "chart-sha256"
"""Which numbers a picture was drawn from; its pixels depend on the fonts and libraries of a machine, too."""


def charts_of(evidence: Evidence) -> dict[str, Chart]:
    """Every chart that the results have numbers for, by the name of its file."""
    charts = {}
    for profile in evidence.entries:
        claims = [claim for claim in evidence.claims(kind="pays", profile=profile) if not claim.is_idle]
        if any(claim.value("loss_to_control") is not None for claim in claims):
            charts[f"against_control_{profile}.png"] = against_control(claims, evidence.label(profile))
        for notebook, rows in evidence.tables("losses", profile).items():
            charts[f"{notebook}_{profile}.png"] = losses_chart(rows)
    for notebook, rows in evidence.tables("memory").items():
        title = f"{notebook}: where the memory goes"
        charts[f"memory_breakdown_{notebook}.png"] = memory_breakdown(rows, title)
        if any(row.get("loss_change") is not None for row in rows):  # else the control did not run
            title = f"{notebook}: what less memory costs in quality"
            charts[f"quality_against_memory_{notebook}.png"] = quality_against_memory(rows, title)
    for notebook, rows in evidence.tables("vram").items():
        for number, row in enumerate(rows):
            title, frame = f"{notebook}, {row['run']}: memory over time", vram_frame(row)
            limit = SAFE_PEAK if frame["used_bytes"].max() > 1e9 * SAFE_PEAK.value / 2 else None
            if frame["used_bytes"].notna().any():
                charts[f"vram_{notebook}_{number}.png"] = memory_timeline(frame, title, limit=limit)
    return charts


def against_control(claims: list[Published], where: str) -> Chart:
    """Each arm's final loss against its truncated control, with the interval over seeds."""
    found = [(c, c.quantity("loss_to_control") or Quantity("loss_to_control", None)) for c in claims]
    rows = [(f"{c.about} ({c.notebook[:2]})", q.value, q.low, q.high) for c, q in found]
    rows.sort(key=lambda row: math.inf if row[1] is None else row[1])
    title = f"Hybrid minus control, {where}: right is worse"
    zero = (Line(0.0, "as good as stopping earlier"),)
    return interval_chart(title, "difference in final loss (nats)", rows, lines=zero)


def vram_frame(row: dict[str, list[float]]) -> pd.DataFrame:
    """A row of the table "vram" as the frame that a run records."""
    used = 1e9 * pd.Series(row["used_gb"], dtype=float)
    return pd.DataFrame({"seconds": row["seconds"], "phase": row["phase"], "used_bytes": used})


def signed(chart: Chart) -> bytes:
    """The chart's picture, with the hash of what it shows written into it."""
    note = PngInfo()
    note.add_text(DIGEST, _digest(chart))
    buffer = io.BytesIO()
    Image.open(io.BytesIO(chart.png())).save(buffer, format="PNG", optimize=True, pnginfo=note)
    return buffer.getvalue()


def shows(picture: bytes, chart: Chart) -> bool:
    """Whether a picture was drawn from the chart's numbers, by the hash in it."""
    with suppress(OSError):  # no picture, or half of one
        return Image.open(io.BytesIO(picture)).info.get(DIGEST) == _digest(chart)
    return False


def _digest(chart: Chart) -> str:
    return hashlib.sha256(json.dumps(chart.plotly().to_plotly_json()).encode()).hexdigest()


def criteria_table(evidence: Evidence) -> Table:
    """Every criterion of the plan with its verdict, and where it was measured."""
    rows = []
    for group, criterion in everywhere():
        notebooks = dict.fromkeys(finding.notebook for finding in criterion.findings(evidence) if finding.notebook)
        where = ", ".join(notebook[:2] for notebook in notebooks)
        rows.append({"of": group, "criterion": criterion.text, "verdict": criterion.outcome(evidence), "in": where})
    return table(rows, "The plan's success criteria, decided by what was measured on a GPU")


def claims_browser(evidence: Evidence) -> LiveTable:
    """Every claim of every notebook and profile."""
    rows = [
        {
            "profile": profile,
            "notebook": claim.notebook,
            "claim": claim.sentence,
            "verdict": claim.verdict,
            "numbers": quantities_in_words(claim.quantities),
        }
        for profile in evidence.entries
        for claim in evidence.claims(profile=profile)
    ]
    return LiveTable(table(rows, f"{len(rows)} claims") if rows else None, "no notebook has published a claim yet")


def charts_beginning(evidence: Evidence, *names: str) -> list[Chart]:
    """The documents' charts whose files' names begin so: against_control, memory_breakdown, quality or vram."""
    return [chart for name, chart in charts_of(evidence).items() if name.startswith(names)]
