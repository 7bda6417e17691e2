"""Decides how many blocks a step trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.base.errors import UserError
from hybridlab.base.operations import operations_of
from hybridlab.depth.growth import forget_, grow_, losses_by_rule, output_projections, positions
from hybridlab.depth.schedule import BEST, RULES, DepthSchedule
from hybridlab.depth.stack import BlockStack, restore_blocks_
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.gate import FORWARD_COST, best_growth
from hybridlab.engine.result import StepResult


@dataclass(frozen=True)
class Choice:
    """What becomes of a growth at the step that it is due.

    rule: by which blocks join now; None where they do not, or not yet
    said: of what was measured; None while batches are still tried
    forward_only_passes: that this step took for it; passes: that the whole trial took
    """

    rule: str | None = None
    said: str | None = None
    forward_only_passes: int = 0
    passes: int = 0

    def added_to(self, result: StepResult) -> StepResult:
        """The result of the step that follows, with what the growth before it took and did."""
        if not self.forward_only_passes and not self.said:
            return result
        return replace(
            result,
            event=self.said or result.event,
            grown=self.rule is not None,
            forward_only_passes=result.forward_only_passes + self.forward_only_passes,
            cost=result.cost + FORWARD_COST * self.forward_only_passes,
        )


class DepthController:
    """Owns the stack of blocks and the stage of its schedule; without a schedule the model is left as it is.

    A growth that was rolled back, or that no rule allowed yet, is tried again `full_steps` steps later.

    Raises UserError for a model without one stack of equal blocks, and for a schedule that does not fit it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig) -> None:
        schedule = config.depth
        self._optimizer, self._config, self._schedule = optimizer, config, schedule
        self._tried: list[Tensor] = []
        self._stage, self._grown_at, self._not_before = 0, -(10**9), 0
        self._block_share = math.nan
        _refuse_without(restore_blocks_(model), optimizer)
        if schedule is None:
            return
        self._model, self._stack = model, BlockStack(model, schedule.blocks)
        _refuse_misfit(schedule, self._stack)
        self._positions = positions(schedule.rule, schedule.depths, len(self._stack))
        self._stack.activate_(self._positions[0])

    @property
    def depth(self) -> int | None:
        """Blocks that take part; None without a schedule."""
        return None if self._schedule is None else len(self._stack.active)

    def weigh_(self, forward: Callable[[], Tensor], *, with_backward: bool) -> None:
        """Count the floating-point operations of a pass with few blocks, and with one more: what one costs.

        cost of a step = 1 - (blocks left out) (operations of a block) / (operations with all)

        with_backward: what checkpointing computes again then counts too; gradients go nowhere
        """
        if self._schedule is None:
            return

        def one_pass() -> None:
            loss = forward()
            if with_backward:
                params = [p for p in self._model.parameters() if p.requires_grad]
                torch.autograd.grad(loss, params, allow_unused=True)

        active, blocks = self._stack.active, len(self._stack)
        counts, few = [], min(1, blocks - 1)
        try:
            self._stack.activate_(range(few))
            with torch.no_grad():
                forward()  # the first time, a bypassed block runs all the same, to see what it returns
            with torch.set_grad_enabled(with_backward):
                for count in (few, few + 1):
                    self._stack.activate_(range(count))
                    counts.append(operations_of(one_pass))
        finally:
            self._stack.activate_(active)
        block = counts[1] - counts[0]
        self._block_share = block / (counts[0] + (blocks - few) * block)

    def taking_part(self, step: int) -> dict[str, Any]:
        """Blocks of a gradient step, and its cost, as a step's result has them."""
        if self._schedule is None:
            return {"cost": 1.0}
        depth = len(self._stack.active) - len(self._drawn(self._schedule, step))
        left_out = len(self._stack) - depth
        return {"depth": depth, "cost": 1.0 - left_out * self._block_share if left_out else 1.0}

    def stages_(self) -> Iterator[int | None]:
        """Show the model as each stage has it, deepest last, then as it was: for whoever warms it up."""
        if self._schedule is None:
            yield None
            return
        try:
            for stage in self._positions:
                self._stack.activate_(stage)
                yield self.depth
        finally:
            self._stack.activate_(self._positions[self._stage])

    def is_due(self, step: int) -> bool:
        """Whether blocks join at this step, counted from 0."""
        return self._schedule is not None and step >= self._not_before and self._schedule.stage_at(step) > self._stage

    @property
    def asks_gate(self) -> bool:
        """Whether a growth that is due is tried first, which costs passes."""
        return self._schedule is not None and self._schedule.rule == BEST

    def choose_(self, step: int, forward: Callable[[], Tensor]) -> Choice:
        """By which rule the blocks of the step's stage join; "best" tries each on this batch, and decides after some.

        forward: the loss of this step's batch, without backward
        """
        assert self._schedule is not None, "without a schedule no growth is due"
        if not self.asks_gate:
            return Choice(self._schedule.rule, self._schedule.rule)
        to, host = self._positions[self._next_stage(step)], self._config.path_device == "host"
        losses = losses_by_rule(self._stack, to, forward, self._schedule.outputs, host, self._model.buffers())
        self._tried.append(torch.stack(losses))
        passes = len(self._tried[-1])
        if len(self._tried) < self._config.gate_batches:
            return Choice(forward_only_passes=passes)
        tried = [losses.cpu() for losses in self._tried]  # those of a checkpoint lie there
        before, *after = torch.stack(tried, dim=1).double().tolist()
        rule, changes = best_growth(dict(zip(RULES, after, strict=True)), before)
        self._tried, self._not_before = [], step if rule else step + self._config.full_steps
        measured = ", ".join(f"{name} {change:+.3f}" for name, change in changes.items())
        said = (
            f"{rule}, the best of {measured} nats" if rule else f"not grown yet: {measured or 'no loss is finite'} nats"
        )
        return Choice(rule, said, passes, passes * self._config.gate_batches)

    def _next_stage(self, step: int) -> int:
        """The step's own; where each is tried first, the one after the present."""
        assert self._schedule is not None
        return self._stage + 1 if self.asks_gate else self._schedule.stage_at(step)

    def grow_(self, step: int, rule: str) -> str:
        """Let the blocks of the step's stage join; what was done, in words."""
        assert self._schedule is not None, "without a schedule no growth is due"
        before, schedule = self.depth, self._schedule
        self._stage, self._grown_at = self._next_stage(step), step
        grow_(self._stack, self._optimizer, self._positions[self._stage], rule, schedule.outputs)
        return f"grown: {before} -> {self.depth} blocks"

    def shrink_(self, depth: int, step: int) -> None:
        """Bypass the blocks again that a growth had added; it is tried again later."""
        self._stage = [len(active) for active in self._positions].index(depth)
        self._not_before, self._grown_at = step + self._config.full_steps, -(10**9)
        self._stack.activate_(self._positions[self._stage])

    def forget_(self) -> None:
        """Once the others are restored, nothing stays of what the growth made of the bypassed blocks."""
        forget_(self._stack, self._optimizer)

    @contextmanager
    def gradient_step(self, step: int) -> Iterator[None]:
        """Around a gradient step: random blocks are skipped, and the rate rises anew after growth, where asked."""
        if self._schedule is None:
            yield
            return
        rewarm = self._schedule.rewarm_steps
        share = (step - self._grown_at + 1) / rewarm if rewarm else 1.0
        skipped = self._stack.without(self._drawn(self._schedule, step))
        with skipped, _rates_times(self._optimizer, share) if share < 1 else nullcontext():
            yield

    def _drawn(self, schedule: DepthSchedule, step: int) -> list[int]:
        """The active blocks that this step skips; at least one is left."""
        if not schedule.skip_share or step >= schedule.skip_until:
            return []
        active = self._stack.active
        count = min(round(schedule.skip_share * len(active)), len(active) - 1)
        return np.random.default_rng((schedule.skip_seed, step)).choice(active, max(count, 0), replace=False).tolist()

    def state_dict(self) -> dict[str, Any]:
        """The stage, and when it began."""
        names = ("stage", "grown_at", "not_before", "block_share", "tried")
        return {name: getattr(self, f"_{name}") for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in a stage: weights and optimizer state of its blocks have been loaded."""
        for name, value in state.items():
            setattr(self, f"_{name}", value)
        if self._schedule is not None:
            self._stack.activate_(self._positions[self._stage])


def _refuse_without(restored: list[nn.Parameter], optimizer: Optimizer) -> None:
    """Refuse an optimizer that lacks weights which were bypassed until now."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in held for p in restored):
        raise UserError(
            "the optimizer was built while blocks were bypassed, as an earlier training had left them, and would not "
            "train these: all of them take part again, so build the optimizer anew, and then the trainer"
        )


def _refuse_misfit(schedule: DepthSchedule, stack: BlockStack) -> None:
    if schedule.in_shares:
        raise UserError("the depth schedule is in shares of a run: give the trainer schedule.fitted_to(steps)")
    last, total = schedule.depths[-1], len(stack)
    if last > total or (last < total and not schedule.shallow):
        raise UserError(
            f"the depth schedule ends at {last} blocks and the model has {total}: let the last stage have {total}, or "
            "set shallow=True for a control that never grows to full depth"
        )
    if schedule.grows and schedule.rule in ("fresh", BEST):
        output_projections(stack.blocks[0], schedule.outputs)


@contextmanager
def _rates_times(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Inside, every learning rate is `factor` times its own; a rate in a tensor changes in place."""
    rates = [(group, group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None]
    saved = [rate.clone() if isinstance(rate, Tensor) else rate for _, rate in rates]
    for group, rate in rates:
        group["lr"] = rate.mul_(factor) if isinstance(rate, Tensor) else rate * factor
    try:
        yield
    finally:
        for (group, rate), value in zip(rates, saved, strict=True):
            group["lr"] = rate.copy_(value) if isinstance(rate, Tensor) else value
