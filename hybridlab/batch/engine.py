"""The papermill engine of `hybridlab run`: encrypted kernel channels, and a quiet end when interrupted."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import papermill
import psutil
import zmq
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_client.manager import KernelManager
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from hybridlab.base.errors import UserError
from hybridlab.base.front_end import PROGRESS_FILE
from hybridlab.base.swapped import swapped
from hybridlab.batch.executed import joined_streams

ENGINE = "hybridlab"


def execute(notebook: Path, output: Path, overrides: dict[str, Any], progress: Path) -> str | None:
    """Run `notebook` into `output`, with `progress` as the file its kernel reports to.

    Returns why it stopped, where papermill knows; None says nothing about the notebook being whole.

    Raises UserError where there is no Python kernel.
    """
    source, target = (str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output))
    options = {"engine_name": ENGINE, "kernel_name": "python3", "progress_bar": False, "env": _environment(progress)}
    try:
        with swapped(logging.getLogger("papermill"), disabled=True):  # what went wrong is said once, at the end
            papermill.execute_notebook(source, target, overrides, **options)
    except PapermillExecutionError as error:
        return None if error.ename == "SystemExit" else f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        return "the kernel died: killed, or out of memory"
    except NoSuchKernel:
        raise UserError("no Jupyter kernel named python3: install ipykernel in this environment") from None
    except RuntimeError as error:
        return f"the kernel failed: {error}"
    except OSError as error:
        return f"cannot write {output}: {error.strerror}; make room there, or name another folder in TMPDIR"
    return None


def _environment(progress: Path) -> dict[str, str]:
    """The kernel's: its temporary files lie beside the progress file and go with it, compiled kernels are kept."""
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{psutil.Process().username()}"  # as torch has it
    ours = {PROGRESS_FILE: str(progress), "TMPDIR": str(progress.parent)}
    return {"TORCHINDUCTOR_CACHE_DIR": str(compiled)} | os.environ | ours


class _Client(PapermillNotebookClient):  # type: ignore[misc]
    """Runs the cells; when interrupted it kills the kernel at once and leaves no task to complain.

    Streams are joined by `joined_streams`: nbclient's way takes time with the square of a line's length.
    """

    def execute_cell(self, cell: NotebookNode, cell_index: int, **options: Any) -> NotebookNode:
        try:
            return super().execute_cell(cell, cell_index, **options)
        finally:
            if "outputs" in cell:
                cell.outputs = joined_streams(cell.outputs)

    def papermill_execute_cells(self) -> None:
        try:
            super().papermill_execute_cells()
        except KeyboardInterrupt:
            self.shutdown_kernel = "immediate"
            for task in asyncio.all_tasks(ensure_event_loop()):
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
            raise


class _Engine(Engine):  # type: ignore[misc]
    """papermill's own engine with our client."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: NotebookExecutionManager, kernel_name: str, env: dict[str, str], **_: Any
    ) -> None:
        """Execute the notebook that `nb_man` holds in a kernel with this environment; called by papermill."""
        _Client(
            nb_man,
            kernel_name=kernel_name,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # a kernel that is shut down may complain on stderr
            config=_kernel_config(),
            log=logging.getLogger("papermill"),
        ).execute(env=env)


papermill_engines.register(ENGINE, _Engine)


def _kernel_config() -> Config:
    """Encrypt the channels to the kernel, where the installed jupyter_client and zmq can."""
    known = "transport_encryption" in KernelManager.class_trait_names() and zmq.has("curve")
    return Config({"KernelManager": {"transport_encryption": "auto"}} if known else {})
