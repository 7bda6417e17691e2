"""Run a notebook as a batch job: check first, run whole, keep a clean copy or say where it stopped."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.base.errors import UserError
from hybridlab.base.files import NOTEBOOKS, PARAMS, RESULTS_LOCK, find_source, make_folders, project_root
from hybridlab.base.one_line import in_one_line
from hybridlab.batch.executed import (
    clean_,
    read_document,
    read_notebook,
    stopping_place,
    trust,
    unfinished,
    write_or_rescue,
)
from hybridlab.batch.given import (
    checked_values,
    declared_parameters,
    defaults,
    from_options,
    value_on_command_line,
)
from hybridlab.batch.limits import check_limits
from hybridlab.batch.terminal import RunFailed, RunInterrupted
from hybridlab.batch.yaml_files import Given, values_in_file
from hybridlab.panel.progress import watched
from hybridlab.results.parameters import asked, parameters_sha256

if TYPE_CHECKING:
    from nbformat import NotebookNode

NPROC = "nproc"
WORK, PROGRESS = "work.ipynb", "progress.json"
GO_ON = "the same command with --resume goes on with its training runs"
REFUSALS = ("ValueError", "TypeError")
"""Errors by which a cell refuses what it was given, beside UserError: the same command ends the same way."""


@dataclass(frozen=True)
class Job:
    """A checked run: nothing about it can be refused any more.

    overrides: parameters that are given to the notebook; parameters: all that it asks with, its defaults included
    results: the file that it publishes to; None where it has no parameter `results`
    resumable: it has a parameter `resume`
    """

    notebook: Path
    output: Path
    overrides: dict[str, Any]
    parameters: dict[str, Any]
    results: Path | None
    root: Path
    resumable: bool


def partial_copy(output: Path) -> Path:
    """Where the copy of a run that stopped goes: beside the executed one."""
    return output.with_suffix(".failed.ipynb")


def run_notebook(job: Job) -> list[str]:
    """Run the notebook of a job, and write the executed copy; standard output shows progress.

    Returns the closing sentences that the notebook published.

    Raises RunFailed where the notebook stopped before its end, and where its copy had to be kept elsewhere;
    RunInterrupted where somebody stopped it.
    """
    from hybridlab.results.environment import environment, git_commit  # torch, which a refusal need not wait for

    commit = git_commit()
    with _working_folder() as folder:
        executed = _run(job, folder)
        facts = environment() | {"git_commit": commit, "parameters": job.parameters}
        facts["parameters_sha256"] = parameters_sha256(job.parameters)
        clean_(executed, job.root)
        executed.metadata["hybridlab"] = facts
        try:
            write_or_rescue(executed, job.output, folder / WORK)
        except UserError as error:
            raise RunFailed(f"every cell has run, but {error}") from None
    trust(executed)
    partial_copy(job.output).unlink(missing_ok=True)
    return summary_of(job)


def prepared(
    notebook: Path,
    output: Path,
    files: Sequence[Path] = (),
    settings: Sequence[tuple[str, str]] = (),
    *,
    resume: bool = False,
    nproc: int | None = None,
) -> Job:
    """Check everything that can be checked before a run of `notebook` with the parameters of `files` and `settings`.

    notebook: the source, as `find_source` takes it; it is only read
    output: the executed copy, written only when every cell has run; a partial copy goes beside it as `.failed.ipynb`.
        The notebook's parameter `results`, if it has one, becomes the folder of `output`
    files: YAML mappings of parameters; a later file wins
    settings: (name, text) pairs, which win over the files, and over `output` for `results`
    resume: go on with the training runs that an interrupted start left: the notebook's parameter `resume`
    nproc: processes that train its run together, each on a GPU: the notebook's parameter `nproc`

    Raises UserError with what to mend, before anything is run or written.
    """
    if nameless := [path for path in (notebook, *files) if not path.name]:
        raise UserError(f"{nameless[0]}: a folder, or nothing at all: name a file")
    notebook, root = find_source(notebook, NOTEBOOKS), project_root()
    declared = declared_parameters(read_document(notebook), notebook.name)
    given = [item for file in files for item in values_in_file(find_source(file, PARAMS))]
    given += from_options(output, resume, declared, root)
    given += [value_on_command_line(name, text, declared) for name, text in settings]
    given += _processes(nproc, declared, notebook.name)
    overrides = checked_values(given, declared, notebook.name)
    parameters = defaults(declared) | overrides
    check_limits(parameters, defaults(declared), {item.name: item.place for item in given})
    _refuse_more_than_gpus(parameters)
    _check_name(notebook, output)
    folder = parameters.get("results")
    results = root / folder / "results.json" if isinstance(folder, str) else None
    make_folders(output, *([results, root / RESULTS_LOCK] if results else []))
    if results and results.exists():
        from hybridlab.results.reading import load_results

        load_results(results)  # a damaged one would refuse what was found, hours later
    return Job(notebook, output, overrides, asked(parameters), results, root, "resume" in declared)


def _processes(nproc: int | None, declared: Mapping[str, Any], name: str) -> list[Given]:
    """Set the parameter `nproc`. Raises UserError for a notebook without it."""
    if nproc is None:
        return []
    if NPROC not in declared:
        raise UserError(f"--nproc: {name} starts no run of several processes: leave it off, or run 11_several_gpus")
    return [Given(NPROC, nproc, str(nproc), "after --nproc")]


def _refuse_more_than_gpus(parameters: Mapping[str, Any]) -> None:
    """Only where several are asked for, since torch has to be imported to count them."""
    for name in (NPROC, "at_once"):
        if (count := parameters.get(name, 1)) > 1:
            from hybridlab.base.device import refuse_more_than_gpus

            refuse_more_than_gpus(name, count, parameters.get("device", "auto"))


def _check_name(notebook: Path, output: Path) -> None:
    if output.suffix != ".ipynb" or output.is_dir():
        raise UserError(f"{output}: the output is a notebook file: give it a name that ends in .ipynb")
    for written in (output, partial_copy(output)):
        if written.resolve() == notebook.resolve():
            raise UserError(f"{written}: the output would replace the source notebook: give it another name")


@contextmanager
def _working_folder() -> Iterator[Path]:
    """A folder of the run's own, so that the output is only touched by a whole run."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="hybridlab-")
    except OSError as error:
        raise UserError(f"no temporary folder: {error.strerror}; name another one in TMPDIR") from None
    with folder as name:
        yield Path(name)


def _run(job: Job, folder: Path) -> NotebookNode:
    """Run every cell. Raises RunFailed where one of them did not."""
    from hybridlab.batch.engine import execute

    try:
        with watched(folder / PROGRESS):
            reason = execute(job.notebook, folder / WORK, job.overrides, folder / PROGRESS)
    except KeyboardInterrupt:
        raise RunInterrupted(_keep_partial(job, folder / WORK, "stopped (Ctrl-C or a signal)")) from None
    executed = _as_it_ran(job, folder / WORK)
    if reason := reason or unfinished(executed):
        raise RunFailed(_keep_partial(job, folder / WORK, reason))
    return executed


def _keep_partial(job: Job, work: Path, reason: str) -> str:
    """Keep the copy of a run that stopped; return the line that says so: what to mend, or where and how to go on."""
    executed = _as_it_ran(job, work)
    try:
        write_or_rescue(executed, partial_copy(job.output), work)
        copy = f"partial copy: {partial_copy(job.output)}"
    except UserError as error:
        copy = str(error)
    if (mistake := reason.removeprefix("UserError: ")) != reason:
        return f"{in_one_line(mistake)} ({copy})"
    said = f"{stopping_place(executed)}: {in_one_line(reason)} ({copy})"
    return f"{said}; {GO_ON}" if job.resumable and not reason.startswith(REFUSALS) else said


def _as_it_ran(job: Job, work: Path) -> NotebookNode:
    """The working copy, or the source where there is none that is whole."""
    try:
        return read_notebook(work)
    except UserError:
        return read_notebook(job.notebook)


def summary_of(job: Job) -> list[str]:
    """The closing sentences that a finished run published; empty when it published none."""
    from hybridlab.results.reading import load_results

    entry = load_results(job.results).get(job.notebook.stem, {}) if job.results else {}
    fresh = entry.get("parameters_sha256") == parameters_sha256(job.parameters)
    return entry["summary"] if fresh else []
