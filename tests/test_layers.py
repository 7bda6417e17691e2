"""Imports go downward only, and siblings do not import each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import hybridlab

ROOT = Path(hybridlab.__file__).parent

LAYERS = [
    {"errors"},
    {"settings"},
    {"gram", "files"},
    {"models", "data", "optimizers", "device", "compiler"},
    {"vram", "runs"},
    {"checkpoint", "tensorboard", "host_memory"},
    {"motion"},
    {"low_weights"},
    {"weights"},
    {"trajectory"},
    {"memory"},
    {"phases", "divergence", "gate", "corrector", "predictors"},
    {"jump", "step_result"},
    {"config"},
    {"passes", "prediction"},
    {"trainer"},
    {"study"},
    {"notebook"},
    {"report"},
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


def test_the_document_lists_the_same_layers() -> None:
    document = (ROOT.parent / "docs" / "design.md").read_text()
    (listed,) = re.findall(r"`(cli >.*?)`", document, flags=re.DOTALL)
    assert [set(re.findall(r"\w+", layer)) for layer in listed.split(">")] == LAYERS[::-1]


def test_decisions_hold_no_tensor_of_the_model() -> None:
    """They do not even import torch; the learned dynamics model has tensors, but of its own."""
    pure = [ROOT / f"{name}.py" for name in ("phases", "divergence", "gate", "corrector", "gram")]
    pure += [path for path in (ROOT / "predictors").glob("*.py") if path.stem not in ("rssm", "dynamics")]
    assert [path.name for path in pure if "torch" in path.read_text()] == []


def test_few_files_write_parameters_in_place() -> None:
    """Beside them, models draw their first weights, and optimizers scale gradients or write what they have rounded."""
    writers = {path for path in FILES if "torch._foreach_" in path.read_text()}
    optimizers = {ROOT / "memory" / "in_backward.py", ROOT / "memory" / "low_bit.py"}
    assert writers == {ROOT / f"{name}.py" for name in ("motion", "weights", "low_weights")} | optimizers
