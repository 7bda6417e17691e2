"""Rules that decide a criterion: which published claims, runs, peaks and savings count, and what each found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hybridlab.report.estimates import ESTIMATES
from hybridlab.report.evidence import Evidence, Published, arm_in_words
from hybridlab.results.claims import Unit
from hybridlab.results.words import amount, quantities_in_words

Outcome = Literal[
    "holds",
    "holds, but by other means",
    "fails",
    "cannot hold",
    "open",
    "predicted nothing",
    "not measured",
    "not run yet",
]
"""A claim's verdict; what other means or arithmetic make of a criterion on time; or its notebook has run without making
the claim; or it has not run."""


@dataclass(frozen=True)
class Finding:
    """One piece of evidence on one criterion: about what, how it came out, in which numbers, from where.

    emulated: it rests on memory of a larger GPU that gave no more than the smaller one has
    otherwise: it is about what the criterion does not name, which saves time too
    """

    about: str
    outcome: Outcome
    words: str
    notebook: str | None
    emulated: bool = False
    otherwise: bool = False


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
class Planned:
    """What only the planner has tried, a list of `executed/.../recipes.json`: no run of it decides anything."""

    table: str

    def findings(self, evidence: Evidence) -> list[Finding]:
        """How many ways to train were planned, and how many of them fit."""
        ways = evidence.planned.get(self.table, ())
        words = (
            f"planned without a GPU: {sum(way['fits'] for way in ways)} of {len(ways)} ways to train fit"
            if ways
            else ""
        )
        return [Finding("plan", "not run yet", words, None)]


def _absent(notebook: str, about: str, evidence: Evidence) -> Finding:
    if evidence.entry(notebook) is None:
        return Finding(about, "not run yet", "", notebook)
    return Finding(about, "not measured", "the notebook makes no such claim", notebook)
