"""Rules that decide a criterion: which published claims, runs, peaks and savings count, and what each found.

With them the least time that prediction in time can take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.notebook.views.side_by_side import side_by_side_claims
from hybridlab.report.estimates import ESTIMATES
from hybridlab.report.evidence import MEMORY, PRESETS, Evidence, Published, arm_in_words, named_in_full
from hybridlab.results.claims import Unit, holds_below, holds_if, rounded
from hybridlab.results.words import amount, quantities_in_words

Outcome = Literal[
    "holds",
    "holds, but by other means",
    "fails",
    "cannot hold",
    "cannot hold, but by other means it does",
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
    notebook: str = ""
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
        pays = evidence.claims(self.notebook, kind="pays", arm=arm)
        if not claims and self.kind == "speedup" and pays and all(claim.is_idle for claim in pays):
            return [Finding(arm_in_words(arm or "", self.notebook), "predicted nothing", "", self.notebook)]
        about = f"{arm or ''} {self.kind.replace('-', ' ')}".strip()
        return [self._finding(claim, evidence) for claim in claims] or [_absent(self.notebook, about, evidence)]

    def _finding(self, claim: Published, evidence: Evidence) -> Finding:
        of_memory = claim.kind == "completes" or any(q.unit == "bytes" for q in claim.quantities)
        emulated = of_memory and evidence.is_emulated(claim.notebook)
        words = "; ".join(filter(None, (claim.numbers, *self._rests_on(claim, evidence))))
        return Finding(claim.about, self._outcome(claim), words, claim.notebook, emulated)

    def _rests_on(self, claim: Published, evidence: Evidence) -> Iterator[str]:
        """What a reader must know beside the numbers: steps and control of a quality, rates of a grown model."""
        grew = claim.kind == "depth-pays" or (claim.kind == "pays" and claim.grew)
        if grew and not evidence.tried_rates(claim.notebook):
            yield UNTRIED
        if claim.kind == "quality" and (steps := evidence.steps_judged(claim.notebook)):
            yield f"after {steps} steps"
        if claim.kind == "quality" and (tf32 := evidence.tf32_stands_for_fp32(claim.notebook)):
            yield f"the control is FP32 in TF32, whether that stands for strict FP32: {tf32}"
        elif claim.kind == "quality" and claim.notebook == MEMORY:
            yield "what is in FP32 takes TF32 beyond the first seed"

    def _outcome(self, claim: Published) -> Outcome:
        if self.below is None or claim.is_idle or claim.rests_on_too_little or claim.verdict == "fails":
            return claim.verdict  # of an arm that diverged there is no number
        quantity = next((q for q in claim.quantities if q.unit == self.of), None)
        if quantity is None or quantity.value is None:
            return "not measured"
        low, high = quantity.ends
        if low >= self.below:
            return "fails"
        return claim.verdict if high < self.below else "open"


@dataclass(frozen=True)
class OnMachines:
    """The claims of one kind in the notebook that times loops side by side, and the same of every other machine."""

    notebook: str
    kind: str

    def findings(self, evidence: Evidence) -> list[Finding]:
        """One per machine, which is named by its GPU; the notebook's own run of the benchmark counts once."""
        own = evidence.claims(self.notebook, kind=self.kind)
        gpu = evidence.device(self.notebook)
        found = [Finding(gpu, claim.verdict, claim.numbers, self.notebook) for claim in own]
        known = {quantity.value for claim in own for quantity in claim.quantities}
        for measured in evidence.side_by_side:
            for claim in side_by_side_claims(measured):
                (ratio,) = claim.quantities
                if claim.kind == self.kind and rounded(ratio.value or 0.0) not in known:
                    gpu = measured["figures"][ratio.name]["rests_on"]["device"]
                    words = quantities_in_words([named_in_full(ratio)])
                    found.append(Finding(f"{gpu} (docs/experiments)", claim.verdict, words))
        return found or [_absent(self.notebook, self.kind.replace("-", " "), evidence)]


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
        words, emulated = f"{steps} nominal steps, whole", evidence.is_emulated(self.notebook)
        return [Finding("run", holds_if(steps >= self.steps), words, self.notebook, emulated)]


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
        words, emulated = f"peak memory {amount(peak, 'bytes')}", evidence.is_emulated(self.notebook)
        return [Finding(self.arm, holds_if(peak < self.bound), words, self.notebook, emulated)]


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
        words = f"planned without a GPU: {sum(way['fits'] for way in ways)} of {len(ways)} ways to train fit"
        return [Finding("plan", "not run yet", words if ways else "")]


def _absent(notebook: str, about: str, evidence: Evidence) -> Finding:
    if evidence.entry(notebook) is None:
        return Finding(about, "not run yet", "", notebook)
    return Finding(about, "not measured", "the notebook ran without it", notebook)


UNTRIED = "learning rates not tried"
"""What a ratio to a plain run's loss may rest on: at another rate that run may need less."""

FORWARD = 1 / 3
"""A forward pass's part of a gradient step's operations."""


@dataclass(frozen=True)
class Faster:
    """A plain run's time over that of something else to the same loss, which is not prediction in time.

    means: what it is; quantity: of the notebook's claims; share: of the plain run's time that it may take
    """

    means: str
    notebook: str
    quantity: str
    share: float

    def findings(self, evidence: Evidence) -> list[Finding]:
        """One per claim that has the quantity, by its whole interval; of a ladder, with what its parts brought.

        An end that is open decides nothing, and hinders the other one in nothing. An arm that grows and diverged has no
        loss that a plain run could reach: it is judged as beside its control. Where no rates were tried, the plain run
        may have had a poor one: open, as where the best rate is at an edge. A ladder's control has the plan's.
        """
        brought = what_parts_brought(evidence.tables("ladder").get(self.notebook, []))
        depths = evidence.claims(self.notebook, kind="depth-pays")
        pays = {claim.arm: f"whether depth pays, beside the shallow model: {claim.verdict}" for claim in depths}
        found = []
        for claim in evidence.claims(self.notebook):
            about = f"{self.means}, {claim.arm}" if claim.arm else self.means
            if claim.kind == "pays" and claim.grew and claim.value("loss_to_control") is None:
                found.append(Finding(about, claim.verdict, "a run diverged", claim.notebook))
            elif ratio := claim.quantity(self.quantity):
                grows = self.quantity == "time_to_loss"
                untried = UNTRIED if grows and not evidence.tried_rates(self.notebook) else ""
                words = filter(None, (quantities_in_words([ratio]), brought or pays.get(claim.arm), untried))
                is_shown = (ratio.low, ratio.high) != (None, None) and not (claim.rests_on_too_little or untried)
                outcome = holds_below(-ratio.ends[1], -ratio.ends[0], -1 / self.share) if is_shown else "open"
                found.append(Finding(about, outcome, "; ".join(words), claim.notebook))
        return found or [_absent(self.notebook, self.means, evidence)]


def what_parts_brought(rungs: Sequence[dict[str, Any]]) -> str:
    """How many times as fast number formats and compilation, the optimizer, and depth made a ladder's run.

    rungs: of its table. One whose lengths were tried learns otherwise: it is the optimizer's, or depth's.
    """
    stack, optimizer, depth = (
        "number formats, compilation and graphs (taken to need as many steps)",
        "optimizer and rates",
        "predicted depth (one value, without a shallow control)",
    )
    factors = dict.fromkeys((stack, optimizer, depth), 1.0)
    timed = [rung for rung in rungs if rung.get("time to it (s)")]
    for before, rung in pairwise(timed):
        part = depth if "depth" in rung["rung"] else optimizer if rung.get("lengths tried") else stack
        factors[part] *= before["time to it (s)"] / rung["time to it (s)"]
    return ", ".join(f"{part} {factor:.2f} times" for part, factor in factors.items()) if timed else ""


@dataclass(frozen=True)
class LeastTime:
    """That no preset can take as little of the baseline's time, whatever is predicted: by counting passes.

    share: of the time that it may take
    """

    share: float

    def findings(self, evidence: Evidence) -> list[Finding]:
        """One, on the preset that can take the least; none where that is little enough."""
        name = min(PRESETS, key=lambda preset: least_time(getattr(HybridTrainerConfig, preset)()))
        config: HybridTrainerConfig = getattr(HybridTrainerConfig, name)()
        if least_time(config) <= self.share:
            return []
        gradient, predicted = config.full_steps + config.correct_steps, config.max_predict_steps
        words = (
            f"{gradient} gradient steps and {_forward_passes(config)} forward passes, each a third of a step, for "
            f"{gradient + predicted} steps: at least {least_time(config):.2f} of the time; with a forward pass on "
            f"every predicted step at least {FORWARD:.2f}, whatever is predicted"
        )
        return [Finding(f"arithmetic, preset {name}", "cannot hold", words)]


def least_time(config: HybridTrainerConfig) -> float:
    """The least share of a plain run's time that as many nominal steps can take.

    (F + C + ceil(H / c) / 3) / (F + C + H)

    where F is full_steps, C correct_steps, H max_predict_steps and c correction_interval: every jump is accepted at its
    full length, trials and proposals cost nothing, and a forward pass is a third of a step.
    """
    gradient, predicted = config.full_steps + config.correct_steps, config.max_predict_steps
    return (gradient + FORWARD * _forward_passes(config)) / (gradient + predicted)


def _forward_passes(config: HybridTrainerConfig) -> int:
    return math.ceil(config.max_predict_steps / config.correction_interval)
