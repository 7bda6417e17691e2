"""What the benchmarks refuse, in one line, before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridlab.benchmarks import against_others, architectures, ranks, recipes, step_overhead

MAINS: dict[str, Callable[..., None]] = {
    "against_others": against_others.main,
    "architectures": lambda **more: architectures.main(**{"models": ["nano"]} | more),
    "ranks": ranks.main,
    "recipes": recipes.main,
    "step_overhead": step_overhead.main,
}


@pytest.mark.parametrize("program", MAINS)
@pytest.mark.parametrize(
    ("place", "says"), [("file/out.json", "cannot write into"), ("", "is no file: name one that can be written")]
)
def test_a_file_that_cannot_be_written_is_refused_first(program: str, place: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"^{program}: .*{says}"):
        MAINS[program](out=tmp_path / place)


@pytest.mark.parametrize(
    ("program", "wrong", "says"),
    [
        ("recipes", {"gpu": "rtx5081"}, "GPU 'rtx5081' is unknown: did you mean 'rtx5080'"),
        ("architectures", {"speed": "fast"}, "speed 'fast' is unknown: choose one of eager"),
        ("architectures", {"models": ["nano", "nope"]}, "nope: no such config"),
        ("step_overhead", {"batch": "0x8"}, "batch '0x8' cannot be read"),
        ("against_others", {"vocab_size": 0}, "vocab_size is 0"),
        ("against_others", {"model": "smal"}, "GPT-2 size 'smal' is unknown"),
        ("against_others", {"device": "gpu"}, "device 'gpu' is unknown"),
    ],
)
def test_what_cannot_be_meant_is_refused_first(program: str, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(SystemExit, match=f"^{program}: .*{says}"):
        MAINS[program](**wrong)
