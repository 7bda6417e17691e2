"""A run's memory, predicted from its settings."""

from __future__ import annotations

from dataclasses import replace

from hybridlab.errors import UserError
from hybridlab.memory.config import MixedPrecisionConfig
from hybridlab.memory.nearest_fit import Situation, nearest_fit
from hybridlab.memory.planner import Plan
from hybridlab.study.run_config import RunConfig
from hybridlab.study.tasks import TextTaskConfig


def plan_of(config: RunConfig) -> Plan:
    """What a run's memory is predicted to be. Raises UserError for a task that is not a GPT-2's."""
    return situation_of(config).plan()


def nearest_fit_of(config: RunConfig, card_bytes: int) -> str:
    """What to switch on so that a run fits a card, in one line, with the peak that is then expected.

    card_bytes: 0 where there is no card
    """
    if not card_bytes or not isinstance(config.task, TextTaskConfig):
        return "take a smaller batch"
    return nearest_fit(situation_of(config), card_bytes)


def situation_of(config: RunConfig) -> Situation:
    """A run as the planner sees it. Raises UserError for a task that is not a GPT-2's."""
    if not isinstance(config.task, TextTaskConfig):
        raise UserError("only runs of a GPT-2 can be planned: give a TextTaskConfig")
    hybrid, memory = config.hybrid, config.memory
    if config.precision == "bf16":
        memory = replace(memory, mixed_precision=MixedPrecisionConfig.conservative())
    return Situation(
        model=config.task.model_config,
        batch=(config.task.batch_size, config.task.block_size),
        memory=memory,
        optimizer=config.optimizer,
        path=hybrid.path_needs,
        path_storage=hybrid.path_storage,
    )
