"""A run's memory, predicted from its settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hybridlab.base.device import find_device
from hybridlab.base.pinned_memory import host_holds
from hybridlab.base.ranks import SHARDING
from hybridlab.memory.config import MixedPrecisionConfig
from hybridlab.planner import Plan, TrainingSpec, plan_training
from hybridlab.planner.architectures import rebuilt
from hybridlab.planner.spec import BatchShape
from hybridlab.study.config import RunConfig
from hybridlab.study.ranks import RanksConfig
from hybridlab.study.task_checks import check_task
from hybridlab.study.tasks import Batch, HuggingFaceTaskConfig, Task, TextTaskConfig


@lru_cache
def plan_of(config: RunConfig) -> Plan:
    """What a run's memory is predicted to be; made once, since XL's takes seconds."""
    return plan_training(training_spec_of(config))


def gpu_bytes_of(config: RunConfig) -> int:
    """The size of the GPU that a run has to itself, or of the smaller one that it stands for; 0 without a GPU."""
    device = find_device(config.device)
    if config.emulates_card():
        return config.gpu_bytes
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def room_for(configs: Iterable[RunConfig]) -> tuple[list[RunConfig], dict[str, str]]:
    """Those of some runs that the machine can hold, and of each other one, by name, why it cannot.

    Goes by the predicted peak on the GPU, context included, against the whole GPU, and by what is kept on the host
    against what the host has available. Without a GPU there is room for all.
    """
    lacks = [(config, _lack(config)) for config in configs]
    return [config for config, lack in lacks if not lack], {config.name: lack for config, lack in lacks if lack}


def _lack(config: RunConfig) -> str:
    """What a run wants and the machine does not have; nothing where it has it all, or no GPU."""
    gpu_bytes = gpu_bytes_of(config)
    if not gpu_bytes:
        return ""
    plan = plan_of(config)
    if not plan.fits(gpu_bytes):
        return f"needs {plan.peak_on_gpu_bytes / 1e9:.1f} GB, this GPU has {gpu_bytes / 1e9:.1f}"
    wanted_bytes, available_bytes = plan.host_memory_bytes, psutil.virtual_memory().available
    if not host_holds(wanted_bytes, available_bytes):
        return f"needs {wanted_bytes / 1e9:.1f} GB of host memory, {available_bytes / 1e9:.1f} are available"
    return ""


def training_spec_of(config: RunConfig, ranks: RanksConfig | None = None, count: int = 1) -> TrainingSpec:
    """A run as the planner sees it; with `ranks`, as each of `count` processes sees it.

    Of a task other than GPT-2's, the model and a batch are made first, for their shapes: of transformers on "meta",
    without their memory, of others on the CPU.

    Raises UserError as `check_task` does.
    """
    hybrid, memory = config.hybrid, config.memory
    if config.precision == "bf16":
        memory = replace(memory, mixed_precision=MixedPrecisionConfig.conservative())
    past: dict[str, Any] = {"path": hybrid.path_needs, "path_storage": hybrid.path_storage}
    past |= {"depth": config.trainer.depth, "averages": config.tail_average > 0, "compiled": config.compiled}
    past["cuda_graphs"] = config.without_cuda_graphs is None
    if ranks:
        past |= {"ranks": count} | {name: getattr(ranks, name) for name in ("wrap", *SHARDING)}
    spec = TrainingSpec("nano", (1, 1), memory, config.optimizer, **past)
    if isinstance(config.task, TextTaskConfig):
        return replace(spec, model=config.task.model_config, batch=(config.task.batch_size, config.task.block_size))
    check_task(config.task)
    place = "meta" if isinstance(config.task, HuggingFaceTaskConfig) else "cpu"
    task = config.task.build(config.seed, torch.device(place), memory)
    sizes = (config.task.batch_size, getattr(config.task, "block_size", 1))
    loss = partial(_loss_like, task, task.batch(0))
    return replace(spec, model=rebuilt(task.model), batch=sizes, loss=loss)


def _loss_like(task: Task, batch: Batch, model: nn.Module, sizes: BatchShape) -> Tensor:
    """The task's loss on so many examples of this batch's shapes."""
    return task.loss(model, tree_map_only(Tensor, lambda t: torch.empty(sizes[0], *t.shape[1:], dtype=t.dtype), batch))
