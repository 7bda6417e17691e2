"""The plan's estimates of memory, beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hybridlab.report.evidence import Evidence
from hybridlab.results.claims import holds_if
from hybridlab.results.words import amount

WITHIN = 0.10
"""The plan's bound on how far a saving may be from its estimate, as a share of the estimate."""

NOTEBOOKS = {"small": "04_gpt2_small_memory", "medium": "05_gpt2_medium", "xl": "06_gpt2_xl"}


@dataclass(frozen=True)
class Estimate:
    """What the plan expects of one model in one state.

    expected: decimal gigabytes; saving: share of FP32's, None for FP32 itself
    arm: of the table "memory", or "predict" (in the Predict phase); or the kind of the claim that has measured it
    """

    model: str
    what: str
    expected: float
    saving: float | None
    source: Literal["memory", "predict", "claim"]
    arm: str

    @property
    def notebook(self) -> str:
        """Where it was measured."""
        return NOTEBOOKS[self.model]

    def cells(self, evidence: Evidence) -> dict[str, Any]:
        """A row of the table: the peak of live tensors, or those alive in Predict, and what it saves of FP32's.

        A saving is as the plan estimates it where it lies within 10 % of that.
        """
        whole = next(it for it in ESTIMATES if it.model == self.model).measured_bytes(evidence)
        measured = self.measured_bytes(evidence)
        saving = 1 - measured / whole if self.saving and measured and whole else None
        verdict: str | None = "not measured" if self.saving else None
        if self.saving and saving is not None:
            verdict = holds_if(abs(saving / self.saving - 1) <= WITHIN)
        return {
            "model": self.model,
            "what": self.what,
            "expected": amount(1e9 * self.expected, "bytes"),
            "measured": amount(measured, "bytes"),
            "saving expected": self.saving and f"{100 * self.saving:.0f} %",
            "saving measured": None if saving is None else f"{100 * saving:.1f} %",
            "verdict": verdict,
        }

    def measured_bytes(self, evidence: Evidence) -> float | None:
        """The peak of live tensors, or those alive in Predict; None where they were not measured."""
        if self.source == "claim":
            claims = evidence.claims(self.notebook, kind=self.arm)
            return next((claim.value("live") or claim.value("measured") for claim in claims), None)
        rows = evidence.tables(self.source).get(self.notebook, [])
        return next((row["measured_allocated_bytes"] for row in rows if row["arm"] == self.arm), None)


ESTIMATES = (
    Estimate("small", "FP32", 2.0, None, "memory", "fp32"),
    Estimate("small", "mixed precision", 1.0, 0.50, "memory", "mixed precision"),
    Estimate("small", "gradient accumulation", 1.4, 0.30, "memory", "gradient accumulation"),
    Estimate("small", "predict-aware, in Predict", 1.0, 0.50, "predict", "pinned"),
    Estimate("small", "all combined, in Predict", 0.6, 0.70, "predict", "pinned, bf16 weights"),
    Estimate("medium", "FP32", 5.6, None, "memory", "fp32"),
    Estimate("medium", "optimized, in Predict", 1.5, 0.73, "claim", "predict-below-2gb"),
    Estimate("xl", "FP32", 16.0, None, "memory", "fp32 (tf32)"),
    Estimate("xl", "optimized, Full phase", 6.5, 0.60, "memory", "fit_16gb"),
    Estimate("xl", "optimized, in Predict", 2.5, 0.85, "claim", "predict-phase"),
)
"""As the plan has them (phase 2B), each model's FP32 first; of "6 to 7 GB" and the like, the middle."""
