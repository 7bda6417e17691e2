"""Whether two number formats train alike, as far as seeds do."""

from __future__ import annotations

from collections.abc import Mapping

from hybridlab.benchmarks.footprint import validation_loss
from hybridlab.results.publish import Claim, verdict
from hybridlab.study.study import StudyResult


def format_agreement(result: StudyResult, strict: str, tf32: str, at_step: int) -> dict[str, float]:
    """Validation losses of strict FP32 and of TF32 on the same held-out batches, after as many steps, in nats.

        difference = |strict - tf32 of the same seed|        spread = max - min over the seeds of TF32

    strict, tf32: the arms; of the first, seed 0 is looked at, of the second all seeds; at_step: nominal

    Returns nothing where one of them has not run. Raises UserError for a run that was not evaluated there.
    """
    if not {(strict, 0), (tf32, 0)} <= result.runs.keys():
        return {}
    exact = validation_loss(result.runs[strict, 0], at_step)
    losses = {seed: validation_loss(run, at_step) for (arm, seed), run in result.runs.items() if arm == tf32}
    return {
        "after_steps": at_step,
        "strict_seed_0_loss": round(exact, 6),
        **{f"tf32_seed_{seed}_loss": round(loss, 6) for seed, loss in losses.items()},
        "difference_in_loss": round(abs(exact - losses[0]), 6),
        "spread_of_seeds_in_loss": round(max(losses.values()) - min(losses.values()), 6),
    }


def agreement_claims(agreement: Mapping[str, float]) -> list[Claim]:
    """That TF32 gives FP32's loss as nearly as another seed does; open with one seed, nothing where none has run."""
    if not agreement:
        return []
    text = (
        f"TF32 stands for FP32: after {agreement['after_steps']:.0f} steps their validation losses differ by no more "
        "than those of TF32's own seeds"
    )
    spread = agreement["spread_of_seeds_in_loss"]
    outcome = verdict(agreement["difference_in_loss"] <= spread) if spread else "open"
    return [Claim("tf32-stands-for-fp32", text, outcome, dict(agreement))]
