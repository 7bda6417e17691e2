"""What a training will take of a card's memory, before it runs and without the card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hybridlab.base.settings import check_bounds, check_types
from hybridlab.memory.config import MemoryConfig
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optim import OptimizerConfig
from hybridlab.planner.dry_run import Rehearsal, StepCosts
from hybridlab.planner.fake_gpu import emulated_card
from hybridlab.planner.live_bytes import LiveBytes
from hybridlab.weights.gram import PathNeeds
from hybridlab.weights.path import PathStorage

Batch = tuple[int, int]
"""Windows, and tokens in each."""

Model = str | GPT2Config | Callable[[], nn.Module]
"""The name of a GPT-2 size, its settings, or what builds any module."""

Loss = Callable[[nn.Module, Batch], Tensor]

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "path", "workspace")


@dataclass(frozen=True)
class CardShare:
    """What a card gives up beside the tensors; the defaults are rounded up from what XL took of an H200.

    workspace_bytes: that cuBLAS takes from torch's allocator
    context_bytes: CUDA's context, outside torch's allocator
    slack: reserved by torch's allocator beyond what is allocated, as a share of that
    """

    workspace_bytes: int = 2 * 32 * 2**20
    context_bytes: int = 900_000_000
    slack: float = 0.06

    def __post_init__(self) -> None:
        check_types(self)
        check_bounds(self, "workspace_bytes", "context_bytes", "slack", least=0)


@dataclass(frozen=True)
class Plan:
    """Predicted memory of a training, in bytes, and the work of a step.

    phases: "Full" (Warmup is Full without the path), "Predict" and "Correct": part -> bytes at that phase's peak
    share: what the card gives up beside tensors
    costs: of a gradient step: operations, and traffic on the card, the bus and the host
    held_on_host: bytes of host memory that the training takes and keeps, by what it keeps there
    """

    phases: dict[str, dict[str, int]]
    share: CardShare
    costs: StepCosts
    held_on_host: dict[str, int]

    @property
    def parts(self) -> dict[str, int]:
        """Part -> bytes, at the peak of the phase that needs the most; their sum is `peak_allocated_bytes`."""
        return max(self.phases.values(), key=_total)

    @property
    def peak_allocated_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` is expected to say."""
        return _total(self.parts)

    @property
    def peak_on_card_bytes(self) -> int:
        """What the card is expected to count: allocated, the allocator's slack, and the context."""
        return round(self.peak_allocated_bytes * (1 + self.share.slack)) + self.share.context_bytes

    @property
    def held_on_host_bytes(self) -> int:
        """Host memory in all, beside the process itself and its data."""
        return _total(self.held_on_host)

    def fits(self, card_bytes: int) -> bool:
        """Whether a card of this size holds it all."""
        return self.peak_on_card_bytes <= card_bytes

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        peaks = {name: getattr(self, name) for name in ("peak_allocated_bytes", "peak_on_card_bytes", "parts")}
        return peaks | asdict(self)


def _total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def plan(
    model: Model,
    batch: Batch,
    memory: MemoryConfig | None = None,
    optimizer: str | OptimizerConfig = "adamw",
    *,
    path: PathNeeds | None = None,
    path_storage: PathStorage | None = None,
    loss: Loss | None = None,
    weight_cache: bool = False,
    share: CardShare | None = None,
) -> Plan:
    """Predict peak memory by part and phase from the real autograd graph, without a GPU and without computing it.

        peak = max over time of the sum of all live storages, each rounded up to 512 bytes, + cuBLAS's workspace

    The model, its loss, backward pass and torch's optimizer run on fake tensors, and every storage is followed from
    birth to death. torchao's state is counted by its format: its compiled step takes next to nothing besides.
    A gradient that has not reached its parameter yet counts among the activations.

    model: the name of a GPT-2 size, its settings, or a function that builds any module
    batch: (windows, tokens); of it, one part at a time with gradient accumulation
    memory: None is plain float32 training
    optimizer: its settings, or its name
    path, path_storage: what a predictor remembers and where (`predictor.needs(full_steps)`); None never predicts
    loss: makes the inputs and the loss of a module and a batch; None calls `module(tokens, targets)`
    weight_cache: autocast's, which hybridlab never uses: for comparison with plain torch
    share: what the card gives up beside tensors; None is `CardShare()`

    Raises ValueError for settings that make no training; the message says what would.
    """
    memory, share = memory or MemoryConfig(), share or CardShare()
    settings = OptimizerConfig(optimizer) if isinstance(optimizer, str) else optimizer
    _refuse(model, batch, memory, settings)
    windows, tokens = batch
    part = windows // memory.micro_batches, tokens
    with emulated_card(), LiveBytes() as live:
        module = _build(model, memory)
        live.logit_widths = _vocabulary(module)
        training = Rehearsal(
            live,
            module,
            lambda module: (loss or next_token_loss)(module, part),
            memory,
            settings,
            path,
            path_storage or PathStorage(),
            weight_cache=weight_cache,
        )
        step = training.gradient_step()
        costs, held_on_host = training.costs(), training.held_on_host()
        phases = {"Full": step, "Predict": training.predict(), "Correct": step}
    return Plan({phase: _by_part(peak, share) for phase, peak in phases.items()}, share, costs, held_on_host)


def next_token_loss(module: nn.Module, batch: Batch) -> Tensor:
    """The loss of a language model that takes tokens and targets."""
    tokens = torch.empty(batch, dtype=torch.long)
    return module(tokens, torch.empty_like(tokens))


def _refuse(model: Model, batch: Batch, memory: MemoryConfig, optimizer: OptimizerConfig) -> None:
    if min(batch) < 1:
        raise ValueError(f"batch={batch} is empty: give windows and tokens, such as (8, 512)")
    config, (windows, tokens) = _config(model), batch
    if config and tokens > config.block_size:
        longest = config.block_size
        raise ValueError(
            f"a window of {tokens} tokens is longer than block_size={longest}: cut it to {longest}, as in "
            f"batch=({windows}, {longest}), on the command line --batch {windows}x{longest}"
        )
    if batch[0] % memory.micro_batches:
        raise ValueError(f"{batch[0]} windows do not split into {memory.micro_batches} equal micro_batches")
    if optimizer.name != "adamw" and (memory.state_on_host or memory.optimizer_state != "fp32"):
        asked = "state_on_host" if memory.state_on_host else f"optimizer_state={memory.optimizer_state!r}"
        raise ValueError(f"{asked} goes with AdamW: set the optimizer's name to 'adamw', not {optimizer.name!r}")


def _build(model: Model, memory: MemoryConfig) -> nn.Module:
    if not (config := _config(model)):
        return model()  # type: ignore[operator]
    return GPT2(replace(config, **{name: value for name, value in memory.model_settings.items() if value}))


def _config(model: Model) -> GPT2Config | None:
    """The settings of a GPT-2; None where the model is anything else."""
    if isinstance(model, GPT2Config):
        return model
    return GPT2Config.named(model) if isinstance(model, str) else None


def _vocabulary(module: nn.Module) -> frozenset[int]:
    """Widths that logits may have: rows of the largest embedding, with and without padding."""
    rows = max((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=0)
    return frozenset({rows, getattr(getattr(module, "config", None), "vocab_size", rows)})


def _by_part(peak: dict[str, int], share: CardShare) -> dict[str, int]:
    return {part: peak.get(part, 0) for part in PARTS} | {"workspace": share.workspace_bytes}
