"""A run's record on disk, readable while the run goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pandas as pd

FLUSH_SHARE = 0.02
"""Writing the record may take this share of a run's time."""


class RunRecorder:
    """Writes one run's folder: config.json, steps.parquet, vram.parquet and summary.json.

    folder: made new; a record of the same name that lies there is replaced
    config: what the run was asked to do, JSON-ready

    Every file is replaced as a whole (written beside, then renamed), so that a reader never sees half of one,
    and a run that is killed leaves what it had measured. A run without summary.json did not finish.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("summary.json", "steps.parquet", "vram.parquet"):
            (folder / name).unlink(missing_ok=True)
        write_json(folder / "config.json", config)
        self._tables: dict[str, list[dict[str, Any]]] = {"steps": [], "vram": []}
        self._flushed_at, self._flush_seconds = time.monotonic(), 0.0

    def add(self, table: str, row: Mapping[str, Any]) -> None:
        """Append a row to "steps" or "vram"; what was added reaches the disk a few seconds later."""
        self._tables[table].append(dict(row))
        if time.monotonic() - self._flushed_at > max(2.0, self._flush_seconds / FLUSH_SHARE):
            self.flush()

    def flush(self) -> None:
        """Write all rows to disk."""
        started = time.monotonic()
        for name, rows in self._tables.items():
            if rows:
                path = self.folder / f"{name}.parquet"
                pd.DataFrame(rows).to_parquet(path.with_suffix(".tmp"), index=False)
                os.replace(path.with_suffix(".tmp"), path)
        self._flushed_at = time.monotonic()
        self._flush_seconds = self._flushed_at - started

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the closing figures: from here on the run counts as finished."""
        self.flush()
        write_json(self.folder / "summary.json", summary)

    def __enter__(self) -> Self:
        """Record for the length of a with-block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Keep what was measured, however the block ended."""
        self.flush()


@dataclass(frozen=True)
class Run:
    """A run as read from its folder. `summary` is None while it has not finished."""

    folder: Path
    config: dict[str, Any]
    steps: pd.DataFrame
    vram: pd.DataFrame
    summary: dict[str, Any] | None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a run's folder, finished or not.

        Raises FileNotFoundError where there is no config.json.
        """
        return cls(
            folder=folder,
            config=json.loads((folder / "config.json").read_text()),
            steps=_read_table(folder / "steps.parquet"),
            vram=_read_table(folder / "vram.parquet"),
            summary=json.loads(path.read_text()) if (path := folder / "summary.json").exists() else None,
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file as a whole; keys in their own order, NaN refused."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=2, allow_nan=False, default=str) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def _read_table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.exists() else pd.DataFrame()
