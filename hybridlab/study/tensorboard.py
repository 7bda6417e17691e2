"""Hands a run's scalars to TensorBoard."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from hybridlab.base.errors import UserError
from hybridlab.base.files import writing_to
from hybridlab.study.record import Run

COUNTERS = ("nominal_step", "gradient_step", "seconds", "unix_seconds")
"""What a scalar is drawn against; no scalars themselves."""


def export_tensorboard(run: Run, folder: Path) -> int:
    """Write every number that a run recorded at each nominal step; returns how many scalars there are.

    folder: takes one event file; what lies there stays, so export each run into a folder of its own

    A scalar is named by its table and column, as "steps/validation_loss"; its wall time is the run's own clock.
    Raises UserError where TensorBoard is not installed, and where the disk is full or cannot be written.
    """
    with writing_to(folder), _disk_told_once(), _writer(folder) as writer:
        return sum(_add(writer, table, rows) for table, rows in (("steps", run.steps), ("vram", run.vram)))


def _add(writer: Any, table: str, rows: pd.DataFrame) -> int:
    columns = [column for column in rows.select_dtypes("number") if column not in COUNTERS]
    for column in columns:
        for row in rows[["nominal_step", "seconds", column]].dropna().itertuples(index=False):
            writer.add_scalar(f"{table}/{column}", row[2], int(row[0]), walltime=row[1])
    return len(columns)


@contextmanager
def _disk_told_once() -> Iterator[None]:
    """Keep the writer's thread from printing a full disk's traceback: the writer itself raises the same error."""
    shown = threading.excepthook
    threading.excepthook = lambda failure: None if isinstance(failure.exc_value, OSError) else shown(failure)
    try:
        yield
    finally:
        threading.excepthook = shown


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard is not installed: .venv/bin/pip install -e '.[tensorboard]'") from None
    return SummaryWriter(str(folder))  # type: ignore[no-untyped-call]
