"""Measurements beside the runs of a study: time of a step and of a jump, memory of an arm, the largest model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hybridlab.base.errors import UserError
from hybridlab.base.files import make_folders
from hybridlab.base.one_line import in_one_line
from hybridlab.study.record import write_json


@contextmanager
def one_line(program: str, out: Path | None) -> Iterator[Callable[[Any], None]]:
    """What is refused inside ends the program with one line, and exit code 1; gives what writes the results.

    out: where they go, as JSON, if anywhere: it is refused before anything is measured
    """
    try:
        make_folders(*[out] if out else [])
        yield partial(write_json, out) if out else lambda results: None
    except (UserError, ValueError) as error:
        raise SystemExit(f"{program}: {in_one_line(error)}") from None
