"""The pictures of the documents: drawn from published numbers, or taken from an executed notebook."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hybridlab.charts.builders import interval_chart
from hybridlab.charts.display import Chart
from hybridlab.charts.model import Line
from hybridlab.notebook.views.memory_charts import SAFE_PEAK, memory_breakdown, memory_timeline, quality_against_memory
from hybridlab.report.evidence import MAIN, PROFILES, Evidence, Found

CURVES = "03_gpt2_small_hybrid"
CURVES_CELL = 'curves(result, [*shown, *controls], "gradient_step")'
DIGEST = "chart-sha256"
"""Which numbers a picture was drawn from; its pixels depend on the fonts and libraries of a machine, too."""


def drawn(evidence: Evidence) -> dict[str, Chart]:
    """Every chart that the results have numbers for, by the name of its file."""
    return dict(_charts(evidence))


def _charts(evidence: Evidence) -> Iterator[tuple[str, Chart]]:
    for profile in evidence.entries:
        if paying := arms_that_predicted(evidence, profile):
            yield f"against_control_{profile}.png", against_control(paying, PROFILES[profile])
    for notebook, rows in evidence.tables("memory").items():
        yield f"memory_breakdown_{notebook}.png", memory_breakdown(rows, f"{notebook}: where the memory goes")
        if any(row.get("loss_change") is not None for row in rows):  # else the control did not run
            title = f"{notebook}: what less memory costs in quality"
            yield f"quality_against_memory_{notebook}.png", quality_against_memory(rows, title)
    for notebook, rows in evidence.tables("vram").items():
        for number, row in enumerate(rows):
            title = f"{notebook}, {row['run']}: memory over time"
            limit = SAFE_PEAK if max(row["used_gb"]) > SAFE_PEAK.value / 2 else None
            yield f"vram_{notebook}_{number}.png", memory_timeline(vram_frame(row), title, limit=limit)


def arms_that_predicted(evidence: Evidence, profile: str = MAIN) -> list[Found]:
    """The claims on arms that took predicted steps."""
    entries = evidence.entries.get(profile, {})
    claims = [claim for notebook in entries for claim in evidence.claims(notebook, "*-pays", profile=profile)]
    return [claim for claim in claims if claim.numbers.get("predicted_steps")]


def against_control(claims: list[Found], where: str) -> Chart:
    """Each arm's final loss against its truncated control, with the interval over seeds."""
    rows = [(f"{claim.arm} ({claim.notebook[:2]})", *_interval(claim)) for claim in claims]
    rows.sort(key=lambda row: row[1])
    title = f"Hybrid minus control, {where}: right is worse"
    zero = (Line(0.0, "as good as stopping earlier"),)
    return interval_chart(title, "difference in final loss (nats)", rows, lines=zero)


def vram_frame(row: dict[str, list[float]]) -> pd.DataFrame:
    """A row of the table "vram" as the frame that a run records."""
    used = [1e9 * gigabytes for gigabytes in row["used_gb"]]
    return pd.DataFrame({"seconds": row["seconds"], "phase": row["phase"], "used_bytes": used})


def signed(chart: Chart) -> bytes:
    """The chart's picture, with the hash of what it shows written into it."""
    note = PngInfo()
    note.add_text(DIGEST, hashlib.sha256(json.dumps(chart.plotly().to_plotly_json()).encode()).hexdigest())
    buffer = io.BytesIO()
    Image.open(io.BytesIO(chart.png())).save(buffer, format="PNG", optimize=True, pnginfo=note)
    return buffer.getvalue()


def same_picture(one: bytes, other: bytes) -> bool:
    """Whether two pictures show the same numbers: by their hashes where both have one, else byte by byte."""
    hashes = [Image.open(io.BytesIO(picture)).info.get(DIGEST) for picture in (one, other)]
    return hashes[0] == hashes[1] if all(hashes) else one == other


def curves_of(notebook: Path) -> bytes | None:
    """The chart of losses against gradient steps, as the executed notebook shows it."""
    if not notebook.exists():
        return None
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "".join(cell["source"]).endswith(CURVES_CELL):
            images = [o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {})]
            return base64.b64decode("".join(images[0])) if images else None
    return None


def _interval(claim: Found) -> tuple[float, float, float]:
    value, low, high = (float(claim.numbers[f"loss_to_control{end}"] or 0.0) for end in ("", "_low", "_high"))
    return value, low, high
