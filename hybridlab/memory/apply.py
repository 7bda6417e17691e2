"""A memory configuration, put to work on a model and its optimizer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hybridlab.base.errors import UserError
from hybridlab.base.ranks import Ranks
from hybridlab.memory.checkpointing import buckets_of, checkpoint_blocks_, is_checkpointed
from hybridlab.memory.config import MemoryConfig
from hybridlab.optim import OptimizerConfig, build_optimizer
from hybridlab.optim.averaging import method_of
from hybridlab.optim.build import MuonWithAdamW, build_muon, rate_groups, with_average
from hybridlab.optim.host_adamw import HostAdamW
from hybridlab.optim.in_backward import StepInBackward
from hybridlab.optim.low_bit import InFewCalls, low_bit_adamw


def prepare_model_(model: nn.Module, memory: MemoryConfig) -> None:
    """Checkpoint the model's blocks and lower its weights, as asked.

    What a model decides when it is built, its loss's chunks and its padding, stands in `memory.model_settings`.
    """
    if memory.checkpointing:
        checkpoint_blocks_(model, memory.checkpointing)
    if memory.lowers_weights:
        model.to(torch.bfloat16)


def optimizer_for(model: nn.Module, config: OptimizerConfig, memory: MemoryConfig) -> Optimizer:
    """The optimizer that `config` names, with its state in the format and the place that `memory` asks for.

    Prepare the model and move it to its device first.

    Raises UserError where the method knows no such state, torchao is not installed, nothing can compile its update, or
    the model is sharded and its weights would have to be whole.
    """
    memory.refuse_optimizer(config)
    if (ranks := Ranks.of(model)).sharded:
        ranks.refuse(memory.of_one_process)
    optimizer = _method(model, config, memory)
    if memory.step_in_backward:
        return StepInBackward(optimizer, buckets_of(model), memory.clip_in_backward)
    return optimizer


def refuse_unprepared(model: nn.Module, optimizer: Optimizer, memory: MemoryConfig) -> None:
    """Raise UserError for settings that nobody has put to work on this model or optimizer: they would do nothing."""
    method = method_of(optimizer)
    built = {
        "step_in_backward": not memory.step_in_backward or isinstance(optimizer, StepInBackward),
        "state_on_host": not memory.state_on_host or isinstance(method, HostAdamW),
        "optimizer_state": memory.optimizer_state == "fp32" or isinstance(method, InFewCalls | MuonWithAdamW),
    }
    for name, is_so in built.items():
        if not is_so:
            raise UserError(
                f"the memory settings ask for {name}={getattr(memory, name)!r}, and this {type(method).__name__} was "
                "built without: make it by hybridlab.memory.optimizer_for(model, OptimizerConfig(...), memory)"
            )
    is_bf16 = all(p.dtype == torch.bfloat16 for p in model.parameters() if p.is_floating_point())
    is_prepared = not memory.checkpointing or is_checkpointed(model, memory.checkpointing)
    if not is_prepared or (memory.lowers_weights and not is_bf16):
        raise UserError(
            "the memory settings ask for checkpointing or bf16 weights, and the model was not prepared: call "
            "hybridlab.memory.prepare_model_(model, memory) first, then build the optimizer"
        )


def _method(model: nn.Module, config: OptimizerConfig, memory: MemoryConfig) -> Optimizer:
    if memory.optimizer_state == "fp32" and not memory.state_on_host:
        return build_optimizer(model, config)
    groups = rate_groups(model, config, [p for p in model.parameters() if p.requires_grad])
    numbers: Any = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if memory.state_on_host:
        return HostAdamW(groups, **numbers)
    low_bit: Any = partial(
        low_bit_adamw, buckets=buckets_of(model), state=memory.optimizer_state, weights=memory.weights, **numbers
    )
    adamw = low_bit(groups)
    if config.name == "adamw":
        return with_average(adamw, config)
    # here that one steps nothing: it knows the format
    muon = build_muon(model, config, low_bit, lambda p: adamw._new_buffer(p, True))
    return with_average(muon, config)


def no_step(optimizer: Optimizer) -> AbstractContextManager[None]:
    """While this lasts, backward passes step nothing, whatever the optimizer: for passes that only warm up."""
    return optimizer.no_step() if isinstance(optimizer, StepInBackward | HostAdamW) else nullcontext()
