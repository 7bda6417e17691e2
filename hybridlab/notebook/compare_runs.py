"""The runs on disk, as a table and in one chart."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from hybridlab.base.errors import UserError, nearest
from hybridlab.base.files import project_root
from hybridlab.base.lock import in_use
from hybridlab.charts.tables import LiveTable, table
from hybridlab.notebook.one_run import run_name, tags_of
from hybridlab.study.record import Run, runs_under

if TYPE_CHECKING:
    from hybridlab.charts.builders import Against
    from hybridlab.charts.display import Chart

COUNTED = ("nominal_steps", "gradient_steps", "predicted_steps", "validation_loss", "seconds")
"""The key figures that a run's summary has by the same name."""

TYPES: dict[str, Any] = dict.fromkeys(("run", "started", "name", "state"), str)
TYPES |= dict.fromkeys(("model", "data", "predictor", "tags"), str | None)
"""Of the columns that hold text; all others hold numbers or nothing."""

SETTINGS = ("model", "data", "lr", "predictor", "seed")
COLUMNS = ("run", "started", "name", *SETTINGS, "state", *COUNTED, "step_ms", "peak_gb", "tags")
FORMATS = {"lr": "g", "seconds": ".1f", "step_ms": ".1f", "peak_gb": ".2f"}
BRIEF = ("run", "started", "model", "data", "lr", "predictor", "state", "steps", "loss", "seconds")
TEXT_WIDTH = 120
"""Characters of a line of the table as text."""


def find_runs(folder: str | Path = "runs", *, sort: str = "run", where: Iterable[str] = ()) -> list[Run]:
    """The runs below a folder of the project.

    sort: the column to sort by, from its least value up; "-" before it turns that round; a missing value comes last
    where: conditions "column=pattern", all of which must hold; a pattern may hold "*", as in "name=*unguarded"

    A warning names each run whose record is damaged, or none of ours; it is left out.

    Raises UserError for a column that is none of `COLUMNS`, and for a condition without "=".
    """
    return [run for run, _ in runs_with_figures(folder, sort, where)]


def runs_with_figures(folder: str | Path, sort: str, where: Iterable[str]) -> list[tuple[Run, dict[str, Any]]]:
    """The runs that `find_runs` gives, each with its key figures."""
    root, wanted, kept = project_root() / folder, [_condition(text) for text in where], []
    descending, column = sort.startswith("-"), _known(sort.removeprefix("-"))
    for run in runs_under(root):
        try:
            row = key_figures(run, root)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            warnings.warn(f"{run.folder} holds no record of ours: it is left out", stacklevel=3)
            continue
        if all(fnmatchcase(str(row[name]), text) for name, text in wanted):
            kept.append((run, row))
    present = [pair for pair in kept if pair[1][column] is not None]
    present.sort(key=lambda pair: pair[1][column], reverse=descending)
    return present + [pair for pair in kept if pair[1][column] is None]


def key_figures(run: Run, root: Path) -> dict[str, Any]:
    """One run in one flat row with the keys `COLUMNS`; what it has not measured is None.

    root: the folder that `run` is named from

    Raises an error of some kind where the record holds something else than a run's.
    """
    summary, task = run.summary or _so_far(run), run.config.get("task", {})
    hybrid = run.config.get("hybrid", {})
    peak = summary.get("peak_memory_bytes")
    row = {
        "run": run_name(run, root),
        "started": f"{datetime.fromtimestamp((run.folder / 'config.json').stat().st_mtime):%Y-%m-%d %H:%M}",
        "name": run.config.get("name"),
        **{name: None if task.get(name) is None else str(task[name]) for name in ("model", "data")},
        "lr": run.config.get("optimizer", {}).get("lr"),
        "predictor": hybrid.get("predictor") if hybrid.get("max_predict_steps") else None,
        "seed": run.config.get("seed"),
        "state": "finished" if run.summary else "running" if in_use(run.folder) else "unfinished",
        **{name: summary.get(name) for name in COUNTED},
        "step_ms": summary.get("gradient_step_ms"),
        "peak_gb": None if peak is None else peak / 1e9,
        "tags": ", ".join(tags_of(run)) or None,
    }
    row = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
    for name, value in row.items():
        if not isinstance(value, TYPES.get(name, Real | None)):
            raise TypeError(f"{name} is {value!r}")
    return row


def runs_table(folder: str | Path = "runs", *, sort: str = "run", where: Iterable[str] = ()) -> LiveTable:
    """The runs below a folder with their key figures; arguments and errors as for `find_runs`.

    As text it has what fits into 120 columns.
    """
    return figures_table(runs_with_figures(folder, sort, where), folder, where)


def figures_table(
    found: Sequence[tuple[Run, Mapping[str, Any]]], folder: str | Path, where: Iterable[str]
) -> LiveTable:
    """What `runs_with_figures` found in a folder under these conditions, as `runs_table` shows it."""
    rows = [row for _, row in found]
    caption = f"{len(rows)} run{'s' * (len(rows) != 1)} in {(project_root() / folder).name}"
    shown = table(rows, caption, FORMATS) if rows else None
    fits = "fits: loosen the conditions, or" if where else "is recorded yet:"
    empty = f"no run in {folder} {fits} train one with `hybridlab run`"
    return LiveTable(shown, empty, _brief(rows, shown.caption) if shown else "")


def _brief(rows: Sequence[Mapping[str, Any]], caption: str | None) -> str:
    """Some columns of the table as text, with names shortened in their middle so that they fit."""

    def told(row: Mapping[str, Any], longest: int) -> dict[str, Any]:
        predicted = f"+{row['predicted_steps']}" if row["predicted_steps"] else ""
        steps = None if row["gradient_steps"] is None else f"{row['gradient_steps']}{predicted}"
        shown = dict(row) | {"steps": steps, "loss": row["validation_loss"], "started": row["started"][5:]}
        return {name: _shortened(shown[name], longest if name == "run" else 14) for name in BRIEF}

    formats = {name: FORMATS[name] for name in BRIEF if name in FORMATS}
    for longest in (70, 60, 50, 44, 40, 36, 33, 30, 26, 22):
        text = str(table([told(row, longest) for row in rows], caption, formats))
        if max(map(len, text.splitlines())) <= TEXT_WIDTH:
            break
    return text


def _shortened(value: Any, longest: int) -> Any:
    """A name without most of its folder, or its middle: the end has the hash and the seed that tell runs apart."""
    if not isinstance(value, str) or len(value) <= longest:
        return value
    folder, slash, name = value.rpartition("/")
    folder = f"{folder[:2]}…/" if slash else ""
    room = longest - len(folder)
    end = min(room * 2 // 3, len("123abc_seed_0"))
    return folder + (name if len(name) <= room else f"{name[: room - end - 1]}…{name[-end:]}")


def overlay(runs: Sequence[Run], against: Against = "nominal_step") -> Chart:
    """Draw any runs' validation losses together, each named by its arm, seed and, where need be, its folder.

    Plain runs (baselines and controls) are drawn as controls. Raises ValueError without runs, and UserError for a run
    that was not evaluated yet or has other data.
    """
    from hybridlab.charts.builders import loss_curves
    from hybridlab.study.study import label

    if not runs:
        raise ValueError("there is nothing to draw: give at least one run")
    for run in runs:
        if run.config.get("data") != runs[0].config.get("data"):
            raise UserError(
                f"{run.folder.name} was trained on other data than {runs[0].folder.name}: "
                "their losses cannot be compared; choose runs with equal data"
            )
    labels = [label(run.config["name"], run.config["seed"]) for run in runs]
    times, curves, plain = Counter(labels), {}, []
    for run, name in zip(runs, labels, strict=True):
        if "validation_loss" not in run.steps or run.steps["validation_loss"].dropna().empty:
            raise UserError(f"{run.folder.name} has no validation_loss yet: leave it out, or wait")
        if times[name] > 1:
            name = f"{name} ({run.folder.parent.name}/{run.folder.name})"
        curves[name] = run.steps
        plain += [name] if run.is_plain else []
    return loss_curves(curves, against=against, control=plain)


def _so_far(run: Run) -> dict[str, Any]:
    """What a run that has not finished has to show: its latest counts and the loss it last measured."""
    if run.steps.empty:
        return {}
    last = run.steps.iloc[-1]
    measured = run.steps.get("validation_loss", pd.Series(dtype=float)).dropna()
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
