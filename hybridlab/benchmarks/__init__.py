"""Measurements that are no training runs: time of a step, of a jump, and the memory of an arm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybridlab.base.errors import UserError
from hybridlab.base.files import make_folders


@contextmanager
def one_line(program: str, out: Path | None) -> Iterator[None]:
    """What is refused inside ends the program with one line, and exit code 1.

    out: where the results go: it is refused before anything is measured
    """
    try:
        make_folders(*[out] if out else [])
        yield
    except (UserError, ValueError) as error:
        raise SystemExit(f"{program}: {error}") from None
