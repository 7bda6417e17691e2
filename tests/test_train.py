"""Runs: what they leave, and that an interrupted one ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import hybridlab
from hybridlab.base.errors import UserError
from hybridlab.memory.config import MemoryConfig
from hybridlab.optim import OptimizerConfig, Schedule
from hybridlab.study import RunConfig, Study, TextTaskConfig, resume, step_log, train
from hybridlab.study.code_version import code_version, read_sources, version_of
from hybridlab.study.record import Run
from hybridlab.study.run import UNSETTLED_STEPS, TrainingRun
from hybridlab.study.step_log import TrainingTimer
from hybridlab.study.tasks import Batch, Task
from tests.conftest import TINY_TEXT, TaskWithin, at_step, contents, jumping, names, tiny_run

STEPS = 48
TRAIN_MODULE = sys.modules[train.__module__]


# --- a task on which every random stream matters -----------------------------------------------------------


@dataclass(frozen=True)
class RestlessTaskConfig(TextTaskConfig):
    """A GPT-2 with dropout, whose loss is shaken by Python's and NumPy's random streams."""

    def build(self, seed: int, device: torch.device, memory: MemoryConfig | None = None) -> Task:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (the global stream is what is tested)
        return RestlessTask(super().build(seed, device, memory))


class RestlessTask(TaskWithin):
    """Evaluates to a hash of the weights beside the usual figures."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.loss(model, batch) * (1 + 0.1 * random.random() + 0.1 * np.random.random())  # noqa: NPY002

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        return self.task.evaluate(model) | {"weights_hash": float(int(digest.hexdigest()[:12], 16))}


TASK = RestlessTaskConfig(**TINY_TEXT, dropout=0.1)
GATE = {"gate": True, "gate_batches": 3, "gate_budget": 1.0}
HYBRID = jumping(8, 8, 8, correction_interval=3, correct_steps=2, clip_norm=1.0, **GATE)
PLAIN = tiny_run("baseline", STEPS, TASK, evaluate_every=20, checkpoint_every=3)
ARMS = {
    "plain": PLAIN,
    "muon": replace(PLAIN, optimizer=OptimizerConfig(name="muon", lr=1e-3)),
    "gated": replace(PLAIN, hybrid=HYBRID),
    "ungated": replace(PLAIN, hybrid=replace(HYBRID, gate=False)),
    "river, path in bf16": replace(PLAIN, hybrid=replace(HYBRID, predictor="river", gate=False, path_dtype="bf16")),
    "rssm": replace(PLAIN, hybrid=replace(HYBRID, predictor="rssm")),
}


def interrupted(config: RunConfig, folder: Path, after: int, *, resume: bool = False) -> None:
    """Train, and press Ctrl-C after so many steps, those of an earlier attempt counted in."""
    with pytest.raises(KeyboardInterrupt):
        train(config, folder, at_step(after, press_ctrl_c), resume=resume)


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def assert_same(run: Run, other: Run) -> None:
    """Everything but time and memory is equal, to the last bit."""
    assert run.config == other.config
    pd.testing.assert_frame_equal(untimed(run.steps), untimed(other.steps), check_exact=True)
    assert run.vram["nominal_step"].is_monotonic_increasing, "no sample of an abandoned step is left"
    assert run.vram["nominal_step"].iloc[-1] == other.vram["nominal_step"].iloc[-1]
    assert figures(run) == figures(other)
    assert "weights_hash" in figures(run)


def untimed(steps: pd.DataFrame) -> pd.DataFrame:
    return steps.drop(columns="seconds")


def figures(run: Run) -> dict[str, object]:
    assert run.summary is not None
    measured = ("seconds", "gradient_step_ms", "peak", "allocator", "warm_up_seconds")
    return {name: value for name, value in run.summary.items() if not name.startswith(measured)}


RECORD = {"config.json", "steps.parquet", "vram.parquet", "summary.json"}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    runs: dict[str, Run] = {}

    def trained(arm: str) -> Run:
        if arm not in runs:
            runs[arm] = train(replace(ARMS[arm], checkpoint_every=0), tmp_path_factory.mktemp("unbroken"))
        return runs[arm]

    return trained


# --- what a run leaves -------------------------------------------------------------------------------------


def test_a_run_records_every_step_once_and_evaluates_in_time(unbroken: Callable[[str], Run]) -> None:
    run = unbroken("gated")
    assert run.summary is not None
    assert run.steps["nominal_step"].tolist() == list(range(1, STEPS + 1))
    assert run.vram["nominal_step"].iloc[[0, -1]].tolist() == [1, STEPS], "sampled from start to end"
    assert run.vram["seconds"].is_monotonic_increasing
    assert (run.vram["used_bytes"] > 0).all()
    assert run.steps.loc[run.steps["validation_loss"].notna(), "nominal_step"].tolist() == [20, 40, STEPS]
    assert run.steps["validation_loss"].iloc[-1] == run.summary["validation_loss"]
    assert run.steps["seconds"].is_monotonic_increasing
    assert run.summary["gradient_steps"] + run.summary["predicted_steps"] == STEPS
    assert run.summary["predicted_steps"] > 0, "the arm is meant to jump"
    assert names(run.folder) == RECORD


@pytest.mark.parametrize("after", [3, STEPS])
def test_the_collector_looks_through_what_a_run_makes_alone(tmp_path: Path, after: int) -> None:
    """However it ends; what torch imported would be looked through in the middle of a step."""
    before, during = gc.get_freeze_count(), []
    run = TrainingRun(replace(PLAIN, checkpoint_every=0), tmp_path)
    run.start()
    with closing(run.steps()) as steps:
        for _ in islice(steps, after):
            during.append(gc.get_freeze_count())
    assert min(during) > max(before, 100_000)
    assert gc.get_freeze_count() == before == 0


class Loop:
    """What nobody holds but itself."""

    def __init__(self) -> None:
        self.itself = self


def test_the_collector_leaves_out_what_the_first_steps_have_made_to_stay(tmp_path: Path) -> None:
    """Compiled code, say, which a run makes when it first steps; garbage goes before."""
    run = TrainingRun(replace(PLAIN, checkpoint_every=0), tmp_path)
    run.start()
    looked_through = []
    with closing(run.steps()) as steps:
        for step, _ in enumerate(islice(steps, UNSETTLED_STEPS + 1)):
            if not step:
                made, garbage = [[number] for number in range(100)], weakref.ref(Loop())
            looked_through.append(bool({id(thing) for thing in made} & {id(thing) for thing in gc.get_objects()}))
    assert looked_through == [True] * UNSETTLED_STEPS + [False]
    assert garbage() is None


def test_checkpoints_are_off_unless_asked_for(tmp_path: Path) -> None:
    seen: set[str] = set()
    train(replace(PLAIN, steps=6, checkpoint_every=0), tmp_path, lambda: seen.update(names(tmp_path)))
    assert not any("checkpoint" in name for name in seen)


def test_checkpoints_leave_the_figures_alone_and_go_when_the_run_has_finished(
    tmp_path: Path, unbroken: Callable[[str], Run]
) -> None:
    seen: list[bool] = []
    run = train(ARMS["gated"], tmp_path, lambda: seen.append((tmp_path / "checkpoint.pt").exists()))
    assert seen == [False] * 2 + [True] * (STEPS - 2)
    assert names(tmp_path) == RECORD
    assert_same(run, unbroken("gated"))


def test_checkpoint_every_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="checkpoint_every is -1: it must be at least 0"):
        replace(PLAIN, checkpoint_every=-1)


# --- going on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_interrupted_again_and_again_ends_bit_identical(
    tmp_path: Path, arm: str, unbroken: Callable[[str], Run]
) -> None:
    """Every five steps, so that each phase is met; checkpoints are three steps apart."""
    for after in range(2, STEPS, 5):
        interrupted(ARMS[arm], tmp_path, after, resume=True)
    assert_same(train(ARMS[arm], tmp_path, resume=True), unbroken(arm))
    assert names(tmp_path) == RECORD


def test_steps_that_are_not_taken_again_are_reported_and_their_time_is_kept(tmp_path: Path) -> None:
    interrupted(PLAIN, tmp_path, 40)
    before = Run.load(tmp_path).steps.set_index("nominal_step")["seconds"]
    calls: list[None] = []
    run = train(PLAIN, tmp_path, lambda: calls.append(None), resume=True)
    assert len(calls) == STEPS
    assert run.steps["seconds"].is_monotonic_increasing
    assert run.steps["seconds"].iloc[38] == before[39]


def test_a_run_names_every_machine_that_trained_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times are of both, once it was gone on with elsewhere."""
    interrupted(PLAIN, tmp_path, 40)
    here = TRAIN_MODULE.host()
    monkeypatch.setattr(TRAIN_MODULE, "host", lambda: "another")
    assert train(PLAIN, tmp_path, resume=True).closing_figures["hosts"] == [here, "another"]


def test_a_finished_run_is_returned_without_training(
    tmp_path: Path, unbroken: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(PLAIN, tmp_path)
    monkeypatch.setattr(TRAIN_MODULE, "TrainingRun", None)
    calls: list[None] = []
    again = train(replace(PLAIN, checkpoint_every=7), tmp_path, lambda: calls.append(None), resume=True)
    assert again.summary == run.summary
    assert len(calls) == STEPS


def test_kept_weights_are_those_that_the_last_evaluation_judged(tmp_path: Path) -> None:
    """Also of a mean; a finished run without them is trained again, once they are asked for."""
    averaging = OptimizerConfig(betas=(0.0, 0.999), average_decay=0.9)
    config = replace(PLAIN, steps=6, optimizer=averaging, checkpoint_every=0)
    train(config, tmp_path)
    assert not (tmp_path / "weights.pt").exists()
    run = train(replace(config, keep_weights=True), tmp_path, resume=True)
    fresh = TASK.build(1, torch.device("cpu"))
    fresh.model.load_state_dict(torch.load(tmp_path / "weights.pt"))
    with torch.no_grad():
        figures = fresh.evaluate(fresh.model.eval())
    assert figures["validation_loss"] == run.closing_figures["validation_loss"]


def test_a_finished_run_of_other_code_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no table holds the figures of two programs."""
    first = train(PLAIN, tmp_path)
    monkeypatch.setattr(resume, "code_version", lambda: "of tomorrow")
    again = train(PLAIN, tmp_path, resume=True)
    assert first.closing_figures["code"] == code_version()
    assert again.closing_figures["code"] == "of tomorrow"


def test_an_interrupted_run_of_other_code_is_trained_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: Callable[[str], Run]
) -> None:
    """So that no run mixes the figures of two programs under the name of one."""
    with monkeypatch.context() as patched:
        patched.setattr(resume, "code_version", lambda: "of yesterday")
        interrupted(PLAIN, tmp_path, 30)
    assert resume.other_code(tmp_path) == "of yesterday"
    seconds = Run.load(tmp_path).steps["seconds"].tolist()
    run = train(PLAIN, tmp_path, resume=True)
    assert not {*seconds} & {*run.steps["seconds"]}, "every step is taken again"
    assert_same(run, unbroken("plain"))
    assert names(tmp_path) == RECORD


def test_a_process_has_the_version_of_the_sources_that_it_imported_whatever_is_edited_since(tmp_path: Path) -> None:
    """A docstring is reworded before it starts, which changes nothing; then a file is written over."""
    shutil.copytree(Path(hybridlab.__file__).parent, tmp_path / "hybridlab")
    edited = tmp_path / "hybridlab" / "engine" / "trainer.py"
    edited.write_text(edited.read_text().replace('"""', '"""Reworded. ', 1))
    command = f"""
import pathlib, sys
sys.path.insert(0, {str(tmp_path)!r})
from hybridlab.study.code_version import code_version, read_sources, version_of
pathlib.Path({str(edited)!r}).write_text("a_constant = 1  # edited while a run goes on")
print(code_version(), version_of(read_sources()), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=tmp_path)
    imported, on_disk = done.stdout.splitlines()
    assert imported == code_version() != on_disk


SOURCES = read_sources()
TRAINER = "hybridlab.engine.trainer"


def edited(module: str, **changes: str) -> str:
    """The code's version after an edit of a module: `old`, which must be there, becomes `new`."""
    assert changes["old"] in SOURCES[module]
    return version_of(SOURCES | {module: SOURCES[module].replace(changes["old"], changes["new"])})


def test_the_code_s_version_counts_what_trains_and_not_what_shows() -> None:
    shows = ("hybridlab.panel.html", "hybridlab.cli", "hybridlab.charts.png", "hybridlab.study.comparison")
    assert version_of(SOURCES | {module: SOURCES[module] + "MORE = 1\n" for module in shows}) == code_version()
    for module in (TRAINER, "hybridlab.optim.low_bit", "hybridlab.predictors.rssm_model"):
        assert version_of(SOURCES | {module: SOURCES[module] + "MORE = 1\n"}) != code_version()


def test_the_code_s_version_counts_neither_words_nor_layout() -> None:
    reworded = SOURCES[TRAINER].replace('"""', '"""Reworded. ', 1).replace("\n\n\n", "\n\n\n\n# A comment.\n")
    assert reworded.count("A comment") > 1
    assert version_of(SOURCES | {TRAINER: reworded}) == code_version()
    old = "UNSETTLED_STEPS = 10"
    assert edited("hybridlab.study.run", old=old, new=f"{old}  # ten") == code_version()
    assert edited("hybridlab.study.run", old=old, new="UNSETTLED_STEPS = 11") != code_version()


def test_a_moved_file_leaves_the_code_s_version_alone_and_another_one_in_its_place_does_not() -> None:
    moved = {name: text.replace("hybridlab.weights.gram", "hybridlab.base.gram") for name, text in SOURCES.items()}
    moved["hybridlab.base.gram"] = moved.pop("hybridlab.weights.gram")
    assert moved != SOURCES
    assert version_of(moved) == code_version()
    moved["hybridlab.base.gram"] += "MORE = 1\n"
    assert version_of(moved) != code_version()


def test_without_resume_the_run_starts_afresh_and_its_old_checkpoint_is_gone(
    tmp_path: Path, unbroken: Callable[[str], Run]
) -> None:
    interrupted(PLAIN, tmp_path, 30)
    assert (tmp_path / "checkpoint.pt").exists()
    interrupted(PLAIN, tmp_path, 2)
    assert names(tmp_path) & {"checkpoint.pt", "checkpoint.previous.pt"} == set()
    assert_same(train(PLAIN, tmp_path, resume=True), unbroken("plain"))


def test_a_run_of_another_configuration_is_refused_and_left_alone(tmp_path: Path) -> None:
    interrupted(PLAIN, tmp_path, 10)
    before = contents(tmp_path)
    other = replace(PLAIN, steps=40, optimizer=OptimizerConfig.tuned(lr=1e-3))
    with pytest.raises(UserError) as caught:
        train(other, tmp_path, resume=True)
    assert str(caught.value) == (
        f"{tmp_path} is of another run: steps (48 then, 40 now), optimizer.lr (0.0003 then, 0.001 now); "
        "choose another folder, or start afresh without resume"
    )
    assert before == contents(tmp_path)


def test_a_run_does_not_take_up_a_checkpoint_of_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(PLAIN, tmp_path, 10)
    monkeypatch.setattr(resume, "code_version", lambda: "of tomorrow")
    with pytest.raises(UserError, match=r"code \('.*' then, 'of tomorrow' now\)"):
        TrainingRun(PLAIN, tmp_path).start()


def test_a_run_on_the_cpu_leaves_the_cards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for their random streams, which would start a context on each of them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)  # AdamW asks once there is a GPU
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: pytest.fail("asks a card"))
    train(replace(PLAIN, steps=2, checkpoint_every=0), tmp_path)


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(tmp_path: Path, unbroken: Callable[[str], Run]) -> None:
    interrupted(ARMS["gated"], tmp_path, 30)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="going on from the checkpoint before it"):
        run = train(ARMS["gated"], tmp_path, resume=True)
    assert_same(run, unbroken("gated"))


@pytest.mark.parametrize("name", ["config.json", "steps.parquet", "vram.parquet", "summary.json"])
def test_a_damaged_record_is_named_and_trained_afresh(
    tmp_path: Path, name: str, unbroken: Callable[[str], Run]
) -> None:
    shutil.copytree(unbroken("plain").folder, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match=rf"run/{name} is damaged.*; training 'baseline', seed 0, afresh"):
        run = train(PLAIN, tmp_path / "run", resume=True)
    assert_same(run, unbroken("plain"))


@pytest.mark.parametrize("name", ["config.json", "vram.parquet", "summary.json"])
def test_a_damaged_record_beside_a_checkpoint_is_named_and_without_it_the_run_goes_on(
    tmp_path: Path, name: str, unbroken: Callable[[str], Run]
) -> None:
    interrupted(PLAIN, tmp_path, 30)
    first = Run.load(tmp_path).steps["seconds"][0]
    (tmp_path / name).write_bytes(b"PAR1")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"{name} is damaged, or no run's record: delete it, or train that run afresh"):
        train(PLAIN, tmp_path, resume=True)
    assert before == contents(tmp_path)
    (tmp_path / name).unlink()
    run = train(PLAIN, tmp_path, resume=True)
    assert run.steps["seconds"][0] == first, "what was trained before is kept"
    assert_same(run, unbroken("plain"))


@pytest.mark.parametrize("done", ["damaged", "damaged, without config.json", "deleted"])
def test_without_its_steps_a_run_goes_on_from_no_checkpoint_and_the_advice_works(
    tmp_path: Path, done: str, unbroken: Callable[[str], Run]
) -> None:
    folder = tmp_path / "run"
    interrupted(PLAIN, folder, 30)
    (folder / "steps.parquet").write_bytes(b"PAR1")
    if done == "deleted":
        (folder / "steps.parquet").unlink()
    if "without" in done:
        (folder / "config.json").unlink()
    with pytest.raises(UserError, match=rf"run/steps\.parquet .*: delete the folder {folder}, so that this run is"):
        train(PLAIN, folder, resume=True)
    shutil.rmtree(folder)
    assert_same(train(PLAIN, folder, resume=True), unbroken("plain"))


def test_a_finished_run_whose_steps_were_deleted_is_trained_afresh(
    tmp_path: Path, unbroken: Callable[[str], Run]
) -> None:
    shutil.copytree(unbroken("plain").folder, tmp_path / "run")
    (tmp_path / "run" / "steps.parquet").unlink()
    assert_same(train(PLAIN, tmp_path / "run", resume=True), unbroken("plain"))


def test_a_checkpoint_that_finds_the_disk_full_leaves_the_one_before_and_training_goes_on(
    tmp_path: Path, unbroken: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(content: object, file: BinaryIO) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    interrupted(PLAIN, tmp_path, 25)
    checkpoints = {name: (tmp_path / name).read_bytes() for name in ("checkpoint.pt", "checkpoint.previous.pt")}
    save = torch.save
    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="no checkpoint") as told:
        interrupted(PLAIN, tmp_path, 31, resume=True)
    room = f"cannot write in the folder {tmp_path}: No space left on device; make room there or choose another folder"
    assert [str(warning.message) for warning in told] == [
        f"'baseline', seed 0: no checkpoint at step {step}, the one before stays: {room}" for step in (27, 30)
    ]
    assert {name: (tmp_path / name).read_bytes() for name in checkpoints} == checkpoints
    assert names(tmp_path) == RECORD - {"summary.json"} | set(checkpoints)
    monkeypatch.setattr(torch, "save", save)
    assert_same(train(PLAIN, tmp_path, resume=True), unbroken("plain"))


# --- killed ------------------------------------------------------------------------------------------------


KILL_AT = [23, 80, 120, 170]
"""Steps of the whole study; the kill comes at some moment after, in whatever is being done then."""


def study() -> Study:
    base = replace(PLAIN, steps=60, schedule=Schedule(warmup_steps=5, total_steps=60))
    return Study(base, {"hybrid": HYBRID}, seeds=1, control_fractions=(0.5,))


def train_study(folder: Path, kill_at: int) -> None:
    """Go on with the study; some time after step `kill_at`, if that is above 0, die without warning."""
    taken = 0

    def count(label: str, total: int) -> None:
        nonlocal taken
        taken += 1

    def kill() -> None:
        while taken < kill_at:
            time.sleep(1e-3)
        time.sleep(random.Random().uniform(0, 0.05))
        os.kill(os.getpid(), signal.SIGKILL)

    if kill_at:
        threading.Thread(target=kill, daemon=True).start()
    study().run(folder, count, resume=True)


def exit_code_of_a_life(folder: Path, kill_at: int) -> int:
    """In a process of its own, a copy of this one."""
    child = os.fork()
    if child == 0:
        try:
            train_study(folder, kill_at)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_study_killed_several_times_ends_bit_identical(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    lives = [exit_code_of_a_life(broken, kill_at) for kill_at in [*KILL_AT, 0]]
    assert lives == [-signal.SIGKILL] * len(KILL_AT) + [0]
    unbroken = study().run(tmp_path / "unbroken")
    assert [name for name, _ in unbroken.runs][:3] == ["baseline", "control, 50% of the steps", "hybrid"]
    assert unbroken.value("predicted_steps", "hybrid", 0) > 0
    assert names(broken) == names(tmp_path / "unbroken")
    for run in unbroken.runs.values():
        assert_same(Run.load(broken / run.folder.name), run)


# --- the timer ---------------------------------------------------------------------------------------------


def test_the_timer_counts_between_start_and_pause_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(step_log.time, "perf_counter", lambda: now)
    watch = TrainingTimer(torch.device("cpu"), seconds=7.0)
    assert watch.seconds == 7.0
    watch.start()
    now += 1.0
    assert watch.lap() == 1.0
    watch.start()
    now += 2.0
    assert (watch.lap(), watch.seconds) == (2.0, 10.0)
    watch.pause()
    now += 50.0
    watch.pause()
    assert watch.seconds == 10.0
    watch.start()
    now += 4.0
    assert (watch.lap(), watch.seconds) == (4.0, 14.0), "a lap begins where the watch was started again"
