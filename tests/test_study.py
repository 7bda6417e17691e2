"""Studies: the floor is reached, controls are what they say, comparisons say what the numbers say."""

from __future__ import annotations

import gc
import json
import math
import re
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hybridlab.base.device import find_device
from hybridlab.base.errors import UserError
from hybridlab.benchmarks import interleaved as turns
from hybridlab.benchmarks.step_overhead import step_overhead
from hybridlab.charts.display import Chart
from hybridlab.engine.trainer import DivergenceError
from hybridlab.memory import GradientAccumulationConfig, MemoryConfig
from hybridlab.notebook.views.study_charts import comparison_chart
from hybridlab.notebook.views.study_claims import hybrid_claims
from hybridlab.optim import OptimizerConfig, Schedule
from hybridlab.results.publish import publish
from hybridlab.results.reading import load_results
from hybridlab.study import Study, StudyResult, TextTaskConfig, bracket_rates, compare, train
from hybridlab.study import config as run_config
from hybridlab.study.record import Run
from hybridlab.study.run import TrainingRun
from hybridlab.study.statistics import Base, Interval
from hybridlab.study.study import folder_name, run_arms
from hybridlab.study.tasks import Batch, TextTask, in_parts
from hybridlab.study.training import Training
from tests.conftest import jumping, tiny_run

MARKOV = TextTaskConfig(model="nano", data="markov", vocab_size=64, block_size=32, batch_size=32)
SHORT = replace(
    tiny_run("baseline", 60, replace(MARKOV, batch_size=8), optimizer=OptimizerConfig(lr=1e-2), evaluate_every=30),
    schedule=Schedule("wsd", warmup_steps=10, total_steps=60),
)
JUMPY = jumping(10, 8, 8)


def test_a_small_model_reaches_the_entropy_floor_of_markov_within_3_percent(tmp_path: Path) -> None:
    config = replace(
        SHORT,
        task=replace(MARKOV, vocab_size=16, batch_size=16),
        steps=250,
        optimizer=OptimizerConfig(lr=2e-2, betas=(0.9, 0.99), weight_decay=0.0),
        schedule=Schedule("cosine", warmup_steps=30, total_steps=250),
        evaluate_every=250,
    )
    run = train(config, tmp_path / "run")
    floor = config.task.load_text().entropy_floor_nats
    assert run.summary is not None
    assert floor is not None
    assert floor * 0.99 <= run.summary["validation_loss"] <= 1.03 * floor


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    study = Study(SHORT, {"jumpy": JUMPY, "never": replace(JUMPY, confidence_threshold=1.0)}, seeds=2)
    return study.run(tmp_path_factory.mktemp("study"))


def test_arms_take_turns_so_that_a_drift_of_the_machine_falls_on_all() -> None:
    """Seed by seed, and every second seed in reverse."""
    planned = [(run.seed, run.name) for run in Study(SHORT, {"jumpy": JUMPY}, seeds=3).planned()]
    by_seed = [[name for seed, name in planned if seed == s] for s in range(3)]
    assert [seed for seed, _ in planned] == sorted(seed for seed, _ in planned)
    assert by_seed[0] == by_seed[2] == by_seed[1][::-1]
    assert {"baseline", "jumpy"} < {*by_seed[0]}


def test_every_hybrid_that_predicted_has_a_control_of_as_many_gradient_steps(result: StudyResult) -> None:
    for seed in (0, 1):
        control = result.control_of("jumpy", seed)
        assert control == "control of jumpy"
        assert result.gradient_steps(control, seed) == result.gradient_steps("jumpy", seed) < 60
        schedule = result.runs[control, seed].config["schedule"]
        assert schedule["total_steps"] == result.gradient_steps("jumpy", seed)
        assert result.control_of("never", seed) == "baseline"
    assert result.controls(["jumpy", "never"]) == ["control of jumpy"]


def test_an_arm_that_predicts_nothing_is_the_baseline_exactly(result: StudyResult) -> None:
    comparison = compare(result, "never")
    assert comparison.to_baseline.mean == 0
    assert comparison.step_value is None
    assert "predicted nothing" in comparison.sentence


def test_a_comparison_pairs_by_seed(result: StudyResult) -> None:
    comparison = compare(result, "jumpy")
    by_hand = [
        result.value("validation_loss", "jumpy", seed) - result.value("validation_loss", "control of jumpy", seed)
        for seed in (0, 1)
    ]
    assert comparison.to_control.mean == pytest.approx(np.mean(by_hand))
    assert comparison.step_value is not None
    assert comparison.predicted_steps + comparison.gradient_steps == 60


def test_a_run_s_record_tells_everything(result: StudyResult) -> None:
    run = result.runs["jumpy", 0]
    assert Run.load(run.folder).summary == run.summary
    assert run.config["hybrid"]["predictor"] == "linear"
    assert run.config["data"]["sha256"] == MARKOV.load_text().sha256
    assert list(run.steps["nominal_step"]) == list(range(1, 61))
    predicted = run.steps[run.steps["phase"] == "predict"]
    assert len(predicted) == run.summary["predicted_steps"]
    assert predicted["gradient_norm"].isna().all()
    assert run.steps["validation_loss"].notna().sum() == 2
    assert (run.vram["used_bytes"] > 0).all()


def test_runs_under_other_settings_lie_apart_and_each_resumes_its_own(tmp_path: Path) -> None:
    short = replace(SHORT, steps=4, evaluate_every=4)
    other = replace(short, optimizer=OptimizerConfig(lr=2e-2))
    first = run_arms([short], tmp_path).runs["baseline", 0]
    second = run_arms([other], tmp_path, resume=True).runs["baseline", 0]
    assert Run.load(first.folder).summary == first.summary
    for config, run in ((short, first), (other, second)):
        resumed = run_arms([config], tmp_path, resume=True).runs["baseline", 0]
        assert (resumed.folder, resumed.summary) == (run.folder, run.summary)
    assert len(list(tmp_path.iterdir())) == 2


DIVERGES = replace(SHORT, name="diverges", steps=24, evaluate_every=12, optimizer=OptimizerConfig(lr=1e3))


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("isolated", [False, True])
def test_an_arm_that_diverges_is_recorded_as_that_and_named_and_the_others_go_on(
    tmp_path: Path, isolated: bool
) -> None:
    arms = [replace(DIVERGES, name=name, optimizer=OptimizerConfig(lr=1e-3)) for name in ("baseline", "after")]
    for resume in (False, True):
        with pytest.warns(UserWarning, match="'diverges', seed 0 diverged: .*; the other runs go on"):
            result = run_arms([arms[0], DIVERGES, arms[1]], tmp_path, isolated=isolated, resume=resume)
        diverged = result.runs["diverges", 0]
        assert "the gradient norm is inf" in str(diverged.diverged)
        assert diverged.closing_figures["validation_loss"] == diverged.validation_loss(at_step=24) == math.inf
        assert diverged.closing_figures["divergences"] == 1
        assert result.runs["after", 0].validation_loss() < 10
        assert result.has_diverged("diverges")
        assert not result.has_diverged("after")
    assert json.loads((diverged.folder / "summary.json").read_text())["validation_loss"] is None


def test_a_run_that_diverges_by_itself_ends_with_an_error_that_names_it(tmp_path: Path) -> None:
    for resume in (False, True):
        with pytest.raises(DivergenceError, match="'diverges', seed 0 diverged"):
            train(DIVERGES, tmp_path, resume=resume)


@pytest.mark.parametrize("predicts", [True, False])
def test_a_hybrid_that_diverges_loses_and_says_so(tmp_path: Path, predicts: bool) -> None:
    result = with_hybrids(0.1, 0.1)
    result.runs["1", 1].closing_figures["validation_loss"] = math.inf
    for seed in result.seeds:
        result.runs["1", seed].closing_figures["predicted_steps"] *= predicts
    kept, diverged = compare(result, "0"), compare(result, "1")
    assert kept.to_control.mean == pytest.approx(-0.1)
    assert (diverged.sign, diverged.answer, str(diverged.to_baseline)) == (1, "diverged", "diverged")
    assert diverged.sentence == "1: diverged with 1 of 3 seeds."
    assert diverged.step_value is None
    verdicts = {claim.kind: claim.verdict for claim in hybrid_claims(diverged)}
    assert (verdicts["pays"], verdicts["quality"], verdicts["speed"]) == ("fails", "fails", "fails")
    publish("a_study", claims=hybrid_claims(diverged), summary=[], record={"parameters": {}}, folder=tmp_path)
    (pays, *_) = load_results(tmp_path / "results.json")["a_study"]["claims"]
    assert pays["quantities"][0]["value"] is None
    assert pays["quantities"][0]["per_seed"] == [-0.11, None, -0.09]
    chart = comparison_chart([kept, diverged])
    assert list(chart.names or ()) == ["0"]
    assert chart.title.endswith("(diverged: 1)")
    beside = replace(kept, to_control=Interval.of([-math.inf, 0.1, 0.1]))
    assert beside.sentence == "0: the plain run that it is compared with diverged."
    chart = comparison_chart([kept, beside])
    assert isinstance(chart, Chart)
    assert chart.title.endswith("(diverged: control of 0)")


def test_what_an_arm_is_does_not_go_by_its_name() -> None:
    """A hybrid called "baseline + snoo" is no control."""
    result = with_hybrids(0.1)
    renamed = {("baseline + snoo" if name == "0" else name, seed): run for (name, seed), run in result.runs.items()}
    assert not StudyResult(renamed).is_plain("baseline + snoo")
    assert "baseline + snoo" not in StudyResult(renamed).controls_beside("baseline + snoo", 0)
    with pytest.raises(ValueError, match="control_fractions: a plain arm is called 'control, 50%"):
        Study(SHORT, {}, control_fractions=(0.5, 0.504))
    with pytest.raises(ValueError, match="hybrids: a plain arm is called 'baseline' already"):
        Study(SHORT, {"baseline": JUMPY})


def test_a_folder_s_name_tells_arm_settings_and_seed() -> None:
    names = [folder_name(replace(SHORT, name="lr x 2", seed=seed)) for seed in (0, 1)]
    assert re.fullmatch(r"lr_x_2_[0-9a-f]{6}_seed_0", names[0])
    assert names[1] == names[0].replace("seed_0", "seed_1")
    assert folder_name(replace(SHORT, checkpoint_every=5)) == folder_name(SHORT), "no figure depends on it"


def test_same_settings_same_numbers(tmp_path: Path, result: StudyResult) -> None:
    again = train(replace(SHORT, name="jumpy", hybrid=JUMPY), tmp_path)
    assert again.steps["measured_loss"].equals(result.runs["jumpy", 0].steps["measured_loss"])


def ended_run(task: dict[str, int], predicts: bool, first_loss: float, summary: dict[str, Any]) -> Run:
    """A run of which the first loss and the closing figures are known."""
    never = ("forward_only_passes", "proposals_accepted", "proposals_rejected", "rollbacks", "divergences")
    figures = dict.fromkeys(never, 0) | {"memory_source": "process"} | summary
    config = {"task": task, "hybrid": {"max_predict_steps": 8 * predicts}}
    return Run(Path(), config, pd.DataFrame({"measured_loss": [first_loss]}), pd.DataFrame(), figures)


def made_up(losses: list[dict[str, float]], steps: int = 400) -> StudyResult:
    """A study's closing figures: for each seed, the final loss of each arm."""
    shares = {"baseline": 1.0, "control, 50% of the steps": 0.5, "control, 75% of the steps": 0.75}
    task, runs = {"batch_size": 8, "block_size": 64}, {}
    for seed, by_arm in enumerate(losses):
        for name, loss in by_arm.items():
            share, predicts = shares.get(name, 0.7), name not in shares and not name.startswith("control of")
            counts = {"gradient_steps": round(share * steps), "predicted_steps": round(0.3 * steps * predicts)}
            runs[name, seed] = ended_run(task, predicts, 6.0, counts | {"seconds": 1.0, "validation_loss": loss})
    return StudyResult(runs)


def with_hybrids(*better_by: float, spread: float = 0.01, seeds: int = 3, **more: int) -> StudyResult:
    """A study of hybrids "0", "1", ... whose losses lie that many nats below their controls'."""
    plain = {"baseline": 4.0, "control, 50% of the steps": 4.4, "control, 75% of the steps": 4.15}
    losses = []
    for seed in range(seeds):
        own = {f"control of {i}": 4.2 for i in range(len(better_by))}
        hybrids = {str(i): 4.2 - by + spread * (seed - 1) for i, by in enumerate(better_by)}
        losses.append(plain | own | hybrids)
    return made_up(losses, **more)


def test_the_step_value_does_not_depend_on_the_other_arms() -> None:
    alone, among_others = with_hybrids(0.1), with_hybrids(0.1, 0.3, -0.2)
    for seed in range(3):
        others = among_others.runs["control of 1", seed].summary
        assert others is not None
        others["validation_loss"] = 9.0
    assert compare(alone, "0").step_value == compare(among_others, "0").step_value


def test_many_arms_need_more_to_pay_than_one() -> None:
    """Differences with p = 0.035 each: alone one of them pays, together none does."""
    alone, together = compare(with_hybrids(0.03), "0"), compare(with_hybrids(0.03, 0.03, 0.03), "0")
    assert alone.to_control == together.to_control
    assert (alone.p_value, together.p_value) == (pytest.approx(0.0353, abs=1e-3), pytest.approx(3 * alone.p_value))
    assert (alone.pays, together.pays) == (True, False)
    assert (alone.tested, together.tested) == (1, 3)
    assert "corrected for 3 arms" in together.answer


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({"steps": 199}, ["199 of 200 steps"]),
        ({"seeds": 2}, ["2 of 3 seeds"]),
        ({}, []),
    ],
)
def test_below_the_least_base_there_is_no_verdict(changes: dict[str, int], lacks: list[str]) -> None:
    comparison = compare(with_hybrids(1.0, spread=1e-6, **changes), "0")
    assert comparison.p_value < 0.05
    assert comparison.base.lacks == lacks
    assert comparison.pays == (not lacks)
    assert comparison.answer.startswith("better" if not lacks else f"open ({lacks[0]}")


def test_a_base_lacks_what_is_below_the_least() -> None:
    assert Base(200, 3, 100_000, 1.0).lacks == []
    assert Base(80, 1, 99_999, 0.5).lacks == [
        "80 of 200 steps",
        "1 of 3 seeds",
        "99999 of 100000 tokens",
        "0.5 of 1 nats of fall",
    ]
    assert Base(200, 3, 100_000, math.nan).lacks == ["nan of 1 nats of fall"]
    assert Base(80, 3, 100_000, 1.0, ("bracket a", "bracket b")).lacks == ["80 of 200 steps", "bracket a; bracket b"]


def test_cuda_without_a_gpu_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device: set device to auto or cpu"):
        find_device("cuda")
    with pytest.raises(UserError, match="device 'gpu' is unknown: choose auto, cuda or cpu"):
        find_device("gpu")


def test_a_run_that_has_ended_lets_its_task_go_at_once(tmp_path: Path) -> None:
    """Else the next run of a study could not take its compiled model over."""
    gc.disable()
    try:
        run = TrainingRun(replace(SHORT, hybrid=JUMPY), tmp_path)
        task = weakref.ref(run._training.task)
        run.run()
        assert task() is not None
        del run
        assert task() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_batch_is_made_once_a_step_and_only_where_it_is_looked_at(tmp_path: Path, micro_batches: int) -> None:
    made: list[int] = []

    class Counted(TextTask):
        def batch(self, step: int) -> Batch:
            made.append(step)
            return super().batch(step)

    memory = MemoryConfig(gradient_accumulation=GradientAccumulationConfig(micro_batches))
    run = TrainingRun(replace(SHORT, hybrid=replace(JUMPY, correction_interval=3, memory=memory)), tmp_path)
    run._training.task.__class__ = Counted
    steps = run.run().steps
    looked_at = steps.loc[steps["measured_loss"].notna(), "nominal_step"] - 1
    assert made == [0, *looked_at], "the first batch also warms up"
    assert len(looked_at) < len(steps), "the arm is meant to predict blindly now and then"


def test_a_batch_falls_into_equal_parts_that_share_its_memory() -> None:
    tokens, targets = torch.arange(12).reshape(4, 3), torch.arange(4)
    parts = in_parts((tokens, targets), 2)
    assert [[tensor.tolist() for tensor in part] for part in parts] == [
        [[[0, 1, 2], [3, 4, 5]], [0, 1]],
        [[[6, 7, 8], [9, 10, 11]], [2, 3]],
    ]
    assert parts[0][0].data_ptr() == tokens.data_ptr()


def test_what_all_windows_share_goes_into_each_part() -> None:
    parts = in_parts({"tokens": torch.arange(4), "mask": torch.ones(1, 3), "temperature": torch.tensor(0.5)}, 2)
    assert [(len(part["tokens"]), part["mask"].shape, part["temperature"].item()) for part in parts] == [
        (2, (1, 3), 0.5)
    ] * 2


@pytest.mark.parametrize(("rows", "said"), [((4, 3), "have 3 and 4 rows"), ((3, 3), "have 3 rows")])
def test_a_batch_that_does_not_fall_into_equal_parts_is_refused(rows: tuple[int, int], said: str) -> None:
    batch = tuple(torch.zeros(count, 2) for count in rows)
    with pytest.raises(UserError, match=f"2 equal parts of a batch are wanted, and its tensors {said}"):
        in_parts(batch, 2)
    assert in_parts(batch, 1)[0][0] is not None


def test_the_trainer_s_cost_is_measured_in_pairs() -> None:
    cost = step_overhead(replace(SHORT, compiled=False), rounds=6, turns=1, steps=2, parts=2)
    for ratio in (cost.plain_over_bare, cost.null_over_bare, cost.recording_over_bare):
        assert -math.inf < ratio.low <= ratio.median <= ratio.high < math.inf
    assert cost.null_over_bare.low > 0
    assert cost.bare_step_ms > 0


def test_an_evaluation_drops_the_gradients_whose_memory_it_needs() -> None:
    training = Training(SHORT, torch.device("cpu"))
    training.step(0)
    assert any(p.grad is not None for p in training.task.model.parameters())
    training.evaluate()
    assert all(p.grad is None for p in training.task.model.parameters())


def test_the_bare_loop_is_no_measure_of_memory_features() -> None:
    hybrid = replace(SHORT.hybrid, memory=MemoryConfig(optimizer_state="int8"))
    with pytest.raises(UserError, match="no memory features: set memory to None"):
        step_overhead(replace(SHORT, hybrid=hybrid), rounds=1, steps=1)


@pytest.mark.parametrize("count", ["rounds", "turns"])
def test_no_turn_is_no_measurement(count: str) -> None:
    with pytest.raises(ValueError, match=f"{count} is 0: it must be at least 1"):
        turns.seconds_in_turns({}, torch.device("cpu"), **{"rounds": 1, "turns": 1, count: 0})


def test_loops_take_turns_and_the_first_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now, turns_taken = 0.0, ""

    def loop(name: str, factor: float) -> None:
        nonlocal now, turns_taken
        turns_taken += name
        now += factor * len(turns_taken)  # a machine that gets slower and slower

    monkeypatch.setattr(turns.time, "perf_counter", lambda: now)
    loops = {"a": partial(loop, "a", 1.0), "b": partial(loop, "b", 2.0)}
    seconds = turns.seconds_in_turns(loops, torch.device("cpu"), rounds=3)
    assert turns_taken == "abbabaabab"
    assert seconds == {"a": [6.0, 7.0, 9.0], "b": [10.0, 16.0, 20.0]}
    rounds = (10 / 6, 16 / 7, 20 / 9)
    assert turns.Ratio.of(seconds["b"], seconds["a"]) == turns.Ratio(20 / 9, -math.inf, math.inf, rounds)


def test_short_turns_in_mirrored_order_put_a_drift_on_all_loops_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    now, turns_taken = 0.0, ""

    def loop(name: str) -> None:
        nonlocal now, turns_taken
        turns_taken += name
        now += len(turns_taken)  # a machine that gets slower and slower

    monkeypatch.setattr(turns.time, "perf_counter", lambda: now)
    loops = {name: partial(loop, name) for name in "abc"}
    seconds = turns.seconds_in_turns(loops, torch.device("cpu"), rounds=2, turns=6)
    assert turns_taken == 4 * "abccbabcaacbcabbac"
    assert seconds["a"] == seconds["b"] == seconds["c"] == [sum(range(37, 55)) / 3, sum(range(55, 73)) / 3]


@pytest.mark.parametrize(("rounds", "ends"), [(5, (-math.inf, math.inf)), (6, (1, 6)), (10, (2, 9)), (20, (6, 15))])
def test_the_interval_of_a_median_is_that_of_the_sign_test(rounds: int, ends: tuple[float, float]) -> None:
    """Ranks as tables of the sign test have them, at 95 %."""
    ranks = [float(rank) for rank in range(rounds, 0, -1)]
    ratio = turns.Ratio.of(ranks, [1.0] * rounds)
    assert (ratio.low, ratio.high) == ends


def test_a_run_s_record_tells_the_device_from_the_card_that_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SHORT, card_gb=16)
    monkeypatch.setattr(run_config, "device_name", lambda _: "NVIDIA H100")
    for larger, described in ((True, "NVIDIA H100 as an emulated 16 GB GPU"), (False, "NVIDIA H100")):
        monkeypatch.setattr(run_config, "exceeds", lambda device, gpu_bytes, larger=larger: larger)
        record = config.record()
        assert (record["device"], record["emulates_card"]) == ("NVIDIA H100", larger)
        assert config.describe_device() == described


def test_the_gradient_clock_makes_the_decay_wait(tmp_path: Path) -> None:
    nominal = train(replace(SHORT, name="nominal", hybrid=JUMPY), tmp_path / "nominal")
    gradient = train(replace(SHORT, name="gradient", hybrid=JUMPY, clock="gradient"), tmp_path / "gradient")
    losses = [run.steps["measured_loss"].dropna() for run in (nominal, gradient)]
    assert losses[0].iloc[:18].equals(losses[1].iloc[:18])
    assert not losses[0].equals(losses[1])


def test_a_card_cannot_be_emulated_without_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set card_gb to 0"):
        train(replace(SHORT, card_gb=16), tmp_path)


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    """One would take the other's place in the result."""
    other = replace(SHORT, optimizer=OptimizerConfig(lr=1e-5))
    with pytest.raises(ValueError, match=f"two runs are called '{SHORT.name}, seed 0'"):
        run_arms([SHORT, other], tmp_path)
    with pytest.raises(ValueError, match=f"two runs are called '{SHORT.name}'"):
        bracket_rates([SHORT, other], tmp_path)
    with pytest.raises(ValueError, match=r"control_fractions has 0.001, which is no step of \d+"):
        Study(SHORT, {}, control_fractions=(0.001,))


def test_a_folder_may_be_a_text(tmp_path: Path) -> None:
    run = replace(SHORT, steps=2, schedule=None)
    assert train(run, str(tmp_path / "run")).folder == tmp_path / "run"
    assert Study(run, {}, seeds=1, control_fractions=()).run(str(tmp_path / "study")).seeds == [0]


def test_an_arm_that_a_study_has_not_is_refused(result: StudyResult) -> None:
    with pytest.raises(ValueError, match=r"arm 'jumpi' is unknown: did you mean 'jumpy'\? \(baseline, "):
        compare(result, "jumpi")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rates": (("jumpi", 1e-3),)}, "rates: arm 'jumpi' is unknown: did you mean 'jumpy'.*control of jumpy"),
        ({"rates": (("baseline", 1e-3),)}, "rates: arm 'baseline' is unknown"),
        ({"rates": (("jumpy", 1e-3), ("jumpy", 2e-3))}, "rates has the arm 'jumpy' twice"),
        ({"rates": (("control of jumpy", float("nan")),)}, "lr is nan: it must be finite"),
        ({"tried": (("basline", ""),)}, "tried: arm 'basline' is unknown: did you mean 'baseline'"),
    ],
)
def test_a_rate_of_no_arm_is_refused_and_the_arms_are_listed(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Study(SHORT, {"jumpy": JUMPY}, **given)
