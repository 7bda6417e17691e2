"""The times of jumps, read off a record, and what is said of the way to Predict and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from hybridlab.benchmarks.footprint import JumpTimes, PredictPhase, jump_times, predict_phase
from hybridlab.memory import MemoryConfig
from hybridlab.notebook.views.memory import transition_table
from hybridlab.notebook.views.memory_claims import lookahead_claims, transition_claims
from hybridlab.optim import Schedule
from hybridlab.results.claims import Quantity
from hybridlab.study import RunConfig, TextTaskConfig, train
from tests.conftest import jumping

GRADIENT_MS = 100


def record(*stretches: tuple[str, list[int]], measured: tuple[int, ...] = ()) -> pd.DataFrame:
    """Steps of so many ms each, phase by phase; predicted ones have a loss where `measured` says, counted in them."""
    rows = [(phase, ms) for phase, stretch in stretches for ms in stretch]
    predicted = [i for i, (phase, _) in enumerate(rows) if phase == "predict"]
    unmeasured = set(predicted) - {predicted[i] for i in measured if i < len(predicted)}
    frame = pd.DataFrame(rows, columns=["phase", "ms"])
    frame["seconds"] = 1e-3 * frame["ms"].cumsum()
    frame["measured_loss"] = [None if i in unmeasured else 5.0 for i in range(len(rows))]
    return frame


FULL = ("full", [GRADIENT_MS] * 6 + [700])
JUMP = ("predict", [500, 2, 2, 40, 300, 2, 2, 60])
CORRECT = ("correct", [180])
WHOLE_JUMP = pytest.approx(
    vars(JumpTimes(proposing=600, offloading=498, moving=298, restoring=0 + 0 + 58 + 80, whole=600 + 1088, steps=8))
)


def test_a_jump_is_told_in_parts_beyond_ordinary_steps() -> None:
    """Two chunks of four steps; the second's motion, and what returns after it, stand apart."""
    steps = record(FULL, JUMP, CORRECT, FULL, measured=(3, 7))
    (jump,) = jump_times(steps)
    assert vars(jump) == WHOLE_JUMP


def test_a_jump_that_was_not_corrected_or_not_gone_beyond_is_not_counted() -> None:
    taken_back, at_the_end = record(FULL, JUMP, FULL), record(FULL, JUMP, CORRECT)
    assert jump_times(taken_back) == jump_times(at_the_end) == []
    assert jump_times(record(FULL)) == []
    assert len(jump_times(record(FULL, JUMP, FULL, JUMP, CORRECT, FULL))) == 1


def phase(*whole_ms: float, held_bytes: int | None = 10**9) -> PredictPhase:
    jumps = tuple(JumpTimes(1.0, 2.0, 3.0, 4.0, ms, steps=20) for ms in whole_ms)
    return PredictPhase(held_bytes, held_bytes, held_bytes, jumps, GRADIENT_MS)


def test_the_first_jump_stands_apart_and_the_control_is_subtracted() -> None:
    phases = {"all away": phase(9000, 700, 900, 800), "nothing away": phase(400, 300, 310, 290)}
    first, control = (dict(zip(row[0], row[1], strict=True)) for row in table_rows(phases))
    assert (first["a jump (ms)"], first["the first (ms)"], first["jumps"]) == ("800.0", "9000.0", "4")
    assert (first["beyond nothing away (ms)"], first["that in gradient steps"]) == ("510.0", "5.10")
    assert (control["a jump (ms)"], control["that in gradient steps"]) == ("300.0", "0.00")
    assert transition_table({}, "nothing away").cells() == [["no run jumped"]]


def table_rows(phases: dict[str, PredictPhase]) -> list[tuple[list[str], list[str]]]:
    shown = transition_table(phases, "nothing away")
    return [(shown.columns, cells) for cells in shown.cells()]


LATER = (300, 310, 290, 305, 295, 300, 320)
"""ms of jumps with nothing away, after the first."""


def further(*beyond_ms: float) -> PredictPhase:
    """Jumps that take so much longer than `LATER`, after a first that is not looked at."""
    return phase(9000, *(ms + more for ms, more in zip(LATER, beyond_ms, strict=False)))


@pytest.mark.parametrize(
    ("beyond_ms", "verdict", "ends"),
    [
        ((50, 60, 70, 80, 90, 40, 30), "holds", (30, 90)),
        ((250, 160, 170, 180, 190, 140, 130), "fails", (130, 250)),
        ((50, 60, 170, 180, 90, 40, 30), "open", (30, 180)),
        ((50, 60, 70, 80, 90), "open", (None, None)),
    ],
)
def test_the_way_there_and_back_is_held_against_a_gradient_step(
    beyond_ms: tuple[float, ...], verdict: str, ends: tuple[float | None, float | None]
) -> None:
    """Jump by jump; too few of them leave it open."""
    phases = {"all away": further(*beyond_ms), "nothing away": phase(400, *LATER)}
    (claim,) = transition_claims(phases, "nothing away")
    assert (claim.id, claim.verdict) == ("all-away-transition", verdict)
    median = sorted(beyond_ms)[len(beyond_ms) // 2]
    assert claim.quantities[:3] == (
        Quantity("beyond", median, *ends, "ms", beyond_ms, GRADIENT_MS),
        Quantity("jumps", len(beyond_ms)),
        Quantity("limit", GRADIENT_MS, unit="ms"),
    )
    names = ["whole_jump", "of_that_proposing", "gradient_step", "drift_between_runs"]
    assert [q.name for q in claim.quantities[3:]] == names
    assert (claim.value("of_that_proposing"), claim.value("gradient_step")) == (1.0, GRADIENT_MS)
    assert "a jump of 20" in claim.text


@pytest.mark.parametrize(("sign", "verdict"), [(-1, "holds"), (1, "fails")])
def test_a_return_beside_predicted_steps_is_held_against_one_after_them(sign: int, verdict: str) -> None:
    ahead, late = further(*(sign * ms for ms in (5, 6, 7, 8, 9, 4, 3))), phase(100, *LATER)
    (claim,) = lookahead_claims({"ahead": ahead, "late": late}, "ahead", "late")
    assert (claim.verdict, claim.value("beyond"), claim.value("limit")) == (verdict, sign * 6, 0.0)
    (claim,) = lookahead_claims({"ahead": further(-5, 6, -7, 8, -9, 4, 3), "late": late}, "ahead", "late")
    assert claim.verdict == "open"


def test_what_two_runs_ordinary_steps_differ_by_decides_nothing_about_their_jumps() -> None:
    ahead, late = further(-5, -6, -7, -8, -9, -4, -3), phase(100, *LATER)
    late = replace(late, gradient_step_ms=1.05 * GRADIENT_MS)
    (claim,) = lookahead_claims({"ahead": ahead, "late": late}, "ahead", "late")
    assert (claim.verdict, claim.value("drift_between_runs")) == ("open", pytest.approx(300 * 0.05 / 1.05, rel=0.05))


@pytest.mark.parametrize("unmeasured", [phase(1.0, 1.0, held_bytes=None), phase(1.0)])
def test_nothing_is_claimed_without_a_card_or_a_second_jump(unmeasured: PredictPhase) -> None:
    phases = {"ahead": unmeasured, "late": unmeasured, "nothing away": unmeasured}
    assert transition_claims(phases, "nothing away") == []
    assert lookahead_claims(phases, "ahead", "late") == []
    assert lookahead_claims({}, "ahead", "late") == transition_claims({}, "nothing away") == []


def test_a_runs_jumps_are_found_in_its_record(tmp_path: Path) -> None:
    hybrid = jumping(2, 4, 6, correction_interval=3, correct_steps=1, path_device="host")
    task = TextTaskConfig("nano", "markov", vocab_size=64, block_size=16, validation_batches=1, max_bytes=40_000)
    config = RunConfig("jumps", task, 30, schedule=Schedule("constant", 2), hybrid=hybrid, device="cpu", cpu_threads=1)
    for memory in (None, MemoryConfig.conservative()):
        run = train(replace(config, hybrid=replace(hybrid, memory=memory)), tmp_path)
        found = predict_phase(run)
        assert len(found.jumps) == 2
        assert all(2 < jump.steps <= 6 for jump in found.jumps)
        assert all(jump.whole > 0 for jump in found.jumps)
        assert found.gradient_step_ms > 0
