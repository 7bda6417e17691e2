"""What the benchmarks refuse, in one line, before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hybridlab.base.errors import UserError
from hybridlab.benchmarks import against_others, architectures, largest, ranks, recipes, step_overhead
from hybridlab.study import StudyResult
from hybridlab.study.record import Run

PLANNED = Path(__file__).parents[1] / "executed" / "rtx5080" / "recipes.json"
FIGURES = {"gradient_steps": 1, "peak_memory_bytes": 5, "gradient_step_ms": 1.0, "validation_loss": 1.5}
MAINS: dict[str, Callable[..., None]] = {
    "against_others": against_others.main,
    "architectures": lambda **more: architectures.main(**{"models": ["nano"]} | more),
    "largest": lambda **more: largest.main(**{"planned": PLANNED} | more),
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
        ("largest", {"planned": Path("nowhere.json")}, "nowhere.json has no table of the largest models"),
        ("largest", {"way": ["fp8"]}, "way 'fp8' is unknown"),
        ("recipes", {"gpu": "rtx5081"}, "GPU 'rtx5081' is unknown: did you mean 'rtx5080'"),
        ("architectures", {"speed": "fast"}, "speed 'fast' is unknown: choose one of eager"),
        ("architectures", {"models": ["nano", "nope"]}, "nope: no such config"),
        ("step_overhead", {"batch": "0x8"}, "batch '0x8' cannot be read"),
        ("step_overhead", {"path_device": "disk"}, "path_device .disk. is unknown"),
        ("against_others", {"vocab_size": 0}, "vocab_size is 0"),
        ("against_others", {"model": "smal"}, "GPT-2 size 'smal' is unknown"),
        ("against_others", {"device": "gpu"}, "device 'gpu' is unknown"),
    ],
)
def test_what_cannot_be_meant_is_refused_first(program: str, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(SystemExit, match=f"^{program}: .*{says}"):
        MAINS[program](**wrong)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"largest": []}', '{"largest": [{}]}', '{"largest": 7}'])
def test_a_file_without_planned_models_is_refused(text: str, tmp_path: Path) -> None:
    (planned := tmp_path / "recipes.json").write_text(text)
    with pytest.raises(SystemExit, match=r"^largest: .*recipes.json has no table of the largest models \("):
        largest.main(planned, tmp_path / "largest.json")


def test_a_model_that_cannot_be_trained_is_a_row_beside_those_that_can(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    way, other = list(recipes.WAYS)[:2]
    rows = [{"way": name, "n_layer": 1, "n_head": 1, "n_embd": 16} for name in (way, other)]
    planned, out = tmp_path / "recipes.json", tmp_path / "largest.json"
    planned.write_text(json.dumps({"largest": rows}))

    def short_of_memory(configs: Any, *_: Any, **__: Any) -> Any:
        if configs[0].name == other:
            raise UserError("it needs more memory")
        return StudyResult(
            {(way, 0): Run(tmp_path, {}, pd.DataFrame({"measured_loss": [2.0]}), pd.DataFrame(), FIGURES)}
        )

    monkeypatch.setattr(largest, "run_arms", short_of_memory)
    largest.main(planned, out, steps=1, device="cpu")
    trained, stopped = json.loads(out.read_text())["rows"]
    assert (trained["way"], trained["first_loss"], trained["peak_memory_bytes"]) == (way, 2.0, 5)
    assert stopped == {"way": other, "stopped": "it needs more memory"}
