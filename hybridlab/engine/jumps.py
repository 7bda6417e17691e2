"""Decides about jumps: proposed, tried, accepted, corrected, shortened, ended, rolled back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hybridlab.engine.aftermath import Aftermath
from hybridlab.engine.closures import warn_of_drawing
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.corrector import JumpOutcome, ResidualStore, wanted_length
from hybridlab.engine.divergence import Action, Divergence, DivergenceMonitor
from hybridlab.engine.gate import Gate
from hybridlab.engine.jump_state import Jump, Slopes, Trial
from hybridlab.engine.phases import Phase, may_propose
from hybridlab.engine.result import StepResult
from hybridlab.predictors import PREDICTORS, Proposal, Signals
from hybridlab.weights.path import Trajectory
from hybridlab.weights.snapshot import Snapshot, Weights

SAID = {Action.SHORTEN: "shortened", Action.END: "left Predict", Action.ROLL_BACK: "rolled back"}


@dataclass(frozen=True)
class Decision:
    """What the trainer has to do after a measurement.

    action: CONTINUE; SHORTEN or END, which the controller has done to the jump already; ROLL_BACK: restore `snapshot`;
        STOP: the numbers are not finite, and there is nothing to restore
    divergence: what is wrong; None where nothing is
    """

    action: Action = Action.CONTINUE
    divergence: Divergence | None = None
    snapshot: Snapshot | None = None

    @property
    def diverged(self) -> bool:
        """Whether training has gone wrong, with or without a jump to roll back."""
        return self.divergence is not None and self.divergence.action is Action.ROLL_BACK

    @property
    def event(self) -> str | None:
        """What was done and why, for the step's result."""
        said = SAID.get(self.action, "diverged" if self.diverged else "noted")
        return f"{said}: {self.divergence}" if self.divergence else None


@dataclass(frozen=True)
class JumpStep:
    """One nominal step of a jump.

    steps_left: nominal steps of the jump before this one
    ends_chunk: whether the loss is measured at this step
    last_motion_made: whether the weights move several times in this jump, and have moved for the last time
    predicted_loss: at its end, in nats
    snapshot: what was before the jump, for whoever offloads weights and state; kept by the controller alone
    """

    steps_left: int
    ends_chunk: bool
    last_motion_made: bool
    predicted_loss: float
    snapshot: Snapshot | None


class JumpController:
    """Owns the jump, its trial and the rollback snapshot, and decides what becomes of them.

        Full       the path is recorded; at the end of a block the predictor may propose a jump, and the gate tries it
                   on the batches that follow, while training goes on
        Predict    the accepted jump is taken in chunks
        Correct    slopes after the jump say how long it should have been
        Full       until a whole block has passed, the jump can be rolled back

    The trainer runs the steps, shows their results here, and carries out the `Decision`. Only `probe_`, `advance_` and
    `correct_` move weights.

    config: the trainer's settings, held here alone; `change` replaces them
    gate, predictor: read by those who report on them
    """

    def __init__(self, weights: Weights, optimizer: Optimizer, config: HybridTrainerConfig) -> None:
        self.config, self._weights, self._optimizer = config, weights, optimizer
        self.predictor = PREDICTORS[config.predictor]()
        self._needs = self.predictor.needs(config.full_steps)
        self._trajectory = self._new_trajectory()
        self._monitor = DivergenceMonitor(config.divergence_threshold)
        self.gate = Gate(config.gate_budget, config.max_predict_steps, float(config.max_predict_steps))
        self._residuals, self._aftermath = ResidualStore(), Aftermath()
        self._jump: Jump | None = None
        self._trial: Trial | None = None
        self._snapshot: Snapshot | None = None
        self._equivalent_steps = self._unconfirmed_equivalent_steps = 0.0
        self._highest_lr = 0.0
        self._closure_tested = False

    def _new_trajectory(self) -> Trajectory:
        return Trajectory(self._weights, self._optimizer, self._needs, self.config.path_storage)

    def begin_path(self) -> None:
        """Other weights are trained from here: the path begins anew, and no earlier jump can be rolled back."""
        self._trajectory, self._trial, self._aftermath = self._new_trajectory(), None, Aftermath()
        self._confirm_jump()

    def begin_growth(self, snapshot: Snapshot) -> None:
        """Blocks have joined: until a Full block has passed, what was before them can be restored."""
        self.begin_path()
        self._snapshot = snapshot
        self._monitor.restart_warmup()

    # --- Full: proposing and trying ----------------------------------------------------------------------

    def begin_block(self) -> None:
        """A Full block begins: the path goes on from here."""
        self._jump = None
        if self.config.max_predict_steps:
            self._trajectory.anchor()

    def probe_(self, forward: Callable[[], Tensor]) -> list[Tensor]:
        """Try every motion of the trial on this step's batch, before it is trained on; put the weights back.

        Returns the losses by motion: none where no trial is under way, and once in a training one more, of length 0
        again: a closure that draws its own batch is told by it.
        """
        if self._trial is None:
            return []
        saved, losses, motions = self._weights.snapshot(optimizer=False), [], self._trial.motions
        if not self._closure_tested and not self._trial.repeated:
            motions = [*motions, motions[0]]
        for motion in motions:
            try:
                self._trajectory.move_(motion)
                losses.append(forward())
            finally:
                self._weights.restore_(saved)
        return losses

    def after_full_step(
        self, result: StepResult, probed: list[Tensor], steps_in_block: int, gradient_steps: int
    ) -> StepResult:
        """The step's result with what was decided: continue the trial under way, or see whether to open one.

        probed: what `probe_` measured; gradient_steps: of the whole training so far, which the gate's budget is a share
            of
        """
        if self._trial is not None:
            return self._continue_trial(self._trial, probed, replace(result, forward_only_passes=len(probed)))
        if not self.config.max_predict_steps:
            if steps_in_block >= self.config.full_steps:
                self._confirm_jump()
            return result
        full = self._trajectory.observe() and self._trajectory.is_full
        if not full or not self._needs.ends_block(steps_in_block, self.config.full_steps):
            return result
        if self._snapshot is not None and not self._weights.are_finite():
            return result  # the loss is read at the next step, and rolls back
        self._confirm_jump()
        if self.config.gate and not self.gate.within_budget(gradient_steps):
            return result
        return self._propose(result)

    def _confirm_jump(self) -> None:
        """A whole block of gradient steps has followed the last jump: it can no longer be rolled back."""
        self._learn_cost()
        self._equivalent_steps += self._unconfirmed_equivalent_steps
        self._snapshot, self._unconfirmed_equivalent_steps = None, 0.0

    def _learn_cost(self) -> None:
        """What became of the loss since the last jump is charged to the next ones."""
        if self._aftermath.after is not None:
            self.gate.learn_cost(self._aftermath.end())

    def _propose(self, result: StepResult) -> StepResult:
        gram, horizon = self._trajectory.gram(), self.gate.horizon
        proposal = self.predictor.propose(gram, horizon)
        result = replace(result, confidence=proposal.confidence)
        if not may_propose(proposal.confidence, self.config):
            return result
        scale = self._residuals.expected_length(proposal.confidence)
        coefficients, loss_change = scale * proposal.coefficients, scale * proposal.loss_change
        proposal = replace(proposal, coefficients=coefficients, loss_change=loss_change)
        if proposal.is_empty:
            return replace(result, event="rejected: the proposal is empty or not finite", jump_accepted=False)
        trial = Trial(proposal, max(1.0, scale * horizon), scale, gram.to_mean())
        if self.config.gate:
            self._trial = trial
            return replace(result, event="proposed", acceptance_probability=self.gate.acceptance_probability)
        trial.slopes.append(self._slopes(proposal, result))
        return self._accept(trial, 1.0, proposal.loss_change, result)

    def _continue_trial(self, trial: Trial, probed: list[Tensor], result: StepResult) -> StepResult:
        """Record losses and slopes along the jump; decide when enough batches were tried."""
        losses, count = torch.stack(probed).flatten(), len(trial.motions)
        trial.losses.append(losses[:count])
        if len(losses) > count:
            trial.repeated.append(losses[[0, -1]])
        trial.slopes.append(self._slopes(trial.proposal, result))
        if len(trial.losses) < self.config.gate_batches:
            return result
        self._trial, found = None, trial.result(self.gate.price)
        if trial.differs_when_repeated():
            warn_of_drawing()
        self._closure_tested = True
        self.gate.record(found, trial.proposal.confidence, forward_passes=count * len(trial.losses))
        if found.accepted:
            return self._accept(trial, found.length, found.loss_change, result)
        self._trajectory.anchor()
        return replace(result, event="rejected", jump_accepted=False)

    def _accept(self, trial: Trial, length: float, loss_change: float, result: StepResult) -> StepResult:
        """Turn a trial into a jump, with a rollback snapshot; a snapshot of NaN would be none."""
        if not self._weights.are_finite():
            return replace(result, event="rejected: the weights are not finite", jump_accepted=False)
        asked = length * trial.horizon
        steps = max(1, min(self.config.max_predict_steps, round(asked)))
        slopes = torch.stack(trial.slopes).mean(dim=0)
        change = loss_change * min(1.0, steps / asked)
        equivalent = self._monitor.equivalent_gradient_steps(change, steps) / steps
        self._snapshot = self._weights.snapshot()  # raises where memory is short: there is no jump without a snapshot
        self._weights.fp32.set_base()
        if self.config.gate:
            self._aftermath.begin()
        self._jump = Jump(
            trial.proposal, trial.horizon, trial.scale, steps, self._monitor.mean, change, equivalent, slopes
        )
        return replace(result, event="accepted", jump_accepted=True)

    # --- Predict and Correct -----------------------------------------------------------------------------

    def advance_(self) -> JumpStep:
        """One nominal step of the jump; the weights move at the start of each chunk.

        It counts with `count_step`: a step whose closure raises can be tried again, and moves nothing twice.
        """
        jump, interval = self._current_jump(), self.config.correction_interval
        if chunk := jump.next_chunk(interval):
            self._trajectory.move_(jump.proposal.coefficients, chunk)
            jump.count_chunk(chunk)
        after = replace(jump, taken=jump.taken + 1)
        return JumpStep(
            steps_left=jump.length - jump.taken,
            ends_chunk=after.taken % interval == 0 or after.is_over,
            last_motion_made=after.last_of_several_made(interval),
            predicted_loss=after.predicted_loss,
            snapshot=self._snapshot,
        )

    def count_step(self) -> None:
        """The step that `advance_` began has been taken."""
        jump = self._current_jump()
        jump.taken += 1
        self._aftermath.predicted_steps += 1
        self._unconfirmed_equivalent_steps += jump.equivalent_steps_per_step

    def correct_(self, result: StepResult) -> None:
        """Record the slopes after the jump; at the end of Correct move each group to where its slope vanishes.

        Where the slopes are not known, as with an optimizer that has taken the gradients away, nothing moves, and
        nothing is learned from the jump.
        """
        jump = self._current_jump()
        jump.slopes_after.append(self._slopes(jump.proposal, result))
        if len(jump.slopes_after) < self.config.correct_steps:
            return
        confidence, taken = jump.proposal.confidence, jump.scale * jump.moved
        before, after = jump.slopes_per_move()
        if not math.isfinite(before.sum() + after.sum()):
            return
        blended = self._residuals.blend(wanted_length(before, after), confidence, taken)
        together = float(wanted_length(before.sum(), after.sum()))
        self._residuals.add(JumpOutcome(confidence, jump.loss_error, together * taken))
        self._trajectory.move_(jump.proposal.coefficients * (jump.moved * (blended - 1.0))[:, None])

    def _current_jump(self) -> Jump:
        assert self._jump is not None, "in Predict and Correct there is a jump"
        return self._jump

    def _slopes(self, proposal: Proposal, result: StepResult) -> Slopes:
        """Slope of the loss along a proposal from the last gradients, as they were before clipping."""
        slopes = self._trajectory.slopes(proposal.coefficients)
        if self.config.clip_norm is None or result.async_norm is None:
            return slopes
        return slopes * (result.async_norm.tensor.double() / self.config.clip_norm).clamp(min=1.0).to(slopes.device)

    # --- deciding after a measurement --------------------------------------------------------------------

    def judge(self, measured: StepResult) -> Decision:
        """What follows from the measured loss of a step; the predictor observes the gradient steps."""
        loss, norm, predicted = measured.measured_loss, measured.gradient_norm, measured.predicted_loss
        if loss is None:
            return Decision()
        if norm is not None:
            self.predictor.observe(Signals(loss, norm, self._lr_share()))
            before_jump = self._jump is not None and measured.phase is Phase.FULL
            self._aftermath.observe(loss, before_jump=before_jump)
        elif self._jump is not None and predicted is not None:
            self._jump.loss_error = loss - predicted
        divergence = self._monitor.check(loss, norm, predicted)
        if divergence is None:
            return Decision()
        if divergence.action is Action.ROLL_BACK:
            return self._roll_back(divergence)
        return self._shorten(divergence) if measured.phase is Phase.PREDICT else Decision(divergence=divergence)

    def _lr_share(self) -> float:
        """The learning rate over the highest one so far, in [0, 1]."""
        given = self._optimizer.param_groups[0].get("lr")
        lr = 1.0 if given is None else float(given)  # None: the optimizer finds its own
        self._highest_lr = max(self._highest_lr, lr)
        return lr / self._highest_lr if self._highest_lr else 1.0

    def _shorten(self, divergence: Divergence) -> Decision:
        """Take half of what is left of the jump, or end it here."""
        jump = self._current_jump()
        if divergence.action is Action.END:
            jump.length = jump.taken
        else:
            jump.share *= 0.5
        return Decision(divergence.action, divergence)

    def _roll_back(self, divergence: Divergence) -> Decision:
        """Give up the last jump, if it may be the cause, and hand out its snapshot; propose less far next time."""
        if self._snapshot is None:
            if divergence.kind == "not finite":
                return Decision(Action.STOP, divergence)
            self._monitor.restart_warmup()
            return Decision(divergence=divergence)
        decision = Decision(Action.ROLL_BACK, divergence, self._snapshot)
        self._learn_cost()
        self._snapshot = self._trial = None
        self._unconfirmed_equivalent_steps = 0.0
        self.gate.halve_horizon()
        return decision

    # --- from outside ------------------------------------------------------------------------------------

    def change(self, config: HybridTrainerConfig) -> None:
        """Go on with other settings; no jump may be under way."""
        self.config = config
        self.gate.set_max_horizon(config.max_predict_steps)

    @property
    def jump_ended(self) -> bool:
        """Whether there is a jump, and all its steps have passed."""
        return self._jump is not None and self._jump.is_over

    @property
    def equivalent_gradient_steps(self) -> float:
        """Gradient steps that all jumps so far were worth, by their change of the loss."""
        return self._equivalent_steps + self._unconfirmed_equivalent_steps

    # --- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that is remembered of the path, of earlier jumps and of the current one."""
        current = {"trial": self._trial, "jump": self._jump, "snapshot": self._snapshot}
        return {
            **{name: component.state_dict() for name, component in self._components.items()},
            **{name: record and record.state_dict() for name, record in current.items()},
            "equivalent_steps": [self._equivalent_steps, self._unconfirmed_equivalent_steps],
            "highest_lr": self._highest_lr,
            "closure_tested": self._closure_tested,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        for name, component in self._components.items():
            component.load_state_dict(state[name])
        device = self._weights.device
        self._trial = Trial.from_state(state["trial"], device) if state["trial"] else None
        self._jump = Jump.from_state(state["jump"], device) if state["jump"] else None
        self._snapshot = Snapshot(**state["snapshot"]) if state["snapshot"] else None
        self._equivalent_steps, self._unconfirmed_equivalent_steps = state["equivalent_steps"]
        self._highest_lr, self._closure_tested = state["highest_lr"], state["closure_tested"]

    @property
    def _components(self) -> dict[str, Any]:
        """What keeps a state of its own."""
        return {
            "trajectory": self._trajectory,
            "predictor": self.predictor,
            "monitor": self._monitor,
            "gate": self.gate,
            "residuals": self._residuals,
            "aftermath": self._aftermath,
        }
