"""Compiling a model, whole or block by block, and when its passes become CUDA graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from hybridlab import DepthSchedule, HybridTrainer, HybridTrainerConfig
from hybridlab.base.errors import UserError
from hybridlab.memory.apply import optimizer_for, prepare_model_
from hybridlab.memory.config import (
    INPUTS,
    CheckpointingConfig,
    GradientAccumulationConfig,
    MemoryConfig,
    PredictAwareMemoryConfig,
)
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optim import OptimizerConfig, build_optimizer, low_bit, muon
from hybridlab.speed import CudaGraphs, buffers_kept, compilation, compile_
from hybridlab.study import RunConfig, TextTaskConfig
from hybridlab.study import config as run_config
from hybridlab.study.training import Training, sped_up
from tests.conftest import TINY_TEXT

TOKENS = torch.randint(0, 500, (2, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts what torch.compile compiles; any program passes for a compiler."""
    counter, compile_function = CompileCounter(), torch.compile

    def counted(function: Callable[..., Any], **settings: Any) -> Any:
        return compile_function(function, **settings | {"backend": counter})

    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(compilation, "_compiled_for", None)
    yield counter
    torch._dynamo.reset()


def model_of(blocks: int, seed: int = 0) -> GPT2:
    torch.manual_seed(seed)
    return GPT2(GPT2Config.nano(n_layer=blocks))


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    loss: torch.Tensor = model(TOKENS[:, :-1], TOKENS[:, 1:])
    return loss


def test_blocks_compile_once_however_many_there_are(compiled: CompileCounter) -> None:
    counts = []
    for blocks in (2, 5):
        compile_(model := model_of(blocks), by_block=True)
        before = compiled.frame_count
        loss_of(model)
        counts.append(compiled.frame_count - before)
    assert counts[0] == counts[1] == 3, "the embedding, a block and the loss"


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "bf16"), ("muon", "fp32")])
def test_nothing_is_compiled_once_a_run_has_begun(
    optimizer: str, precision: str, compiled: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or its compilation would count as time of steps: those of Muon, of a schedule's rates and of more blocks too."""
    monkeypatch.setattr(muon, "_is_compiled_for", lambda p: True)
    muon._update.cache_clear()
    hybrid = HybridTrainerConfig.plain(clip_norm=1.0, depth=DepthSchedule(((0, 1), (3, 2))))
    rates = OptimizerConfig.tuned(optimizer)
    config = RunConfig(
        "ready", TextTaskConfig(**TINY_TEXT), 6, rates, hybrid=hybrid, precision=precision, compiled=True, device="cpu"
    )
    training = Training(config, torch.device("cpu"))
    training.warm_up_()
    before = compiled.frame_count
    for step in range(6):
        training.step(step)
    training.evaluate()
    muon._update.cache_clear()
    assert compiled.frame_count == before > 3


def test_updates_of_many_shapes_are_compiled_before_the_first_step(
    compiled: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than torch by default compiles of one function."""
    pytest.importorskip("torchao.optim")
    monkeypatch.setattr(low_bit, "_is_compiled_for", lambda p: True)
    low_bit._update.cache_clear()
    model = nn.Sequential(*(nn.Linear(64 * n, 64 * (n + 1)) for n in range(1, 11)))
    optimizer: Any = optimizer_for(
        model, OptimizerConfig(), MemoryConfig(optimizer_state="int8", step_in_backward=True)
    )
    optimizer.compile_steps_()
    before = compiled.frame_count
    for _ in range(2):
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    low_bit._update.cache_clear()
    assert compiled.frame_count == before >= len(model)


@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_muon_compiled_steps_as_it_does_uncompiled(
    state: str, compiled: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.ParameterList([nn.Parameter(torch.randn(64, 256)) for _ in range(2)])
        optimizer = optimizer_for(model, OptimizerConfig("muon"), MemoryConfig(optimizer_state=state))
        for _ in range(3):
            for p in model:
                p.grad = torch.randn_like(p)
            optimizer.step()
        return list(model)

    plain = trained()
    muon._update.cache_clear()
    monkeypatch.setattr(muon, "_is_compiled_for", lambda p: True)
    assert all(torch.equal(p, q) for p, q in zip(trained(), plain, strict=True))
    assert compiled.frame_count
    muon._update.cache_clear()


@pytest.mark.parametrize("by_block", [True, False])
def test_models_of_one_shape_share_what_was_compiled(by_block: bool, compiled: CompileCounter) -> None:
    losses = []
    for seed in (0, 1):
        compile_(model := model_of(2, seed), by_block=by_block)
        losses.append(loss_of(model).item())
        if seed == 0:
            once = compiled.frame_count
    assert compiled.frame_count == once > 0
    assert losses == [loss_of(model_of(2, seed)).item() for seed in (0, 1)], "each computes with its own weights"


@pytest.mark.parametrize("inputs", INPUTS)
def test_blocks_that_are_computed_again_compile_once_and_give_the_same_gradients(
    inputs: str, compiled: CompileCounter
) -> None:
    """Copies to the host and back are made in Python, around what is compiled."""
    plain, model = model_of(3), model_of(3)
    prepare_model_(model, MemoryConfig(checkpointing=CheckpointingConfig(inputs=inputs)))
    compile_(model, by_block=True)
    for each in (plain, model):
        loss_of(each).backward()
    assert compiled.frame_count == 3, "the embedding, a block and the loss"
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_growth_compiles_nothing_anew(compiled: CompileCounter) -> None:
    compile_(model := model_of(4), by_block=True)
    schedule = DepthSchedule(stages=((0, 1), (2, 2), (4, 4)))
    optimizer = build_optimizer(model, OptimizerConfig())
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig.plain(depth=schedule))
    trainer.step(lambda: loss_of(model))
    once = compiled.frame_count
    depths = [trainer.step(lambda: loss_of(model)).depth for _ in range(5)]
    assert depths == [1, 2, 2, 4, 4]
    assert compiled.frame_count == once


def test_cuda_graphs_of_a_model_on_the_processor_are_refused() -> None:
    with pytest.raises(UserError, match="need the model on a GPU"):
        CudaGraphs(model_of(2))


def test_capturing_leaves_buffers_as_they_were() -> None:
    """Its passes count for nothing: the running means of a batch norm stay."""
    norm = nn.BatchNorm1d(3)
    before = [buffer.tolist() for buffer in norm.buffers()]
    with buffers_kept([norm]):
        norm(torch.randn(4, 3) + 5)
    assert [buffer.tolist() for buffer in norm.buffers()] == before


def test_another_tensor_in_a_buffer_s_place_is_seen_and_put_back() -> None:
    """A replay would leave the old one there."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self) -> None:
            self.count = self.count + 1

    counts = Counts()
    with buffers_kept([counts]) as replaced:
        assert not replaced()
        counts()
        assert replaced()
    assert counts.count.item() == 0


def test_warming_up_leaves_buffers_as_they_were() -> None:
    """Running means of a batch norm, for one: or a plain run were not the plain loop."""
    training = Training(RunConfig("counts", TextTaskConfig(**TINY_TEXT), steps=4, device="cpu"), torch.device("cpu"))
    training.task.model.register_buffer("passes", torch.zeros(()))
    training.task.model.register_forward_hook(lambda model, *_: model.passes.add_(1) and None)
    training.warm_up_()
    assert training.task.model.passes.item() == 0
    training.step(0)
    assert training.task.model.passes.item() == 1


def test_warming_up_shows_how_the_norm_is_shared_out() -> None:
    """By the buckets' sizes the first step of a run would be clipped, and their gradients are not shared out so."""
    memory = MemoryConfig(step_in_backward=True, clip_in_backward=1.0)
    config = RunConfig(
        "shares", TextTaskConfig(**TINY_TEXT), 4, hybrid=HybridTrainerConfig.plain(memory=memory), device="cpu"
    )
    training = Training(config, torch.device("cpu"))
    shares = training._optimizer.param_groups[0]["clip_shares"]
    before = shares.clone()
    training.warm_up_()
    assert not torch.allclose(shares, before, rtol=0.1)
    assert shares.sum().item() == pytest.approx(1.0)


ON_GPU = RunConfig("graphs", TextTaskConfig(**TINY_TEXT), steps=4, compiled=True, device="cpu")
PARTS = MemoryConfig(gradient_accumulation=GradientAccumulationConfig(micro_batches=2))
AGAIN = HybridTrainerConfig.plain(memory=MemoryConfig(checkpointing=CheckpointingConfig()))
STEPPING, IN_FULL = MemoryConfig.fit_16gb(weights="fp32"), MemoryConfig(step_in_backward=True)
AWAY = MemoryConfig.fit_16gb(predict_aware=PredictAwareMemoryConfig("pinned"))
MUON = OptimizerConfig.tuned("muon")
SKIPS = DepthSchedule(stages=((0, 2),), skip_share=0.5, skip_until=2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ON_GPU, None),
        (replace(ON_GPU, compiled=False), "compiled is off"),
        (replace(ON_GPU, cuda_graphs=False), "cuda_graphs is off"),
        (replace(ON_GPU, hybrid=HybridTrainerConfig.plain(memory=PARTS)), None),
        (replace(ON_GPU, hybrid=AGAIN), None),
        (replace(ON_GPU, hybrid=AGAIN, task=replace(ON_GPU.task, dropout=0.1)), "of dropout again"),
        (replace(ON_GPU, hybrid=HybridTrainerConfig.plain(memory=MemoryConfig.fit_16gb())), None),
        (replace(ON_GPU, hybrid=HybridTrainerConfig.plain(memory=STEPPING)), None),
        (replace(ON_GPU, hybrid=HybridTrainerConfig(memory=STEPPING)), "takes each gradient away"),
        (replace(ON_GPU, hybrid=HybridTrainerConfig.plain(memory=replace(STEPPING, weights="bf16"))), "takes each"),
        (replace(ON_GPU, hybrid=HybridTrainerConfig.plain(memory=STEPPING), optimizer=MUON), "takes each gradient"),
        (replace(ON_GPU, hybrid=HybridTrainerConfig.plain(memory=IN_FULL)), "takes each gradient away"),
        (replace(ON_GPU, hybrid=HybridTrainerConfig.plain(memory=AWAY)), "to the host"),
        (replace(ON_GPU, hybrid=HybridTrainerConfig.plain(depth=SKIPS)), "skips other blocks"),
    ],
)
def test_a_run_says_why_it_has_no_cuda_graphs(
    config: RunConfig, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.without_cuda_graphs is not None, "there is no GPU"
    monkeypatch.setattr(run_config, "find_device", lambda name: torch.device("cuda"))
    said = config.without_cuda_graphs
    assert (said is None) if reason is None else (said is not None and reason in said)


def test_a_run_whose_depth_changes_is_compiled_by_block(compiled: CompileCounter) -> None:
    """As a whole it would be compiled anew for each depth, and run uncompiled after the eighth time."""
    deep = replace(ON_GPU, hybrid=HybridTrainerConfig.plain(depth=DepthSchedule(stages=((0, 1), (2, 2)))))
    model = model_of(2)
    assert sped_up(model, deep) is model
    loss_of(model)
    assert compiled.frame_count == 3
