"""Imports go downward only, and siblings do not import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hybridlab

ROOT = Path(hybridlab.__file__).parent

LAYERS = [
    {"errors", "gram"},
    {"models", "data", "optimizers"},
    {"vram", "runs"},
    {"trajectory"},
    {"memory"},
    {"phases", "divergence", "gate", "predictors"},
    {"jump", "step_result"},
    {"config"},
    {"trainer"},
    {"study"},
    {"notebook"},
    {"cli"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(path: Path) -> set[str]:
    """Parts of hybridlab that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "hybridlab":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hybridlab."):
            found.add(part_of(node.module or ""))
        elif isinstance(node, ast.Import):
            found |= {part_of(a.name) for a in node.names if a.name.startswith("hybridlab.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward_only(path: Path) -> None:
    mine = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imports_of(path) - {mine}:
        assert HEIGHT[other] < HEIGHT[mine], f"{mine} must not import {other}"


def test_only_the_trajectory_writes_parameter_storage() -> None:
    """Decisions hold no tensor of the model: they do not even import torch."""
    for name in ("phases.py", "divergence.py", "gate.py", "gram.py"):
        assert "import torch" not in (ROOT / name).read_text()
    assert not any("import torch" in path.read_text() for path in (ROOT / "predictors").glob("*.py"))
