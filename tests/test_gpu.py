"""What only a GPU can show; skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybridlab import HybridTrainer, HybridTrainerConfig
from hybridlab.memory.precision import autocast
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optimizers import OptimizerConfig, Schedule, build_optimizer
from hybridlab.study import RunConfig, TextTaskConfig, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(step)).to(CUDA)


def trained(config: HybridTrainerConfig | None, steps: int = 60) -> torch.Tensor:
    """Final weights of a nano GPT-2 under a trainer, or under the plain loop where there is none."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config.nano()).to(CUDA)
    optimizer = build_optimizer(model, OptimizerConfig())
    trainer = HybridTrainer(model, optimizer, config) if config else None
    for step in range(steps):
        if trainer:
            trainer.step(lambda step=step: model(batch(step), batch(step)))  # type: ignore[misc]
        else:
            optimizer.zero_grad()
            model(batch(step), batch(step)).backward()
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_plain_training_is_the_bare_loop_bit_for_bit_on_a_gpu() -> None:
    assert torch.equal(trained(None), trained(HybridTrainerConfig.plain()))


@pytest.mark.parametrize("predictor", ["linear", "adam_coast"])
@pytest.mark.parametrize("path_device", ["same", "host"])
def test_jumps_and_rollback_snapshots_work_wherever_the_path_is_kept(predictor: str, path_device: str) -> None:
    config = HybridTrainerConfig(
        warmup_steps=10, full_steps=8, max_predict_steps=8, confidence_threshold=0.0, gate=True, predictor=predictor
    )
    kept_here = trained(config)
    kept_there = trained(replace(config, path_device=path_device))
    torch.testing.assert_close(kept_here, kept_there, rtol=1e-3, atol=1e-4)


def test_weights_moved_in_place_reach_a_compiled_bf16_forward() -> None:
    model = GPT2(GPT2Config.nano()).to(CUDA)
    compiled = torch.compile(model)
    tokens = batch(0)

    def losses() -> tuple[float, float]:
        with torch.no_grad(), autocast("bf16", CUDA):
            return float(compiled(tokens, tokens)), float(model(tokens, tokens))

    before, _ = losses()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    after, eager = losses()
    assert after == pytest.approx(eager, rel=1e-3)
    assert abs(after - before) > 1e-3


def test_a_run_on_a_gpu_counts_memory_as_the_card_does(tmp_path: Path) -> None:
    config = RunConfig(
        name="baseline",
        task=TextTaskConfig(model="nano", data="markov", vocab_size=64, block_size=32),
        steps=20,
        schedule=Schedule(warmup_steps=5, total_steps=20),
        precision="bf16",
        device="cuda",
    )
    summary = train(config, tmp_path).summary
    assert summary is not None
    assert summary["memory_source"] == "cuda"
    assert summary["peak_memory_bytes"] >= summary["peak_reserved_bytes"] >= summary["peak_allocated_bytes"] > 0
