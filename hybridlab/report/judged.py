"""Verdicts of copies that ran before verdicts needed a base and a correction: given again from what they published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import scipy

from hybridlab.results.claims import Claim, Quantity, Verdict, too_little
from hybridlab.study.base import Base
from hybridlab.study.comparison import SIGNIFICANCE
from hybridlab.study.statistics import holm

C = TypeVar("C", bound=Claim)

ON_LOSSES = ("pays", "quality", "speed", "speedup")
"""The kinds of claims that rest on losses."""


def judged(claims: Sequence[C], parameters: Mapping[str, Any]) -> list[C]:
    """The claims of one notebook; those on losses are open where too little was trained.

    parameters: the notebook's own. A claim that several arms are corrected for keeps its verdict; an older one, without
    a p-value, gets it from its interval and those of the notebook's other arms, and loses its step value, which
    depended on the other arms' controls. An arm that grew was judged when it was published, by its study's own base.
    """
    base, older = _base(parameters), [claim for claim in claims if _is_older(claim)]
    p_values = holm({claim.id: _p_value(claim, base.seeds) for claim in older})
    corrected = [_corrected(claim, p_values[claim.id], len(older)) if claim in older else claim for claim in claims]
    grown = {claim.arm for claim in claims if claim.quantity("cost_in_full_steps")}
    idle = {claim.arm for claim in claims if claim.kind == "pays" and not _predicted(claim)}
    kept = [claim.kind not in ON_LOSSES or claim.arm in grown for claim in corrected]
    return [c if keep else _judged(c, base, c.arm in idle) for c, keep in zip(corrected, kept, strict=True)]


def _predicted(claim: Claim) -> bool:
    """Whether an arm predicted weights, in time or in depth, as far as was published."""
    return claim.value("predicted_steps") != 0 or claim.quantity("p_value") is not None


def _base(parameters: Mapping[str, Any]) -> Base:
    """What the notebook trained; how far the losses fell is not among its parameters."""
    budgets = parameters.get("budgets") or [0]  # of several, the notebook has judged each
    steps = parameters.get("reference_steps") or parameters.get("steps") or max(budgets)
    tokens = steps * (parameters.get("batch_size") or 0) * (parameters.get("block_size") or 1)
    return Base(steps, parameters.get("seeds") or 1, tokens, math.inf)


def _is_older(claim: Claim) -> bool:
    return claim.kind == "pays" and bool(claim.value("predicted_steps")) and claim.quantity("p_value") is None


def _p_value(claim: Claim, seeds: int) -> float:
    """Of Student's test, from the interval that was published."""
    loss = claim.quantity("loss_to_control")
    if seeds < 2 or loss is None or loss.value is None or loss.low is None or loss.high is None:
        return 1.0
    if loss.high == loss.low:
        return float(not loss.value)
    t = abs(loss.value) / ((loss.high - loss.low) / 2) * scipy.stats.t.ppf(0.975, seeds - 1)
    return float(2 * scipy.stats.t.sf(t, seeds - 1))


def _corrected(claim: C, p_value: float, tested: int) -> C:
    better = (claim.value("loss_to_control") or 0.0) < 0
    decided: Verdict = "holds" if better else "fails"
    kept = [quantity for quantity in claim.quantities if quantity.name != "step_value"]
    more = (Quantity("p_value", p_value, unit="probability"), Quantity("arms_corrected_for", tested))
    return replace(claim, verdict=decided if p_value < SIGNIFICANCE else "open", quantities=(*kept, *more))


def _judged(claim: C, base: Base, idle: bool) -> C:
    """A claim on losses: of a hybrid that predicted nothing it shows nothing, and on too little training it is open."""
    if idle:
        return replace(claim, verdict="predicted nothing")
    if not base.lacks:
        return claim
    said = claim.text if claim.rests_on_too_little else claim.text + too_little(base)
    return replace(claim, text=said, verdict="open")
