"""What a notebook draws of a study: its curves, its phases, and the differences to the controls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hybridlab.charts.builders import AXES, Against, interval_chart, loss_curves, paired, phase_chart, seed_panels
from hybridlab.charts.display import Chart, Panels
from hybridlab.charts.model import Line, Series
from hybridlab.notebook.views.study import by_difference
from hybridlab.study.comparison import Comparison
from hybridlab.study.study import StudyResult, control_name


def curves(result: StudyResult, arms: Sequence[str], against: Against) -> Chart | str:
    """Validation loss of the arms, plain runs as controls; what predicted nothing, or diverged, is named instead.

    A sentence says so where that are all.
    """
    diverged = [name for name in arms if result.has_diverged(name)]
    idle = [name for name in arms if name not in diverged and _is_idle(result, name)]
    runs = {name: result.steps(name) for name in arms if name not in [*idle, *diverged]}
    left_out = (f"; predicted nothing: {', '.join(idle)}" if idle else "") + _left_out(diverged)
    if not runs:
        return f"no arm has a curve{left_out}"
    plain, title = [name for name in runs if result.is_plain(name)], f"Validation loss over {AXES[against]}{left_out}"
    return loss_curves(runs, against=against, control=plain, control_of=_control_of(runs), title=title)


def _at_once(arm: str, seed: int) -> str:
    return f"{arm}, seed {seed}: it diverged at its first step, and there is nothing to draw"


def _left_out(diverged: Sequence[str]) -> str:
    """What a title says of arms that cannot be drawn."""
    return f" (diverged: {', '.join(diverged)})" if diverged else ""


def _is_idle(result: StudyResult, name: str) -> bool:
    """Whether an arm was to predict, and did not with any seed."""
    runs = {seed: run for (arm, seed), run in result.runs.items() if arm == name}
    asked = any(run.config.get("hybrid", {}).get("max_predict_steps") for run in runs.values())
    return asked and not any(result.predicted(name, seed) for seed in runs)


def _control_of(names: Iterable[str]) -> dict[str, str]:
    """Each hybrid's truncated control -> the hybrid."""
    return {control_name(name): name for name in names}


def loss_rows(result: StudyResult, arms: Sequence[str]) -> list[dict[str, Any]]:
    """The table "losses" that a notebook publishes: what `curves` draws over gradient steps, a row per arm."""
    chart = curves(result, arms, "gradient_step")
    return [
        {"arm": s.name, "control": s.control, "gradient_steps": s.x, "loss": s.y, "low": s.low, "high": s.high}
        for s in (series.drawn() for series in (chart.series if isinstance(chart, Chart) else ()))
    ]


def losses_chart(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw the table "losses"."""
    series = [
        Series(row["arm"], row["gradient_steps"], row["loss"], row["low"], row["high"], control=row["control"])
        for row in rows
    ]
    axis, shown = AXES["gradient_step"], paired(series, _control_of(row["arm"] for row in rows))
    return Chart(f"Validation loss over {axis}", axis, "validation loss (nats)", shown)


def by_seed(result: StudyResult, comparisons: Sequence[Comparison]) -> Panels | str:
    """Each hybrid that predicted anything, seed by seed, beside its truncated control."""
    names = [c.name for c in comparisons if c.predicted]
    controls = {name: control_name(name) for name in names if control_name(name) in result.controls([name])}
    diverged = [name for pair in controls.items() for name in pair if result.has_diverged(name)]
    controls = {name: control for name, control in controls.items() if not {name, control} & {*diverged}}
    if not controls:
        return f"no arm predicted anything{_left_out(diverged)}"
    runs = {name: result.steps(name) for name in {*controls, *controls.values()}}
    title = f"Validation loss by seed, beside the control{_left_out(diverged)}"
    return seed_panels(runs, controls, against="gradient_step", title=title)


def phases(result: StudyResult, arm: str, seed: int = 0) -> Chart | str:
    """One run's losses over its phases, measured and predicted ones apart; a sentence where it diverged at once."""
    steps = result.runs[arm, seed].steps
    if not np.isfinite(steps["measured_loss"]).any():
        return _at_once(arm, seed)
    return phase_chart(steps, f"{arm}: what each nominal step did (seed {seed})")


def gradient_chart(result: StudyResult, arm: str) -> Chart | str:
    """The gradient's norm before clipping, step by step, in an arm's first run; a sentence where there is none."""
    steps = result.runs[arm, 0].steps
    if not np.isfinite(steps["gradient_norm"]).any():
        return _at_once(arm, 0)
    return loss_curves(
        {arm: steps}, against="nominal_step", smooth=10, value="gradient_norm", title="Gradient norm", y_label="norm"
    )


def comparison_chart(comparisons: Sequence[Comparison]) -> Chart | str:
    """The differences to the controls, with intervals; right of zero is worse than stopping earlier.

    Arms that predicted nothing, or diverged, are left out; a sentence says so where that are all.
    """
    drawn = by_difference(c for c in comparisons if math.isfinite(c.to_control.mean))
    compared = {c.name: c for c in comparisons if not math.isfinite(c.to_control.mean)}
    diverged = [n if c.validation_loss.mean == math.inf else control_name(n) for n, c in compared.items()]
    rows = [(c.name, c.to_control.mean, *c.to_control.ends) for c in drawn]
    if not rows:
        return f"no arm predicted anything{_left_out(diverged)}"
    zero = (Line(0.0, "as good as stopping earlier"),)
    grown = [c.grown for c in drawn]
    equal = (
        "computation" if all(grown) else f"gradient steps{', of grown arms equal computation' if any(grown) else ''}"
    )
    title = f"Hybrid minus control, equal {equal}: right of the line is worse{_left_out(diverged)}"
    return interval_chart(title, "difference in final loss (nats)", rows, lines=zero)
