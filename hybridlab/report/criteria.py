"""The plan's success criteria, and which published claims decide each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from hybridlab.notebook.views.depth import GROWN
from hybridlab.report.estimates import ESTIMATES
from hybridlab.report.evidence import PRESETS, Evidence, Published, arm_in_words
from hybridlab.results.claims import Unit
from hybridlab.results.words import amount, quantities_in_words

Outcome = Literal["holds", "fails", "open", "predicted nothing", "not measured", "not run yet"]
"""A claim's verdict; or its notebook has run without making the claim; or it has not run."""

MNIST = "01_mnist_cnn"
BASELINE, HYBRID, MEMORY = "02_gpt2_small_baseline", "03_gpt2_small_hybrid", "04_gpt2_small_memory"
MEDIUM, XL = "05_gpt2_medium", "06_gpt2_xl"
LADDER = "08_speed_ladder"


@dataclass(frozen=True)
class Finding:
    """One piece of evidence on one criterion: about what, how it came out, in which numbers, from where.

    emulated: it rests on memory of a larger GPU that gave no more than the smaller one has
    """

    about: str
    outcome: Outcome
    words: str
    notebook: str | None
    emulated: bool = False


@dataclass(frozen=True)
class Claims:
    """The claims of one kind in one notebook, each with its own verdict, or compared with a tighter bound.

    arms: each needs a claim; without any, every claim of the kind counts, and one is needed
    below: the bound on the quantity of unit `of`, with its whole interval if it has one
    """

    notebook: str
    kind: str
    arms: tuple[str, ...] = ()
    below: float | None = None
    of: Unit = "nats"

    def findings(self, evidence: Evidence) -> list[Finding]:
        """A claim that fails by its own bound fails a tighter one too."""
        return [finding for arm in self.arms or (None,) for finding in self._on(arm, evidence)]

    def _on(self, arm: str | None, evidence: Evidence) -> list[Finding]:
        claims = evidence.claims(self.notebook, kind=self.kind, arm=arm)
        if not claims and self.kind == "speedup" and self._predicted_nothing(arm, evidence):
            return [Finding(arm_in_words(arm or "", self.notebook), "predicted nothing", "", self.notebook)]
        about = f"{arm or ''} {self.kind.replace('-', ' ')}".strip()
        return [self._finding(claim, evidence) for claim in claims] or [_absent(self.notebook, about, evidence)]

    def _predicted_nothing(self, arm: str | None, evidence: Evidence) -> bool:
        pays = evidence.claims(self.notebook, kind="pays", arm=arm)
        return bool(pays) and all(claim.is_idle for claim in pays)

    def _finding(self, claim: Published, evidence: Evidence) -> Finding:
        of_memory = claim.kind == "completes" or any(q.unit == "bytes" for q in claim.quantities)
        emulated = of_memory and evidence.is_emulated(claim.notebook)
        words = quantities_in_words(claim.quantities)
        return Finding(claim.about, self._outcome(claim), words, claim.notebook, emulated)

    def _outcome(self, claim: Published) -> Outcome:
        if self.below is None or claim.is_idle:
            return claim.verdict
        quantity = next((q for q in claim.quantities if q.unit == self.of), None)
        if quantity is None or quantity.value is None:
            return "not measured"
        low, high = (quantity.value if end is None else end for end in (quantity.low, quantity.high))
        if claim.verdict == "fails" or low >= self.below:
            return "fails"
        return claim.verdict if high < self.below else "open"


@dataclass(frozen=True)
class Ran:
    """The notebook ran whole, with at least so many nominal steps."""

    notebook: str
    steps: int

    def findings(self, evidence: Evidence) -> list[Finding]:
        """A notebook publishes in its last cell: an entry means that everything before it ran."""
        entry = evidence.entry(self.notebook)
        if entry is None:
            return [_absent(self.notebook, "run", evidence)]
        steps = entry["parameters"].get("steps")
        if steps is None:
            return [Finding("run", "not measured", "its steps are not among its parameters", self.notebook)]
        outcome: Outcome = "holds" if steps >= self.steps else "fails"
        whole = f"{steps} nominal steps, whole"
        return [Finding("run", outcome, whole, self.notebook, evidence.is_emulated(self.notebook))]


@dataclass(frozen=True)
class Peak:
    """An arm of a table "memory" whose peak VRAM lies below a bound, in bytes."""

    notebook: str
    arm: str
    bound: float

    def findings(self, evidence: Evidence) -> list[Finding]:
        """What the GPU counted, its context included; nothing without one."""
        rows = evidence.tables("memory").get(self.notebook, [])
        mine = (row for row in rows if row["arm"] == self.arm and row["measured_allocated_bytes"])
        peak = next((row["peak_memory_bytes"] for row in mine), None)
        if peak is None:
            return [_absent(self.notebook, self.arm, evidence)]
        words = f"peak memory {amount(peak, 'bytes')}"
        outcome: Outcome = "holds" if peak < self.bound else "fails"
        return [Finding(self.arm, outcome, words, self.notebook, evidence.is_emulated(self.notebook))]


@dataclass(frozen=True)
class Savings:
    """The plan's estimates of what memory features save, for some models."""

    models: tuple[str, ...]

    def findings(self, evidence: Evidence) -> list[Finding]:
        """One per estimate of a saving."""
        return [
            self._finding(estimate.cells(evidence), estimate.notebook, evidence)
            for estimate in ESTIMATES
            if estimate.model in self.models and estimate.saving is not None
        ]

    def _finding(self, cells: dict[str, Any], notebook: str, evidence: Evidence) -> Finding:
        if cells["verdict"] == "not measured":
            return _absent(notebook, cells["what"], evidence)
        words = f"saves {cells['saving measured']} instead of {cells['saving expected']}"
        return Finding(cells["what"], cells["verdict"], words, notebook)


@dataclass(frozen=True)
class Criterion:
    """A sentence of the plan, and the rules that decide it; none where no notebook tries it.

    need: "all" findings must hold, or "any" one of them is enough
    """

    text: str
    rules: tuple[Claims | Ran | Peak | Savings, ...]
    need: Literal["all", "any"] = "all"

    def findings(self, evidence: Evidence) -> list[Finding]:
        """What every rule found."""
        found = [finding for rule in self.rules for finding in rule.findings(evidence)]
        return found or [Finding("", "not run yet", "no notebook tries it", None)]

    def outcome(self, evidence: Evidence) -> Outcome:
        """The worst of the findings where all must hold, the best where one is enough."""
        order: tuple[Outcome, ...] = ("fails", "not run yet", "not measured", "open", "predicted nothing", "holds")
        if self.need == "any":
            order = ("holds", "not run yet", "not measured", "open", "fails", "predicted nothing")
        outcomes = {finding.outcome for finding in self.findings(evidence)}
        return next(outcome for outcome in order if outcome in outcomes)


def of_presets(kind: str, suffix: str = "", **bound: Any) -> Claims:
    """The claims of notebook 03 on both presets. bound: as `Claims` takes it."""
    return Claims(HYBRID, kind, tuple(f"{preset}{suffix}" for preset in PRESETS), **bound)


def in_depth(notebook: str, kind: str, **bound: Any) -> Claims:
    """The claims of a notebook on its arm that predicts depth, which the plan did not think of."""
    return Claims(notebook, kind, (GROWN,), **bound)


IN_DEPTH, OURS = "The plan's promise of time, by predicting depth", "Beyond the plan"
"""The same asked of another kind of prediction, and what we ask of ourselves: not counted among the plan's criteria."""

SIZES = {"GPT-2 Small": HYBRID, "GPT-2 Medium": MEDIUM, "GPT-2 XL": XL}
"""The models that a notebook grows."""

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
            (of_presets("speed"), of_presets("speed", ", unguarded")),
            need="any",
        ),
        Criterion("Perplexity within 2 % of the baseline", (of_presets("quality"),)),
        Criterion("The same without confidence threshold and gate", (of_presets("quality", ", unguarded"),)),
        Criterion("Zero divergences", (of_presets("stable"), of_presets("stable", ", unguarded"))),
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
    "Overall: must have": (
        Criterion("The 1B model fits 16 GB with optimizations", (Claims(XL, "fits-16gb"),)),
        Criterion("Peak VRAM below 14 GB", (Claims(XL, "peak-below-14gb"),)),
        Criterion(
            "Perplexity within 2 % of the baseline in all models",
            (
                of_presets("quality"),
                *(Claims(notebook, "quality", below=TWO_PERCENT) for notebook in (MEMORY, MEDIUM, XL)),
            ),
        ),
        Criterion("Training stable, zero divergences", (of_presets("stable"), Claims(XL, "stable-1000-steps"))),
        Criterion("VRAM savings within ±10 % of the plan's estimates", (Savings(("small", "medium", "xl")),)),
    ),
    "Overall: nice to have": (
        Criterion(
            "60 to 78 % less time on a GPU, at the baseline's quality, in one arm at least",
            tuple(of_presets("speed", suffix, below=0.4, of="time ratio") for suffix in ("", ", unguarded")),
            need="any",
        ),
        Criterion(
            "Perplexity within 1 % of the baseline in all models",
            (
                of_presets("quality", below=ONE_PERCENT),
                *(Claims(notebook, "quality", below=ONE_PERCENT) for notebook in (MEMORY, MEDIUM, XL)),
            ),
        ),
        Criterion("7B model exploration", ()),
    ),
    IN_DEPTH: (
        *(
            Criterion(f"{model}: 40 to 60 % less time, at the baseline's quality", (in_depth(notebook, "speed"),))
            for model, notebook in SIZES.items()
        ),
        Criterion(
            "60 to 78 % less time, at the baseline's quality, of one model at least",
            tuple(in_depth(notebook, "speed", below=0.4, of="time ratio") for notebook in SIZES.values()),
            need="any",
        ),
        Criterion(
            "Growing beats a plain run of as much computation",
            tuple(in_depth(notebook, "pays") for notebook in SIZES.values()),
        ),
        Criterion(
            "Depth pays: the grown model ends below the shallow one",
            tuple(in_depth(notebook, "depth-pays") for notebook in SIZES.values()),
        ),
    ),
    OURS: (
        Criterion(
            "The planner's peaks within ±10 % of what was measured",
            tuple(Claims(notebook, "predicted-within-10-percent") for notebook in (MEMORY, MEDIUM, XL)),
        ),
        Criterion("The tuned baseline, in bf16, peaks below 5 GB", (Claims(BASELINE, "vram"),)),
        Criterion(
            "The whole stack reaches the vanilla run's loss in 1/15 of its time", (Claims(LADDER, "stack-is-fast"),)
        ),
        Criterion("A step takes at most 0.75 of that of nanoGPT's loop", (Claims(LADDER, "step-beside-nanogpt"),)),
        Criterion("A step with Muon takes at most 1.25 of one with AdamW", (Claims(LADDER, "muon-beside-adamw"),)),
    ),
}
"""The plan's groups of criteria, in its order; each names the claims that decide it."""


def _absent(notebook: str, about: str, evidence: Evidence) -> Finding:
    if evidence.entry(notebook) is None:
        return Finding(about, "not run yet", "", notebook)
    return Finding(about, "not measured", "the notebook makes no such claim", notebook)
