"""A ladder finds what each rung takes to the vanilla run's loss; the benchmark beside it times other loops."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from hybridlab import DepthSchedule, HybridTrainerConfig
from hybridlab.base.errors import UserError
from hybridlab.benchmarks import against_others
from hybridlab.benchmarks.step_profile import GpuWork, StepWork, stages_of, step_work, time_step
from hybridlab.notebook import (
    ladder_claims,
    ladder_figures,
    ladder_table,
    side_by_side,
    side_by_side_claims,
    steps_table,
    waterfall_chart,
)
from hybridlab.notebook.views.ladder import LadderProfile
from hybridlab.optim import OptimizerConfig
from hybridlab.planner.gpu_specs import spec_of
from hybridlab.study import Ladder, RunConfig, TextTaskConfig
from hybridlab.study.ladder import AVERAGED, lengths_around
from hybridlab.study.record import Run
from hybridlab.study.study import StudyResult

TASK = TextTaskConfig("nano", "markov", vocab_size=64, block_size=64, batch_size=8, validation_batches=1)
VANILLA = RunConfig("baseline", TASK, steps=1000, evaluate_every=250, device="cpu", cpu_threads=1).as_vanilla()
PLAIN = HybridTrainerConfig.plain(clip_norm=1.0)
GROWN = replace(PLAIN, depth=DepthSchedule.shares(((0.0, 1), (0.7, 2))))
CHANGES = {
    "TF32": {"precision": "tf32"},
    "CUDA graph": {"cuda_graphs": True},
    "tuned rates": {"optimizer": OptimizerConfig.tuned(), "hybrid": PLAIN},
    "predicted depth": {"hybrid": GROWN},
}
FASTER = {"vanilla": 1, "TF32": 2, "CUDA graph": 8, "tuned rates": 8, "predicted depth": 16}
"""Than the vanilla run's step of 0.1 s."""
STEPS_SAVED = {"tuned rates": 4, "predicted depth": 2}


def trained(configs: list[RunConfig]) -> StudyResult:
    """Runs whose loss falls with the logarithm of their length, by a rung's own factor; seeds differ alike in all."""
    return StudyResult({(config.name, config.seed): _run(config) for config in configs})


def _run(config: RunConfig) -> Run:
    rung = config.name.partition(",")[0]
    loss = 12 - math.log(config.steps * STEPS_SAVED.get(rung, 1)) + 0.01 * config.seed
    figures = {
        "validation_loss": loss,
        AVERAGED: loss - math.log(1.25),
        "seconds": 0.1 * config.steps / FASTER[rung],
        "warm_up_seconds": 1.0,
        "gradient_steps": config.steps,
    }
    at = range(config.evaluate_every, config.steps + 1, config.evaluate_every)
    losses = [12 - math.log(n) + 0.01 * config.seed for n in at]
    steps = pd.DataFrame({"nominal_step": at, "validation_loss": losses, "measured_loss": 12.0})
    return Run(Path(), json.loads(json.dumps(config.record(), default=str)), steps, pd.DataFrame(), figures)


@pytest.fixture(scope="module")
def ladder():
    return Ladder(replace(VANILLA, cuda_graphs=False), CHANGES, timed_steps=250)


@pytest.fixture(scope="module")
def rungs(ladder):
    return ladder.run(trained)


def test_steps_and_time_to_the_vanilla_runs_loss_are_found_for_every_rung(rungs):
    steps = {rung.name: round(rung.steps.value) for rung in rungs}
    assert steps == {"vanilla": 1000, "TF32": 1000, "CUDA graph": 1000, "tuned rates": 250, "predicted depth": 500}
    ratios = [rung.time_ratio.value for rung in rungs]
    assert ratios == pytest.approx([1, 2, 8, 32, 32], rel=1e-3)
    assert all(rung.time_ratio.low <= ratio <= rung.time_ratio.high for rung, ratio in zip(rungs, ratios, strict=True))
    assert [rung.seconds for rung in rungs] == pytest.approx([100, 50, 12.5, 3.125, 3.125], rel=1e-3)


def test_a_rung_that_changes_rounding_is_held_against_the_vanilla_run_after_as_many_steps(rungs):
    changes = [rung.loss_change and rung.loss_change.values for rung in rungs]
    assert changes == [None, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), None, None]
    assert [(rung.tried, rung.seeds) for rung in rungs] == [(0, 3), (0, 3), (0, 3), (5, 3), (5, 3)]


def test_a_number_format_that_learns_less_does_not_count_as_rounding(ladder):
    def worse(configs: list[RunConfig]) -> StudyResult:
        result = trained(configs)
        for (name, seed), run in result.runs.items():
            run.closing_figures["validation_loss"] += (0.1 + 0.01 * seed) * name.startswith("TF32")
        return result

    verdicts = {claim.id: claim.verdict for claim in ladder_claims(ladder, ladder.run(worse), 15.0)}
    assert (verdicts["TF32-rounding"], verdicts["CUDA-graph-rounding"]) == ("fails", "holds")


@pytest.mark.parametrize(
    ("lost", "noise", "seeds", "verdict"),
    [(0.0, 0.0, 3, "holds"), (0.1, 0.0, 3, "open"), (0.0, 0.9, 3, "open"), (0.0, 0.0, 1, "open")],
)
def test_a_stack_that_ends_in_a_number_format_is_fast_where_it_learns_as_much_and_times_agree(
    lost: float, noise: float, seeds: int, verdict: str
) -> None:
    """Its steps are those of the vanilla run: so times over seeds, and what it learns, decide."""

    def run(configs: list[RunConfig]) -> StudyResult:
        result = trained(configs)
        for (name, seed), one in result.runs.items():
            one.closing_figures["validation_loss"] += lost * name.startswith("TF32")
            one.closing_figures["seconds"] *= 1 + noise * seed * name.startswith("TF32")
        return result

    only = Ladder(replace(VANILLA, cuda_graphs=False), {"TF32": CHANGES["TF32"]}, timed_steps=250, seeds=seeds)
    stack = next(claim for claim in ladder_claims(only, only.run(run), 1.2) if claim.kind == "stack-is-fast")
    assert stack.verdict == verdict


def test_the_table_chart_claims_and_figures_say_so(ladder, rungs):
    work = dict.fromkeys([rung.name for rung in rungs], StepWork(6.25, 900.0, 1e9))
    shown = str(ladder_table(ladder, rungs, LadderProfile({"TF32": 50.0, "tuned rates": 100.0}, work)))
    (tuned,) = (line for line in shown.splitlines() if line.startswith("tuned rates"))
    assert all(text in tuned for text in ("250 [", "32.0", "50%", "4.00"))
    assert "predicted depth: 3.13 s" in str(waterfall_chart(rungs))
    claims = {claim.id: claim for claim in ladder_claims(ladder, rungs, 15.0)}
    assert claims["stack-is-fast"].value("stack_time_ratio") == pytest.approx(32, rel=1e-3)
    assert claims["tuned-rates-fewer-steps"].value("steps_over_vanilla") == pytest.approx(0.25, rel=1e-3)
    assert {claim.verdict for claim in claims.values()} == {"holds"}
    figure = ladder_figures(rungs)["stack_time_ratio"]
    assert figure["low"] <= figure["value"] <= figure["high"]
    assert figure["rests_on"].items() >= {"seeds": 3, "lengths_tried": 10}.items()


def test_each_rung_has_the_changes_before_it_and_alone_its_own(ladder):
    top, alone = ladder.stacked("predicted depth"), ladder.alone("predicted depth")
    assert (top.precision, top.optimizer, top.cuda_graphs) == ("tf32", OptimizerConfig.tuned(), True)
    assert (alone.precision, alone.optimizer.name, alone.hybrid) == ("fp32", "adam", GROWN)
    assert ladder.alone("CUDA graph") is None


def test_the_readout_of_averaged_weights_stands_beside_the_plain_one(rungs):
    averaging = Ladder(replace(VANILLA, tail_average=0.2), {"tuned rates": CHANGES["tuned rates"]}, timed_steps=250)
    tuned = averaging.run(trained)[-1]
    assert (round(tuned.steps.value), round(tuned.averaged_steps.value)) == (250, 200)
    assert str(steps_table([tuned])).count("with averaged weights") == 1
    assert "averaged" not in str(steps_table(rungs))


def test_an_average_that_is_no_number_leaves_its_readout_open():
    def spoilt(configs):
        result = trained(configs)
        for (name, seed), run in result.runs.items():
            if seed == 1 and name.startswith("tuned"):
                run.summary[AVERAGED] = None
        return result

    averaging = Ladder(replace(VANILLA, tail_average=0.2), {"tuned rates": CHANGES["tuned rates"]}, timed_steps=250)
    tuned = averaging.run(spoilt)[-1]
    assert (round(tuned.steps.value), tuned.averaged_steps) == (250, None)


def test_a_rung_that_never_reaches_the_loss_fails_after_twice_the_vanilla_runs_length():
    def never(configs):
        result = trained(configs)
        for (name, _), run in result.runs.items():
            run.summary["validation_loss"] += 100 * name.startswith("tuned")
        return result

    short = Ladder(VANILLA, {"tuned rates": CHANGES["tuned rates"]}, timed_steps=250)
    rungs = short.run(never)
    assert (rungs[-1].seconds, max(rungs[-1].lengths)) == (None, 1500)
    assert [claim.verdict for claim in ladder_claims(short, rungs, 15.0)] == ["fails", "fails"]
    assert "(open: tuned rates)" in str(waterfall_chart(rungs))


@pytest.mark.parametrize(
    ("reaches_at", "found"), [(130, [99, 148, 222]), (900, [750, 1125, 500]), (210, [148, 222, 333])]
)
def test_three_lengths_lie_around_the_target_wherever_the_search_begins(reaches_at, found):
    lengths = lengths_around(lambda steps: -math.log(steps), -math.log(reaches_at), 333, 2000)
    assert lengths == sorted(found)


def test_timed_steps_that_the_vanilla_run_is_not_evaluated_after_are_refused():
    with pytest.raises(ValueError, match="take a multiple of evaluate_every"):
        Ladder(VANILLA, CHANGES, timed_steps=300)


# What a step takes.


def test_work_of_a_gpu_that_overlaps_counts_once_and_annotations_do_not():
    spans = [("kernel", 0, 10), ("gpu_memcpy", 5, 10), ("kernel", 20, 5), ("gpu_user_annotation", 0, 100)]
    events = [{"ph": "X", "cat": cat, "name": "x", "ts": ts, "dur": dur} for cat, ts, dur in spans]
    calls = ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync")
    events += [{"ph": "X", "cat": "cuda_runtime", "name": name, "ts": 0, "dur": 1} for name in calls]
    assert GpuWork.of_events([*events, {"ph": "M", "name": "process_name"}]) == GpuWork(0.02, 3)
    assert GpuWork.of(lambda: None, torch.device("cpu")) is None


def test_a_depth_schedule_is_profiled_stage_by_stage():
    stages = stages_of(replace(VANILLA, hybrid=GROWN))
    assert [(round(share, 3), stage.trainer.depth.depths) for share, stage in stages] == [(0.7, (1,)), (0.3, (2,))]
    whole, grown = step_work(VANILLA), step_work(replace(VANILLA, hybrid=GROWN))
    assert 0.5 * whole.operations < grown.operations < whole.operations
    assert (grown.busy_ms, grown.launches) == (None, None)
    assert time_step(VANILLA, steps=1) > 0


def test_a_gpus_data_sheet_is_found_by_its_drivers_name():
    assert spec_of("NVIDIA H100 80GB HBM3").name == "H100 SXM 80GB"
    assert spec_of("NVIDIA GeForce RTX 5080").bfloat16_flops == 112.6e12
    assert spec_of("AMD EPYC") is None


# Beside other loops.


def test_loops_are_timed_in_turns_and_what_is_not_installed_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    config = replace(VANILLA, optimizer=OptimizerConfig.tuned(), hybrid=PLAIN)
    measured = against_others.measure(config, rounds=1, turns=1, steps=1)
    assert "Hugging Face Trainer is left out: ModuleNotFoundError" in capsys.readouterr().out
    rows = {row["loop"]: row for row in measured["loops"]}
    names = (against_others.ADAMW, against_others.MUON, against_others.NANOGPT, against_others.TORCH_MUON)
    assert set(rows) == set(names)
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    ours, nanogpt = rows[against_others.ADAMW]["step_ms"], rows[against_others.NANOGPT]["step_ms"]
    figure = measured["figures"]["library_over_nanogpt_step"]
    assert figure["value"] == pytest.approx(ours / nanogpt)
    assert figure["rests_on"]["settings"]["batch_size"] == 8
    assert [claim.kind for claim in side_by_side_claims(measured)] == ["step-beside-nanogpt", "muon-beside-adamw"]


def test_another_loop_takes_one_step_per_turn_and_ends_with_its_own_error():
    taken, turns = [], against_others._Turns()
    hooks = turns.hooks()

    def train() -> None:
        control = type("Control", (), {"should_training_stop": False})()
        for step in range(5):
            hooks["on_step_begin"](None, None, None, control)
            taken.append(step)
            hooks["on_step_end"](None, None, None, control)
            if control.should_training_stop:
                return
        raise RuntimeError("out of data")

    steps = turns.steps(train)
    next(steps)
    assert taken == [0]
    with pytest.raises(RuntimeError, match="out of data"):
        list(steps)
    assert taken == [0, 1, 2, 3, 4]


def test_a_benchmark_that_was_not_run_is_told_and_a_damaged_file_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "pyproject.toml").write_text("[tool.hybridlab]\n")
    monkeypatch.chdir(tmp_path)
    assert side_by_side("") == side_by_side("others.json") == {}
    assert "others.json is not there: python -m" in capsys.readouterr().out
    for damaged in ("{", "[1]", '{"loops": []}'):
        (tmp_path / "others.json").write_text(damaged)
        with pytest.raises(UserError, match="write it again"):
            side_by_side("others.json")


def test_a_rung_that_changes_no_setting_of_a_run_is_refused_before_anything_is_trained():
    with pytest.raises(TypeError, match="optimiser"):
        Ladder(VANILLA, CHANGES | {"Muon": {"optimiser": "muon"}}, timed_steps=250)
