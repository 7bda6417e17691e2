"""What lies in a run's folder, and whether the run can go on from it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hybridlab.base.checkpoint import (
    checkpoint_meta,
    has_checkpoint,
    load_checkpoint,
    refuse_differences,
    remove_checkpoint,
    save_checkpoint,
)
from hybridlab.base.rank_checkpoints import RankCheckpoints
from hybridlab.study.code_version import code_version
from hybridlab.study.config import RunConfig
from hybridlab.study.record import Run

CHECKPOINT = "checkpoint.pt"
"""In a run's folder, while the run has not finished; several ranks write into the folder `RANK_CHECKPOINTS`."""

RANK_CHECKPOINTS = "checkpoints"

WEIGHTS = "weights.pt"
"""In a finished run's folder, where `RunConfig.keep_weights` asked for them."""


class FileCheckpoints:
    """The checkpoints of a run in one process, each in one file, in the place of the one before."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def save(self, step: int, state: Mapping[str, Any], *, meta: Mapping[str, Any]) -> None:
        """Write one, as `save_checkpoint` does."""
        save_checkpoint(self._file, state, meta=meta)

    def load(self, model: nn.Module, *, expect: Mapping[str, Any]) -> dict[str, Any] | None:
        """The state of the newest one, as `load_checkpoint` reads it."""
        return load_checkpoint(self._file, expect=expect)

    def remove(self) -> None:
        """Delete them."""
        remove_checkpoint(self._file)


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


def remove_checkpoints(folder: Path) -> None:
    """Delete what an earlier start, of one process or of several, could be gone on from."""
    remove_checkpoint(folder / CHECKPOINT)
    shutil.rmtree(folder / RANK_CHECKPOINTS, ignore_errors=True)


def has_checkpoints(folder: Path) -> bool:
    """Whether an earlier start, of one process or of several, left a checkpoint."""
    return has_checkpoint(folder / CHECKPOINT) or RankCheckpoints.newest_file(folder / RANK_CHECKPOINTS) is not None


def kept_in(folder: Path, advice: str = "") -> str:
    """What a run that ends before its time leaves, in words; advice: where it can be gone on from."""
    if has_checkpoints(folder):
        return f"the record and the last checkpoint in {folder} are intact{advice}"
    return f"no checkpoint was written to {folder}: the run begins anew"


def other_code(folder: Path) -> str | None:
    """The code that wrote the checkpoint in `folder`, where it was other code than this; else None."""
    meta = checkpoint_meta(RankCheckpoints.newest_file(folder / RANK_CHECKPOINTS) or folder / CHECKPOINT)
    if meta is None or meta.get("code") == code_version():
        return None
    return meta.get("code") or "unknown"


def can_stand(run: Run) -> bool:
    """Whether a run has finished, its steps are there, and this code has trained it."""
    return run.summary is not None and not run.steps.empty and run.summary.get("code") == code_version()
