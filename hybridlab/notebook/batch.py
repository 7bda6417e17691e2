"""Run a notebook as a batch job: check first, run whole, keep a clean copy or say where it stopped."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbformat import NotebookNode
from rich.console import Console

from hybridlab.errors import UserError
from hybridlab.notebook.engine import execute
from hybridlab.notebook.executed import clean_, read_notebook, stopping_place, unfinished, write_notebook
from hybridlab.notebook.given import checked_values, value_on_command_line, values_in_file
from hybridlab.notebook.parameters import declared_parameters, defaults, parameters_sha256
from hybridlab.notebook.progress import watched
from hybridlab.notebook.results import environment, git_commit, load_results, project_root


class RunFailed(Exception):
    """The notebook stopped before its end; the message names the cell and the reason."""


class RunInterrupted(RunFailed):
    """Somebody stopped the run."""


@dataclass(frozen=True)
class Job:
    """A checked run: nothing about it can be refused any more."""

    notebook: Path
    output: Path
    overrides: dict[str, Any]
    parameters: dict[str, Any]
    root: Path

    @property
    def partial(self) -> Path:
        """Where the copy of a run that stopped goes."""
        return self.output.with_suffix(".failed.ipynb")


def run_notebook(
    notebook: Path,
    output: Path,
    files: Sequence[Path] = (),
    settings: Sequence[tuple[str, str]] = (),
    console: Console | None = None,
) -> NotebookNode:
    """Run `notebook` with the parameters of `files` and `settings`, and write it to `output`.

    notebook: the source; it is only read
    output: the executed copy, written only when every cell has run; a partial copy goes beside it as `.failed.ipynb`
    files: YAML mappings of parameters; a later file wins
    settings: (name, text) pairs, which win over the files
    console: where progress is shown; standard output by default

    Returns the executed notebook, as written.

    Raises UserError where something is refused, before anything is run or written, and where the disk has no room for
    the copy; RunFailed where the notebook stopped before its end; RunInterrupted where somebody stopped it.
    """
    job = prepared(notebook, output, files, settings)
    commit = git_commit()
    executed = _run(job, console or Console())
    facts = environment() | {"git_commit": commit, "parameters": job.parameters}
    facts["parameters_sha256"] = parameters_sha256(job.parameters)
    clean_(executed, job.root)
    executed.metadata["hybridlab"] = facts
    write_notebook(executed, job.output)
    job.partial.unlink(missing_ok=True)
    return executed


def prepared(notebook: Path, output: Path, files: Sequence[Path] = (), settings: Sequence[tuple[str, str]] = ()) -> Job:
    """Check everything that can be checked before a run; arguments as for `run_notebook`.

    Raises UserError with what to mend.
    """
    declared = declared_parameters(read_notebook(notebook), notebook.name)
    given = [item for file in files for item in values_in_file(file)]
    given += [value_on_command_line(name, text, declared) for name, text in settings]
    overrides = checked_values(given, declared, notebook.name)
    root = project_root()
    _check_output(notebook, output)
    return Job(notebook, output, overrides, defaults(declared) | overrides, root)


def _check_output(notebook: Path, output: Path) -> None:
    if output.suffix != ".ipynb" or output.is_dir():
        raise UserError(f"{output}: the output is a notebook file: give it a name that ends in .ipynb")
    if output.resolve() == notebook.resolve():
        raise UserError(f"{output}: the output would replace the source notebook: give it another name")
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{output}: cannot write into {folder}: choose another output folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot make its folder: {error.strerror}") from None


def _run(job: Job, console: Console) -> NotebookNode:
    """Run in a folder of its own, so that the output is only touched by a whole run."""
    with tempfile.TemporaryDirectory(prefix="hybridlab-") as folder:
        work, progress = Path(folder) / "work.ipynb", Path(folder) / "progress.json"
        try:
            with watched(progress, console):
                reason = execute(job.notebook, work, job.overrides, progress)
        except KeyboardInterrupt:
            raise RunInterrupted(_keep_partial(job, work, "stopped (Ctrl-C or a signal)")) from None
        executed = read_notebook(work if work.exists() else job.notebook)
        if reason := reason or unfinished(executed):
            raise RunFailed(_keep_partial(job, work, reason))
    return executed


def _keep_partial(job: Job, work: Path, reason: str) -> str:
    """Keep the copy of a run that stopped; return the line that says so."""
    executed = read_notebook(work if work.exists() else job.notebook)
    write_notebook(executed, job.partial)
    return f"{stopping_place(executed)}: {' '.join(reason.split())} (partial copy: {job.partial})"


def summary_of(job_parameters: dict[str, Any], notebook: Path) -> list[str]:
    """Fetch the closing sentences that a finished run published; empty when it published none."""
    folder = job_parameters.get("results")
    if not isinstance(folder, str):
        return []
    entry = load_results(project_root() / folder / "results.json").get(notebook.stem, {})
    fresh = entry.get("parameters_sha256") == parameters_sha256(job_parameters)
    return entry["summary"] if fresh else []
