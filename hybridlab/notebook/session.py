"""Trains from a notebook: a progress bar, and runs under the project's `runs` folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hybridlab.notebook.progress import Progress
from hybridlab.notebook.results import project_root
from hybridlab.study.arms import Study, StudyResult, run_arms
from hybridlab.study.run_config import RunConfig

RESUME = "HYBRIDLAB_RESUME"


def run_study(study: Study, notebook: str) -> StudyResult:
    """Train every arm of a study and its controls; records go to `runs/<notebook>`."""
    with Progress(study.base.steps, "training") as progress:
        return study.run(runs_folder(notebook), progress.step, resume=_resumes())


def run_configs(configs: Sequence[RunConfig], notebook: str) -> StudyResult:
    """Train some runs, one after the other; records go to `runs/<notebook>`."""
    with Progress(sum(config.steps for config in configs), "training") as progress:
        return run_arms(configs, runs_folder(notebook), progress.step, resume=_resumes())


def runs_folder(notebook: str) -> Path:
    """Where a notebook's runs are recorded."""
    return project_root() / "runs" / notebook


def _resumes() -> bool:
    """Whether to go on with the runs that an interrupted start left: `hybridlab run --resume`."""
    return os.environ.get(RESUME) == "1"
