"""Runs as jobs of a cluster, by submitit."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridlab.base.errors import UserError
from hybridlab.base.one_line import in_one_line
from hybridlab.study.config import RunConfig
from hybridlab.study.record import Run
from hybridlab.study.run import train

JOBS = "jobs"
"""The folder, beside those of the runs, of what submitit writes."""


def train_as_jobs(
    runs: Sequence[tuple[RunConfig, Path]],
    cluster: Mapping[str, Any],
    on_step: Callable[[RunConfig], None] = lambda config: None,
    *,
    resume: bool = False,
) -> Generator[tuple[RunConfig, Callable[[], Run]]]:
    """Train each run as a job of its own, and give them in their order, each as soon as it has ended.

    runs: each with its folder, on a disk that all nodes see
    cluster: settings of submitit's AutoExecutor, as {"cluster": "slurm", "timeout_min": 600, "slurm_partition": "gpu"};
        a job has one GPU, unless `gpus_per_node` says otherwise
    on_step: called for each step of a run that has ended; resume: as in `train`

    What is given with a run returns its record, or raises the UserError that ended it. However the iteration ends, jobs
    that have not ended are cancelled.

    Raises UserError where submitit is not installed, and for settings that it does not take.
    """
    if not runs:
        return
    gpus = int(any(config.device != "cpu" for config, _ in runs))
    executor = _executor(runs[0][1].parent / JOBS, {"gpus_per_node": gpus, **cluster})
    with executor.batch():
        jobs = [executor.submit(_outcome, config, folder, resume) for config, folder in runs]
    try:
        for (config, folder), job in zip(runs, jobs, strict=True):
            job.wait()
            for _ in range(config.steps):
                on_step(config)
            yield config, lambda job=job, folder=folder: _record(job, folder)  # type: ignore[misc]
    finally:
        for job in jobs:
            if not job.done():
                job.cancel()


def _executor(folder: Path, cluster: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("a cluster needs submitit: pip install 'hybridlab[cluster]'") from None
    settings = dict(cluster)
    try:
        executor = submitit.AutoExecutor(folder, cluster=settings.pop("cluster", None))
        executor.update_parameters(**settings)
    except (NameError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"cluster: submitit does not take {cluster}: {in_one_line(error)}") from error
    return executor


def _record(job: Any, folder: Path) -> Run:
    from submitit.core.utils import UncompletedJobError

    try:
        error = job.result()
    except UncompletedJobError as ended:
        said = in_one_line(ended)
        raise UserError(f"the job of {folder} ended before its run: go on with resume. submitit says: {said}") from None
    if error:
        raise error
    return Run.load(folder)


def _outcome(config: RunConfig, folder: Path, resume: bool) -> UserError | None:
    """In the job: train. submitit keeps of an error no more than its text, so what a person can mend is returned."""
    try:
        train(config, folder, resume=resume)
    except UserError as error:
        return error
    return None
