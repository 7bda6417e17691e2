"""What a notebook calls: run a study, look at it, say what was found."""

from hybridlab.notebook.session import Session, run_configs, run_study
from hybridlab.notebook.views.study import (
    baseline_claims,
    by_seed,
    cost_claims,
    counts_table,
    curves,
    final_table,
    gradient_chart,
    hybrid_claims,
    overhead_table,
    pays_claim,
    phases,
    record_table,
    reliability_table,
    stable_claim,
    time_table,
    verdict_chart,
    verdict_table,
)
from hybridlab.panel.frame import Frame, final_frame
from hybridlab.results.parameters import parameters_from
from hybridlab.results.publish import claims_table, publish

__all__ = [
    "Frame",
    "Session",
    "baseline_claims",
    "by_seed",
    "claims_table",
    "cost_claims",
    "counts_table",
    "curves",
    "final_frame",
    "final_table",
    "gradient_chart",
    "hybrid_claims",
    "overhead_table",
    "parameters_from",
    "pays_claim",
    "phases",
    "publish",
    "record_table",
    "reliability_table",
    "run_configs",
    "run_study",
    "stable_claim",
    "time_table",
    "verdict_chart",
    "verdict_table",
]
