"""Imports: late, so that commands start without torch, and without the messages of other packages."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A package's `__getattr__`, `__dir__` (PEP 562) and `__all__`, from its file's imports for type checkers.

        if TYPE_CHECKING:
            from hybridlab.study.run import train
        __getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)

    Raises AttributeError, as a module does, for a name that is not among them.
    """
    source = ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
    found = [
        node for node in source if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hybridlab.")
    ]
    homes = {alias.name: node.module or "" for node in found for alias in node.names}

    def get(name: str) -> Any:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted(homes), sorted(homes)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Inside, packages are imported without messages: torchao lists the kernels that a machine cannot use."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)
