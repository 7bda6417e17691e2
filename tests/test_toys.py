"""Toy problems with known answers: the whole engine, gate and rollback included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybridlab import HybridTrainer, HybridTrainerConfig
from hybridlab.engine.result import StepResult

Loss = Callable[[Tensor, int], Tensor]


def run(
    config: HybridTrainerConfig, loss: Loss, steps: int, lr: float
) -> tuple[Tensor, HybridTrainer, list[StepResult]]:
    """Train one vector of weights on a loss that may depend on the step."""
    weights = nn.Parameter(torch.full((64,), 2.0))
    model = nn.Module()
    model.register_parameter("weights", weights)
    trainer = HybridTrainer(model, torch.optim.SGD([weights], lr=lr), config)
    results = [trainer.step(lambda step=step: loss(weights, step)) for step in range(steps)]  # type: ignore[misc]
    return weights.detach(), trainer, results


def noise(step: int, size: float) -> Tensor:
    return size * torch.randn(64, generator=torch.Generator().manual_seed(step))


def test_a_noisy_stationary_quadratic_is_left_alone_by_the_gate() -> None:
    """Settled around the minimum, every step is noise: jumps can only hurt, and are refused."""

    def loss(weights: Tensor, step: int) -> Tensor:
        return (weights - noise(step, 1.0)).square().sum() / 2

    config = HybridTrainerConfig(warmup_steps=100, confidence_threshold=0.0)
    hybrid, trainer, _ = run(config, loss, 1500, lr=0.05)
    plain, _, _ = run(HybridTrainerConfig.plain(), loss, 1500, lr=0.05)

    def expected(weights: Tensor) -> float:
        return float(weights.square().sum() / 2) + 32

    counts = trainer.statistics()
    assert counts.proposals_rejected >= 3
    assert counts.predicted_steps <= 0.05 * counts.nominal_steps
    assert counts.forward_only_passes / 3 <= 0.03 * counts.nominal_steps
    assert expected(hybrid) <= 1.02 * expected(plain)


def test_constant_drift_under_noise_is_predicted_and_costs_nothing() -> None:
    """A slope that never ends: a predicted step is as good as a real one."""
    slope = torch.ones(64)

    def loss(weights: Tensor, step: int) -> Tensor:
        return weights @ (slope + noise(step, 0.3))

    config = HybridTrainerConfig(warmup_steps=20)
    hybrid, trainer, _ = run(config, loss, 600, lr=0.001)
    counts = trainer.statistics()
    assert counts.predicted_steps > 0.5 * counts.nominal_steps
    start = 2.0 * 64
    progress, full = start - float(hybrid @ slope), 600 * 0.001 * 64
    gradient_share = counts.gradient_steps / counts.nominal_steps
    step_value = (progress / full - gradient_share) / (1 - gradient_share)
    assert step_value > 0.8


def test_a_sudden_change_of_the_landscape_is_rolled_back_and_forgotten() -> None:
    """A valley that drifts on until it turns into a wall: the jump into the wall is taken back."""
    wall = 250

    def loss(weights: Tensor, step: int) -> Tensor:
        plain = (weights + 3.0 + noise(step, 0.1)).square().sum() / 2
        steep = 400 * torch.relu(1.2 - weights).square().sum() if step >= wall else 0.0
        return plain + steep + 50

    config = HybridTrainerConfig(warmup_steps=20, gate=False, confidence_threshold=0.3, max_predict_steps=60)
    hybrid, trainer, results = run(config, loss, 500, lr=0.001)
    plain, _, _ = run(HybridTrainerConfig.plain(), loss, 500, lr=0.001)
    events = [(r.nominal_step, r.event) for r in results if r.event and r.event.startswith("rolled back")]
    assert events
    assert wall <= events[0][0] <= wall + 20
    assert trainer.statistics().rollbacks >= 1
    final, reference = float(loss(hybrid, 10_000)), float(loss(plain, 10_000))
    assert final <= 1.02 * reference
