"""What notebook 00 needs of a model that is not ours: how long to train, what fits a GPU, and a recipe to paste."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch

from hybridlab.base.errors import UserError
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.memory.checkpointing import blocks_of
from hybridlab.planner.gpu_specs import find_gpu
from hybridlab.planner.suggest import fit_or_least
from hybridlab.planner.text_report import Question, code_of, report_lines
from hybridlab.results.claims import Claim, Quantity, holds_if
from hybridlab.study.comparison import Comparison
from hybridlab.study.config import RunConfig
from hybridlab.study.planning import plan_of, training_spec_of
from hybridlab.study.run import train
from hybridlab.study.statistics import LEAST
from hybridlab.study.study import Study

TRIAL_STEPS = 40
"""Of the run that measures how long a step takes."""


def blocks_in(config: RunConfig, first_blocks: int = 0) -> int:
    """How many blocks the task's model repeats.

    Raises UserError for a model without, whose depth cannot be predicted, and where it begins with all or more of them.
    """
    blocks = len(blocks_of(config.task.build(0, torch.device("cpu")).model))
    if not blocks:
        raise UserError("the model repeats no block: set first_blocks to -1, and no depth is predicted")
    if max(1, first_blocks) >= blocks:
        raise UserError(f"first_blocks must be below the model's blocks, {blocks}; -1 predicts no depth")
    return blocks


def steps_within(minutes: float, study: Study) -> int:
    """The length of the baseline with which a study takes about so many minutes here, by a short run's step time.

    At least what a verdict needs, and so many that each predictor has a path to predict from for half of them; rounded
    to tens.
    """
    short = replace(study.base, steps=TRIAL_STEPS, schedule=study.base.lr_schedule.fitted_to(TRIAL_STEPS))
    with tempfile.TemporaryDirectory() as folder:
        figures = train(replace(short, evaluate_every=TRIAL_STEPS), Path(folder)).closing_figures
    fractions = study.control_fractions
    runs = sum(fractions) + len(study.arms()) - len(fractions)  # each of the others costs a baseline at most
    steps = 60e3 * minutes / (figures["gradient_step_ms"] * study.seeds * runs)
    predicting = [(hybrid, needs) for hybrid in study.hybrids.values() if (needs := hybrid.path_needs)]
    least = [2 * (hybrid.warmup_steps + needs.rows * needs.every) for hybrid, needs in predicting]
    return max(LEAST.steps, *least, 10 * round(steps / 10))


def fit_report(config: RunConfig, card: str) -> str:
    """For the run's vocabulary and batch: memory on that GPU, and what to switch on where it does not fit."""
    vocabulary = [f"A vocabulary of {size} tokens" for size in [getattr(config.task, "vocab_size", None)] if size]
    return "\n".join([*vocabulary, *report_lines(Question(training_spec_of(config), *find_gpu(card)))])


def fits_claim(config: RunConfig, card: str) -> Claim:
    """Whether the run as it is fits that GPU, by the plan."""
    plan, (gpu_bytes, _) = plan_of(config), find_gpu(card)
    quantities = (Quantity("peak_on_gpu", plan.peak_on_gpu_bytes, unit="bytes"),)
    text = f"by the plan, the training fits a GPU of {gpu_bytes / 1e9:g} GB"
    return Claim("fits", text, holds_if(plan.fits(gpu_bytes)), quantities)


def best_arm(comparisons: Iterable[Comparison]) -> str | None:
    """Of the arms that beat their controls beyond doubt, the one that beats its own by most; None where none does."""
    paying = [comparison for comparison in comparisons if comparison.pays]
    return min(paying, key=lambda comparison: comparison.order).name if paying else None


def recipe(base: RunConfig, arm: str | None, hybrids: Mapping[str, HybridTrainerConfig], card: str) -> str:
    """Python to paste: the run that the study speaks for, with what it takes to fit that GPU."""
    memory = fit_or_least(training_spec_of(base), find_gpu(card)[0]).spec.memory
    hybrid = hybrids[arm] if arm else base.hybrid
    if memory != base.memory and not (hybrid.depth and memory.state_on_host):
        clip = None if memory.step_in_backward else hybrid.clip_norm
        hybrid = replace(hybrid, memory=memory, clip_norm=clip)
    config = replace(base, name="mine", hybrid=hybrid, device="auto", cpu_threads=0, keep_weights=True)
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(_homes(config).items())]
    run = [
        "",
        f"config = {code_of(config)}",
        'session = Session(config, "mine")',
        "for result in session.run():",
        "    pass",
        'print(session.folder / "weights.pt")',
    ]
    return "\n".join([*lines, "from hybridlab.notebook import Session", *run])


def _homes(settings: object) -> dict[str, set[str]]:
    """Module -> names of all classes that settings are made of."""
    found = {type(settings).__module__: {type(settings).__name__}}
    for field in fields(settings) if is_dataclass(settings) else ():
        value = getattr(settings, field.name)
        if is_dataclass(value) and value != field.default:
            for module, names in _homes(value).items():
                found.setdefault(module, set()).update(names)
    return found
