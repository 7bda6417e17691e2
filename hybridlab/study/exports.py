"""Runs as other programs read them: CSV, nvidia-smi's columns, TensorBoard."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from hybridlab.base.errors import UserError
from hybridlab.base.files import replaced, writing_to
from hybridlab.base.swapped import swapped
from hybridlab.study.record import Run

MIB = 2**20

COUNTERS = ("nominal_step", "gradient_step", "seconds", "unix_seconds")
"""What a scalar is drawn against; no scalars themselves."""


def export_steps(runs: Mapping[str, Run], path: Path) -> None:
    """Write every recorded step of some runs as one CSV file: the run's name and seed, then what each step measured.

    Raises UserError where the disk is full or cannot be written.
    """
    parts = [run.steps.assign(run=name, seed=run.config.get("seed")) for name, run in runs.items() if len(run.steps)]
    whole = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run", "seed"])
    with replaced(path) as beside:
        whole[["run", "seed", *whole.columns.drop(["run", "seed"])]].to_csv(beside, index=False)


def export_nvidia_smi(run: Run, path: Path) -> None:
    """Write the samples as `nvidia-smi --query-gpu=... --format=csv,nounits` would have, in local time.

    Raises UserError for a run without NVML's figures, and where the disk is full or cannot be written.
    """
    vram = run.vram
    if vram.empty or vram["device_used_bytes"].isna().all():
        raise UserError(f"{run.folder} has no figures of a GPU for nvidia-smi's columns: train on a GPU")
    columns = {
        "timestamp": _local_time(vram["unix_seconds"]),
        "name": pd.Series(run.config["device"], index=vram.index),
        "memory.total [MiB]": _whole(vram["device_total_bytes"] / MIB),
        "memory.used [MiB]": _whole(vram["device_used_bytes"] / MIB),
        "utilization.gpu [%]": _whole(vram["utilization_percent"]),
    }
    lines = [", ".join(columns), *map(", ".join, zip(*columns.values(), strict=True))]
    with replaced(path) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _whole(values: pd.Series) -> pd.Series:
    return values.map(lambda value: "[N/A]" if pd.isna(value) else str(round(value)))


def _local_time(unix_seconds: pd.Series) -> pd.Series:
    """As nvidia-smi prints it: 2025/01/31 12:00:00.000."""
    return unix_seconds.map(lambda moment: f"{datetime.fromtimestamp(moment):%Y/%m/%d %H:%M:%S.%f}"[:-3])


def export_tensorboard(run: Run, folder: Path) -> None:
    """Write every number that a run recorded at each nominal step.

    folder: takes one event file; what lies there stays, so export each run into a folder of its own

    A scalar is named by its table and column, as "steps/validation_loss"; its wall time is the run's own clock.
    Raises UserError where TensorBoard is not installed, and where the disk is full or cannot be written.
    """
    with writing_to(folder), _disk_told_once(), _writer(folder) as writer:
        for table, rows in (("steps", run.steps), ("vram", run.vram)):
            _add_scalars(writer, table, rows)


def _add_scalars(writer: Any, table: str, rows: pd.DataFrame) -> None:
    for column in [name for name in rows.select_dtypes("number") if name not in COUNTERS]:
        for row in rows[["nominal_step", "seconds", column]].dropna().itertuples(index=False):
            writer.add_scalar(f"{table}/{column}", row[2], int(row[0]), walltime=row[1])


def _disk_told_once() -> AbstractContextManager[None]:
    """Keep the writer's thread from printing a full disk's traceback: the writer itself raises the same error."""
    shown = threading.excepthook

    def told(failure: Any) -> None:
        if not isinstance(failure.exc_value, OSError):
            shown(failure)

    return swapped(threading, excepthook=told)


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard is not installed: .venv/bin/pip install -e '.[tensorboard]'") from None
    return SummaryWriter(str(folder))  # type: ignore[no-untyped-call]
