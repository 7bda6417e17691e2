"""A run's memory, predicted from its settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import psutil
import torch

from hybridlab.base.device import find_device
from hybridlab.base.errors import UserError
from hybridlab.base.pinned_memory import host_holds
from hybridlab.memory.config import MixedPrecisionConfig
from hybridlab.planner import Plan, TrainingSpec, nearest_fit, plan_training
from hybridlab.study.config import RunConfig
from hybridlab.study.tasks import TextTaskConfig


@lru_cache
def plan_of(config: RunConfig) -> Plan:
    """What a run's memory is predicted to be; made once, since XL's takes seconds.

    Raises UserError for a task that is not a GPT-2's.
    """
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

    Raises UserError for a task that is not a GPT-2's, where there is a GPU.
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


def nearest_fit_of(config: RunConfig, gpu_bytes: int) -> str:
    """What to switch on so that a run fits a GPU, in one line, with the peak that is then expected.

    gpu_bytes: 0 where there is no GPU
    """
    if not gpu_bytes or not isinstance(config.task, TextTaskConfig):
        return "take a smaller batch"
    return nearest_fit(training_spec_of(config), gpu_bytes)


def training_spec_of(config: RunConfig) -> TrainingSpec:
    """A run as the planner sees it. Raises UserError for a task that is not a GPT-2's."""
    if not isinstance(config.task, TextTaskConfig):
        raise UserError("only runs of a GPT-2 can be planned: give a TextTaskConfig")
    hybrid, memory = config.hybrid, config.memory
    if config.precision == "bf16":
        memory = replace(memory, mixed_precision=MixedPrecisionConfig.conservative())
    return TrainingSpec(
        model=config.task.model_config,
        batch=(config.task.batch_size, config.task.block_size),
        memory=memory,
        optimizer=config.optimizer,
        path=hybrid.path_needs,
        path_storage=hybrid.path_storage,
    )
