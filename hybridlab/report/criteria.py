"""The plan's success criteria, and which published claims decide each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from hybridlab.report.evidence import Evidence, Found
from hybridlab.report.words import numbers_in_words

Outcome = Literal["holds", "fails", "open", "not measured", "not run yet"]
"""A claim's verdict; or its notebook has run without making the claim; or it has not run."""

BASELINE, HYBRID, MEMORY = "02_gpt2_small_baseline", "03_gpt2_small_hybrid", "04_gpt2_small_memory"
MEDIUM, XL = "05_gpt2_medium", "06_gpt2_xl"
PRESETS = ("conservative", "aggressive")


@dataclass(frozen=True)
class Finding:
    """One piece of evidence on one criterion: about what, how it came out, in which numbers, from where."""

    about: str
    outcome: Outcome
    words: str
    notebook: str | None


class Rule(Protocol):
    """Says what the results have to say on a criterion; never nothing."""

    def findings(self, evidence: Evidence) -> list[Finding]:
        """One finding for each claim that counts."""
        ...


@dataclass(frozen=True)
class Claims:
    """The claims of one notebook whose ids match; each pattern needs at least one."""

    notebook: str
    patterns: tuple[str, ...]

    def findings(self, evidence: Evidence) -> list[Finding]:
        """The claims' own verdicts."""
        return [finding for pattern in self.patterns for finding in self._of(pattern, evidence)]

    def _of(self, pattern: str, evidence: Evidence) -> list[Finding]:
        claims = evidence.claims(self.notebook, pattern)
        return [_finding(c, c.verdict, evidence) for c in claims] or [_absent(self.notebook, pattern, evidence)]


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
        steps = int(entry["parameters"].get("steps", 0))
        outcome: Outcome = "holds" if steps >= self.steps else "fails"
        return [Finding("run", outcome, f"{steps} nominal steps, whole", self.notebook)]


@dataclass(frozen=True)
class Below:
    """The claims' own verdicts, held to a tighter bound on one of their numbers, or on its interval if it has one.

    number: how the number's name begins
    """

    notebook: str
    pattern: str
    number: str
    bound: float

    def findings(self, evidence: Evidence) -> list[Finding]:
        """A claim that fails by its own bound fails this one too."""
        claims = evidence.claims(self.notebook, self.pattern)
        return [_finding(claim, self._outcome(claim), evidence) for claim in claims] or [
            _absent(self.notebook, self.pattern, evidence)
        ]

    def _outcome(self, claim: Found) -> Outcome:
        name = next((name for name in sorted(claim.numbers) if name.startswith(self.number)), None)
        value = claim.numbers.get(name) if name else None
        if name is None or not isinstance(value, float | int):
            return "not measured"
        low, high = (claim.numbers.get(f"{name}_{end}", value) for end in ("low", "high"))
        low, high = (bound if isinstance(bound, float | int) else math.nan for bound in (low, high))
        if claim.verdict == "fails" or low >= self.bound:
            return "fails"
        return claim.verdict if high < self.bound else "open"


@dataclass(frozen=True)
class Nowhere:
    """Nothing here has tried it."""

    why: str

    def findings(self, evidence: Evidence) -> list[Finding]:
        """Always the same."""
        return [Finding("", "not run yet", self.why, None)]


@dataclass(frozen=True)
class Criterion:
    """A sentence of the plan, and the rules that decide it.

    need: "all" findings must hold, or "any" one of them is enough
    """

    text: str
    rules: tuple[Rule, ...]
    need: Literal["all", "any"] = "all"

    def findings(self, evidence: Evidence) -> list[Finding]:
        """What every rule found."""
        return [finding for rule in self.rules for finding in rule.findings(evidence)]

    def outcome(self, evidence: Evidence) -> Outcome:
        """The worst of the findings where all must hold, the best where one is enough."""
        order: tuple[Outcome, ...] = ("fails", "not run yet", "not measured", "open", "holds")
        if self.need == "any":
            order = ("holds", "not run yet", "not measured", "open", "fails")
        outcomes = {finding.outcome for finding in self.findings(evidence)}
        return next(outcome for outcome in order if outcome in outcomes)


def claims(notebook: str, *patterns: str) -> Claims:
    """Claims of one notebook, by the patterns of their ids."""
    return Claims(notebook, patterns)


def of_presets(ending: str, suffix: str = "") -> Claims:
    """The claims of notebook 03 on both presets."""
    return Claims(HYBRID, tuple(f"{preset}{suffix}-{ending}" for preset in PRESETS))


ONE_PERCENT, TWO_PERCENT = math.log1p(0.01), math.log1p(0.02)
"""In nats: the loss that costs 1 and 2 % of perplexity."""

CRITERIA: dict[str, tuple[Criterion, ...]] = {
    "1.1 GPT-2 Small: the architecture": (
        Criterion("The model builds; forward and backward pass work", (claims(BASELINE, "converges"),)),
        Criterion("Trains 100 steps without running out of memory", (Ran(BASELINE, 100),)),
    ),
    "1.2 GPT-2 Small: the baseline": (
        Criterion("Training completes 1000 steps", (Ran(BASELINE, 1000),)),
        Criterion("The loss converges (decreasing trend)", (claims(BASELINE, "converges"),)),
        Criterion("Peak VRAM below 5 GB", (claims(BASELINE, "vram"),)),
    ),
    "1.3 GPT-2 Small: hybrid training": (
        Criterion(
            "40 to 60 % less time on a GPU, at the baseline's quality, in one arm at least",
            (of_presets("speed"), of_presets("speed", "-unguarded")),
            need="any",
        ),
        Criterion("Perplexity within 2 % of the baseline", (of_presets("quality"),)),
        Criterion("The same without confidence threshold and gate", (of_presets("quality", "-unguarded"),)),
        Criterion("Zero divergences", (of_presets("stable"), of_presets("stable", "-unguarded"))),
        Criterion("Peak VRAM below 5 GB", (of_presets("vram"),)),
    ),
    "1.4 GPT-2 Small: memory optimizations": (
        Criterion("VRAM within ±10 % of the estimates", (claims(MEMORY, "*-predicted-within-10-percent"),)),
        Criterion("Quality degradation below 1 % of the validation loss", (claims(MEMORY, "*-quality"),)),
        Criterion("The same of the perplexity", (Below(MEMORY, "*-quality", "loss_", ONE_PERCENT),)),
        Criterion("All tests complete without running out of memory", (claims(MEMORY, "completes"),)),
    ),
    "2 GPT-2 Medium": (
        Criterion("The baseline fits 16 GB", (claims(MEDIUM, "baseline-fits-16gb"),)),
        Criterion("Optimized, it uses less than 2 GB", (claims(MEDIUM, "optimized-below-2gb"),)),
        Criterion("Perplexity within 2 % of the baseline", (Below(MEDIUM, "*-quality", "loss_", TWO_PERCENT),)),
    ),
    "3 GPT-2 XL, the plan's 1B model": (
        Criterion("Fits 16 GB with optimizations", (claims(XL, "fits-16gb"),)),
        Criterion("Peak VRAM below 14 GB", (claims(XL, "peak-below-14gb"),)),
        Criterion("Training stable for 1000 steps and more", (claims(XL, "stable-1000-steps"),)),
        Criterion("Perplexity within 2 % of the baseline", (Below(XL, "quality", "loss_", TWO_PERCENT),)),
    ),
    "Overall: must have": (
        Criterion("The 1B model fits 16 GB with optimizations", (claims(XL, "fits-16gb"),)),
        Criterion("Peak VRAM below 14 GB", (claims(XL, "peak-below-14gb"),)),
        Criterion(
            "Perplexity within 2 % of the baseline in all models",
            (
                of_presets("quality"),
                *(Below(notebook, "*quality", "loss_", TWO_PERCENT) for notebook in (MEMORY, MEDIUM, XL)),
            ),
        ),
        Criterion("Training stable, zero divergences", (of_presets("stable"), claims(XL, "stable-1000-steps"))),
        Criterion(
            "VRAM within ±10 % of the estimates",
            (claims(MEMORY, "*-predicted-within-10-percent"), claims(XL, "predicted-within-10-percent")),
        ),
    ),
    "Overall: nice to have": (
        Criterion(
            "60 to 78 % less time on a GPU, at the baseline's quality, in one arm at least",
            (Below(HYBRID, "*-speed", "baseline_ratio_time", 0.4),),
            need="any",
        ),
        Criterion(
            "Perplexity within 1 % of the baseline in all models",
            (
                *(Below(HYBRID, f"{preset}-quality", "loss_", ONE_PERCENT) for preset in PRESETS),
                *(Below(notebook, "*quality", "loss_", ONE_PERCENT) for notebook in (MEMORY, MEDIUM, XL)),
            ),
        ),
        Criterion("7B model exploration", (Nowhere("no notebook tries it"),)),
    ),
}
"""The plan's groups of criteria, in its order; each names the claims that decide it."""


def _finding(claim: Found, outcome: Outcome, evidence: Evidence) -> Finding:
    words = numbers_in_words(claim.numbers)
    return Finding(claim.arm, outcome, words + _predicted(claim, evidence), claim.notebook)


def _predicted(claim: Found, evidence: Evidence) -> str:
    """A hybrid that predicted nothing is the baseline: where that is so, every claim on it says it."""
    arm = claim.id.rpartition("-")[0]
    for pays in evidence.claims(claim.notebook, f"{arm}-pays", profile=claim.profile):
        if pays.is_idle:
            return " (predicted nothing)"
    return ""


def _absent(notebook: str, pattern: str, evidence: Evidence) -> Finding:
    about = pattern.removeprefix("*").strip("-").replace("-", " ")
    if evidence.entry(notebook) is None:
        return Finding(about, "not run yet", "", notebook)
    return Finding(about, "not measured", "the notebook makes no such claim", notebook)
