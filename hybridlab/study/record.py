"""A run's record on disk, readable while the run goes on."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hybridlab.base.errors import UserError
from hybridlab.base.files import remove, replaced

GROUP_ROWS = 16_384
"""In memory at most: so many rows are a row group, which from then on lies on the disk alone."""


class GrowingTable:
    """Rows that are appended, and written to a parquet file whenever that is asked for.

    path: of the file; keep_steps: rows of the file up to this nominal step stay, the others are dropped at the next
        write

    The file is replaced as a whole: row groups that are full are copied one by one, the newest rows follow them.
    """

    def __init__(self, path: Path, keep_steps: int) -> None:
        self.path, self.last_step = path, 0
        self._rows: list[dict[str, Any]] = []
        self._groups = 0
        if keep_steps and path.exists():
            _read(path, lambda _: self._keep(keep_steps))

    def __bool__(self) -> bool:
        """Whether there are any rows."""
        return bool(self._groups or self._rows)

    @property
    def is_full(self) -> bool:
        """Whether the rows in memory are a row group."""
        return len(self._rows) >= GROUP_ROWS

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows; the next write brings them to the disk."""
        self._rows.extend(map(dict, rows))

    def write(self) -> None:
        """Bring all rows to the disk. Raises UserError where it is full, and keeps them for the next time."""
        if not self:
            return
        with replaced(self.path) as beside:
            self._write(beside)
        if self.is_full:
            self._groups += 1
            self._rows.clear()

    def _write(self, file: Path) -> None:
        newest = pa.Table.from_pandas(pd.DataFrame(self._rows), preserve_index=False).replace_schema_metadata()
        if not self._groups:
            pq.write_table(newest, file)
            return
        with pq.ParquetFile(self.path) as before:
            schema = pa.unify_schemas([before.schema_arrow, newest.schema], promote_options="permissive")
            with pq.ParquetWriter(file, schema) as writer:
                for group in chain(map(before.read_row_group, range(self._groups)), [newest]):
                    if group.num_rows:
                        whole = pa.concat_tables([schema.empty_table(), group], promote_options="permissive")
                        writer.write_table(whole)

    def _keep(self, nominal_step: int) -> None:
        """Take up the file: its row groups that are kept whole stay there, the rest is read."""
        with pq.ParquetFile(self.path) as file:
            for group in map(file.read_row_group, range(file.num_row_groups)):
                kept = group.filter(pc.field("nominal_step") <= nominal_step)
                if kept.num_rows == group.num_rows >= GROUP_ROWS and not self._rows:
                    self._groups += 1
                else:
                    self._rows += kept.to_pylist()
                self.last_step = pc.max(kept["nominal_step"]).as_py() or self.last_step


FLUSH_SHARE = 0.02
"""Writing the record may take this share of a run's time."""


T = TypeVar("T")

STEPS = "steps.parquet"
"""Of a run's files the one that it cannot go on without, nor be compared: its losses, step by step."""

WORST = {"validation_loss": math.inf, "perplexity": math.inf, "accuracy": -math.inf}
"""What counts for a run that diverged: worse than any other."""


class DamagedRecordError(UserError):
    """A file of a run's record that cannot be read."""


class RunRecorder:
    """Writes one run's folder: config.json, steps.parquet, vram.parquet (samples, in their own time) and summary.json.

    folder: made where it is missing; a record that lies there is replaced
    config: what the run was asked to do, JSON-ready
    keep_steps: go on with the record that lies there, up to this nominal step; later rows are dropped

    Every file is replaced as a whole (written beside, then renamed), so that a reader never sees half of one,
    and a run that is killed leaves what it had measured. A run without summary.json did not finish.

    Raises UserError where the disk is full or cannot be written, and where the steps to keep are not there or are
    damaged; what was written before stays readable.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, keep_steps: int = 0) -> None:
        self.folder = folder
        self._tables = {name: GrowingTable(folder / f"{name}.parquet", keep_steps) for name in ("steps", "vram")}
        if self._tables["steps"].last_step < keep_steps:
            raise UserError(
                f"{folder / STEPS} does not reach step {keep_steps}, where its checkpoint is: {_afresh(folder)}"
            )
        remove(folder / "summary.json", *[table.path for table in self._tables.values() if not table])
        write_json(folder / "config.json", config)
        self.flush()

    def add(self, table: str, row: Mapping[str, Any]) -> None:
        """Append a row to "steps" or "vram"; what was added reaches the disk a few seconds later."""
        self.extend(table, [row])
        pause = max(2.0, self._flush_seconds / FLUSH_SHARE)
        if time.monotonic() - self._flushed_at > pause or any(kept.is_full for kept in self._tables.values()):
            self.flush()

    def extend(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows; they reach the disk with the next one that is added, or the next flush."""
        self._tables[table].extend(rows)

    def flush(self) -> None:
        """Write all rows to disk."""
        started = time.monotonic()
        for table in self._tables.values():
            table.write()
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
        """Keep what was measured, however the block ended; its own error goes before a full disk's."""
        with suppress(*[UserError] if error else []):
            self.flush()


@dataclass(frozen=True)
class Run:
    """A run as read from its folder. `summary` is None while it has not finished; of one that diverged it has
    `WORST`.
    """

    folder: Path
    config: dict[str, Any]
    steps: pd.DataFrame
    vram: pd.DataFrame
    summary: dict[str, Any] | None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a run's folder, finished or not.

        Raises FileNotFoundError where there is no config.json, and DamagedRecordError for a file that cannot be read.
        """
        summary = _read(path, _mapping) if (path := folder / "summary.json").exists() else None
        if summary and summary.get("diverged"):
            summary |= {name: worst for name, worst in WORST.items() if name in summary}
        return cls(
            folder=folder,
            config=_read(folder / "config.json", _mapping),
            steps=_read_table(folder / STEPS),
            vram=_read_table(folder / "vram.parquet"),
            summary=summary,
        )

    @property
    def is_plain(self) -> bool:
        """Whether it trains all blocks from the start and predicts nothing: a baseline, or one of its controls."""
        hybrid = self.config.get("hybrid", {})
        return not hybrid.get("max_predict_steps") and not hybrid.get("depth")

    @property
    def diverged(self) -> str | None:
        """Why the run ended early, with a loss or weights that are not finite; None where it did not."""
        return (self.summary or {}).get("diverged")

    @property
    def closing_figures(self) -> dict[str, Any]:
        """`summary`, of a run that has finished. Raises UserError for one that has not."""
        if self.summary is None:
            raise UserError(f"the run in {self.folder} has not finished: go on with it, or train it afresh")
        return self.summary

    def validation_loss(self, at_step: int | None = None) -> float:
        """In nats: at its end, or after `at_step` nominal steps. Raises UserError if none was measured there."""
        if at_step is None or self.diverged:
            return float(self.closing_figures["validation_loss"])
        measured = self.steps.loc[self.steps["nominal_step"] == at_step, "validation_loss"].dropna()
        if measured.empty:
            raise UserError(f"{self.folder} was not evaluated at step {at_step}: set evaluate_every to a divisor of it")
        return float(measured.iloc[-1])


def runs_under(folder: Path) -> Iterator[Run]:
    """Every run that lies in a folder or below it, by path; a warning names each that cannot be read."""
    for config in sorted(folder.rglob("config.json")):
        try:
            yield Run.load(config.parent)
        except DamagedRecordError as error:
            warnings.warn(f"{error}; this run is left out", stacklevel=2)


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Replace a JSON file as a whole; keys in their own order, NaN refused."""
    with replaced(path) as beside:
        beside.write_text(json.dumps(content, indent=2, allow_nan=False, default=str) + "\n")


def _mapping(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")).items())


def _read_table(path: Path) -> pd.DataFrame:
    return _read(path, pd.read_parquet) if path.exists() else pd.DataFrame()


def _read(path: Path, reader: Callable[[Path], T]) -> T:
    try:
        return reader(path)
    except FileNotFoundError:
        raise
    except Exception:  # a damaged file makes its reader fail in a dozen ways
        mend = _afresh(path.parent) if path.name == STEPS else "delete it, or train that run afresh"
        raise DamagedRecordError(f"{path} is damaged, or no run's record: {mend}") from None


def _afresh(folder: Path) -> str:
    """What to do about a run that cannot go on: the others of its study are kept then, also with resume."""
    return f"delete the folder {folder}, so that this run is trained afresh"
