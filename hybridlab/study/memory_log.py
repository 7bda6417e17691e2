"""What a run's samples of the GPU tell: whether its memory grows, and how busy it is."""

from __future__ import annotations

from hybridlab.base.errors import UserError
from hybridlab.engine.phases import Phase
from hybridlab.study.record import Run
from hybridlab.study.run import UNSETTLED_STEPS


def growth_bytes(run: Run, early: int = 50, late: int = 1000) -> int:
    """How much more memory the run uses late than early.

        growth = median(used over steps late - early + 1 ... late) - median(used over steps early ... 2 early - 1)

    early, late: nominal steps; what is used is torch's reserve on a GPU, else the process's resident size
    Medians, because samples fall on any moment of a step.

    Raises UserError where the run is shorter, or has no samples there.
    """
    return round(_median_used(run, late - early + 1, late) - _median_used(run, early, 2 * early - 1))


def gpu_busy_percent(run: Run) -> float | None:
    """Mean share of the time of gradient steps in which the GPU computed; None without NVML, or for a short run.

    What is missing to 100 the GPU spent waiting for the host. Steps that compile or settle do not count.
    """
    if run.vram.empty or "utilization_percent" not in run.vram:
        return None
    stable = run.vram[(run.vram["nominal_step"] > UNSETTLED_STEPS) & (run.vram["phase"] != str(Phase.PREDICT))]
    known = stable["utilization_percent"].dropna()
    return float(known.mean()) if len(known) else None


def _median_used(run: Run, first: int, last: int) -> float:
    """Over the samples of some nominal steps."""
    there = run.vram[run.vram["nominal_step"].between(first, last)] if len(run.vram) else run.vram
    if there.empty:
        raise UserError(f"{run.folder} has no sample of memory in steps {first} to {last}: choose other steps")
    return float(there["used_bytes"].median())
