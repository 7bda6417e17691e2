"""Tables of docs/experiments.md are those that its scripts make of the losses committed beside them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from hybridlab.study.rates import RateTrials
from hybridlab.study.statistics import Interval, formatted
from tests.test_statistics import study_of

FOLDER = Path(__file__).parents[1] / "docs" / "experiments"
PAGE = FOLDER.with_suffix(".md").read_text(encoding="utf-8")


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_choices_of_growth_follow_from_their_losses_and_costs() -> None:
    made, rows = script("choices_of_growth"), committed("choices_of_growth")
    ran = {"predicted_steps": 0, "seconds": 1.0, "first_loss": 8.0}
    for row in rows:
        depth = made.SCHEDULES.get(row["arm"])
        steps = made.STEPS if depth else round(row["cost_in_full_steps"])
        row |= ran | {"gradient_steps": steps, "growths": bool(depth and depth.grows)}
    result = study_of(rows, {"batch_size": 8, "block_size": 64})
    for row in rows:
        result.runs[row["arm"], row["seed"]].steps["event"] = pd.Series(row["events"][:1], dtype=object)
    for line in [*made.table(result).splitlines(), *made.differences(result).splitlines()]:
        assert line in PAGE, line


@pytest.mark.parametrize("steps", [200, 800])
def test_losses_of_averaged_weights_follow_from_every_run(steps: int) -> None:
    made, found = script("primal_averaging"), committed(f"primal_averaging_{steps}")
    trials = {
        arm: RateTrials({float(rate): loss for rate, loss in losses.items()}) for arm, losses in found["trials"].items()
    }
    for line in made.table(steps, trials, found["losses"]).splitlines()[2:]:
        assert line in PAGE, line


def test_losses_ahead_are_those_that_were_measured() -> None:
    for row in committed("nowcasting"):
        changes = " | ".join(formatted(loss - row["now"], "+.3f") for loss in row["ahead"])
        line = f"| {row['network']} | {row['interval']} | {row['step']} | {row['now']:.3f} | {changes} |"
        assert line in PAGE, line


def test_predicted_depth_on_a_cpu_follows_from_its_runs() -> None:
    """Each arm against as much computation, and against the shallow model of as many steps."""
    results = json.loads((FOLDER.parents[1] / "executed" / "cpu_long" / "results.json").read_text(encoding="utf-8"))
    rows = results["10_predicted_depth"]["tables"]["runs"]
    losses = {(row["budget"], row["arm"], row["seed"]): row["validation_loss"] for row in rows}
    for budget in (200, 800):
        for arm, called in (("grown from 3", "copies"), ("fresh from 3", "fresh blocks")):
            beside = (f"control of {arm}", "shallow, 3 blocks")
            computation, shallow = (
                Interval.of([losses[budget, arm, seed] - losses[budget, other, seed] for seed in range(3)])
                for other in beside
            )
            (line,) = (row for row in PAGE.splitlines() if row.startswith(f"| {budget} (") and f"| {called} |" in row)
            assert f"| {computation} |" in line
            assert line.endswith(f"| {shallow} |")
