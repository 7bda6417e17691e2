"""The charts that notebooks ask for, from plain frames and numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd

from hybridlab.charts.display import Chart, Panels
from hybridlab.charts.model import Band, Line, Series
from hybridlab.study.statistics import Interval

Against = Literal["nominal_step", "gradient_step", "seconds"]
Frames = pd.DataFrame | Sequence[pd.DataFrame]
AXES: dict[Against, str] = {
    "nominal_step": "nominal steps",
    "gradient_step": "gradient steps",
    "seconds": "wall time (s)",
}


def loss_curves(
    runs: Mapping[str, Frames],
    *,
    against: Against,
    smooth: int = 0,
    control: Collection[str] = (),
    control_of: Mapping[str, str] | None = None,
    value: str = "validation_loss",
    title: str | None = None,
    y_label: str | None = None,
) -> Chart:
    """Draw one loss curve per arm.

    runs: arm -> a frame with the columns `against` and `value`, or a list of such frames, one per seed:
        then the line is their mean and the ribbon runs from their least to their greatest value, rows
        paired by order up to the end of the shortest. Rows whose value is nan or infinite are left out
    smooth: rows of a centered running mean, 0 or 1 for none; the axis says so
    control: the arms drawn as the control
    control_of: control -> the arm that it decides about: it is drawn thick, in that arm's color

    Raises ValueError for an arm without a finite value, a missing column, or a control that is no arm.
    """
    if unknown := set(control) - set(runs):
        raise ValueError(f"control names {sorted(unknown)}, the arms are {list(runs)}")
    name = value.replace("_", " ")
    series = paired(
        [_arm(arm, frames, against, value, smooth, arm in control) for arm, frames in runs.items()], control_of or {}
    )
    smoothed = f", mean of {smooth} rows" if smooth > 1 else ""
    label = (y_label or f"{name} (nats)") + smoothed
    return Chart(title or f"{name.capitalize()} against {AXES[against]}", AXES[against], label, series)


def paired(series: Sequence[Series], control_of: Mapping[str, str]) -> tuple[Series, ...]:
    """The series, each control in the color of the arm that it decides about."""
    colors = {s.name: i for i, s in enumerate(s for s in series if not s.control)}
    pairs = {control: colors.get(arm) for control, arm in control_of.items()}
    return tuple(replace(s, color=pairs.get(s.name) if s.control else colors[s.name]) for s in series)


def seed_panels(
    runs: Mapping[str, Sequence[pd.DataFrame]],
    controls: Mapping[str, str],
    *,
    against: Against,
    title: str,
) -> Panels:
    """Draw one small chart per arm: each seed's validation loss as points, their mean with its 95 % interval, and the
    arm's control.

    runs: arm -> one frame per seed, the controls included
    controls: arm -> the control it is compared with; only these arms get a chart

    Raises ValueError for a control that is no arm, and as `loss_curves`.
    """
    if unknown := {*controls, *controls.values()} - set(runs):
        raise ValueError(f"there are no runs of {sorted(unknown)}, the arms are {list(runs)}")
    charts = [
        Chart(arm, AXES[against], "validation loss (nats)", _seeds(runs[arm], runs[control], against))
        for arm, control in controls.items()
    ]
    return Panels(title, tuple(charts))


def _seeds(mine: Sequence[pd.DataFrame], control: Sequence[pd.DataFrame], against: str) -> tuple[Series, ...]:
    seeds = [_arm(f"seed {i}", frame, against, "validation_loss", 0, False) for i, frame in enumerate(mine)]
    rows = min(len(s.x) for s in seeds)
    over = [Interval.of([s.y[i] for s in seeds]) for i in range(rows)]
    low, high = ([i.low for i in over], [i.high for i in over]) if len(seeds) > 1 else (None, None)
    x = np.stack([s.x[:rows] for s in seeds]).mean(axis=0)
    mean = Series("mean of the seeds, 95 % interval", x, [i.mean for i in over], low, high, color=0)
    shared = _arm("its control", control, against, "validation_loss", 0, True)
    beside = replace(shared, low=None, high=None, color=1)
    return (mean, beside, *(replace(s, kind="points", dash=True) for s in seeds))


def phase_bands(steps: pd.DataFrame, over: str = "nominal_step") -> tuple[Band, ...]:
    """Merge consecutive rows of one phase into bands over the nominal steps, or over another rising column.

    steps: columns `over` (such as the count of steps, or the seconds, after the row's step) and `phase`. A row
    covers what lies between the row before it and its own, so that bands touch without gaps.

    Raises ValueError where there are no rows.
    """
    if steps.empty:
        raise ValueError("no steps to draw phases from: record at least one")
    phase = steps["phase"].map(lambda name: str(name).capitalize()).to_numpy()
    ends = steps[over].to_numpy()
    starts = np.concatenate([[ends[0] - 1 if over == "nominal_step" else 0], ends[:-1]])
    first = np.flatnonzero(np.concatenate([[True], phase[1:] != phase[:-1]]))
    last = np.concatenate([first[1:], [len(phase)]]) - 1
    stretches = [(float(starts[i]), float(ends[j]), phase[i]) for i, j in zip(first, last, strict=True)]
    return tuple(Band(*stretch) for stretch in stretches if stretch[0] < stretch[1])


def phase_chart(steps: pd.DataFrame, title: str) -> Chart:
    """Draw measured loss as a line, predicted loss as points, the phases behind them.

    steps: columns `nominal_step`, `phase`, `measured_loss`, `predicted_loss`; losses are nan where
    nothing was measured or predicted.
    """
    measured = _finite_rows(steps, "nominal_step", "measured_loss", "the steps")
    series = [Series("measured", measured["nominal_step"].tolist(), measured["measured_loss"].tolist())]
    predicted = steps.loc[np.isfinite(steps["predicted_loss"].to_numpy(float))]
    if len(predicted):
        x, y = predicted["nominal_step"].tolist(), predicted["predicted_loss"].tolist()
        series.append(Series("predicted", x, y, kind="points", dash=True))
    return Chart(title, AXES["nominal_step"], "loss (nats)", tuple(series), phase_bands(steps))


def interval_chart(
    title: str,
    x_label: str,
    rows: Sequence[tuple[str, float | None, float | None, float | None]],
    *,
    lines: tuple[Line, ...] = (Line(0.0, "zero"),),
) -> Chart:
    """Draw a value with its interval per row.

    rows: (name, value, low, high), drawn from top to bottom; without both ends, finite ones, a value has no interval,
        and a row without a finite value is left out, which the title says
    lines: the reference values the intervals are judged by

    Raises ValueError where no row has a value.
    """
    drawn = [
        (name, value, *((low, high) if _is_finite(low) and _is_finite(high) else (value, value)))
        for name, value, low, high in rows
        if _is_finite(value)
    ]
    if not drawn:
        raise ValueError(f"chart {title!r} has no rows: give at least one (name, value, low, high)")
    names, values, low, high = zip(*drawn, strict=True)
    series = Series("value and interval", values, range(len(drawn)), low, high, kind="points")
    said = without(title, [name for name, value, *_ in rows if not _is_finite(value)])
    return Chart(said, x_label, "", (series,), names=names, lines=lines)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def without(title: str, names: Sequence[str]) -> str:
    """A title that says what was not measured, and is left out."""
    return f"{title} (not measured: {', '.join(names)})" if names else title


def _arm(arm: str, frames: Frames, against: str, value: str, smooth: int, control: bool) -> Series:
    seeds = [frames] if isinstance(frames, pd.DataFrame) else list(frames)
    clean = [_finite_rows(frame, against, value, f"arm {arm!r}") for frame in seeds]
    if not clean:
        raise ValueError(f"arm {arm!r} has no runs: give a frame, or a list of at least one")
    rows = min(len(frame) for frame in clean)
    x = np.stack([frame[against].to_numpy(float)[:rows] for frame in clean])
    y = np.stack([_smoothed(frame[value], smooth)[:rows] for frame in clean])
    low, high = (y.min(axis=0), y.max(axis=0)) if len(clean) > 1 else (None, None)
    return Series(arm, x.mean(axis=0), y.mean(axis=0), low, high, control=control)


def _smoothed(values: pd.Series, rows: int) -> np.ndarray:
    if rows > 1:
        values = values.rolling(rows, center=True, min_periods=1).mean()
    return values.to_numpy(float)


def _finite_rows(frame: pd.DataFrame, x: str, value: str, what: str) -> pd.DataFrame:
    if missing := {x, value} - set(frame.columns):
        raise ValueError(f"no column {sorted(missing)[0]!r} in {what}; there are {list(frame.columns)}")
    finite = frame.loc[np.isfinite(frame[[x, value]].to_numpy(float)).all(axis=1)]
    if finite.empty:
        raise ValueError(f"no finite {value} in {what}: nothing to draw, leave it out or look at its log")
    return finite
