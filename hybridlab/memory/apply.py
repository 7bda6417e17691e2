"""A memory configuration, put to work on a model and its optimizer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.optim import Optimizer

from hybridlab.errors import UserError
from hybridlab.memory.blocks import buckets_of, checkpoint_blocks_
from hybridlab.memory.config import MemoryConfig
from hybridlab.memory.host_optimizer import HostAdamW
from hybridlab.memory.in_backward import StepInBackward
from hybridlab.memory.low_bit import low_bit_adamw
from hybridlab.optimizers import OptimizerConfig, build_optimizer, decay_groups


def prepare_model_(model: nn.Module, memory: MemoryConfig) -> None:
    """Checkpoint the model's blocks and lower its weights, as asked.

    What a model decides when it is built, its loss's chunks and its padding, stands in `memory.model_settings`.
    """
    if memory.checkpointing:
        checkpoint_blocks_(model, memory.checkpointing)
    if memory.weights == "bf16":
        model.to(torch.bfloat16)


def optimizer_for(model: nn.Module, config: OptimizerConfig, memory: MemoryConfig) -> Optimizer:
    """The optimizer that `config` names, with its state in the format and the place that `memory` asks for.

    Prepare the model and move it to its device first.

    Raises UserError where the method knows no such state, or torchao is not installed.
    """
    if (memory.state_on_host or memory.optimizer_state != "fp32") and config.name != "adamw":
        asked = "state_on_host" if memory.state_on_host else f"optimizer_state={memory.optimizer_state!r}"
        raise UserError(f"{asked} goes with AdamW: set the optimizer's name to 'adamw', not {config.name!r}")
    optimizer = _method(model, config, memory)
    if memory.step_in_backward:
        return StepInBackward(optimizer, buckets_of(model), memory.clip_in_backward)
    return optimizer


def _method(model: nn.Module, config: OptimizerConfig, memory: MemoryConfig) -> Optimizer:
    if memory.optimizer_state == "fp32" and not memory.state_on_host:
        return build_optimizer(model, config)
    groups = decay_groups((p for p in model.parameters() if p.requires_grad), config.decay)
    if memory.state_on_host:
        return HostAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return low_bit_adamw(
        groups,
        buckets_of(model),
        state=memory.optimizer_state,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        stochastic_rounding=memory.weights == "bf16",
    )


def held(optimizer: Optimizer) -> AbstractContextManager[None]:
    """While this lasts, backward passes step nothing, whatever the optimizer: for passes that only warm up."""
    return optimizer.held() if isinstance(optimizer, StepInBackward | HostAdamW) else nullcontext()
