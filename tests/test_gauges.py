"""The live panel's gauges: what they say of a state, and how the state is read from a run."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from hybridlab.engine.result import Statistics
from hybridlab.panel.html import Memory, State, bar_html, frame_html, panel_html, style_html
from hybridlab.panel.instruments import decision_of, memory_of, work_of
from hybridlab.panel.timeline import COLUMNS, Timeline

CARD = Memory(True, 16 * 10**9, 9 * 10**9, 12_500_000_000, 5 * 10**9, 8 * 10**9, 10**9)
PROCESS = Memory(False, 32 * 10**9, 2 * 10**9, 3 * 10**9)


def timeline(steps: int = 10, *phases: str) -> Timeline:
    line = Timeline(steps)
    for step, phase in enumerate(phases or ("warmup", "full", "predict", "correct"), start=1):
        line.add(
            step, phase, 10**9, None if phase == "predict" else 3.0 - step / 10, 2.0 if phase == "predict" else None
        )
    return line


def state(**changes: object) -> State:
    base = State("hybrid, seed 0", "running", "full", 40, 100, CARD, timeline(), Statistics(nominal_steps=40))
    return replace(base, **changes)


def text(drawn: str) -> str:
    """What a person reads: tags and style taken out."""
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", drawn, flags=re.DOTALL))


def shown(**changes: object) -> str:
    """What a person reads of the panel."""
    return text(panel_html(state(**changes)))


def test_the_card_is_shown_in_parts_beside_its_line_and_its_peak() -> None:
    seen = shown()
    assert "GPU memory 9.00 of 16.0 GB" in seen
    for part in ("allocated 5.00 GB", "reserved 8.00 GB", "other 1.00 GB", "peak 12.50 GB", "1.50 GB below 14 GB"):
        assert part in seen
    assert "0.50 GB above 14 GB" in shown(memory=replace(CARD, peak_bytes=14_500_000_000))


def test_without_a_gpu_the_panel_says_whose_memory_it_shows() -> None:
    drawn = panel_html(state(memory=PROCESS))
    assert "Process memory (no GPU) 2.00 GB of the machine's 32.0" in text(drawn)
    assert "14 GB" not in text(drawn)
    assert "var(--limit)" not in drawn


def test_what_could_not_be_read_is_unavailable_and_not_zero() -> None:
    assert "other unavailable" in shown(memory=replace(CARD, other_bytes=None))


def test_measured_and_predicted_loss_are_told_apart_in_words_and_by_line() -> None:
    drawn = panel_html(state(measured=2.5, predicted=2.25, threshold=0.5))
    assert "Loss (nats) measured 2.5000 predicted 2.2500 validation –" in text(drawn)
    lines = re.findall(r"<polyline [^>]*>", drawn)
    assert [("dasharray" in line) for line in lines if "--predicted" in line] == [True]
    assert [("dasharray" in line) for line in lines if "--measured" in line] == [False]


def test_the_phase_under_way_is_the_one_lamp_that_is_lit() -> None:
    drawn = panel_html(state(phase="predict", threshold=0.5))
    assert re.findall(r"hl-lamp hl-(\w+) on", drawn) == ["predict"]


def test_speed_counts_and_time_left_are_read_off() -> None:
    counts = Statistics(nominal_steps=40, gradient_steps=30, predicted_steps=10, proposals_accepted=2)
    step_ms = {"full": 20.04, "predict": 1.5}
    seen = shown(statistics=counts, threshold=0.5, rate=12345.6, step_ms=step_ms, seconds_left=75)
    for part in (
        "12,346 tokens / s",
        "Full 20 ms",
        "Predict 1.5 ms",
        "Correct –",
        "Steps predicted 10 of 40 (25%)",
        "accepted 2",
    ):
        assert part in seen
    assert "step 40 of 100 · 1 min 15 s left" in seen
    assert "time left unknown" in shown()
    assert "GPU 59% busy · 61 °C" in shown(gpu_busy_percent=58.6, temperature_celsius=61)
    assert "busy" not in shown()
    assert "left" not in shown(status="finished").split("GPU memory")[0]
    assert "2 h 05 min left" in shown(seconds_left=7500)


def test_a_plain_run_shows_nothing_of_prediction() -> None:
    seen = shown()
    assert not [word for word in ("predict", "Predict", "Confidence", "Correct") if word in seen]


def test_confidence_stands_beside_its_threshold_and_what_the_gate_decided() -> None:
    decision = decision_of({"nominal_step": 8, "confidence": 0.41, "event": None}, 0.6)
    seen = shown(threshold=0.6, confidence=0.41, decision=decision)
    assert "Confidence 0.41 threshold 0.60 step 8: no proposal: the confidence is below its threshold" in seen
    row = {"nominal_step": 9, "confidence": None}
    assert "no tried length lowers the loss" in decision_of(row | {"event": "rejected"}, 0.6)
    assert decision_of(row | {"event": "rejected: the weights are not finite"}, 0.6).endswith("weights are not finite")
    assert decision_of(row | {"event": "left Predict: oscillation"}, 0.6) == ""


def test_what_training_does_is_told_and_a_depth_where_there_is_one() -> None:
    told = state(learning_rate=3e-4, gradient_norm=0.812, work=12_345, seconds=75)
    assert "learning rate 3.00e-04 gradient norm 0.812 tokens 12,345 elapsed 1 min 15 s" in text(panel_html(told))
    assert "depth" not in text(panel_html(told))
    assert "depth 6 blocks" in text(panel_html(replace(told, depth=6)))


def test_the_finished_baseline_lies_behind_the_curve_and_validation_is_dotted() -> None:
    line = timeline()
    line.validate(5, 2.6)
    line.validate(6, float("nan"))
    drawn = panel_html(state(timeline=line, baseline=[(0.1, 3.0), (0.4, 2.7), (0.9, 2.5)]))
    assert drawn.index("stroke='var(--baseline)'") < drawn.index("stroke='var(--measured)'")
    assert "baseline at this step 2.7000" in text(drawn)
    assert drawn.count("<u style=") == 1
    assert "predicted" not in shown()


def test_final_losses_stay_while_the_arms_change() -> None:
    arms = {"baseline": {0: 3.0161, 1: None}, "hybrid": {0: None, 1: None}}
    drawn = panel_html(state(arms=arms))
    assert "Final validation loss by arm and seed (nats) baseline 3.016 – hybrid – –" in text(drawn)
    assert re.findall(r"<b class='on'>(.*?)</b>", drawn) == ["–"], "the run under way, hybrid with seed 0"
    assert "Final" not in shown(arms={"hybrid": {0: None}}), "a single run has no table"


def test_the_curve_tells_its_values_under_the_pointer() -> None:
    line = timeline()
    line.validate(2, 2.85)
    drawn = panel_html(state(timeline=line))
    assert "data-t='step 2 · Full · loss 2.8000 · validation 2.8500'" in drawn
    assert "data-t='step 3 · Predict · predicted 2.0000'" in drawn


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ({"done": 10, "total": 20, "seconds_left": 5}, "running · step 40 of 100 · 5 s left in this cell"),
        ({"done": 40, "total": 100, "seconds_left": 5}, "running · step 40 of 100 · 5 s left"),
        ({"done": 140, "total": 400, "seconds_left": 5}, "step 40 of 100 · 140 of 400 steps in all runs · 5 s left"),
        ({"done": 140, "total": 400, "status": "stopped"}, "stopped · step 40 of 100 · 140 of 400 steps in all runs"),
        ({"done": 10, "total": 20, "status": "stopped"}, "stopped · step 40 of 100"),
    ],
)
def test_the_bar_measures_the_run_whose_step_is_written_beside_it(cell: dict[str, Any], said: str) -> None:
    drawn = panel_html(state(**cell))
    assert re.findall(r"hl-progress'><div style='width:(.*?)%", drawn) == ["40.0"]
    head = re.sub(r"\s+", " ", text(drawn.split("<div class='hl-progress'>")[0])).strip()
    assert f"{head} ·".endswith(f"{said} ·")


def test_a_bar_alone_measures_all_runs() -> None:
    drawn = bar_html("<fits>, seed 0", 30, 120, "running", 75)
    assert "width:25.0%" in drawn
    assert text(drawn).strip() == "&lt;fits&gt;, seed 0 running · step 30 of 120 in all · 1 min 15 s left"
    assert "left" not in text(bar_html("fits", 120, 120, "finished", 0))


def test_a_page_is_told_the_style_once_and_a_whole_panel_brings_its_own() -> None:
    whole = frame_html(state(), "frame.png")
    assert whole.count(style_html()) == 1
    assert panel_html(state()) in whole
    assert style_html().startswith("<style>")
    assert "<style>" not in panel_html(state()) + bar_html("fits", 30, 120, "running", 75)


def test_memory_is_drawn_by_its_corners() -> None:
    line = Timeline(6)
    for step, size in enumerate((4, 4, 4, 8, 8, 8), start=1):
        line.add(step, "full", size, None, None)
    corners = "83,57.0 417,57.0 583,14.0 917,14.0"
    drawn = panel_html(state(timeline=line, memory=replace(PROCESS, used_bytes=1, peak_bytes=8)))
    assert f"<polyline points='{corners}' stroke='var(--memory)'/>" in drawn
    assert f"<polygon points='83,100 {corners} 917,100'" in drawn


def test_a_column_is_of_the_phase_of_most_of_its_steps() -> None:
    line = Timeline(5 * COLUMNS)
    for step, phase in enumerate(("full", "predict", "predict", "correct"), start=1):
        line.add(step, phase, 1, None, None)
    assert [phase for phase, _, _ in line.bands()] == ["predict"]
    for _ in range(2):
        line.add(5, "full", 1, None, None)
    assert [phase for phase, _, _ in line.bands()] == ["full"]


def test_steps_that_nobody_saw_stay_empty() -> None:
    line = Timeline(10)
    for step in (5, 6):
        line.add(step, "full", 1, 1.0, None)
    assert list(line.bands()) == [("full", 0.4, 0.6)]


def test_names_and_events_cannot_break_the_page() -> None:
    drawn = frame_html(state(title="<b>'a", note="loss < 1 & falling"), "frame.png")
    assert drawn.count("&lt;b&gt;&#x27;a") == 2, "as title and in place of the picture"
    assert "loss &lt; 1 &amp; falling" in drawn


def test_a_state_before_anything_was_measured_can_be_drawn() -> None:
    empty = state(timeline=Timeline(5), statistics=Statistics(), memory=replace(CARD, peak_bytes=0, used_bytes=0))
    assert "nan" not in panel_html(empty)


def test_a_long_run_is_drawn_in_few_columns_that_keep_peaks_and_means() -> None:
    line = Timeline(100_000)
    for step in range(1, 100_001):
        line.add(step, "full" if step <= 50_000 else "predict", step, float(step), None)
    assert len(line.columns) == COLUMNS
    assert list(line.bands()) == [("full", 0.0, 0.5), ("predict", 0.5, 1.0)]
    assert line.series("memory_bytes")[-1][1] == 100_000
    assert line.series("measured_loss")[0][1] == pytest.approx((1 + 100_000 // COLUMNS + 1) / 2, rel=1e-2)
    assert len(panel_html(state(timeline=line))) < 30_000


def test_a_loss_that_is_not_finite_leaves_the_line_alone() -> None:
    line = Timeline(3)
    for step, loss in enumerate((1.0, float("nan"), float("inf")), start=1):
        line.add(step, "full", 1, loss, None)
    assert [value for _, value in line.series("measured_loss")] == [1.0]


def test_an_emulated_card_is_as_large_as_the_one_it_stands_for() -> None:
    reading = {"source": "nvml", "used_bytes": 4, "allocated_bytes": 3, "other_bytes": float("nan")}
    memory = memory_of(reading | {"device_total_bytes": 80 * 10**9}, 5, emulated_bytes=16 * 10**9)
    assert (memory.total_bytes, memory.used_bytes, memory.other_bytes) == (16 * 10**9, 4, None)


@pytest.mark.parametrize(
    ("task", "work"),
    [({"batch_size": 8, "block_size": 64}, (512, "tokens")), ({"batch_size": 16}, (16, "samples")), ({}, (1, "steps"))],
)
def test_the_unit_of_work_is_the_tasks(task: dict[str, int], work: tuple[int, str]) -> None:
    assert work_of(task) == work
