"""When to grow, from how many blocks, by which rule, at once or in stages: every choice against as much computation.

python docs/experiments/choices_of_growth.py trains all arms (half an hour on one core), writes the losses and costs of
every run beside this file, and prints the tables of docs/experiments.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybridlab import DepthSchedule, HybridTrainerConfig
from hybridlab.notebook import run_rows, run_study
from hybridlab.optim import OptimizerConfig, Schedule
from hybridlab.study import RunConfig, Study, StudyResult, TextTaskConfig, compare
from hybridlab.study.statistics import Interval

STEPS, PLAIN_RATE, GROWN_RATE, BLOCKS = 240, 0.002, 0.001, 6


LATE = "3, all at 70%"
"""The arm that others are held against, by seed."""


def grown(first: int, at: float, rule: str = "interleave", **more: Any) -> DepthSchedule:
    """So many blocks, then all of them, at a share of the run."""
    return DepthSchedule.shares(((0.0, first), (at, BLOCKS)), rule=rule, **more)


SCHEDULES = {
    **{f"3, all at {at:.0%}": grown(3, at) for at in (0.3, 0.5, 0.7, 0.9)},
    **{f"{first}, all at 70%": grown(first, 0.7) for first in (1, 2)},
    "0, all at 70%, fresh": grown(0, 0.7, "fresh"),
    **{f"3, all at 70%, {rule}": grown(3, 0.7, rule) for rule in ("fresh", "stack", "linear", "best")},
    "1, 3 at 40%, all at 70%": DepthSchedule.shares(((0.0, 1), (0.4, 3), (0.7, BLOCKS))),
    "3, all at 70%, re-warmed over 20 steps": grown(3, 0.7, rewarm_steps=20),
    "3, all at 70%, a third skipped until then": grown(3, 0.7, skip_share=0.34, skip_until=0.7),
    "all, a third skipped until 70%": DepthSchedule.shares(((0.0, BLOCKS),), skip_share=0.34, skip_until=0.7),
    **{f"{first} for ever": DepthSchedule.constant(first) for first in (1, 2, 3)},
}


PAIRS = (
    *((f"{LATE}, {rule}", LATE) for rule in ("fresh", "stack", "linear")),
    (f"{LATE}, best", f"{LATE}, fresh"),
    *((f"3, all at {at}%", LATE) for at in (30, 50, 90)),
    *((f"{first}, all at 70%", LATE) for first in (1, 2)),
    ("1, 3 at 40%, all at 70%", "1, all at 70%"),
    (f"{LATE}, re-warmed over 20 steps", LATE),
    (f"{LATE}, a third skipped until then", LATE),
    (LATE, "3 for ever"),
    (f"{LATE}, fresh", "3 for ever"),
    ("all, a third skipped until 70%", "baseline"),
    ("all, a third skipped until 70%", "control, 75% of the steps"),
)
"""Arms whose losses are compared, seed by seed."""


def study() -> Study:
    """Every schedule at one rate, plain runs of several lengths at theirs; both were bracketed in notebook 10."""
    task = TextTaskConfig(
        "micro", vocab_size=2048, block_size=64, batch_size=8, validation_batches=16, max_bytes=4_000_000
    )
    plain = HybridTrainerConfig.plain(clip_norm=1.0)
    base = RunConfig(
        "baseline",
        task,
        STEPS,
        OptimizerConfig.tuned(lr=PLAIN_RATE),
        Schedule("wsd", 40, STEPS),
        plain,
        evaluate_every=STEPS,
        device="cpu",
        cpu_threads=1,
    )
    arms = {name: HybridTrainerConfig.plain(clip_norm=1.0, depth=depth) for name, depth in SCHEDULES.items()}
    rates = tuple((name, GROWN_RATE) for name, depth in SCHEDULES.items() if depth.stages[0][1] < BLOCKS)
    return Study(base, arms, seeds=3, control_fractions=(0.5, 0.75, 1.25), rates=rates)


def table(result: StudyResult) -> str:
    """A row per arm, plain runs last."""
    lines = ["| blocks | cost | loss | against as much computation | computation to its loss | said at growth |"]
    lines.append("|---|---|---|---|---|---|")
    for c in sorted((compare(result, name) for name in SCHEDULES), key=lambda c: c.validation_loss.mean):
        events = [run.steps["event"].dropna().tolist() for (name, _), run in result.runs.items() if name == c.name]
        said = "; ".join(dict.fromkeys(e.partition("(")[2].partition(",")[0].rstrip(")") for es in events for e in es))
        control, ratio = (str(c.to_control), c.compute_to_loss) if c.grown else ("", None)
        cells = (
            c.name,
            f"{c.cost:.0f}",
            f"{c.validation_loss.mean:.3f}",
            control,
            ratio.as_ratio if ratio else "",
            said,
        )
        lines.append(f"| {' | '.join(cells)} |")
    plain = [
        name for name in dict.fromkeys(arm for arm, _ in result.runs) if "of the steps" in name or name == "baseline"
    ]
    for name in plain:
        losses = [result.value("validation_loss", name, seed) for seed in result.seeds]
        lines.append(f"| plain: {name} | {result.cost(name, 0):.0f} | {sum(losses) / len(losses):.3f} | | | |")
    return "\n".join(lines)


def differences(result: StudyResult) -> str:
    """A row per pair of arms."""
    lines = ["| arm | against | difference in loss |", "|---|---|---|"]
    for arm, other in PAIRS:
        pairs = ([result.value("validation_loss", name, seed) for name in (arm, other)] for seed in result.seeds)
        lines.append(f"| {arm} | {other} | {Interval.of([mine - theirs for mine, theirs in pairs])} |")
    return "\n".join(lines)


def figures(result: StudyResult) -> list[dict[str, Any]]:
    """What every run ended with, and what was measured where it grew."""
    kept = ("arm", "seed", "validation_loss", "cost_in_full_steps")
    events = {key: run.steps["event"].dropna().tolist() for key, run in result.runs.items()}
    return [{key: row[key] for key in kept} | {"events": events[row["arm"], row["seed"]]} for row in run_rows(result)]


if __name__ == "__main__":
    found = run_study(study(), "choices_of_growth", resume=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(figures(found), indent=1) + "\n")
    print(table(found), differences(found), sep="\n\n")
