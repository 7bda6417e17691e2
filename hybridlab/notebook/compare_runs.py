"""The runs on disk beside each other: a table that sorts and filters, and any of them in one chart."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from hybridlab.base.errors import UserError, nearest
from hybridlab.base.files import project_root
from hybridlab.charts.tables import table
from hybridlab.notebook.live_table import LiveTable
from hybridlab.notebook.run_details import tags_of
from hybridlab.study.record import Run, runs_under

if TYPE_CHECKING:
    from hybridlab.charts.builders import Against
    from hybridlab.charts.display import Chart

COUNTED = ("nominal_steps", "gradient_steps", "predicted_steps", "validation_loss", "seconds")
"""The key figures that a run's summary has by the same name."""

TYPES = dict.fromkeys(("run", "name", "state"), str) | dict.fromkeys(("predictor", "tags"), str | None)
"""Of the columns that hold text; all others hold numbers or nothing."""

COLUMNS = ("run", "name", "predictor", "seed", "state", *COUNTED, "step_ms", "peak_gb", "tags")
FORMATS = {"seconds": ".1f", "step_ms": ".1f", "peak_gb": ".2f"}


def find_runs(folder: str | Path = "runs", *, sort: str = "run", where: Iterable[str] = ()) -> list[Run]:
    """The runs below a folder of the project.

    sort: the column to sort by, from its least value up; "-" before it turns that round; a missing value comes last
    where: conditions "column=pattern", all of which must hold; a pattern may hold "*", as in "name=*unguarded"

    A warning names each run whose record is damaged, or none of ours; it is left out.

    Raises UserError for a column that is none of `COLUMNS`, and for a condition without "=".
    """
    root = project_root() / folder
    wanted = [_condition(text) for text in where]
    descending, column = sort.startswith("-"), _known(sort.removeprefix("-"))
    kept = [
        (run, row)
        for run, row in _with_figures(root)
        if all(fnmatchcase(str(row[name]), text) for name, text in wanted)
    ]
    present = [pair for pair in kept if pair[1][column] is not None]
    present.sort(key=lambda pair: pair[1][column], reverse=descending)
    return [run for run, _ in present] + [run for run, row in kept if row[column] is None]


def _with_figures(root: Path) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Every run below a folder, those with figures that no run of ours records left out."""
    for run in runs_under(root):
        try:
            yield run, key_figures(run, root)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            warnings.warn(f"{run.folder} holds no record of ours: it is left out", stacklevel=3)


def key_figures(run: Run, root: Path) -> dict[str, Any]:
    """One run in one flat row with the keys `COLUMNS`; what it has not measured is None.

    root: the folder that `run` is named from

    Raises an error of some kind where the record holds something else than a run's.
    """
    summary = run.summary or _so_far(run)
    peak = summary.get("peak_memory_bytes")
    row = {
        "run": str(run.folder.relative_to(root)),
        "name": run.config.get("name"),
        "predictor": _predictor(run.config.get("hybrid", {})),
        "seed": run.config.get("seed"),
        "state": "finished" if run.summary else "unfinished",
        **{name: summary.get(name) for name in COUNTED},
        "step_ms": summary.get("gradient_step_ms"),
        "peak_gb": None if peak is None else peak / 1e9,
        "tags": ", ".join(tags_of(run)) or None,
    }
    for name, value in row.items():
        if not isinstance(value, TYPES.get(name, Real | None)):
            raise TypeError(f"{name} is {value!r}")
    return row


def runs_table(folder: str | Path = "runs", *, sort: str = "run", where: Iterable[str] = ()) -> LiveTable:
    """The runs below a folder with their key figures; arguments and errors as for `find_runs`."""
    root = project_root() / folder
    rows = [key_figures(run, root) for run in find_runs(folder, sort=sort, where=where)]
    shown = table(rows, f"{len(rows)} runs in {root.name}", FORMATS) if rows else None
    return LiveTable(shown, f"no run in {folder} fits: loosen the conditions, or train one with `make run`")


def overlay(runs: Sequence[Run], against: Against = "nominal_step") -> Chart:
    """Draw any runs' validation losses together, each named by its arm, seed and, where need be, its folder.

    Plain runs (baselines and controls) are drawn as controls. Raises ValueError without runs, and UserError for a run
    that was not evaluated yet.
    """
    from hybridlab.charts.builders import loss_curves
    from hybridlab.study.study import is_plain

    if not runs:
        raise ValueError("there is nothing to draw: give at least one run")
    curves = dict(zip(_names(runs), (run.steps for run in runs), strict=True))
    for run in runs:
        if "validation_loss" not in run.steps or run.steps["validation_loss"].dropna().empty:
            raise UserError(f"{run.folder.name} has no validation_loss yet: leave it out, or wait")
    plain = [name for name in curves if is_plain(name)]
    return loss_curves(curves, against=against, control=plain)


def _names(runs: Sequence[Run]) -> list[str]:
    from hybridlab.study.study import label

    names = [label(run.config["name"], run.config["seed"]) for run in runs]
    twice = {name for name in names if names.count(name) > 1}
    return [
        f"{name} ({run.folder.parent.name}/{run.folder.name})" if name in twice else name
        for name, run in zip(names, runs, strict=True)
    ]


def _predictor(hybrid: Mapping[str, Any]) -> str | None:
    """The name of the one that a run asks; None for plain training."""
    return hybrid.get("predictor") if hybrid.get("max_predict_steps") else None


def _so_far(run: Run) -> dict[str, Any]:
    """What a run that has not finished has to show: its latest counts and the loss it last measured."""
    if run.steps.empty:
        return {}
    last = run.steps.iloc[-1]
    measured = run.steps["validation_loss"].dropna() if "validation_loss" in run.steps else pd.Series(dtype=float)
    return {
        "nominal_steps": int(last["nominal_step"]),
        "gradient_steps": int(last["gradient_step"]),
        "predicted_steps": int(last["nominal_step"] - last["gradient_step"]),
        "validation_loss": None if measured.empty else float(measured.iloc[-1]),
        "seconds": float(last["seconds"]),
    }


def _condition(text: str) -> tuple[str, str]:
    column, sign, pattern = text.partition("=")
    if not sign:
        raise UserError(f"the condition {text!r} has no '=': write COLUMN=PATTERN, as name=baseline")
    return _known(column), pattern


def _known(column: str) -> str:
    if column not in COLUMNS:
        raise UserError(f"there is no column {column!r}: {nearest(column, COLUMNS)}")
    return column
