"""Whether two number formats train alike, as far as seeds do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hybridlab.notebook.results import Claim, verdict
from hybridlab.runs import Run
from hybridlab.study.footprint import validation_loss


def format_agreement(strict: Run, tf32: Sequence[Run], at_step: int) -> dict[str, float]:
    """Validation losses of strict FP32 and of TF32 on the same held-out batches, after as many steps, in nats.

        difference = |strict - tf32 of the same seed|        spread = max - min over the seeds of TF32

    tf32: a run a seed, the first of them of the seed of `strict`; at_step: nominal

    Raises UserError for a run that was not evaluated there.
    """
    exact, losses = validation_loss(strict, at_step), [validation_loss(run, at_step) for run in tf32]
    seeds = [run.config["seed"] for run in tf32]
    return {
        "after_steps": at_step,
        f"strict_seed_{strict.config['seed']}_loss": round(exact, 6),
        **{f"tf32_seed_{seed}_loss": round(loss, 6) for seed, loss in zip(seeds, losses, strict=True)},
        "difference_in_loss": round(abs(exact - losses[0]), 6),
        "spread_of_seeds_in_loss": round(max(losses) - min(losses), 6),
    }


def agreement_claim(agreement: Mapping[str, float]) -> Claim:
    """That TF32 gives FP32's loss as nearly as another seed does."""
    text = (
        f"TF32 stands for FP32: after {agreement['after_steps']:.0f} steps their validation losses differ by no more "
        "than those of TF32's own seeds"
    )
    holds = agreement["difference_in_loss"] <= agreement["spread_of_seeds_in_loss"]
    return Claim("tf32-stands-for-fp32", text, verdict(holds), dict(agreement))
