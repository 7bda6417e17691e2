"""Imports go downward only, and siblings do not import each other."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Collection
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import hybridlab

ROOT = Path(hybridlab.__file__).parent

LAYERS = [
    {"base"},
    {"weights", "models", "data", "vram"},
    {"predictors", "optim", "depth"},
    {"memory", "optimizers"},
    {"engine", "speed"},
    {"planner"},
    {"study"},
    {"benchmarks", "charts", "results"},
    {"panel"},
    {"batch", "notebook"},
    {"report", "integrations"},
    {"cli", "train"},
]
"""The folders of the library, from the bottom up. Those of one layer do not import each other."""

HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem in ("cli", "train"))


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


def module_of(path: Path) -> str:
    return ".".join(("hybridlab", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def modules_imported(path: Path, modules: Collection[str]) -> set[str]:
    """Modules of hybridlab that a file imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (named | {node.module}) & set(modules)
    return found - {module_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward_only(path: Path) -> None:
    mine = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imports_of(path) - {mine}:
        assert HEIGHT[other] < HEIGHT[mine], f"{mine} must not import {other}"


def test_no_file_lies_flat_in_the_library_but_the_programs() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py", "train.py"}


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES} - {ROOT}), ids=lambda path: path.name)
def test_a_folder_says_in_one_sentence_what_is_in_it(folder: Path) -> None:
    sentence = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_no_file_imports_itself_by_way_of_others() -> None:
    modules = {module_of(path): path for path in FILES}
    imported = {name: modules_imported(path, modules) for name, path in modules.items()}
    TopologicalSorter(imported).prepare()  # raises CycleError, which names the circle


def test_decisions_hold_no_tensor_of_the_model() -> None:
    """They do not even import torch; the learned dynamics model has tensors, but of its own."""
    pure = [ROOT / "engine" / f"{name}.py" for name in ("phases", "divergence", "gate", "corrector")]
    pure += [path for path in (ROOT / "predictors").glob("*.py") if path.stem not in ("rssm", "rssm_model")]
    pure += [ROOT / "weights" / "gram.py"]
    assert [path.name for path in pure if "torch" in path.read_text()] == []


def test_few_files_write_parameters_in_place() -> None:
    """Beside them, models draw first weights, optimizers average or write what is rounded; gradients change, too."""
    writers = {path for path in FILES if "torch._foreach_" in path.read_text()}
    optimizers = {ROOT / "optim" / f"{name}.py" for name in ("averaging", "in_backward", "low_bit")}
    weights = ("motion", "snapshot", "bf16_resident", "tail_average")
    of_gradients = {ROOT / name for name in ("engine/passes.py", "speed/compilation.py", "base/ranks.py")}
    assert writers == {ROOT / "weights" / f"{name}.py" for name in weights} | optimizers | of_gradients


def test_every_package_that_the_library_imports_is_declared() -> None:
    imported: set[str] = set()
    for node in (node for path in ROOT.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            imported |= {name.split(".")[0] for name in names}
    imported -= {*sys.stdlib_module_names, "hybridlab", "_typeshed"}
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    declared = {re.split(r"[\[><=]", name)[0].replace("-", "_").lower() for name in listed}
    from_package = packages_distributions()

    def distributions(name: str) -> set[str]:
        return {found.replace("-", "_").lower() for found in from_package.get(name, [name])}

    assert [name for name in sorted(imported) if not distributions(name) & declared] == []
