"""What lies in a run's folder, and whether the run can go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridlab.base.checkpoint import checkpoint_meta, refuse_differences
from hybridlab.study.code_version import code_version
from hybridlab.study.config import RunConfig
from hybridlab.study.record import Run

CHECKPOINT = "checkpoint.pt"
"""In a run's folder, while the run has not finished."""


def identity(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint must fit to be gone on from, bit for bit: the settings, and the code that trains."""
    return config.record() | {"code": code_version()}


def earlier_run(config: RunConfig, folder: Path) -> Run | None:
    """The run of `config` that lies in `folder`, finished or not; None where there is none.

    Raises UserError when it is a run of another configuration, and DamagedRecordError when it cannot be read.
    """
    if not (folder / "config.json").exists():
        return None
    earlier = Run.load(folder)
    refuse_differences(folder, earlier.config, config.record())
    return earlier


def other_code(folder: Path) -> str | None:
    """The code that wrote the checkpoint in `folder`, where it was other code than this; else None."""
    meta = checkpoint_meta(folder / CHECKPOINT)
    if meta is None or meta.get("code") == code_version():
        return None
    return meta.get("code") or "unknown"


def can_stand(run: Run) -> bool:
    """Whether a run has finished, and this code has trained it."""
    return run.summary is not None and run.summary.get("code") == code_version()
