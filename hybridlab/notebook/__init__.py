"""What a notebook calls: run a study, look at it, say what was found."""

from typing import TYPE_CHECKING

from hybridlab.base.lazy import lazy_exports

if TYPE_CHECKING:
    from hybridlab.base.files import project_root
    from hybridlab.benchmarks.footprint import (
        footprint,
        footprints,
        jumping_with,
        plain_with,
        predict_phase,
        ways_to_predict,
    )
    from hybridlab.benchmarks.step_overhead import step_overhead
    from hybridlab.notebook.compare_runs import find_runs, overlay, runs_table
    from hybridlab.notebook.session import Session
    from hybridlab.notebook.studies import find_rates, run_configs, run_on_ranks, run_study
    from hybridlab.notebook.views.answer import (
        answer_place,
        claims_in_sentences,
        claims_table,
        comparisons_in_sentences,
        show_answer,
    )
    from hybridlab.notebook.views.depth import (
        budget_chart,
        depth_arms,
        depth_claims,
        depth_figures,
        depth_table,
        rate_rows,
        rates_table,
        shallow_claim,
    )
    from hybridlab.notebook.views.ladder import (
        ladder_claims,
        ladder_figures,
        ladder_table,
        ladder_tables,
        profile_ladder,
        steps_table,
        waterfall_chart,
    )
    from hybridlab.notebook.views.memory import (
        cost_table,
        memory_table,
        parts_table,
        predict_rows,
        predict_table,
        transition_table,
    )
    from hybridlab.notebook.views.memory_charts import (
        SAFE_PEAK,
        memory_breakdown,
        memory_timeline,
        quality_against_memory,
        vram_rows,
    )
    from hybridlab.notebook.views.memory_claims import (
        agreement_claims,
        below_claim,
        few_bits_claims,
        fit_claims,
        format_agreement,
        lookahead_claims,
        predict_claim,
        predicted_claims,
        quality_claims,
        reference_claims,
        stable_run_claim,
        transition_claims,
    )
    from hybridlab.notebook.views.panel import panel_claims, panel_table
    from hybridlab.notebook.views.side_by_side import side_by_side, side_by_side_claims, side_by_side_table
    from hybridlab.notebook.views.study import (
        comparison_table,
        counts_table,
        final_table,
        overhead_table,
        rate_table,
        record_table,
        reliability_table,
        run_rows,
        time_table,
    )
    from hybridlab.notebook.views.study_charts import (
        by_seed,
        comparison_chart,
        curves,
        gradient_chart,
        loss_rows,
        phases,
    )
    from hybridlab.notebook.views.study_claims import (
        baseline_claims,
        cost_claims,
        hybrid_claims,
        pays_claim,
        rate_claims,
        stable_claim,
    )
    from hybridlab.notebook.views.your_model import best_arm, blocks_in, fit_report, fits_claim, recipe, steps_within
    from hybridlab.panel.cost import panel_overhead
    from hybridlab.panel.frame import Frame, final_frame
    from hybridlab.results.claims import GPU_BYTES, Claim, Quantity, holds_if
    from hybridlab.results.parameters import parameters_from
    from hybridlab.results.publish import publish
    from hybridlab.study.planning import room_for

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
