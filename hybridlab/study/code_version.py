"""Which code a run was trained by."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

import hybridlab

TRAINS = "hybridlab.study.run"
"""All that trains is this module and what it imports, directly or through others."""

MEASURES = "hybridlab.benchmarks"
"""All that measures beside the runs is below it."""

NOT_TRAINING = (__name__, "hybridlab.study.out_of_memory")
"""Imported by those, and without a part in any figure of a run."""


@cache
def code_version() -> str:
    """The library's version with a hash of the code that trains, and torch's: runs of equal ones are comparable.

    Syntax trees are hashed, so that docstrings, comments and layout do not count; and an import counts for the content
    of what it imports, so that a moved file does not count either. Sources count as they were when this process
    imported them: what is edited while a run goes on has no part in its figures.
    """
    return _version(_OWN_HASHES)


def version_of(sources: Mapping[str, str]) -> str:
    """The version of some sources: module -> text."""
    return _version(_hashes_of(sources))


def read_sources() -> dict[str, str]:
    """The sources of the library as they lie on the disk: module -> text."""
    root = Path(hybridlab.__file__).parent
    modules = {path: path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path.read_text("utf-8") for path, name in modules.items()}


@cache
def code_hashes() -> dict[str, str]:
    """The hashes of the code that trains, and of the benchmarks with all that they import; alike for every Python."""
    of = _OWN_HASHES
    benchmarks = [of(module) for module in sorted(_AT_IMPORT) if module.startswith(f"{MEASURES}.")]
    return {"trains": of(TRAINS)[:8], "measures": hashlib.sha256(repr(benchmarks).encode()).hexdigest()[:8]}


def _version(of: Callable[[str], str]) -> str:
    return f"hybridlab {hybridlab.__version__}+{of(TRAINS)[:8]}, torch {torch.__version__}"


def _hashes_of(sources: Mapping[str, str]) -> Callable[[str], str]:
    """The hash of a module: its own code, with the hashes of the modules that it imports."""

    def source_of(place: str, name: str) -> str:
        return f"{place}.{name}" if f"{place}.{name}" in sources else place

    @cache
    def of(module: str) -> str:
        if module in NOT_TRAINING:
            return module
        code = _Code()
        own = _as_lists(code.visit(ast.parse(sources[module])))
        imported = sorted((of(source_of(place, it.name)), it.name, it.asname or "") for place, it in code.imports)
        return hashlib.sha256(repr((imported, own)).encode()).hexdigest()

    return of


def _as_lists(node: Any) -> Any:
    """A syntax tree without its empty fields, of which each version of Python has others."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return [type(node).__name__, *((name, _as_lists(value)) for name, value in fields)]
    return [_as_lists(part) for part in node] if isinstance(node, list) else repr(node)


class _Code(ast.NodeTransformer):
    """Takes docstrings out of a syntax tree, and imports of the library, which it keeps in `imports`."""

    def __init__(self) -> None:
        self.imports: list[tuple[str, ast.alias]] = []

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        if not (place := node.module or "").startswith("hybridlab"):
            return node
        self.imports += [(place, name) for name in node.names]
        return None


_AT_IMPORT = read_sources()
_OWN_HASHES = _hashes_of(_AT_IMPORT)
