"""Charts of memory: over time, part by part beside what was measured, and against quality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from hybridlab.charts.builders import phase_bands, without
from hybridlab.charts.display import Chart
from hybridlab.charts.model import Line, Series, kept
from hybridlab.planner.plan import PARTS
from hybridlab.results.claims import SAFE_PEAK_BYTES

LINES = {"device_used_bytes": "whole GPU", "used_bytes": "reserved by torch", "allocated_bytes": "in live tensors"}
SAFE_PEAK = Line(SAFE_PEAK_BYTES / 1e9, f"{SAFE_PEAK_BYTES / 1e9:.0f} GB")
"""The plan's bound on the peak, in decimal gigabytes."""

MemoryRow = Mapping[str, Any]
"""A row of the table "memory", as `Footprint.row` makes it."""


def memory_timeline(vram: pd.DataFrame, title: str, *, limit: Line | None = None) -> Chart:
    """Draw memory over wall time, with the phases behind it.

    vram: columns `seconds`, `phase` and at least one of `used_bytes`, `allocated_bytes`, `device_used_bytes`, as in
        a run's vram.parquet; `source` "process" says that there is no GPU
    limit: a bound to draw, in decimal gigabytes

    Raises ValueError where the frame is empty or nothing of it was read.
    """
    without_gpu = "source" in vram and set(vram["source"]) == {"process"}
    names = LINES | ({"used_bytes": "resident memory of the process"} if without_gpu else {})
    series = []
    for column, name in names.items():
        if column in vram and len(read := vram[["seconds", column]].dropna()):
            series.append(Series(name, read["seconds"].tolist(), (read[column] / 1e9).tolist()))
    lines = (limit,) if limit else ()
    top = max([*(value for s in series for value in s.y), *(line.value for line in lines)], default=1.0)
    bands = phase_bands(vram, over="seconds")
    return Chart(title, "wall time (s)", "memory (GB)", tuple(series), bands, lines=lines, y_zoom=(0.0, 1.15 * top))


def vram_rows(runs: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """The table "vram" that a notebook publishes: each run's used memory over time, thinned, no phase lost.

    runs: name -> a run's `vram` frame
    """
    rows = []
    for name, vram in runs.items():
        changes = vram["phase"].ne(vram["phase"].shift(-1)).to_numpy().nonzero()[0]
        few = vram.iloc[sorted({*kept(vram["used_bytes"].tolist()), *changes.tolist()})]
        columns = {"seconds": few["seconds"].round(3).tolist(), "used_gb": (few["used_bytes"] / 1e9).round(3).tolist()}
        rows.append({"run": name, **columns, "phase": few["phase"].map(str).tolist()})
    return rows


def memory_breakdown(rows: Sequence[MemoryRow], title: str) -> Chart:
    """Draw the predicted parts of each arm's peak stacked into one bar, and what was measured below it.

    rows: with `arm`, `parts` (name -> bytes) and `measured_allocated_bytes`

    Raises ValueError without rows.
    """
    if not rows:
        raise ValueError(f"chart {title!r} has no rows: publish the table 'memory' first")
    numbers = range(len(rows))
    shown = [part for part in PARTS if any(row["parts"].get(part) for row in rows)]
    stacked = [
        Series(part, [row["parts"].get(part, 0) / 1e9 for row in rows], numbers, kind="bar", stack=True)
        for part in shown
    ]
    sizes = [row.get("measured_allocated_bytes") for row in rows]
    known = [(number, size / 1e9) for number, size in enumerate(sizes) if size is not None]
    names, label = tuple(row["arm"] for row in rows), "peak of allocated memory (GB), predicted by part above measured"
    if known:
        at, measured = zip(*known, strict=True)
        stacked.append(Series("measured", measured, at, kind="bar", control=True))
        title = without(title, [name for name, size in zip(names, sizes, strict=True) if size is None])
    return Chart(title, label, "", tuple(stacked), names=names)


def quality_against_memory(rows: Sequence[MemoryRow], title: str) -> Chart:
    """Draw each arm's change of the loss over its peak memory; down and to the left is better.

    rows: with `arm`, `peak_memory_bytes`, `loss_change`, `loss_change_low` and `loss_change_high`. The only one without
        a change is the control; of several, none is known to be it, and they are left out. So is one whose change is
        not finite, as it or the control diverged. 0 is an arm that is exact

    Raises ValueError where no row is left.
    """
    lacking = [row["arm"] for row in rows if row["loss_change"] is None]
    diverged = [row["arm"] for row in rows if not math.isfinite(row["loss_change"] or 0.0)]
    rows = [row for row in rows if row["arm"] not in diverged]
    series = []
    for row in rows if len(lacking) < 2 else (row for row in rows if row["arm"] not in lacking):
        change = 0.0 if row["loss_change"] is None else row["loss_change"]
        bounds = [row.get("loss_change_low"), row.get("loss_change_high")]
        low, high = (change if bound is None else bound for bound in bounds)
        where = ([row["peak_memory_bytes"] / 1e9], [change], [low], [high])
        series.append(Series(row["arm"], *where, kind="points", control=row["loss_change"] is None))
    title = without(title, lacking if len(lacking) > 1 else ())
    title += f" (diverged: {', '.join(diverged)})" if diverged else ""
    label = "change of the final loss (nats)"
    zero = (Line(0.0, "as good as the control"),)
    near = max(row["peak_memory_bytes"] for row in rows) / 1e9 > SAFE_PEAK.value / 2
    bound = (SAFE_PEAK,) if near else ()
    return Chart(title, "peak memory (GB)", label, tuple(series), lines=zero, x_lines=bound)
