"""Which code a run was trained by."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

import hybridlab

TRAINS = "hybridlab.study.run"
"""All that trains is this module and what it imports, directly or through others."""

NOT_TRAINING = (__name__, "hybridlab.study.out_of_memory")
"""Imported by those, and without a part in any figure of a run."""


@cache
def code_version() -> str:
    """The library's version with a hash of the code that trains, and torch's: runs of equal ones are comparable.

    Syntax trees are hashed, so that docstrings, comments and layout do not count; and an import counts for the content
    of what it imports, so that a moved file does not count either. Sources count as they were when this process
    imported them: what is edited while a run goes on has no part in its figures.
    """
    return version_of(_AT_IMPORT)


def version_of(sources: Mapping[str, str]) -> str:
    """The version of some sources: module -> text."""
    return f"hybridlab {hybridlab.__version__}+{_hash_of(sources)[:8]}, torch {torch.__version__}"


def read_sources() -> dict[str, str]:
    """The sources of the library as they lie on the disk: module -> text."""
    root = Path(hybridlab.__file__).parent
    modules = {path: path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path.read_text("utf-8") for path, name in modules.items()}


def _hash_of(sources: Mapping[str, str]) -> str:
    """Of `TRAINS`: each module's own code, with the hashes of the modules that it imports."""

    def source_of(place: str, name: str) -> str:
        return f"{place}.{name}" if f"{place}.{name}" in sources else place

    @cache
    def of(module: str) -> str:
        if module in NOT_TRAINING:
            return module
        code = _Code()
        own = ast.dump(code.visit(ast.parse(sources[module])))
        imported = sorted((of(source_of(place, it.name)), it.name, it.asname or "") for place, it in code.imports)
        return hashlib.sha256(repr((imported, own)).encode()).hexdigest()

    return of(TRAINS)


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
