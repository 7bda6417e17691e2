"""The plan's estimates of memory, beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hybridlab.report.evidence import Evidence
from hybridlab.results.claims import holds_if
from hybridlab.results.words import amount

WITHIN = 0.10
"""The plan's bound on how far a saving may be from its estimate, as a share of the estimate."""

FP32 = {"small": "fp32", "medium": "fp32", "xl": "fp32 (tf32)"}
"""The arm without memory features, by model: what savings are shares of."""

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
        whole = _row_bytes(evidence, self.notebook, "memory", FP32[self.model])
        measured = self._measured_bytes(evidence)
        saving = 1 - measured / whole if self.saving and measured and whole else None
        verdict: str | None = None if self.saving is None else "not measured"
        if self.saving and saving is not None:
            verdict = holds_if(abs(saving / self.saving - 1) <= WITHIN)
        return {
            "model": self.model,
            "what": self.what,
            "expected": amount(1e9 * self.expected, "bytes"),
            "measured": amount(measured, "bytes"),
            "saving expected": None if self.saving is None else f"{100 * self.saving:.0f} %",
            "saving measured": None if saving is None else f"{100 * saving:.1f} %",
            "verdict": verdict,
        }

    def _measured_bytes(self, evidence: Evidence) -> float | None:
        if self.source == "claim":
            claims = evidence.claims(self.notebook, kind=self.arm)
            return next((claim.value("live") or claim.value("measured") for claim in claims), None)
        return _row_bytes(evidence, self.notebook, self.source, self.arm)


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
"""As the plan has them (phase 2B); of "6 to 7 GB" and the like, the middle."""


def _row_bytes(evidence: Evidence, notebook: str, table: str, arm: str) -> float | None:
    rows = evidence.tables(table).get(notebook, [])
    return next((row["measured_allocated_bytes"] for row in rows if row["arm"] == arm), None)
