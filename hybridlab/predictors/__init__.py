"""Predictors: coefficients over the weights' remembered path. A new one is a file and a line here."""

from __future__ import annotations

from hybridlab.predictors.adam_coast import AdamCoast
from hybridlab.predictors.base import Predictor, Proposal, Signals
from hybridlab.predictors.linear import Linear
from hybridlab.predictors.null import Null

PREDICTORS: dict[str, type[Predictor]] = {
    "null": Null,
    "linear": Linear,
    "adam_coast": AdamCoast,
}


__all__ = ["PREDICTORS", "Predictor", "Proposal", "Signals"]
