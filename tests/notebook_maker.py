"""Tiny notebooks for the tests of the batch runner and of notebook hygiene."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
DECLARED = """\
lr: float = 1.0e-3  # learning rate
steps: int = 3
start: str = "now"
fast: bool = False
widths: list[int] = [1, 2]
limit: int | None = None
resume: bool = False
results: str = "runs"
"""


def tiny_notebook(*cells: str, declared: str = DECLARED) -> NotebookNode:
    """Make a stripped notebook: a title, the parameters cell, and `cells` of code."""
    parameters = new_code_cell(declared.strip(), id="parameters", metadata={"tags": ["parameters"]})
    code = [new_code_cell(source, id=f"code-{number}") for number, source in enumerate(cells)]
    return new_notebook(
        cells=[new_markdown_cell("# Tiny", id="title"), parameters, *code], metadata={"kernelspec": KERNEL}
    )


def save(notebook: NotebookNode, path: Path) -> Path:
    """Write a notebook, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def project(folder: Path) -> Path:
    """Make `folder` a project's root."""
    (folder / "pyproject.toml").write_text("[tool.hybridlab]\n")
    return folder
