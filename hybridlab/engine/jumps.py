"""The life of a jump: proposed, tried, taken, corrected, and taken back if it must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.optim import Optimizer

from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.corrector import Case, ResidualStore, wanted_length
from hybridlab.engine.divergence import DivergenceMonitor
from hybridlab.engine.gate import Gate
from hybridlab.engine.jump_state import Jump, Trial
from hybridlab.engine.phases import may_propose
from hybridlab.engine.result import Statistics, StepResult
from hybridlab.predictors import PREDICTORS, Forecaster, Proposal, Signals
from hybridlab.weights.path import Trajectory
from hybridlab.weights.snapshot import Snapshot, Weights


class Prediction:
    """What happens between a path of real steps and a jump that has stood.

        Full       the path is recorded; at the end of a block the predictor may propose, and the gate tries its
                   proposal on the batches that follow, while training goes on
        Predict    the accepted jump is taken in chunks
        Correct    slopes after the jump say how long it should have been
        Full       until it has stood a whole block, it can be taken back

    config: may be replaced between steps, where nothing is under way
    monitor: says at which pace the loss falls; statistics: where proposals are counted

    jump: the accepted one, from its acceptance to the Full block after it
    """

    def __init__(
        self,
        weights: Weights,
        optimizer: Optimizer,
        config: HybridTrainerConfig,
        monitor: DivergenceMonitor,
        statistics: Statistics,
    ) -> None:
        self.config, self._weights, self._monitor, self._statistics = config, weights, monitor, statistics
        self._predictor = PREDICTORS[config.predictor]()
        self._needs = self._predictor.needs(config.full_steps)
        self._trajectory = Trajectory(weights, optimizer, self._needs, config.path_storage)
        self._gate = Gate(config.gate_budget, config.max_predict_steps, float(config.max_predict_steps))
        self._residuals = ResidualStore()
        self.jump: Jump | None = None
        self._trial: Trial | None = None
        self._way_back: Snapshot | None = None
        self._worth_steps = self._worth_at_risk = 0.0

    # --- Full: proposing and trying ----------------------------------------------------------------------

    def begin_block(self) -> None:
        """A Full block begins: the path goes on from here."""
        self.jump = None
        if self.config.max_predict_steps:
            self._trajectory.anchor()

    def probe(self, forward: Callable[[], Tensor]) -> None:
        """Try every length of the trial on this step's batch, before it is trained on; put the weights back."""
        if self._trial is None:
            return
        saved = self._weights.snapshot(optimizer=False)
        for length, losses in self._trial.losses.items():
            try:
                self._trajectory.move_(self._trial.at(length))
                losses.append(forward())
            finally:
                self._weights.restore_(saved)

    def look_ahead(self, result: StepResult, steps_in_block: int) -> StepResult:
        """After a Full step: carry on with the trial under way, or see whether to open one."""
        if self._trial is not None:
            return self._pursue(self._trial, result)
        if not self.config.max_predict_steps or not self._trajectory.observe() or not self._ended(steps_in_block):
            return result
        self._settle()
        if self.config.gate and not self._gate.may_ask(self._statistics.gradient_steps):
            return result
        return self._propose(result)

    def _ended(self, steps: int) -> bool:
        """Whether this record is the first since a Full block was completed, on a path that is full."""
        block = self.config.full_steps
        return self._trajectory.is_full and steps >= block and steps % block < self._needs.every

    def _settle(self) -> None:
        """The last jump has stood a whole block of real steps: it is final."""
        self._worth_steps += self._worth_at_risk
        self._way_back, self._worth_at_risk = None, 0.0

    def _propose(self, result: StepResult) -> StepResult:
        gram = self._trajectory.gram()
        horizon = self._gate.horizon
        proposal = self._predictor.propose(gram, horizon)
        result = replace(result, confidence=proposal.confidence)
        if not may_propose(proposal.confidence, self.config):
            return result
        if proposal.stays_put:
            self._statistics.proposals_rejected += 1
            return replace(result, event="rejected: the proposal is empty or not finite")
        scale = self._residuals.expected_length(proposal.confidence)
        proposal = replace(proposal, coefficients=scale * proposal.coefficients)
        trial = Trial(proposal, max(1.0, scale * horizon), gram.to_mean())
        if self.config.gate:
            self._trial = trial
            return replace(result, event="proposed")
        trial.slopes.append(self._slopes(proposal, result))
        return self._accept(trial, 1.0, proposal.loss_change, result)

    def _pursue(self, trial: Trial, result: StepResult) -> StepResult:
        """Note the slopes along the jump; decide when enough batches were tried."""
        trial.slopes.append(self._slopes(trial.proposal, result))
        if trial.batches < self.config.gate_batches:
            return result
        self._trial = None
        decision = trial.decide()
        self._gate.learn(decision, trial.proposal.confidence, trial.forwards)
        if decision.accepted:
            return self._accept(trial, decision.length, decision.change, result)
        self._statistics.proposals_rejected += 1
        self._trajectory.anchor()
        return replace(result, event="rejected")

    def _accept(self, trial: Trial, length: float, loss_change: float, result: StepResult) -> StepResult:
        """Turn a trial into a jump, and keep a way back."""
        asked = length * trial.horizon
        steps = max(1, min(self.config.max_predict_steps, round(asked)))
        slopes = torch.stack(trial.slopes).mean(dim=0)
        change = loss_change * min(1.0, steps / asked)
        worth = self._monitor.worth_steps(change, steps) / steps
        self._way_back = self._weights.snapshot()  # may be refused: no jump without a way back
        self._weights.depart_from(self._way_back)
        self.jump = Jump(trial.proposal, trial.horizon, steps, self._monitor.mean, change, worth, slopes)
        self._statistics.proposals_accepted += 1
        return replace(result, event="accepted")

    # --- Predict and Correct -----------------------------------------------------------------------------

    def advance_(self, jump: Jump) -> bool:
        """One nominal step of the jump: the weights move at the start of a chunk. Whether this step ends one."""
        interval = self.config.correction_interval
        chunk = jump.next_chunk(interval) if jump.taken % interval == 0 else None
        jump.taken += 1
        if chunk is not None:
            self._trajectory.move_(jump.proposal.coefficients, chunk)
        self._statistics.predicted_steps += 1
        self._worth_at_risk += jump.worth_per_step
        return jump.taken % interval == 0 or jump.is_over

    def correct_(self, result: StepResult) -> None:
        """Note the slopes after the jump; at the end of Correct pull each group to where its slope vanishes."""
        jump = self.jump
        assert jump is not None
        jump.slopes_after.append(self._slopes(jump.proposal, result))
        if len(jump.slopes_after) < self.config.correct_steps:
            return
        confidence = jump.proposal.confidence
        wanted = wanted_length(*jump.slopes_per_move())
        blended = self._residuals.blend(wanted, confidence)
        self._residuals.add(Case(confidence, jump.loss_error, float(wanted.mean())))
        self._trajectory.move_(jump.proposal.coefficients * (jump.moved * (blended - 1.0))[:, None])

    def _slopes(self, proposal: Proposal, result: StepResult) -> Float64[Tensor, " group"]:
        """Slope of the loss along a proposal from the last gradients, as they were before clipping."""
        slopes = self._trajectory.slopes(proposal.coefficients)
        if self.config.clip_norm is None or result.norm_reading is None:
            return slopes
        return slopes * (result.norm_reading.tensor.double() / self.config.clip_norm).clamp(min=1.0).to(slopes.device)

    # --- the way back ------------------------------------------------------------------------------------

    @property
    def can_be_taken_back(self) -> bool:
        """Whether there is a jump that has not stood a whole block yet."""
        return self._way_back is not None

    def take_back_(self) -> None:
        """Restore weights, buffers and optimizer state as they were before the jump; ask for less next time."""
        assert self._way_back is not None
        self._weights.restore_(self._way_back)
        self._way_back = self._trial = None
        self._worth_at_risk = 0.0
        self._gate.shorten()

    # --- looking -----------------------------------------------------------------------------------------

    def observe(self, signals: Signals) -> None:
        """Show the predictor a gradient step."""
        self._predictor.observe(signals)

    def reach(self, longest: int) -> None:
        """Change how many steps a jump may replace."""
        self._gate.reach(longest)

    @property
    def worth_steps(self) -> float:
        """Gradient steps that all jumps so far were worth, by their change of the loss."""
        return self._worth_steps + self._worth_at_risk

    def reliability(self) -> list[dict[str, float]]:
        """Predicted confidence against how often proposals were accepted, a row a bin of confidence."""
        return self._gate.reliability()

    def forecast_skill(self) -> float | None:
        """How much better than persistence the predictor's forecasts of the loss were; None where it makes none."""
        return self._predictor.skill() if isinstance(self._predictor, Forecaster) else None

    # --- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that is remembered of the path, of earlier jumps and of the one under way."""
        underway = {"trial": self._trial, "jump": self.jump, "way_back": self._way_back}
        return {
            **{name: component.state_dict() for name, component in self._components.items()},
            **{name: record and record.state_dict() for name, record in underway.items()},
            "worth": [self._worth_steps, self._worth_at_risk],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name, component in self._components.items():
            component.load_state_dict(state[name])
        device = self._weights.device
        self._trial = Trial.from_state(state["trial"], device) if state["trial"] else None
        self.jump = Jump.from_state(state["jump"], device) if state["jump"] else None
        self._way_back = Snapshot(**state["way_back"]) if state["way_back"] else None
        self._worth_steps, self._worth_at_risk = state["worth"]

    @property
    def _components(self) -> dict[str, Any]:
        """What keeps a state of its own."""
        return {
            "trajectory": self._trajectory,
            "predictor": self._predictor,
            "gate": self._gate,
            "residuals": self._residuals,
        }
