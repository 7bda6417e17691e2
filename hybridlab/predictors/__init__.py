"""Predictors: coefficients over the weights' remembered path. A new one is a file and a line here."""

from __future__ import annotations

from hybridlab.predictors.adam_coast import AdamCoast
from hybridlab.predictors.base import Predictor, Proposal, Signals
from hybridlab.predictors.dmd import Dmd
from hybridlab.predictors.ema_nesterov import EmaNesterov
from hybridlab.predictors.linear import Linear
from hybridlab.predictors.null import Null
from hybridlab.predictors.river import River
from hybridlab.predictors.rre import Rre
from hybridlab.predictors.rssm import Rssm
from hybridlab.predictors.snoo import Snoo

PREDICTORS: dict[str, type[Predictor]] = {
    "null": Null,
    "linear": Linear,
    "adam_coast": AdamCoast,
    "ema_nesterov": EmaNesterov,
    "snoo": Snoo,
    "river": River,
    "dmd": Dmd,
    "rre": Rre,
    "rssm": Rssm,
}
