"""Which code a run was trained by."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

import hybridlab

NOT_TRAINING = ("batch", "charts", "cli.py", "notebook", "panel", "report", "results")
"""Parts of the library that show runs and do not train them."""


def code_version() -> str:
    """The library's version with a hash of its sources, and torch's: runs of equal ones can stand beside each other.

    What only shows runs does not count. The sources count as they were when this process imported them: what is edited
    while a run goes on has no part in its figures.
    """
    return _AT_IMPORT


def _read_version() -> str:
    """From the sources as they lie on the disk."""
    root = Path(hybridlab.__file__).parent
    sources = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    digest = hashlib.sha256()
    for path in sources:
        if path.parts[0] not in NOT_TRAINING:
            digest.update(path.as_posix().encode() + (root / path).read_bytes())
    return f"hybridlab {hybridlab.__version__}+{digest.hexdigest()[:8]}, torch {torch.__version__}"


_AT_IMPORT = _read_version()
