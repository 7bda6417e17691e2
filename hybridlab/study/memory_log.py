"""What a run's samples of the GPU tell: whether its memory grows, how busy it is, and nvidia-smi's own columns."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pandas as pd

from hybridlab.base.errors import UserError
from hybridlab.base.files import replaced
from hybridlab.engine.phases import Phase
from hybridlab.study.record import Run
from hybridlab.study.run import UNSETTLED_STEPS

MIB = 2**20


def growth_bytes(run: Run, early: int = 50, late: int = 1000) -> int:
    """How much more memory the run uses late than early.

        growth = median(used over steps late - early + 1 ... late) - median(used over steps early ... 2 early - 1)

    early, late: nominal steps; what is used is torch's reserve on a GPU, else the process's resident size
    Medians, because samples fall on any moment of a step.

    Raises UserError where the run is shorter, or has no samples there.
    """
    return round(_median_used(run, late - early + 1, late) - _median_used(run, early, 2 * early - 1))


def gpu_busy_percent(run: Run) -> float | None:
    """Mean share of the time of gradient steps in which the GPU computed; None without NVML, or for a short run.

    What is missing to 100 the GPU spent waiting for the host. Steps that compile or settle do not count.
    """
    if run.vram.empty or "utilization_percent" not in run.vram:
        return None
    stable = run.vram[(run.vram["nominal_step"] > UNSETTLED_STEPS) & (run.vram["phase"] != str(Phase.PREDICT))]
    known = stable["utilization_percent"].dropna()
    return float(known.mean()) if len(known) else None


def export_csv(run: Run, path: Path) -> None:
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


def _median_used(run: Run, first: int, last: int) -> float:
    """Over the samples of some nominal steps."""
    there = run.vram[run.vram["nominal_step"].between(first, last)] if len(run.vram) else run.vram
    if there.empty:
        raise UserError(f"{run.folder} has no sample of memory in steps {first} to {last}: choose other steps")
    return float(there["used_bytes"].median())


def _whole(values: pd.Series) -> pd.Series:
    return values.map(lambda value: "[N/A]" if pd.isna(value) else str(round(value)))


def _local_time(unix_seconds: pd.Series) -> pd.Series:
    """As nvidia-smi prints it: 2025/01/31 12:00:00.000."""
    return unix_seconds.map(lambda moment: f"{datetime.fromtimestamp(moment):%Y/%m/%d %H:%M:%S.%f}"[:-3])
