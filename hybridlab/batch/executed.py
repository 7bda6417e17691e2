"""Executed notebooks: whether one is whole, where it stopped, and what is taken out of a kept copy."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlab.base.errors import UserError
from hybridlab.base.files import NOTEBOOKS, replaced
from hybridlab.base.text_file import reading

if TYPE_CHECKING:
    from nbformat import NotebookNode

INJECTED = "injected-parameters"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
NOTEBOOK = ("notebook", NOTEBOOKS, "not a Jupyter notebook (format 4, JSON)")
"""What `reading` says of one that cannot be read."""


def read_notebook(path: Path) -> NotebookNode:
    """Read a notebook file. Raises UserError where it is missing, unreadable, or no notebook."""
    import nbformat

    with reading(path, *NOTEBOOK):
        return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def read_document(path: Path) -> dict[str, Any]:
    """Read a notebook file as plain JSON: nbformat takes seconds to import. Raises as `read_notebook`."""
    with reading(path, *NOTEBOOK):
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["nbformat"] != 4 or not isinstance(document["cells"], list):
            raise ValueError
        return dict(document)


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook file, whole or not at all."""
    import nbformat

    with replaced(path) as beside:
        nbformat.write(notebook, beside)  # type: ignore[no-untyped-call]


def trust(notebook: NotebookNode) -> None:
    """Sign outputs that we made, so that JupyterLab shows their tables alive; without a place to keep it, nothing."""
    from nbformat.sign import NotebookNotary

    with suppress(Exception):
        NotebookNotary().sign(notebook)  # type: ignore[no-untyped-call]


def write_or_rescue(notebook: NotebookNode, path: Path, working_copy: Path) -> None:
    """Write a notebook file; where that cannot be, keep it in a folder of its own among the temporary files.

    working_copy: the notebook as it ran, if it is there: moved, it takes no more room

    Raises UserError that says where the notebook is kept.
    """
    try:
        write_notebook(notebook, path)
    except UserError as error:
        raise UserError(f"{error}; {_rescued(notebook, path.name, working_copy)}") from error


def _rescued(notebook: NotebookNode, name: str, working_copy: Path) -> str:
    kept = working_copy.parent.with_name(f"{working_copy.parent.name}-kept") / name
    with suppress(OSError, UserError):
        kept.parent.mkdir(mode=0o700)
        read_notebook(working_copy)  # half of one is none
        working_copy.rename(kept)
    with suppress(UserError):
        write_notebook(notebook, kept)  # clean, where there is room
    with suppress(OSError):
        kept.parent.rmdir()  # if it is empty
    return f"the copy is kept as {kept}" if kept.exists() else "no copy could be kept"


def joined_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """What a cell left, with all of a stream in one output, where it began; standard output precedes what it warned of.

    Of a line that was written over, after a carriage return, the last state is kept.
    """
    texts: dict[str, list[str]] = {}
    joined: list[NotebookNode] = []
    for output in outputs:
        if output.output_type != "stream":
            joined.append(output)
            continue
        if output.name not in texts:
            joined.append(output)
        texts.setdefault(output.name, []).append(output.text)
    for output in (output for output in joined if output.output_type == "stream"):
        lines = "".join(texts[output.name]).split("\n")
        output.text = "\n".join(line[line.rfind("\r", 0, -1) + 1 :] for line in lines)
    for i, (first, second) in enumerate(pairwise(joined)):
        if (first.get("name"), second.get("name")) == ("stderr", "stdout"):
            joined[i : i + 2] = second, first
            break
    return joined


def unfinished(notebook: NotebookNode) -> str | None:
    """Say why an executed notebook is not whole; None when every code cell ran, in order, without error."""
    cells = code_cells(notebook)
    for error in (output for cell in cells for output in cell.outputs if output.output_type == "error"):
        if error.ename == "SystemExit":
            return "the notebook ended early with SystemExit"
        return f"{error.ename}: {error.evalue}"
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        return "its code cells did not all run, in order"
    return None


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """List the cells that hold code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def stopping_place(notebook: NotebookNode) -> str:
    """Name the code cell where a run stopped: that of the first error, else the last that was started."""
    cells = code_cells(notebook)
    failed = [i for i, cell in enumerate(cells) if any(o.output_type == "error" for o in cell.outputs)]
    started = [i for i, cell in enumerate(cells) if cell.metadata.get("papermill", {}).get("start_time")]
    if not (stops := failed[:1] or started[-1:]):
        return "before the first cell"
    first_line = cells[stops[0]].source.strip().splitlines()[0]
    return f"code cell {stops[0] + 1}, `{first_line}`"


def clean_(notebook: NotebookNode, root: Path) -> None:
    """Take out of an executed notebook what differs between equal runs: timings, widgets, paths."""
    for name in ("papermill", "widgets"):
        notebook.metadata.pop(name, None)
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k not in ("papermill", "execution") and v != []}
        if INJECTED in cell.metadata.get("tags", []):
            cell.id = INJECTED
            cell.metadata["jupyter"] = {"source_hidden": True}
    for cell in code_cells(notebook):
        cell.outputs = [clean for output in cell.outputs if (clean := _clean_output(output, root))]


def _clean_output(output: NotebookNode, root: Path) -> NotebookNode | None:
    if "data" in output:
        output.data.pop(WIDGET_VIEW, None)
        if not output.data:
            return None
    return _without_paths(output, root)


def _without_paths(value: Any, root: Path) -> Any:
    if isinstance(value, dict):
        return type(value)({k: v if k.startswith("image/") else _without_paths(v, root) for k, v in value.items()})
    if isinstance(value, list):
        return [_without_paths(item, root) for item in value]
    if isinstance(value, str):
        for folder, name in ((root, "."), (Path.home(), "~")):
            value = re.sub(rf"(?<!\w){re.escape(str(folder))}(?![\w.-])", name, value)
    return value
