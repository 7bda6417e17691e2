"""Charts of memory, and small multiples over seeds: nothing is lost, predicted and measured are told apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hybridlab.charts.builders import seed_panels
from hybridlab.charts.model import Series
from hybridlab.charts.style import CONTROL
from hybridlab.notebook.views.memory_charts import (
    SAFE_PEAK,
    memory_breakdown,
    memory_timeline,
    quality_against_memory,
    vram_rows,
)


def memory_row(arm: str, peak_gb: float, step_ms: float, change: float | None, *gigabytes: float) -> dict[str, Any]:
    names = ("weights", "gradients", "optimizer", "activations", "logits", "path", "workspace", "context")
    parts = {name: int(1e9 * size) for name, size in zip(names, gigabytes, strict=True)}
    predicted = sum(parts.values()) - parts["context"]
    bounds = {"loss_change_low": None, "loss_change_high": None}
    if change:
        bounds = {"loss_change_low": round(change - 0.005, 4), "loss_change_high": round(change + 0.004, 4)}
    return {
        "arm": arm,
        "model": "small",
        "parts": parts,
        "predicted_allocated_bytes": predicted,
        "measured_allocated_bytes": round(predicted / 0.98),
        "peak_memory_bytes": int(1e9 * peak_gb),
        "step_ms": step_ms,
        "validation_loss": 3.9,
        "loss_change": change,
    } | bounds


MEMORY_ROWS = [
    memory_row("fp32", 6.9, 85.0, None, 0.5, 0.5, 1.0, 2.2, 1.6, 0.0, 0.1, 0.5),
    memory_row("bf16", 6.0, 28.0, 0.002, 0.5, 0.5, 1.0, 1.4, 1.6, 0.0, 0.1, 0.5),
    memory_row("everything", 1.8, 41.0, 0.006, 0.5, 0.05, 0.25, 0.2, 0.1, 0.3, 0.1, 0.5)
    | {"loss_change_low": -0.001, "loss_change_high": 0.012},
]


def vram(rows: int = 2000) -> pd.DataFrame:
    phase = ["warmup"] * (rows // 4) + ["full"] * (rows // 2) + ["predict"] * (rows // 4)
    used = np.where(np.array(phase) == "full", 14e9, 11e9)
    used[777] = 15e9
    columns = {"nominal_step": range(rows), "seconds": np.arange(rows) * 0.5, "phase": phase, "source": "cuda"}
    return pd.DataFrame(columns | {"used_bytes": used, "allocated_bytes": used - 1e9, "device_used_bytes": None})


def test_stacked_parts_begin_where_the_last_one_ended_and_share_a_row() -> None:
    chart = memory_breakdown(MEMORY_ROWS, "Memory")
    places = {place.series.name: place for place in chart.places()}
    assert places["gradients"].base == places["weights"].series.x
    assert places["optimizer"].base == (1.0, 1.0, 0.55)
    assert places["weights"].offset == places["workspace"].offset < places["measured"].offset
    assert [name for name, place in places.items() if place.topmost] == ["workspace", "measured"]
    ends = [b + x for b, x in zip(places["workspace"].base, places["workspace"].series.x, strict=True)]
    assert ends == pytest.approx([row["predicted_allocated_bytes"] / 1e9 for row in MEMORY_ROWS])
    assert chart.x_limits()[1] > max(places["measured"].series.x)


def test_a_breakdown_is_drawn_with_totals_at_the_ends_and_without_the_context() -> None:
    chart = memory_breakdown(MEMORY_ROWS, "Memory")
    figure = chart.plotly()
    assert [note.text for note in figure.layout.annotations[:-1]] == ["5.9", "5.1", "1.5", "6.02", "5.204", "1.531"]
    bars = {trace.name: trace for trace in figure.data}
    assert list(bars["activations"].base) == [2.0, 2.0, 0.8]
    assert bars["measured"].marker.color == CONTROL
    assert "context" not in bars
    assert chart.png().startswith(b"\x89PNG")


def test_parts_that_nothing_needs_are_left_out() -> None:
    assert "path" not in str(memory_breakdown(MEMORY_ROWS[:2], "Memory"))


def test_an_arm_that_was_only_predicted_has_no_measured_bar() -> None:
    rows = [row | {"measured_allocated_bytes": None} for row in MEMORY_ROWS[:1]]
    assert "measured," not in str(memory_breakdown(rows, "Memory"))


def test_the_control_is_told_apart_and_the_bound_is_drawn_where_it_matters() -> None:
    chart = quality_against_memory(MEMORY_ROWS, "Quality")
    assert [series.name for series in chart.series if series.control] == ["fp32"]
    assert chart.x_lines == ()
    large = quality_against_memory([MEMORY_ROWS[0] | {"peak_memory_bytes": 13e9}], "Quality")
    assert large.x_lines == (SAFE_PEAK,)
    assert large.x_limits()[1] >= SAFE_PEAK.value
    assert "line at x 14.0000: 14 GB" in str(large)
    assert large.png().startswith(b"\x89PNG")


def test_an_arm_that_changes_nothing_is_no_control() -> None:
    exact = MEMORY_ROWS[1] | {"arm": "exact", "loss_change": 0.0, "loss_change_low": 0.0, "loss_change_high": 0.0}
    chart = quality_against_memory([MEMORY_ROWS[0], exact], "Quality")
    assert [series.name for series in chart.series if series.control] == ["fp32"]


def test_an_arm_that_diverged_is_named_and_not_drawn() -> None:
    ended = MEMORY_ROWS[1] | {
        "arm": "ended",
        "loss_change": math.inf,
        "loss_change_low": None,
        "loss_change_high": None,
    }
    chart = quality_against_memory([MEMORY_ROWS[0], ended], "Quality")
    assert ([series.name for series in chart.series], chart.title) == (["fp32"], "Quality (diverged: ended)")


def test_a_time_line_starts_at_zero_and_shows_every_phase_and_the_bound() -> None:
    chart = memory_timeline(vram(), "VRAM", limit=SAFE_PEAK)
    assert [series.name for series in chart.series] == ["reserved by torch", "in live tensors"]
    assert [band.label for band in chart.bands] == ["Warmup", "Full", "Predict"]
    assert chart.y_limits()[0] == 0
    assert chart.y_limits()[1] > 15


def test_without_a_gpu_the_time_line_says_whose_memory_it_is() -> None:
    frame = vram().assign(source="process", allocated_bytes=None)
    assert [series.name for series in memory_timeline(frame, "Memory").series] == ["resident memory of the process"]


def test_the_published_table_is_short_and_loses_neither_peak_nor_phase() -> None:
    (row,) = vram_rows({"run": vram()})
    assert len(row["seconds"]) == len(row["used_gb"]) == len(row["phase"]) <= 310
    assert max(row["used_gb"]) == 15
    assert row["seconds"][0] == 0


@pytest.mark.parametrize("kind", ["line", "points"])
def test_only_bars_can_be_stacked(kind: Any) -> None:
    with pytest.raises(ValueError, match="can be stacked"):
        Series("a", [1.0], [0.0], kind=kind, stack=True)


def test_each_arm_gets_a_chart_with_its_seeds_their_interval_and_its_control() -> None:
    def frame(end: float) -> pd.DataFrame:
        return pd.DataFrame({"gradient_step": [10, 20, 30], "validation_loss": [5.0, 4.0, end]})

    runs = {"a": [frame(3.0), frame(3.2)], "cut": [frame(3.1), frame(3.3)], "b": [frame(2.9), frame(3.1)]}
    panels = seed_panels(runs, {"a": "cut", "b": "cut"}, against="gradient_step", title="by seed")
    assert [chart.title for chart in panels.charts] == ["a", "b"]
    mean, control, *seeds = panels.charts[0].series
    assert mean.y[-1] == pytest.approx(3.1)
    assert mean.high is not None
    assert mean.high[-1] == pytest.approx(3.1 + 12.706 * 0.1, rel=1e-3)  # Student's t with one degree of freedom
    assert control.control
    assert [series.kind for series in seeds] == ["points", "points"]
    with pytest.raises(ValueError, match="no runs of"):
        seed_panels(runs, {"a": "cud"}, against="gradient_step", title="by seed")
