"""Tables of docs/experiments.md are those that its scripts make of the losses committed beside them."""

from __future__ import annotations

import importlib.util
import json
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import pytest

from hybridlab.results.claims import Quantity
from hybridlab.results.words import in_words, quantity_interval
from hybridlab.study.rates import RateTrials
from hybridlab.study.statistics import Interval, formatted
from tests.test_statistics import study_of

FOLDER = Path(__file__).parents[1] / "docs" / "experiments"
MICRO, MINI = (FOLDER.parents[1] / "executed" / f"rtx5080_{size}" for size in ("micro", "mini"))
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


def test_depth_of_six_narrow_blocks_follows_from_its_runs() -> None:
    """Each arm beside every control, its own plain one and the equal one of the other arm."""
    page = " ".join(PAGE.split())
    published = json.loads((MICRO / "results.json").read_text(encoding="utf-8"))["10_predicted_depth"]
    runs = pd.DataFrame(published["tables"]["runs"])
    losses = runs.set_index(["budget", "arm", "seed"])["validation_loss"].sort_index()
    grown, fresh, shallow = "grown from 3", "fresh from 3", "shallow, 3 blocks"
    own, other, longer = (f"control of {grown}", f"control of {fresh}", f"control of {grown}, shallow")

    def beside(budget: int, arm: str, control: str) -> Interval:
        return Interval.of((losses[budget, arm] - losses[budget, control]).tolist())

    pays = {claim["arm"]: claim for claim in published["claims"] if claim["kind"] == "pays"}
    for budget, tokens in ((266, 5), (1062, 20), (5312, 100)):
        for arm in (grown, fresh):
            quantities = {q["name"]: Quantity(**q) for q in pays[f"{arm}, {budget} steps"]["quantities"]}
            ends = f"{losses[budget, arm].mean():.4f} | {quantity_interval(quantities['loss_to_control'])}"
            controls = " | ".join(str(beside(budget, arm, control)) for control in (shallow, longer))
            ratio = in_words(quantities["compute_to_loss"])
            assert f"| {tokens} | {arm} | {ends} | {controls} | {ratio} |" in PAGE
    low, high = beside(5312, grown, "baseline").low, beside(5312, grown, "baseline").high
    assert f"by {beside(5312, grown, 'baseline').mean:.3f} [{low:.3f}, {high:.3f}] nats" in page
    tried = pd.DataFrame(published["tables"]["rates"]).set_index(["budget", "arm", "rate"])["loss"].sort_index()
    apart = {
        budget: max((kind[budget, own] - kind[budget, other]).abs().max() for kind in (losses, tried))
        for budget in (266, 5312)
    }
    assert f"by up to {apart[266]:.3f} nats at 5 and {apart[5312]:.3f} at 100" in page
    assert f"comes to {beside(266, fresh, own)}, which" in page
    assert min(2 * beside(266, fresh, own).p_value, 1) > 0.05, "Holm's correction for two arms"
    assert f"*grown* at 100 to {beside(5312, grown, other)}." in page
    assert f"on each seed, by {beside(266, fresh, grown)};" in page
    above = losses[5312, fresh] - losses[5312, grown]
    assert f"by {above.min():.3f} to {above.max():.3f}, but the interval of their mean holds 0" in page
    assert beside(5312, fresh, grown).low < 0
    time = Quantity(**next(q for q in pays[f"{grown}, 5312 steps"]["quantities"] if q["name"] == "time_over_baseline"))
    assert f"took {in_words(time)} times" in page
    steps = runs.set_index(["budget", "arm"])["gradient_steps"].groupby(level=[0, 1]).first()
    assert f"{steps[5312, longer]:,} instead of {steps[5312, grown]:,}" in page
    passes = [steps[5312, arm] * 128 * 64 / published["data"]["train_tokens"] for arm in (grown, longer)]
    assert [f"its text {passes[0]:.2f} times" in page, f"seen it {passes[1]:.2f} times" in page] == [True, True]


def test_passes_over_the_text_at_10_000_steps_are_those_of_its_run() -> None:
    results = json.loads((FOLDER.parents[1] / "executed" / "rtx5080_10k" / "results.json").read_text(encoding="utf-8"))
    ran, tokens = results["10_predicted_depth"]["parameters"], results["10_predicted_depth"]["data"]["train_tokens"]
    seen = ran["budgets"][0] * ran["batch_size"] * ran["block_size"]
    assert f"The {seen / 1e6:.0f} million tokens are three and a half passes over the text." in " ".join(PAGE.split())
    assert round(seen / tokens, 1) == 3.5


def test_depth_of_a_mini_follows_from_its_runs() -> None:
    page, (grown, shallow) = " ".join(PAGE.split()), ("grown from 6", "shallow, 6 blocks")
    own, longer = f"control of {grown}", f"control of {grown}, shallow"
    published = json.loads((MINI / "results.json").read_text(encoding="utf-8"))["10_predicted_depth"]
    runs = pd.DataFrame(published["tables"]["runs"])
    losses = runs.set_index(["budget", "arm", "seed"])["validation_loss"].sort_index()
    pays = {claim["arm"]: claim for claim in published["claims"] if claim["kind"] == "pays"}
    for budget, tokens in ((82, 1), (326, 4), (1632, 20)):
        ratio = next(q for q in pays[f"{grown}, {budget} steps"]["quantities"] if q["name"] == "compute_to_loss")
        beside = [losses[budget, grown] - losses[budget, control] for control in (own, shallow, longer)]
        controls = " | ".join(str(Interval.of(difference.tolist())) for difference in beside)
        (line,) = (
            row for row in PAGE.splitlines() if row.startswith(f"| {tokens} | {losses[budget, grown].mean():.4f} |")
        )
        assert f"| {controls} | {in_words(Quantity(**ratio))}" in line
        assert tokens == 1 or f"{ratio['value']:.1f}" == "1.3", "times the computation"
    assert f"by at most {beside[-1].max():.3f} nats: six blocks end lower on each of five seeds" in page
    assert (beside[-1] > 0).all()
    plain = Interval.of((losses[1632, longer] - losses[1632, "baseline"]).tolist())
    assert f"end at {plain} nats, in 77 % of the computation" in page
    whole = Interval.of((losses[1632, grown] - losses[1632, "baseline"]).tolist())
    assert f"ends at {whole} nats against it" in page
    by_arm = runs.set_index(["budget", "arm"])[["gradient_steps", "cost_in_full_steps"]].groupby(level=[0, 1]).first()
    assert round(100 * by_arm["cost_in_full_steps"][1632, longer] / 1632) == 77
    steps = by_arm["gradient_steps"]
    assert f"{steps[1632, longer]:,} instead of {steps[1632, grown]:,}" in page
    passes = [steps[1632, arm] * 32_768 / published["data"]["train_tokens"] for arm in (grown, longer)]
    assert [f"its text {passes[0]:.2f} times" in page, f"seen it {passes[1]:.2f} times" in page] == [True, True]
    seconds = runs[(runs["arm"] == grown) & (runs["budget"] == 1632)]["seconds"]
    assert f"between {seconds.min():.1f} and {seconds.max():.1f} s" in page


def test_plans_of_other_architectures_stand_beside_what_a_gpu_counted() -> None:
    page, found = " ".join(PAGE.split()), committed("architectures_eager")
    off = {kind: {row["config"]: row[f"{kind}_error"] for row in found["eager"]} for kind in ("allocated", "on_gpu")}
    for row in found["eager"]:
        cells = [
            f"{row[f'planned_{kind}_bytes'] / 1e9:.2f} | {row[f'measured_{kind}_bytes'] / 1e9:.2f} "
            f"| {100 * row[f'{kind}_error']:+.1f} %"
            for kind in ("allocated", "on_gpu")
        ]
        assert f"| {row['config']} | {' | '.join(cells)} |" in PAGE
    least, most = (100 * of(off["on_gpu"].values()) for of in (min, max))
    assert max(-least, most) < 2, "as README says"
    assert f"{max(100 * abs(error) for error in off['allocated'].values()):.1f}" == "0.1"
    beside = f"which decides whether a model fits, between {-least:.1f} % too little and {most:.1f} % too much."
    assert f"is planned within 0.1 %, what the **GPU holds**, {beside} These are not" in page
    first = {kind: [100 * row[f"first_{kind}_error"] for row in found["eager"]] for kind in off}
    low, high = min(first["allocated"]), max(first["allocated"])
    assert f"those were {-low:.1f} % too little to {high:.1f} % too much, and" in page
    low, high = min(first["on_gpu"]), max(first["on_gpu"])
    assert f"of what the GPU holds {-low:.1f} % too little to {high:.1f} % too much." in page
    assert len(found["not_captured"]) == 13, "models that were tried in graphs"
    assert [name for name, why in found["not_captured"].items() if "between CPU" in why] == ["bloom", "mpt"]


def test_a_verdict_on_a_mini_differs_between_two_trainings_of_its_seeds() -> None:
    page, grown, budget = " ".join(PAGE.split()), "grown from 6", 1632
    published = json.loads((MINI / "results.json").read_text(encoding="utf-8"))["10_predicted_depth"]
    runs = (
        pd.DataFrame(published["tables"]["runs"]).set_index(["budget", "arm", "seed"])["validation_loss"].sort_index()
    )
    first = json.loads((FOLDER / "mini_first_losses.json").read_text(encoding="utf-8"))
    moved = [
        [now - then for now, then in zip(runs[int(steps), arm], losses, strict=True)]
        for steps, arms in first.items()
        for arm, losses in arms.items()
    ]
    means, seeds = (max(map(abs, x)) for x in (map(fmean, moved), chain.from_iterable(moved)))
    assert f"moved by at most {means:.3f} nats, one seed by up to {seeds:.3f}," in page
    beside = [
        a - b for a, b in zip(first[f"{budget}"][grown], runs[budget, f"control of {grown}, shallow"], strict=True)
    ]
    above = sum(x > 0 for x in beside)
    assert (above, f"ended at {Interval.of(beside)} nats" in page) == (4, True)
