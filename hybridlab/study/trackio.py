"""Hands runs to trackio, whose dashboard compares them in a browser, in one file that needs neither it nor a server."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from hybridlab.base.errors import UserError
from hybridlab.base.files import replaced
from hybridlab.study.record import Run

TABLES = """
CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, timestamp TEXT NOT NULL,
    run_name TEXT NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL);
CREATE TABLE configs (id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL, run_name TEXT NOT NULL,
    config TEXT NOT NULL, created_at TEXT NOT NULL, UNIQUE(run_id));
"""
"""Of trackio's own file of a project; it adds what else it needs when it opens one."""


def export_trackio(runs: Mapping[str, Run], path: Path) -> int:
    """Write every number that some runs recorded, with their settings; returns how many rows there are.

    runs: by the name that the dashboard shows; path: `<folder>/<project>.db`; it is replaced as a whole

    Raises UserError where the disk is full or cannot be written.
    """
    with replaced(path) as beside:
        try:
            with closing(sqlite3.connect(beside)) as file, file:
                file.executescript(TABLES)
                return sum(_add(file, name, run) for name, run in runs.items())
        except sqlite3.Error as error:
            raise UserError(f"cannot write in the folder {path.parent}: {error}; make room there") from error


def _add(file: sqlite3.Connection, name: str, run: Run) -> int:
    began = _time((run.folder / "config.json").stat().st_mtime)
    config = run.config | {f"final_{key}": value for key, value in (run.summary or {}).items()}
    file.execute(
        "INSERT INTO configs (run_id, run_name, config, created_at) VALUES (?, ?, ?, ?)",
        (name, name, json.dumps(config, default=str), began),
    )
    rows = [(name, began, name, step, json.dumps(numbers)) for step, numbers in _numbers(run)]
    file.executemany("INSERT INTO metrics (run_id, timestamp, run_name, step, metrics) VALUES (?, ?, ?, ?, ?)", rows)
    return len(rows)


def _numbers(run: Run) -> Iterator[tuple[int, dict[str, float]]]:
    """By nominal step, the finite numbers of a row of steps or of memory."""
    for table, rows in (("", run.steps), ("vram/", run.vram)):
        for row in rows.select_dtypes("number").to_dict("records"):
            step = int(row.pop("nominal_step"))
            yield step, {f"{table}{key}": value for key, value in row.items() if math.isfinite(value)}


def _time(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).isoformat()
