"""A run on disk: found by its name, in full, beside another one, and its tags."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd

from hybridlab.base.errors import UserError, nearest
from hybridlab.base.files import project_root
from hybridlab.study.record import Run, runs_under, write_json

TAGS = "tags.json"
"""In a run's folder; no figure depends on it."""


def find_run(name: str, folder: str | Path = "runs") -> Run:
    """The run of that name, shortened by … as `runs_table` prints it or not, or the one run whose name holds it.

    Raises UserError where there is none, or more than one.
    """
    root = project_root() / folder
    runs = {run_name(run, root): run for run in runs_under(root)}
    part = name.replace("…", "*") if "…" in name else f"*{name}*"
    fitting = [name] if name in runs else [known for known in runs if fnmatchcase(known, part)]
    if len(fitting) > 1:
        raise UserError(f"{name!r} is part of {len(fitting)} names: write more of one, as {fitting[0]} or {fitting[1]}")
    if not fitting:
        known = nearest(name, runs) if runs else "it holds none, train one with `hybridlab run`"
        raise UserError(f"there is no run {name!r} in {folder}: {known}")
    return runs[fitting[0]]


def run_name(run: Run, root: Path) -> str:
    """A run's name among those below a folder."""
    return str(run.folder.relative_to(root))


def run_record(run: Run) -> dict[str, Any]:
    """Everything of a run but its rows, for JSON: settings, final figures, events by step, tags."""
    steps = run.steps
    events = steps.loc[steps["event"].notna(), ["nominal_step", "event"]] if "event" in steps else pd.DataFrame()
    return {
        "folder": str(run.folder),
        "tags": tags_of(run),
        "settings": run.config,
        "summary": run.summary,
        "steps_recorded": len(steps),
        "events": [{"nominal_step": int(step), "event": event} for step, event in events.itertuples(index=False)],
    }


def show_lines(run: Run) -> Iterator[str]:
    """A run in lines of text: tags, settings, final figures, and what was decided at which step."""
    record = run_record(run)
    yield f"{record['folder']} ({'finished' if run.summary else 'unfinished'}, {record['steps_recorded']} steps)"
    if record["tags"]:
        yield f"tags: {', '.join(record['tags'])}"
    for title in ("settings", "summary"):
        yield f"\n{title}"
        yield from (f"  {key:36} {_word(value)}" for key, value in flat(record[title] or {}).items())
    if record["events"]:
        yield "\nevents"
        yield from (f"  step {event['nominal_step']:<7,} {event['event']}" for event in record["events"])


def differences(first: Run, second: Run) -> list[dict[str, Any]]:
    """What two runs' settings and final figures do not share: key and both values; None is missing."""
    sides = [flat({"settings": run.config, "summary": run.summary or {}}) for run in (first, second)]
    keys = [*sides[0], *(key for key in sides[1] if key not in sides[0])]
    pairs = ((key, sides[0].get(key), sides[1].get(key)) for key in keys)
    return [{"key": key, "first": one, "second": other} for key, one, other in pairs if one != other]


def difference_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """`differences` in columns of text."""
    for row in rows:
        yield f"{row['key']:44} {_word(row['first']):24} {_word(row['second'])}"


def tags_of(run: Run) -> list[str]:
    """The tags that a run was given; none where their file is damaged."""
    with suppress(OSError, ValueError):
        return [str(tag) for tag in json.loads((run.folder / TAGS).read_text(encoding="utf-8"))]
    return []


def set_tags(run: Run, add: Iterable[str] = (), remove: Iterable[str] = ()) -> list[str]:
    """Give tags to a run and take others away; returns those that it has then."""
    tags = sorted({*tags_of(run), *add} - {*remove})
    write_json(run.folder / TAGS, tags)
    return tags


def flat(nested: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}": value}
    return found


def _word(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)
