"""Sessions: a run driven some steps a cell, steered, stopped, and gone on with; and the panel that follows it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from operator import attrgetter
from pathlib import Path

import pandas as pd
import pytest
from ipywidgets import VBox

from hybridlab import HybridTrainer, HybridTrainerConfig, Phase
from hybridlab.base.errors import UserError
from hybridlab.benchmarks.interleaved import Ratio
from hybridlab.notebook import Session, final_frame, run_study, session, studies
from hybridlab.optim import OptimizerConfig
from hybridlab.panel import live, progress
from hybridlab.panel.controls import Controls, control_row
from hybridlab.panel.cost import panel_overhead
from hybridlab.panel.instruments import Instruments
from hybridlab.panel.live import Live, interrupts
from hybridlab.study import Study, StudyResult, resume, train
from hybridlab.study.record import Run
from hybridlab.study.run import TrainingRun
from hybridlab.study.study import OnStep
from hybridlab.study.training import Training
from tests.conftest import Problem, contents, jumping, tiny_run

STEPS = 40
HYBRID = jumping(8, 8, 8, correction_interval=3, correct_steps=2)
CONFIG = tiny_run("hybrid", STEPS, hybrid=HYBRID, evaluate_every=20)


pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Live]:
    """As if a person looked; gives the panels that were shown."""
    shown: list[Live] = []
    for module in (session, studies):
        monkeypatch.setattr(module, "shows_panel", lambda: True)
    monkeypatch.setattr(Live, "__enter__", lambda live: shown.append(live) or live)
    return shown


def untimed(run: Run) -> pd.DataFrame:
    return run.steps.drop(columns="seconds")


# --- driving -----------------------------------------------------------------------------------------------


def test_cells_of_a_session_are_one_run_bit_for_bit(tmp_path: Path) -> None:
    driven = Session(CONFIG, "cells")
    counted = [result.nominal_step for result in driven.run(7)] + [result.nominal_step for result in driven.run(20)]
    assert counted == list(range(1, 28))
    assert repr(driven).startswith("Session(hybrid, seed 0: step 27 of 40, ")
    assert len(driven.record.steps) == 27, "what was measured is on disk between two cells"
    assert driven.record.summary is None
    for result in driven.run():
        assert result.loss > 0
    unbroken = train(CONFIG, tmp_path / "unbroken")
    pd.testing.assert_frame_equal(untimed(driven.record), untimed(unbroken), check_exact=True)
    assert driven.record.summary is not None


def test_a_cell_that_breaks_off_is_gone_on_with() -> None:
    driven = Session(CONFIG, "cells")
    for result in driven.run():
        if result.nominal_step == 5:
            break
    assert [result.nominal_step for result in driven.run(2)] == [6, 7]
    with pytest.raises(ValueError, match="must be at least 1, or None"):
        next(driven.run(0))


def test_nothing_is_sampled_between_two_cells() -> None:
    driven = Session(CONFIG, "cells")
    for _ in range(2):
        for _ in driven.run(5):
            assert "memory sampler" in [thread.name for thread in threading.enumerate()]
        assert "memory sampler" not in [thread.name for thread in threading.enumerate()]
    list(driven.run())
    assert driven.record.vram["nominal_step"].iloc[[0, -1]].tolist() == [1, STEPS]
    assert driven.record.vram["seconds"].is_monotonic_increasing


def test_time_between_two_cells_is_no_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Session(CONFIG, "cells")
    list(driven.run(5))
    before = driven._run._timer.seconds
    assert driven._run._timer.seconds == before, "the clock stands"


def test_a_session_goes_on_from_its_checkpoint_in_another_process(tmp_path: Path) -> None:
    driven = Session(CONFIG, "cells")
    list(driven.run(12))
    driven.save()
    list(driven.run(3))
    driven._end()  # as an interpreter that ends does
    with pytest.raises(UserError, match="resume=True"):
        next(driven.run())
    again = Session(CONFIG, "cells", resume=True)
    assert next(iter(again.run())).nominal_step == 13
    list(again.run())
    pd.testing.assert_frame_equal(untimed(again.record), untimed(train(CONFIG, tmp_path / "x")), check_exact=True)
    with pytest.raises(UserError, match="has finished"):
        Session(CONFIG, "cells", resume=True)
    assert Session(replace(CONFIG, steps=20), "cells", resume=True).steps_done == 0, "another run, in another folder"


def test_without_a_checkpoint_resume_is_refused_and_touches_nothing() -> None:
    driven = Session(CONFIG, "cells")
    list(driven.run(5))
    driven._end()
    before = contents(driven.folder)
    with pytest.raises(UserError, match=r"no checkpoint in .*: its 5 steps cannot be resumed; start afresh"):
        Session(CONFIG, "cells", resume=True)
    assert contents(driven.folder) == before
    assert Session(CONFIG, "cells").steps_done == 0


def test_a_checkpoint_of_other_code_is_refused_in_one_line_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driven = Session(CONFIG, "cells")
    list(driven.run(5))
    driven.close()
    before = contents(driven.folder)
    with monkeypatch.context() as patched:
        for module in (session, resume):
            patched.setattr(module, "code_version", lambda: "of tomorrow")
        with pytest.raises(UserError, match=r"of other code \(hybridlab .* then, of tomorrow now\)") as caught:
            Session(CONFIG, "cells", resume=True)
    assert "\n" not in str(caught.value)
    assert contents(driven.folder) == before
    assert Session(CONFIG, "cells", resume=True).steps_done == 5


def test_a_damaged_record_is_named_and_without_it_the_session_goes_on() -> None:
    driven = Session(CONFIG, "cells")
    list(driven.run(5))
    driven.close()
    (driven.folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged, or no run's record: delete it"):
        Session(CONFIG, "cells", resume=True)
    (driven.folder / "config.json").unlink()
    assert Session(CONFIG, "cells", resume=True).steps_done == 5


def test_resume_starts_where_nothing_was_trained_yet() -> None:
    assert Session(CONFIG, "cells", resume=True).steps_done == 0
    assert Session(CONFIG, "cells", resume=True).steps_done == 0


def test_closing_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    driven = Session(CONFIG, "cells")
    list(driven.run(27))
    driven.close()
    driven.close()
    again = Session(CONFIG, "cells", resume=True)
    assert again.steps_done == 27
    written = (again.folder / "checkpoint.pt").read_bytes()
    again.close()
    assert (again.folder / "checkpoint.pt").read_bytes() == written, "it holds every step already"
    again = Session(CONFIG, "cells", resume=True)
    list(again.run())
    again.close()
    assert not (again.folder / "checkpoint.pt").exists()
    pd.testing.assert_frame_equal(untimed(again.record), untimed(train(CONFIG, tmp_path / "x")), check_exact=True)


def test_a_cell_that_is_run_again_closes_the_session_that_it_made_before() -> None:
    first = Session(CONFIG, "cells")
    list(first.run(5))
    again = Session(CONFIG, "cells", resume=True)
    assert again.steps_done == 5
    with pytest.raises(UserError, match="this session has ended"):
        next(first.run())
    with pytest.raises(UserError, match="this process trains there already; close its session first"):
        train(CONFIG, again.folder)
    again.close()
    assert train(CONFIG, again.folder).summary


def test_half_a_step_is_never_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Session(CONFIG, "cells")
    list(driven.run(5))
    monkeypatch.setattr(HybridTrainer, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(driven.run(5))
    driven.close()
    assert not (driven.folder / "checkpoint.pt").exists()
    assert len(driven.record.steps) == 5


def test_a_session_that_took_no_step_is_closed_without_a_checkpoint() -> None:
    driven = Session(CONFIG, "cells")
    driven.close()
    assert not (driven.folder / "checkpoint.pt").exists()


def test_a_resumed_panel_shows_the_steps_before_in_their_own_phases() -> None:
    driven = Session(CONFIG, "cells")
    list(driven.run(30))
    bands = list(driven.frame().state.timeline.bands())
    driven.close()
    again = Session(CONFIG, "cells", resume=True)
    assert list(again._instruments.timeline.bands()) == bands
    assert bands[0] == ("warmup", 0.0, 8 / STEPS)
    list(again.run(1))
    measured = again.frame().state.timeline.series("measured_loss")
    assert [loss for _, loss in measured] == pytest.approx(again.record.steps["measured_loss"].dropna().tolist())


def test_an_interrupt_ends_the_cell_after_the_step_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    driven = Session(CONFIG, "cells")
    for result in driven.run():
        if result.nominal_step == 6:
            os.kill(os.getpid(), signal.SIGINT)
    assert capsys.readouterr().out == "stopped at step 6 of 40: session.run() goes on from here\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert next(iter(driven.run())).nominal_step == 7


def test_a_second_interrupt_does_not_wait() -> None:
    controls = Controls()
    with interrupts(controls):
        os.kill(os.getpid(), signal.SIGINT)
        assert controls.stopping
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# --- steering ----------------------------------------------------------------------------------------------


def test_changed_settings_act_from_the_next_step_and_are_recorded(tmp_path: Path) -> None:
    driven = Session(CONFIG, "cells")
    list(driven.run(10))
    driven.change(max_predict_steps=4, correction_interval=2)
    list(driven.run())
    steps = driven.record.steps
    assert steps["changed"].dropna().to_dict() == {10: "max_predict_steps=4, correction_interval=2"}
    jumps = (steps["phase"] != steps["phase"].shift()).cumsum()[steps["phase"] == "predict"].value_counts()
    assert set(jumps) == {4}
    assert driven.record.config == train(CONFIG, tmp_path / "x").config


def test_a_checkpoint_remembers_what_was_changed() -> None:
    driven = Session(CONFIG, "cells")
    driven.change(max_predict_steps=4)
    list(driven.run(5))
    driven.save()
    driven.close()
    again = Session(CONFIG, "cells", resume=True)
    assert again._run.settings.max_predict_steps == 4


def test_a_trainer_refuses_changes_that_it_cannot_make(problem: Problem) -> None:
    trainer = HybridTrainer(problem.model, problem.adamw(), HYBRID)
    with pytest.raises(UserError, match=r"full_steps cannot change while training: .*confidence_threshold"):
        trainer.change(full_steps=3)
    with pytest.raises(UserError, match="plain training"):
        trainer.change(max_predict_steps=0)
    with pytest.raises(ValueError, match="at least 0 and at most 1"):
        trainer.change(confidence_threshold=2.0)
    step = 0
    while trainer.current_phase is not Phase.PREDICT:
        trainer.step(problem.closure(step := step + 1))
    with pytest.raises(UserError, match="a jump is under way"):
        trainer.change(correction_interval=2)
    assert trainer.config == HYBRID


def test_buttons_and_sliders_act_between_two_steps(watched: list[Live]) -> None:
    driven = Session(CONFIG, "cells")
    seen = []
    for result in driven.run():
        controls = watched[0].controls
        seen.append(result.nominal_step)
        if result.nominal_step == 3:
            controls.save()
            controls.set("confidence_threshold", 0.25)
        if result.nominal_step == 5:
            assert (driven.folder / "checkpoint.pt").exists()
            controls.stop()
    assert seen == [1, 2, 3, 4, 5]
    saved = (driven.folder / "checkpoint.pt").stat().st_mtime_ns
    driven.close()
    assert (driven.folder / "checkpoint.pt").stat().st_mtime_ns == saved, "Stop has left one already"
    driven = Session(CONFIG, "cells", resume=True)
    assert driven.steps_done == 5
    assert driven.record.steps["changed"].dropna().to_dict() == {3: "confidence_threshold=0.25"}
    list(driven.run())
    assert "finished" in watched[1]._gauges.value
    buttons, sliders = watched[1]._row.children
    left = [child.disabled for child in (*buttons.children, *sliders.children)]
    assert set(left) == {True}, "every button stays where it is, switched off, so that nothing below it moves"


def test_a_change_waits_until_the_jump_is_over(watched: list[Live]) -> None:
    driven = Session(CONFIG, "cells")
    for result in driven.run():
        if str(result.phase) == "predict":
            watched[0].controls.set("correction_interval", 5)
    changed = driven.record.steps.set_index("nominal_step")
    assert (changed.loc[changed["changed"].notna(), "phase"] != "predict").all()
    assert changed["changed"].notna().any()


def test_paused_means_no_step_but_the_ones_asked_for() -> None:
    controls = Controls()
    assert controls.take_step()
    controls.step()
    assert [controls.take_step(), controls.take_step()] == [True, False]
    controls.toggle()
    assert controls.take_step()
    controls.toggle()
    assert not controls.take_step()
    controls.stop()
    assert controls.take_step(), "a paused run can be stopped"


def test_the_clock_stands_while_paused(watched: list[Live], monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Session(CONFIG, "cells")
    waits: list[float] = []

    def wait(self: Controls, seconds: float) -> None:
        waits.append(driven._run._timer.seconds)
        if len(waits) == 3:
            self.toggle()

    monkeypatch.setattr(Controls, "wait", wait)
    for result in driven.run(8):
        if result.nominal_step == 4:
            watched[0].controls.toggle()
    assert len(waits) == 3
    assert len(set(waits)) == 1


def test_gauges_are_drawn_by_the_clock_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(live, "panel_html", lambda state: drawn.append(state.step) or "")
    driven, now = Session(CONFIG, "cells"), 0.0
    panel = Live(Controls(), STEPS, driven._instruments, clock=lambda: now)
    for result in driven.run(12):
        now += live.SHOW_EVERY_SECONDS if result.nominal_step in (5, 9) else 0.0  # else it stands
        panel.between_steps(driven._run)
    assert drawn == [1, 5, 9]


def test_a_panel_s_style_is_sent_once_and_the_last_frame_is_whole(watched: list[Live]) -> None:
    driven = Session(CONFIG, "cells")
    for _ in driven.run():
        assert "<style>" not in watched[0]._gauges.value
    assert watched[0]._gauges.value
    assert ["<style>" in child.value for child in watched[0]._panel.children[:2]] == [True, False]
    assert driven.frame()._repr_mimebundle_()["text/html"].count("<style>") == 1


def test_a_plain_run_offers_nothing_to_steer() -> None:
    row = control_row(Controls(), HybridTrainerConfig.plain())
    assert all(slider.disabled for slider in row.children[1].children)
    slider = control_row(controls := Controls(), HYBRID).children[1].children[1]
    assert (slider.value, controls.take_settings()) == (8, {})
    slider.value = 20
    assert controls.take_settings() == {"max_predict_steps": 20}


# --- studies, batch, frames --------------------------------------------------------------------------------


def test_a_stopped_study_goes_on_when_the_cell_is_run_again(
    watched: list[Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(
        replace(CONFIG, hybrid=HybridTrainerConfig.plain()), {"hybrid": HYBRID}, seeds=1, control_fractions=()
    )
    step = Live.step

    def stopping(live: Live, label: str, total: int) -> None:
        step(live, label, total)
        if live._done == STEPS + 9:
            live.controls.stop()

    monkeypatch.setattr(Live, "step", stopping)
    with pytest.raises(studies.Stopped) as stopped:
        run_study(study, "study")
    assert stopped.value._render_traceback_() == [
        "stopped at step 9 of hybrid, seed 0: run this cell again to go on from here"
    ]
    monkeypatch.setattr(Live, "step", step)
    totals: list[int] = []
    monkeypatch.setattr(Live, "step", lambda live, label, total: totals.append(total) or step(live, label, total))
    result = run_study(study, "study")
    assert totals[0] == 3 * STEPS, "baseline, hybrid, and the control that may follow, of a baseline's length at most"
    assert totals[-1] == 2 * STEPS + result.gradient_steps("control of hybrid", 0) == len(totals)
    panel = watched[1]
    assert "<b>finished</b>" in panel._gauges.value
    assert set(panel._finals.arms) == {"baseline", "hybrid", "control of hybrid"}
    losses = {name: seeds[0] for name, seeds in panel._finals.arms.items()}
    assert losses == {name: run.validation_loss() for (name, _), run in result.runs.items()}, "the kept one's too"
    assert f"baseline</span><b>{losses['baseline']:.3f}</b>" in panel._gauges.value
    assert "stroke='var(--baseline)'" in panel._gauges.value, "behind the runs of its seed"
    unbroken = study.run(Path("unbroken"))
    for name, run in unbroken.runs.items():
        pd.testing.assert_frame_equal(untimed(result.runs[name]), untimed(run), check_exact=True)


@pytest.mark.parametrize("looked_at", [True, False])
def test_isolated_runs_show_a_bar_of_their_own(
    looked_at: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_arms(configs: object, folder: Path, on_step: OnStep, **_: object) -> str:
        for _step in range(3):
            on_step("fits, seed 0", 4)
        return "result"

    shown: list[VBox] = []
    monkeypatch.setattr(studies, "shows_panel", lambda: looked_at)
    monkeypatch.setattr(studies, "run_arms", run_arms)
    monkeypatch.setattr(live, "show", lambda box: shown.append(box))
    assert studies.run_configs([replace(CONFIG, steps=4)], "isolated", isolated=True) == "result"
    assert capsys.readouterr() == ("", "")
    bars = [box.children[1].value for box in shown]
    assert [("stopped" in bar, "3</b> of 4 in all" in bar) for bar in bars] == [(True, True)] * looked_at


def test_isolated_runs_that_were_interrupted_are_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    resumed: list[bool] = []

    def run_arms(*_: object, resume: bool, **__: object) -> StudyResult:
        resumed.append(resume)
        if len(resumed) in (1, 2):
            raise KeyboardInterrupt
        return StudyResult()

    monkeypatch.setattr(studies, "run_arms", run_arms)
    with pytest.raises(KeyboardInterrupt):
        studies.run_configs([CONFIG], "isolated", isolated=True)
    for name in ("shows_panel", "in_jupyterlab"):
        monkeypatch.setattr(studies, name, lambda: True)
    monkeypatch.setattr(live, "show", lambda _: None)
    with pytest.raises(studies.Stopped, match="stopped: run this cell again"):
        studies.run_configs([CONFIG], "isolated", isolated=True)
    studies.run_configs([CONFIG], "isolated", isolated=True)
    studies.run_configs([CONFIG], "isolated", isolated=True)
    assert resumed == [False, True, True, False], "only what was interrupted is gone on with"
    studies.run_configs([CONFIG], "isolated", isolated=True, resume=True)
    monkeypatch.setattr(studies, "shows_panel", lambda: False)
    studies.run_configs([CONFIG], "isolated", resume=True)
    studies.run_configs([CONFIG], "isolated")
    assert resumed[4:] == [True, True, False], "and what an earlier start left, when asked"


@pytest.mark.parametrize("control", ["", "fine", "diverges"])
def test_where_the_control_diverged_one_line_says_so_and_every_record_is_kept(control: str) -> None:
    settings = {"fine": OptimizerConfig(), "diverges": OptimizerConfig(lr=1e3)}
    configs = [replace(CONFIG, name=name, steps=24, optimizer=how) for name, how in settings.items()]
    refused = pytest.raises(
        UserError, match=r"^diverges diverged, and .*: lower the learning rate.* kept in runs/kept$"
    )
    with pytest.warns(UserWarning, match="diverges"), refused if control == "diverges" else nullcontext():
        assert studies.run_configs(configs, "kept", control=control).has_diverged("diverges")
    assert len([*studies.runs_folder("kept").glob("*/summary.json")]) == 2


def test_without_widgets_progress_is_text_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "in_jupyterlab", lambda: True)
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    list(Session(CONFIG, "cells").run(3))
    said = capsys.readouterr()
    assert "pip install jupyterlab_widgets" in said.out
    assert "hybrid, seed 0" in said.err
    assert "3/3" in said.err


def test_a_page_without_widgets_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    monkeypatch.setattr(live, "display", lambda bundle, raw: shown.append(bundle))
    live.show(VBox([]))
    assert "application/vnd.jupyter.widget-view+json" in shown[0]
    assert "pip install jupyterlab_widgets" in shown[0]["text/plain"]
    assert "hybridlab runs" in shown[0]["text/plain"]


def test_in_batch_nothing_but_progress_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    list(Session(CONFIG, "cells").run(3))
    assert capsys.readouterr() == ("", "")


def test_a_frame_stays_without_widgets_and_says_the_same_as_the_record() -> None:
    driven = Session(CONFIG, "cells")
    list(driven.run(30))
    assert "stopped at step 30 of 40" in str(driven.frame())
    with pytest.raises(UserError, match="has not finished"):
        final_frame(driven.record)
    list(driven.run())
    live, recorded = driven.frame().state, final_frame(driven.record).state
    same = attrgetter("title", "status", "step", "statistics", "measured", "validation", "unit")
    assert same(live) == same(recorded)
    counted, written = ([(c.steps, c.losses) for c in s.timeline.columns.values()] for s in (live, recorded))
    assert counted == written, "each step once, however often it was looked at"
    bundle = final_frame(driven.record)._repr_mimebundle_()
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    assert "<script" not in bundle["text/html"]
    without_style = bundle["text/html"].split("</style>")[1]
    assert without_style.startswith("<div class='hl-styled' hidden='hidden'><div class='hl'>"), "it waits for its style"
    assert without_style.partition("</div><img ")[2].count(bundle["image/png"]) == 1, "and a picture stands in"
    assert sum(map(len, bundle.values())) < 300_000


@pytest.mark.parametrize(("is_emulated", "total_bytes"), [(False, 17_100_000_000), (True, 16_000_000_000)])
def test_a_frame_shows_the_card_that_ran_or_the_one_it_stood_for(is_emulated: bool, total_bytes: int) -> None:
    """A card of 16 GB by name has a little more: it is no emulated one, though the run asked for 16."""
    driven = Session(CONFIG, "cells")
    list(driven.run())
    figures = {"source": "nvml", "device_total_bytes": 17_100_000_000, "allocated_bytes": 1, "other_bytes": 1}
    config = driven.record.config | {"card_gb": 16, "emulates_card": is_emulated}
    run = replace(driven.record, config=config, vram=driven.record.vram.assign(**figures))
    assert final_frame(run).state.memory.total_bytes == total_bytes


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], None]:
    """Makes a method take an eighth of a second, while all else takes no time."""
    now = 0.0

    def take_time(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def taking(*arguments: object, **named: object) -> object:
            nonlocal now
            now += 0.125
            return method(*arguments, **named)

        monkeypatch.setattr(owner, name, taking)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    take_time(Training, "_loss")
    return take_time


PLAIN = replace(CONFIG, hybrid=HybridTrainerConfig.plain())


def test_the_panels_cost_is_measured_in_pairs_beside_its_control(tick: Callable[[type, str], None]) -> None:
    tick(Live, "step")
    cost = panel_overhead(PLAIN, rounds=6, turns=2, steps=2)
    assert cost.panel_over_none == Ratio(2.0, 2.0, 2.0, rounds=(2.0,) * 6)
    assert cost.none_over_none == Ratio(1.0, 1.0, 1.0, rounds=(1.0,) * 6)
    assert (cost.step_ms, cost.panel_itself_ms) == (125.0, 125.0)


def test_a_step_takes_as_long_however_few_are_noted(tick: Callable[[type, str], None], tmp_path: Path) -> None:
    run = TrainingRun(PLAIN, tmp_path / "run")
    run.start()
    instruments = Instruments(run)
    for record in islice(run.steps(), 0, 30, 3):
        instruments.note(record)
    state = instruments.state("running", done=30, total=STEPS, seconds_left=None)
    assert set(state.step_ms.values()) == {125.0}


def test_while_the_panel_is_off_its_clock_stands(tick: Callable[[type, str], None]) -> None:
    """Every second watched step is a quarter of a second later, however many steps nobody watched."""
    assert live.SHOW_EVERY_SECONDS == 0.25
    cost = panel_overhead(PLAIN, rounds=4, turns=2, steps=1)
    assert (cost.drawings, cost.panel_itself_ms) == (1.0, 0.0)


def test_no_evaluation_falls_in_a_turn_and_no_round_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[None] = []
    monkeypatch.setattr(Training, "evaluate", lambda _: evaluated.append(None) or {})
    panel_overhead(PLAIN, rounds=1, turns=1, steps=1)
    assert len(evaluated) == 1, "in the warm-up"
    with pytest.raises(ValueError, match="rounds is 0: it must be at least 1"):
        panel_overhead(PLAIN, rounds=0, turns=1, steps=1)
