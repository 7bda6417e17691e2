"""What saves time beside prediction in time, and how much prediction in time can save at most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.report.evidence import PRESETS, Evidence, Published
from hybridlab.report.rules import Finding, Outcome
from hybridlab.results.claims import Quantity
from hybridlab.results.words import quantities_in_words

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
        """One per claim that has the quantity, by its whole interval; of a ladder, with what its parts brought."""
        measured = [(claim, claim.quantity(self.quantity)) for claim in evidence.claims(self.notebook)]
        brought = what_parts_brought(evidence.tables("ladder").get(self.notebook, []))
        depths = evidence.claims(self.notebook, kind="depth-pays")
        pays = {claim.arm: f"whether depth pays, beside the shallow model: {claim.verdict}" for claim in depths}
        return [
            self._finding(claim, ratio, brought or pays.get(claim.arm, ""))
            for claim, ratio in measured
            if ratio is not None
        ]

    def _finding(self, claim: Published, ratio: Quantity, beside: str) -> Finding:
        about = f"{self.means}, {claim.arm}" if claim.arm else self.means
        words = "; ".join(filter(None, (quantities_in_words([ratio]), beside)))
        return Finding(about, self._outcome(claim, ratio), words, claim.notebook)

    def _outcome(self, claim: Published, ratio: Quantity) -> Outcome:
        if claim.rests_on_too_little or ratio.low is None:
            return "open"
        if ratio.low >= 1 / self.share:
            return "holds"
        return "fails" if ratio.high is not None and ratio.high < 1 / self.share else "open"


def what_parts_brought(rungs: Sequence[dict[str, Any]]) -> str:
    """How many times as fast number formats and compilation, the optimizer, and depth made a ladder's run.

    rungs: of its table. One whose lengths were tried learns otherwise: it is the optimizer's, or depth's.
    """
    factors = {"number formats, compilation and graphs": 1.0, "optimizer and rates": 1.0, "predicted depth": 1.0}
    stack, optimizer, depth = factors
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
        presets = {name: getattr(HybridTrainerConfig, name)() for name in PRESETS}
        name, config = min(presets.items(), key=lambda preset: least_time(preset[1]))
        if least_time(config) <= self.share:
            return []
        return [Finding(f"arithmetic, preset {name}", "cannot hold", _in_words(config), None)]


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


def _in_words(config: HybridTrainerConfig) -> str:
    gradient, predicted = config.full_steps + config.correct_steps, config.max_predict_steps
    return (
        f"{gradient} gradient steps and {_forward_passes(config)} forward passes, each a third of a step, for "
        f"{gradient + predicted} steps: at least {least_time(config):.2f} of the time; with a forward pass on every "
        f"predicted step at least {FORWARD:.2f}, whatever is predicted"
    )
