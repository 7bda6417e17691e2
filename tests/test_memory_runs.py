"""Whole runs with memory features: as good as without, resumable at any moment, and told in numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import geometric_mean
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from hybridlab import HybridTrainerConfig
from hybridlab.base.errors import UserError
from hybridlab.base.pinned_memory import LEFT_TO_OTHERS_BYTES
from hybridlab.batch.run import prepared, run_notebook
from hybridlab.benchmarks.footprint import Footprint, JumpTimes, PredictPhase, footprint, footprints, predict_phase
from hybridlab.memory import (
    CheckpointingConfig,
    GradientAccumulationConfig,
    MemoryConfig,
    MixedPrecisionConfig,
    PredictAwareMemoryConfig,
)
from hybridlab.notebook.views.memory import cost_table, memory_table, predict_table
from hybridlab.notebook.views.memory_claims import (
    agreement_claims,
    few_bits_claims,
    fit_claims,
    format_agreement,
    predict_claim,
    predicted_claims,
    quality_claims,
    reference_claims,
    stable_run_claim,
    step_time_claims,
)
from hybridlab.optim import Schedule
from hybridlab.planner import plan
from hybridlab.planner.text_report import MEMORY_PRESETS
from hybridlab.results.reading import load_results
from hybridlab.results.repeats import repeats_of
from hybridlab.study import RunConfig, TextTaskConfig, planning, train
from hybridlab.study.planning import plan_of, room_for
from hybridlab.study.record import Run
from hybridlab.study.statistics import LEAST, Base, Interval
from hybridlab.study.study import StudyResult, run_arms
from tests.conftest import jumping
from tests.notebook_maker import project

TASK = TextTaskConfig(
    model="nano", data="markov", vocab_size=64, block_size=16, batch_size=4, validation_batches=4, max_bytes=40_000
)
BASE = RunConfig(
    name="fp32", task=TASK, steps=12, schedule=Schedule("wsd", 2, 12), evaluate_every=6, device="cpu", cpu_threads=1
)
JUMPS = jumping(2, 4, 8, correction_interval=3, correct_steps=2, path_device="host")


def plain(memory: MemoryConfig | None) -> HybridTrainerConfig:
    clip_norm = None if memory and memory.step_in_backward else 1.0
    return HybridTrainerConfig.plain(clip_norm=clip_norm, memory=memory)


@pytest.mark.parametrize("preset", [name for name in MEMORY_PRESETS if name != "none"])
def test_presets_train_to_fp32s_loss(preset: str, tmp_path: Path) -> None:
    configs = [replace(BASE, hybrid=plain(None)), replace(BASE, name=preset, hybrid=plain(MEMORY_PRESETS[preset]()))]
    result = run_arms(configs, tmp_path)
    fp32, arm = (result.value("validation_loss", config.name, 0) for config in configs)
    assert abs(arm - fp32) < 0.01 * fp32


@pytest.mark.parametrize("broken_off_at", [9, 12, 15])
def test_a_run_that_is_broken_off_in_predict_goes_on_bit_for_bit(broken_off_at: int, tmp_path: Path) -> None:
    """With bf16 weights on the device, masters and state on the host, and shares for clipping in the optimizer."""
    memory = MemoryConfig.fit_16gb(
        predict_aware=PredictAwareMemoryConfig("pinned", lookahead=2),
        mixed_precision=MixedPrecisionConfig("fp32", "bf16_weights"),
    )
    schedule = BASE.lr_schedule.fitted_to(24)
    longer = replace(
        BASE, name="jumps", steps=24, schedule=schedule, evaluate_every=24, hybrid=replace(JUMPS, memory=memory)
    )
    config = replace(longer, checkpoint_every=1)
    whole = train(longer, tmp_path / "whole")
    assert set(whole.steps["phase"].iloc[8:15]) & {"predict"}

    class BrokenOff(Exception):
        pass

    taken = 0

    def count() -> None:
        nonlocal taken
        taken += 1
        if taken == broken_off_at:
            raise BrokenOff

    with pytest.raises(BrokenOff):
        train(config, tmp_path / "broken", count)
    resumed = train(config, tmp_path / "broken", resume=True)
    columns = ["nominal_step", "phase", "measured_loss", "predicted_loss", "gradient_norm"]
    pd.testing.assert_frame_equal(resumed.steps[columns], whole.steps[columns])
    assert resumed.steps["validation_loss"].iloc[-1] == whole.steps["validation_loss"].iloc[-1]


def test_an_evaluation_inside_predict_sees_the_exact_weights(tmp_path: Path) -> None:
    losses = []
    for name, predict in (("plain", "fp32"), ("low", "bf16_weights")):
        memory = MemoryConfig(mixed_precision=MixedPrecisionConfig("fp32", predict))
        config = replace(BASE, name=name, steps=12, evaluate_every=12, hybrid=replace(JUMPS, memory=memory))
        run = train(config, tmp_path / name)
        assert run.steps["phase"].iloc[-1] == "predict"
        losses.append(run.steps["validation_loss"].iloc[-1])
    assert losses[0] == losses[1]


def test_accumulation_splits_evaluation_too() -> None:
    """Else the whole batch would set the peak that its parts avoid."""
    device, memory = torch.device("cpu"), MemoryConfig(gradient_accumulation=GradientAccumulationConfig(2))
    whole, split = TASK.build(0, device), TASK.build(0, device, memory)
    for task in (whole, split):
        task.model.requires_grad_(False)
    sizes = []
    split.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    loss = split.evaluate(split.model)["validation_loss"]
    assert set(sizes) == {TASK.batch_size // 2}
    assert loss == pytest.approx(whole.evaluate(whole.model)["validation_loss"], rel=1e-6)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="both name a format"):
        replace(BASE, precision="bf16", hybrid=plain(MemoryConfig.conservative()))
    with pytest.raises(ValueError, match="a batch of 4 does not split into 3 equal micro_batches"):
        replace(BASE, hybrid=plain(MemoryConfig(gradient_accumulation=GradientAccumulationConfig(3))))


# --- told in numbers -------------------------------------------------------------------------------------


def test_footprints_pair_losses_by_seed_and_plan_each_arm(tmp_path: Path) -> None:
    configs = [
        replace(BASE, hybrid=plain(None)),
        replace(BASE, name="checkpointed", hybrid=plain(MemoryConfig(checkpointing=CheckpointingConfig()))),
    ]
    repeated = [replace(config, seed=1) for config in configs]
    result = run_arms([*configs, *repeated], tmp_path)
    control, arm = footprints(result, configs, control="fp32")
    assert control.change is None
    assert arm.change == Interval.of([0.0, 0.0]), "checkpointing changes no bit"
    assert arm.predicted.parts["activations"] < control.predicted.parts["activations"]
    assert arm.error is None, "there is no card to measure"
    halfway = footprint(result, configs[1], "fp32", at_step=6)
    first = result.runs["checkpointed", 0].steps.set_index("nominal_step")["validation_loss"]
    assert halfway.validation_loss == pytest.approx(
        (first[6] + result.runs["checkpointed", 1].steps["validation_loss"][5]) / 2
    )
    with pytest.raises(UserError, match="was not evaluated at step 5"):
        footprint(result, configs[1], "fp32", at_step=5)
    with pytest.raises(UserError, match="has no whole jump: set confidence_threshold to 0"):
        predict_phase(result.runs["fp32", 0])
    with pytest.raises(UserError, match=r"fp32.* diverged before a jump was over: lower the learning rate"):
        predict_phase(replace(result.runs["fp32", 0], summary={"diverged": "the loss is nan"}))
    assert "–" in memory_table([control]).cells()[0]


def measured(error: float = 0.0, change: Interval | None = None) -> Footprint:
    predicted = plan("nano", (2, 16))
    size = round(predicted.peak_allocated_bytes / (1 + error))
    base = Base(steps=200, seeds=change.seeds, tokens=100_000, fall_nats=1.0) if change else None
    return Footprint("arm", predicted, size, size, (1.0,), 5.0, change, base)


@pytest.mark.parametrize(("error", "verdict"), [(0.09, "holds"), (-0.09, "holds"), (0.12, "fails"), (-0.12, "fails")])
def test_a_prediction_is_right_within_ten_percent_either_way(error: float, verdict: str) -> None:
    (claim,) = predicted_claims([measured(error)])
    assert (claim.id, claim.verdict) == ("arm-predicted-within-10-percent", verdict)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (Interval.of([0.01, 0.02, 0.03]), "holds"),
        (Interval.of([-0.5, -0.4, -0.6]), "holds"),
        (Interval.of([0.0, 0.1, 0.05]), "open"),
        (Interval.of([0.3, 0.31, 0.32]), "fails"),
        (Interval.of([0.04]), "open"),
        (Interval.of([0.06]), "open"),
        (Interval.of([0.3, 0.31]), "open"),
    ],
)
def test_quality_is_judged_by_the_whole_interval_and_fewer_than_three_seeds_leave_it_open(
    change: Interval, verdict: str
) -> None:
    (claim,) = quality_claims([measured(change=change)], control=5.0)
    assert claim.verdict == verdict
    assert all(
        math.isfinite(value) for q in claim.quantities for value in (q.value, q.low, q.high) if value is not None
    )
    assert claim.quantities[0].per_seed == change.values


def card_run(**summary: Any) -> Run:
    figures = {"memory_source": "cuda", "peak_memory_bytes": 13 * 10**9, "allocator_retries": 0, "nominal_steps": 200}
    vram = pd.DataFrame(
        {"nominal_step": range(1, 201), "used_bytes": [12e9] * 150 + [12e9 + summary.pop("grown", 0)] * 50}
    )
    run: Any = SimpleNamespace(closing_figures=figures | summary, vram=vram, folder="here")
    return run


@pytest.mark.parametrize(
    ("summary", "failing"),
    [
        ({}, set()),
        ({"peak_memory_bytes": 15 * 10**9}, {"peak-below-14gb"}),
        ({"peak_memory_bytes": 17 * 10**9}, {"peak-below-14gb", "fits-16gb"}),
        ({"allocator_retries": 1}, {"peak-below-14gb"}),
        ({"grown": 1e9}, {"does-not-grow"}),
    ],
)
def test_fitting_means_peak_retries_and_growth(summary: dict[str, Any], failing: set[str]) -> None:
    assert {claim.id for claim in fit_claims(card_run(**summary)) if claim.verdict == "fails"} == failing


def test_a_run_that_diverged_does_not_show_that_it_fits() -> None:
    diverged = card_run(peak_memory_bytes=15 * 10**9, diverged="the loss is nan")
    assert {claim.id: claim.verdict for claim in fit_claims(diverged)} == {
        "fits-16gb": "open", "peak-below-14gb": "fails", "does-not-grow": "open"
    }  # fmt: skip


def test_a_run_that_was_over_between_two_samples_says_nothing_of_growth() -> None:
    run: Any = card_run()
    run.vram = run.vram.iloc[:0]
    assert [claim.id for claim in fit_claims(run)] == ["fits-16gb", "peak-below-14gb"]


def phase(whole_ms: float, held_bytes: int | None = None) -> PredictPhase:
    jump = JumpTimes(0.0, 0.0, 0.0, 0.0, whole_ms, steps=20)
    with_context = held_bytes and held_bytes + 900_000_000
    return PredictPhase(held_bytes, held_bytes, with_context, (jump,), gradient_step_ms=1.0)


def test_what_was_not_measured_makes_no_claim() -> None:
    assert fit_claims(card_run(memory_source="process")) == []
    assert predict_claim(phase(1.0)) == []
    assert predicted_claims([replace(measured(), measured_allocated_bytes=None)]) == []


def test_predict_is_judged_by_what_torch_holds() -> None:
    (claim,) = predict_claim(phase(1.0, 3_600_000_000))
    assert claim.verdict == "holds"
    assert claim.value("with_context") == 4_500_000_000
    assert predict_table({"none": phase(10.0), "cpu": phase(15.0)}, "none").cells()[1][5] == "1.50"
    assert predict_table({}, "none").cells() == [["no run jumped"]]


def with_steps(*steps_ms: float | None, busy_percent: float | None = None) -> Footprint:
    return replace(measured(), steps_ms=steps_ms, gpu_busy_percent=busy_percent)


@pytest.mark.parametrize(
    ("steps_ms", "verdict"),
    [((1.4, 1.38, 1.41), "holds"), ((1.6, 1.58, 1.61), "fails"), ((1.2, 1.4, 1.6), "open"), ((1.4,), "open")],
)
def test_step_times_are_paired_by_seed_and_open_with_one(steps_ms: tuple[float, ...], verdict: str) -> None:
    (claim,) = step_time_claims(with_steps(*steps_ms), with_steps(1.0, 1.0, 1.0))
    assert (claim.verdict, claim.value("step_ratio")) == (verdict, pytest.approx(geometric_mean(steps_ms)))


def test_the_time_in_which_the_gpu_waits_is_told_apart() -> None:
    waiting, busy = with_steps(1.6, 1.6, busy_percent=50.0), with_steps(1.0, 1.0, busy_percent=80.0)
    (claim,) = step_time_claims(waiting, busy)
    assert (claim.verdict, claim.value("busy_ratio")) == ("fails", pytest.approx(1.0))
    assert "50%" in str(cost_table([waiting, busy], "arm"))
    assert "busy" not in str(cost_table([measured()], "arm"))


def test_the_step_beside_the_control_s_is_that_of_the_run_whose_memory_was_measured() -> None:
    """In 04 further seeds of float32 arms are trained in TF32, which is faster."""
    shown = cost_table([replace(with_steps(3.0, 3.0), arm="bf16"), replace(with_steps(9.0, 4.0), arm="fp32")], "fp32")
    assert [row[-1] for row in shown.cells()] == ["0.33", "1.00"]


def test_runs_without_a_gpu_and_runs_too_short_have_no_step_time() -> None:
    without_a_gpu = replace(measured(), measured_allocated_bytes=None)
    assert step_time_claims(without_a_gpu, measured()) == step_time_claims(with_steps(None), measured()) == []


@pytest.mark.parametrize(
    ("steps", "divergences", "last", "verdict"),
    [(1000, 0, 4.0, "holds"), (999, 0, 4.0, "open"), (999, 1, 4.0, "fails"), (1000, 1, 4.0, "fails"),
     (1000, 0, 6.0, "fails"), (40, 0, 6.0, "fails")],
)  # fmt: skip
def test_a_run_that_was_too_short_to_be_called_stable_leaves_it_open(
    steps: int, divergences: int, last: float, verdict: str
) -> None:
    losses = pd.DataFrame({"measured_loss": [5.0] * 20 + [last] * 20})
    run: Any = SimpleNamespace(closing_figures={"nominal_steps": steps, "divergences": divergences}, steps=losses)
    assert stable_run_claim(run).verdict == verdict


def test_what_the_card_could_not_hold_is_not_claimed_about() -> None:
    fits = replace(measured(change=Interval.of([0.01])), arm="fit_16gb")
    free, control = (replace(measured(), arm=arm) for arm in ("no limits", "fp32"))
    words = {"control": "fp32", "fast": "no limits"}
    claims = reference_claims(fits, [free, control], **words)
    assert [(claim.id, claim.arm) for claim in claims] == [("step-time", "fit_16gb"), ("fit_16gb-quality", "fit_16gb")]
    committed = load_results(Path(__file__).parents[1] / "executed/rtx5080/results.json")["06_gpt2_xl"]
    published = {"parameters": committed["parameters"], "claims": [claim.record() for claim in claims]}
    assert any("step-time.step_ratio" in kept["figures"] for kept in repeats_of(committed, published))
    assert reference_claims(fits, [], **words) == []
    assert cost_table([fits], "fp32", fast="no limits").cells()[0][-1] == "–"


def test_a_card_runs_what_it_can_hold_and_the_rest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = BASE, replace(BASE, name="large", task=replace(TASK, batch_size=64))
    assert room_for([small, large]) == ([small, large], {}), "without a card"
    between = (plan_of(small).peak_on_gpu_bytes + plan_of(large).peak_on_gpu_bytes) // 2
    monkeypatch.setattr(planning, "gpu_bytes_of", lambda _: between)
    held, left_out = room_for([small, large])
    assert held == [small]
    needed = plan_of(large).peak_on_gpu_bytes
    assert left_out == {"large": f"needs {needed / 1e9:.1f} GB, this GPU has {between / 1e9:.1f}"}


def test_what_the_host_cannot_keep_is_left_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = replace(BASE, name="jumps", hybrid=replace(JUMPS, memory=MemoryConfig.conservative()))
    monkeypatch.setattr(planning, "gpu_bytes_of", lambda _: 10**12)
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: SimpleNamespace(available=LEFT_TO_OTHERS_BYTES))
    held, left_out = room_for([BASE, jumps])
    assert held == [BASE]
    assert left_out == {"jumps": "needs 0.0 GB of host memory, 0.5 are available"}


@pytest.mark.slow
def test_xl_s_notebook_tells_what_it_can_where_its_references_have_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[1]
    copy = project(tmp_path) / "executed" / "cpu" / "06_gpt2_xl.ipynb"
    monkeypatch.chdir(tmp_path)
    settings = [("steps", "8"), ("reference_steps", "0"), ("predict_steps", "0"), ("first_blocks", "0")]
    run_notebook(
        prepared(root / "notebooks" / copy.name, copy, [root / "params" / "cpu" / "06_gpt2_xl.yaml"], settings)
    )
    claims = load_results(copy.parent / "results.json")["06_gpt2_xl"]["claims"]
    assert [claim["id"] for claim in claims] == ["stable-1000-steps"]


def evaluated(**losses: float) -> Any:
    """A run that was evaluated after some steps: `after_10=3.5`."""
    steps = [int(name.removeprefix("after_")) for name in losses]
    frame = pd.DataFrame({"nominal_step": steps, "validation_loss": list(losses.values())})
    return Run(Path("here"), {}, frame, pd.DataFrame(), None)


@pytest.mark.parametrize(
    ("strict_losses", "verdict"),
    [
        ((3.005, 3.02, 2.985), "holds"),
        ((3.01, 3.03, 2.96), "open"),  # in the mean they are equal, and the interval reaches beyond
        ((3.05, 3.07, 3.03), "fails"),
        ((2.96, 2.98, 2.94), "fails"),
        ((3.0,), "open"),  # one seed has no interval
    ],
)
def test_number_formats_agree_where_the_whole_interval_lies_within_two_per_cent_of_the_perplexity(
    strict_losses: tuple[float, ...], verdict: str
) -> None:
    """By the losses where the strict runs ended, not where TF32's did."""
    runs = {("strict", seed): evaluated(after_5=9.0, after_10=loss) for seed, loss in enumerate(strict_losses)}
    runs |= {
        ("tf32", 0): evaluated(after_5=8.0, after_10=3.0, after_15=1.0),
        ("tf32", 1): evaluated(after_10=3.02),
        ("tf32", 2): evaluated(after_10=2.98),
        ("fit_16gb", 0): evaluated(after_10=5.0),
    }
    agreement = format_agreement(StudyResult(runs), "strict", "tf32", at_step=10)
    [claim] = agreement_claims(agreement)
    assert (claim.id, claim.verdict) == ("tf32-stands-for-fp32", verdict)
    assert claim.value("difference_in_loss") == pytest.approx(
        sum(other - mine for mine, other in zip(strict_losses, (3.0, 3.02, 2.98), strict=False)) / len(strict_losses)
    )
    assert {"strict_seed_0_loss", "tf32_seed_0_loss"} < {q.name for q in claim.quantities}
    with pytest.raises(UserError, match="was not evaluated at step 15"):
        format_agreement(StudyResult(runs), "strict", "tf32", at_step=15)


def test_number_formats_that_did_not_run_are_not_spoken_of() -> None:
    runs = {("tf32", 0): evaluated(after_10=3.0)}
    assert agreement_claims(format_agreement(StudyResult(runs), "strict", "tf32", at_step=10)) == []


def test_weights_of_24_bits_are_judged_by_memory_time_and_loss() -> None:
    change = Interval.of([0.01, 0.011, 0.012])
    few = replace(with_steps(1.2, 1.2, 1.2), arm="few", peak_memory_bytes=9_400_000_000)
    ended = replace(few, change=change, base=replace(LEAST, steps=1000))
    exact = replace(few, arm="exact", peak_memory_bytes=12_600_000_000)
    free = replace(with_steps(1.0, 1.0, 1.0), arm="free")
    claims = few_bits_claims(few, [exact, free], ended, exact="exact", fast="free")
    assert {claim.id: claim.verdict for claim in claims} == {
        "few-few-bits-peak": "holds",
        "exact-predicted-within-10-percent": "holds",
        "exact-masters-peak": "fails",
        "few-bits-step-time": "fails",
        "few-few-bits-quality": "holds",
    }
    assert claims[-1].text == "few: validation loss at most 0.5 % above that of exact after 1000 steps (3 seeds)"
    assert claims[-1].quantities[0].bound == pytest.approx(0.005 * (ended.validation_loss - change.mean))
    unmeasured = replace(few, measured_allocated_bytes=None)
    assert few_bits_claims(unmeasured, [], unmeasured, exact="exact", fast="free") == []
