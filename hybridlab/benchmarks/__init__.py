"""Measurements beside the runs of a study: time of a step and of a jump, memory of an arm, the largest model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybridlab.base.errors import UserError
from hybridlab.base.files import make_folders
from hybridlab.base.one_line import in_one_line


@contextmanager
def one_line(program: str, out: Path | None) -> Iterator[None]:
    """What is refused inside ends the program with one line, and exit code 1.

    out: where the results go: it is refused before anything is measured
    """
    try:
        make_folders(*[out] if out else [])
        yield
    except (UserError, ValueError) as error:
        raise SystemExit(f"{program}: {in_one_line(error)}") from None
