"""The plan's success criteria, and which published claims decide each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, Protocol

from hybridlab.notebook.views.depth import GROWN
from hybridlab.report.evidence import MEMORY, PRESETS, Evidence
from hybridlab.report.rules import Claims, Faster, Finding, LeastTime, OnMachines, Outcome, Peak, Planned, Ran, Savings

MNIST = "01_mnist_cnn"
BASELINE, HYBRID = "02_gpt2_small_baseline", "03_gpt2_small_hybrid"
MEDIUM, XL = "05_gpt2_medium", "06_gpt2_xl"
LADDER, DEPTH = "08_speed_ladder", "10_predicted_depth"


class Rule(Protocol):
    """What finds out about a criterion."""

    def findings(self, evidence: Evidence) -> list[Finding]:
        """What it found, each with an outcome of its own."""
        ...


@dataclass(frozen=True)
class Criterion:
    """A sentence of the plan, and the rules that decide it; two that the same rules decide are equal.

    need: "all" findings must hold, or "any" one of them is enough
    otherwise: of a criterion on the time that prediction saves, what else may save as much; it counts where prediction
        in time does not
    """

    text: str = field(compare=False)
    rules: tuple[Rule, ...]
    need: Literal["all", "any"] = "all"
    otherwise: tuple[Rule, ...] = field(default=(), compare=False)

    def findings(self, evidence: Evidence) -> list[Finding]:
        """What every rule found, and what saves as much by other means."""
        return [*self._found(evidence), *self._by_other_means(evidence)]

    def outcome(self, evidence: Evidence) -> Outcome:
        """What decides alone; else open, where a part was measured and a part is missing or open; then other means."""
        outcomes = {finding.outcome for finding in self._found(evidence)}
        order = WORST if self.need == "all" else BEST
        found = next(outcome for outcome in order if outcome in outcomes)
        if found in MISSING and outcomes & MEASURED:
            found = "open"
        saved = any(finding.outcome == "holds" for finding in self._by_other_means(evidence))
        return SAVED.get(found, found) if saved else found

    def _found(self, evidence: Evidence) -> list[Finding]:
        return [finding for rule in self.rules for finding in rule.findings(evidence)]

    def _by_other_means(self, evidence: Evidence) -> list[Finding]:
        found = [finding for rule in self.otherwise for finding in rule.findings(evidence)]
        return [replace(it, otherwise=True) for it in found if it.outcome not in MISSING]


MISSING: tuple[Outcome, ...] = ("not run yet", "not measured")
MEASURED: set[Outcome] = {"holds", "fails", "open"}
WORST: tuple[Outcome, ...] = ("fails", "cannot hold", *MISSING, "open", "predicted nothing", "holds")
BEST: tuple[Outcome, ...] = ("holds", "cannot hold", *MISSING, "open", "fails", "predicted nothing")
"""Of several outcomes a criterion has the first of these, where all must hold and where one is enough.

What is missing leaves it open beside anything that was measured, and is said only where nothing was.
"""

SAVED: dict[Outcome, Outcome] = {
    "fails": "holds, but by other means",
    "open": "holds, but by other means",
    "predicted nothing": "holds, but by other means",
    "cannot hold": "cannot hold, but by other means it does",
}
"""Outcomes of prediction in time, and what a criterion has where other means save as much."""


def of_presets(kind: str, suffix: str = "", **bound: Any) -> Claims:
    """The claims of notebook 03 on both presets. bound: as `Claims` takes it."""
    return Claims(HYBRID, kind, tuple(f"{preset}{suffix}" for preset in PRESETS), **bound)


def of_all_arms(kind: str, **bound: Any) -> tuple[Claims, ...]:
    """The same on all arms of the presets, with the checks on predictions and without."""
    return of_presets(kind, **bound), of_presets(kind, ", unguarded", **bound)


def in_all_models(tolerance: float) -> tuple[Claims, ...]:
    """The claims of all models that quality is kept, within so many nats."""
    others = (Claims(notebook, "quality", below=tolerance) for notebook in (MEMORY, MEDIUM, XL))
    return of_presets("quality", below=tolerance), *others


def in_depth(share: float, *notebooks: str) -> tuple[Rule, ...]:
    """That a grown model takes at most this share of a plain run's time to the same loss, in these notebooks."""
    return tuple(Faster("predicted depth", notebook, "time_to_loss", share) for notebook in notebooks)


def in_less_time(share: float) -> tuple[Rule, ...]:
    """What may take at most this share of the time by other means: predicted depth, and all that is faster, stacked."""
    stack = Faster("the whole stack, against the vanilla FP32 run", LADDER, "stack_time_ratio", share)
    return (*in_depth(share, *SMALL), stack)


IN_DEPTH, OURS = "The plan's promise of time, by predicting depth", "Beyond the plan"
"""The same asked of another kind of prediction, and what we ask of ourselves: not counted among the plan's criteria."""

OVERALL = ("Overall: must have", "Overall: nice to have")
"""The groups that sum up what others have in detail."""

SMALL = (HYBRID, DEPTH)
"""The notebooks that grow GPT-2 Small."""

GROWING = {"GPT-2 Small": SMALL, "GPT-2 Medium": (MEDIUM,), "GPT-2 XL": (XL,)}
"""The models that are grown, and the notebooks that do it."""


def grown(kind: str) -> tuple[Claims, ...]:
    """The claims of every notebook that grows a model."""
    return (*(Claims(notebook, kind, (GROWN,)) for notebook in (HYBRID, MEDIUM, XL)), Claims(DEPTH, kind))


ONE_PERCENT, TWO_PERCENT = math.log1p(0.01), math.log1p(0.02)
"""In nats: the loss that costs 1 and 2 % of perplexity."""

CRITERIA: dict[str, tuple[Criterion, ...]] = {
    "2A MNIST: what the plan starts from": (
        Criterion("Conservative: 1.35 times as fast, no less accurate", (Claims(MNIST, "speedup", PRESETS[:1]),)),
        Criterion("Aggressive: 1.88 times as fast, no less accurate", (Claims(MNIST, "speedup", PRESETS[1:]),)),
    ),
    "1.1 GPT-2 Small: the architecture": (
        Criterion("The model builds; forward and backward pass work", (Claims(BASELINE, "converges"),)),
        Criterion("Trains 100 steps without running out of memory", (Ran(BASELINE, 100),)),
    ),
    "1.2 GPT-2 Small: the baseline": (
        Criterion("Training completes 1000 steps", (Ran(BASELINE, 1000),)),
        Criterion("The loss converges (decreasing trend)", (Claims(BASELINE, "converges"),)),
        Criterion("Peak VRAM below 5 GB, in FP32 as the plan has it", (Peak(MEMORY, "fp32", 5e9),)),
    ),
    "1.3 GPT-2 Small: hybrid training": (
        Criterion(
            "40 to 60 % less time on a GPU, at the baseline's quality, in one arm at least",
            of_all_arms("speed"),
            "any",
            in_less_time(0.6),
        ),
        Criterion("Perplexity within 2 % of the baseline", (of_presets("quality"),)),
        Criterion("The same without confidence threshold and gate", (of_presets("quality", ", unguarded"),)),
        Criterion("Zero divergences", of_all_arms("stable")),
        Criterion("Peak VRAM below 5 GB", (of_presets("vram"),)),
    ),
    "1.4 GPT-2 Small: memory optimizations": (
        Criterion("VRAM savings within ±10 % of the plan's estimates", (Savings(("small",)),)),
        Criterion("Quality degradation below 1 % of the validation loss", (Claims(MEMORY, "quality"),)),
        Criterion("The same of the perplexity", (Claims(MEMORY, "quality", below=ONE_PERCENT),)),
        Criterion("All tests complete without running out of memory", (Claims(MEMORY, "completes"),)),
    ),
    "2 GPT-2 Medium": (
        Criterion("The baseline fits 16 GB", (Claims(MEDIUM, "baseline-fits-16gb"),)),
        Criterion("Optimized, it uses less than 2 GB", (Claims(MEDIUM, "optimized-below-2gb"),)),
        Criterion("Perplexity within 2 % of the baseline", (Claims(MEDIUM, "quality", below=TWO_PERCENT),)),
    ),
    "3 GPT-2 XL, the plan's 1B model": (
        Criterion("Fits 16 GB with optimizations", (Claims(XL, "fits-16gb"),)),
        Criterion("Peak VRAM below 14 GB", (Claims(XL, "peak-below-14gb"),)),
        Criterion("Training stable for 1000 steps and more", (Claims(XL, "stable-1000-steps"),)),
        Criterion("Perplexity within 2 % of the baseline", (Claims(XL, "quality", below=TWO_PERCENT),)),
    ),
    OVERALL[0]: (
        Criterion("Fits 16 GB with optimizations", (Claims(XL, "fits-16gb"),)),
        Criterion("Peak VRAM below 14 GB", (Claims(XL, "peak-below-14gb"),)),
        Criterion("Perplexity within 2 % of the baseline in all models", in_all_models(TWO_PERCENT)),
        Criterion(
            "Training stable, zero divergences",
            (Claims(MNIST, "stable"), *of_all_arms("stable"), Claims(XL, "stable-1000-steps")),
        ),
        Criterion("VRAM savings within ±10 % of the plan's estimates", (Savings(("small", "medium", "xl")),)),
    ),
    OVERALL[1]: (
        *(
            Criterion(
                f"{saved} % less time on a GPU, at the baseline's quality, in one arm at least",
                (*of_all_arms("speed", below=1 - saved / 100, of="time ratio"), LeastTime(1 - saved / 100)),
                "any",
                in_less_time(1 - saved / 100),
            )
            for saved in (60, 78)
        ),
        Criterion("Perplexity within 1 % of the baseline in all models", in_all_models(ONE_PERCENT)),
        Criterion("7B model exploration", (Planned("seven_billion"),)),
    ),
    IN_DEPTH: (
        *(
            Criterion(
                f"{model}: 40 to 60 % less time than a plain run to the same loss", in_depth(0.6, *notebooks), "any"
            )
            for model, notebooks in GROWING.items()
        ),
        Criterion(
            "60 to 78 % less time than a plain run to the same loss, of one model at least",
            in_depth(0.4, *chain(*GROWING.values())),
            "any",
        ),
        Criterion("At the plan's scale, growing beats a plain run of as much computation", grown("pays")),
        Criterion(
            "At the plan's scale, depth pays: the grown model ends below the shallow one of as much computation",
            grown("depth-pays"),
        ),
    ),
    OURS: (
        Criterion(
            "The planner's peaks of allocated memory within ±10 % of what was measured",
            tuple(Claims(notebook, "predicted-within-10-percent") for notebook in (MEMORY, MEDIUM, XL)),
        ),
        Criterion("The tuned baseline, in bf16, peaks below 5 GB", (Claims(BASELINE, "vram"),)),
        Criterion(
            "The whole stack reaches the vanilla FP32 run's loss in 1/15 of its time, compilation not counted",
            (Claims(LADDER, "stack-is-fast"),),
        ),
        Criterion(
            "A step takes at most 0.75 of that of nanoGPT's loop, on every machine",
            (OnMachines(LADDER, "step-beside-nanogpt"),),
        ),
        Criterion(
            "A step with Muon takes at most 1.25 of one with AdamW, on every machine",
            (OnMachines(LADDER, "muon-beside-adamw"),),
        ),
    ),
}
"""The plan's groups of criteria, in its order; each names the claims that decide it."""


def everywhere() -> list[tuple[str, Criterion]]:
    """Every criterion, with the title of its group."""
    return [(title, criterion) for title, group in CRITERIA.items() for criterion in group]
