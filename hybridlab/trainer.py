"""Hybrid predictive training, one nominal step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.config import HybridTrainerConfig
from hybridlab.divergence import DivergenceMonitor, Verdict
from hybridlab.errors import UserError
from hybridlab.gate import LENGTHS, judge
from hybridlab.gram import Gram
from hybridlab.jump import Jump
from hybridlab.phases import Moment, Phase, first_phase, next_phase
from hybridlab.predictors import PREDICTORS, Proposal, Signals
from hybridlab.step_result import Statistics, StepResult
from hybridlab.trajectory import Snapshot, Trajectory

Closure = Callable[[], Tensor]
"""Forward only: returns the scalar loss of one batch, and leaves backward to the trainer."""


TOLERATED_DEVIATIONS = 2.0
"""How far, in standard deviations of the loss, a measurement inside a jump may lie above its prediction."""


class DivergenceError(UserError):
    """Training diverged, and there is no jump to take back."""


class HybridTrainer:
    """Runs any model and torch optimizer through Warmup -> Full -> Predict -> Correct.

    Call `step(closure)` once for each batch. The closure runs the forward pass on that batch and returns the
    loss; whether a backward pass follows is the trainer's decision.

    model: any `torch.nn.Module`; optimizer: any torch optimizer over its parameters
    config: `HybridTrainerConfig`; with `max_predict_steps=0` training equals the plain loop bit for bit

    Raises DivergenceError when the loss is NaN or infinite and there is no jump to take back, UserError when
    the closure runs backward by itself.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.config = config or HybridTrainerConfig()
        self._phase, self._steps_in_phase = first_phase(self.config), 0
        self._predictor = PREDICTORS[self.config.predictor]()
        self._monitor = DivergenceMonitor(self.config.divergence_threshold)
        self._statistics = Statistics()
        self._params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._trajectory = Trajectory(model, optimizer, self.config.path_rows, self.config.record_every)
        self._jump: Jump | None = None
        self._before_jump: Snapshot | None = None
        self._last: StepResult | None = None
        if self._phase is Phase.FULL:
            self._enter(Phase.FULL)

    # --- the step ----------------------------------------------------------------------------------------

    def step(self, closure: Closure) -> StepResult:
        """Take one nominal step on the closure's batch."""
        started = time.perf_counter()
        event = self._open_jump(closure) if self._phase is Phase.PREDICT and self._jump is None else None
        match self._phase:
            case Phase.WARMUP | Phase.CORRECT:
                result = self._gradient_step(closure)
            case Phase.FULL:
                result = self._gradient_step(closure)
                result = replace(result, confidence=self._record_path())
            case Phase.PREDICT:
                result = self._predicted_step(closure)
        diverged = self._watch(result)
        result = replace(result, event=diverged or result.event or event)
        self._advance(result, started, diverged=diverged is not None)
        return result

    def _gradient_step(self, closure: Closure) -> StepResult:
        """Forward, backward, clip, optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = closure()
        if any(p.grad is not None for p in self._params):
            raise UserError("the closure ran backward: let it return the loss only, the trainer decides about backward")
        loss.backward()  # type: ignore[no-untyped-call]
        norm = self._clip_()
        self.optimizer.step()
        self._statistics.gradient_steps += 1
        return self._result(loss_tensor=loss.detach(), norm_tensor=norm)

    def _predicted_step(self, closure: Closure) -> StepResult:
        """The weights move at the start of a chunk; its last step measures the loss on the user's own batch."""
        assert self._jump is not None
        jump, chunk = self._jump, self.config.correction_interval
        if jump.taken % chunk == 0:
            self._trajectory.move_(jump.proposal.coefficients, min(chunk, jump.length - jump.taken) / jump.horizon)
        jump.taken += 1
        self._statistics.predicted_steps += 1
        result = self._result(predicted_loss=jump.predicted_loss)
        if jump.taken % chunk and not jump.is_over:
            return result
        result = replace(result, loss_tensor=self._forward(closure))
        return self._micro_correct(jump, result)

    def _micro_correct(self, jump: Jump, result: StepResult) -> StepResult:
        """End the jump where the measured loss is well above the predicted one."""
        assert result.predicted_loss is not None
        too_high = result.loss > result.predicted_loss + TOLERATED_DEVIATIONS * self._monitor.deviation
        if not too_high or jump.is_over:
            return result
        jump.length = jump.taken
        return replace(result, event="shortened")

    # --- proposing ---------------------------------------------------------------------------------------

    def _open_jump(self, closure: Closure) -> str:
        """Ask the predictor for a jump and keep a way back; a refused one makes this step a Full one."""
        self._jump = self._propose(closure)
        if self._jump is not None:
            self._statistics.proposals_accepted += 1
            return "accepted"
        self._statistics.proposals_rejected += 1
        self._before_jump = None
        self._phase, self._steps_in_phase = Phase.FULL, 0
        return "rejected"

    def _propose(self, closure: Closure) -> Jump | None:
        horizon = self.config.max_predict_steps
        proposal = self._predictor.propose(self._gram(), horizon)
        if proposal.stays_put:
            return None
        self._before_jump = self._trajectory.snapshot()
        return self._try(proposal, horizon, closure) if self.config.gate else self._trust(proposal, horizon)

    def _try(self, proposal: Proposal, horizon: int, closure: Closure) -> Jump | None:
        """The gate: one batch and one dropout mask at every length, the weights put back after each."""
        here = float(self._forward(closure, same_noise=True))
        after = {length: self._loss_after(proposal, length, closure) for length in LENGTHS}
        taken = judge(here, after)
        steps = round(taken * horizon)
        return Jump(proposal, horizon, steps, here, after[taken]) if steps else None

    def _loss_after(self, proposal: Proposal, length: float, closure: Closure) -> float:
        assert self._before_jump is not None
        self._trajectory.move_(proposal.coefficients, length)
        try:
            return float(self._forward(closure, same_noise=True))
        finally:
            self._trajectory.restore_(self._before_jump, optimizer=False)

    def _trust(self, proposal: Proposal, horizon: int) -> Jump:
        """No gate: the jump is taken whole, with the predictor's own forecast of the loss."""
        mean = self._monitor.mean
        return Jump(proposal, horizon, horizon, mean, mean + proposal.loss_change)

    def _record_path(self) -> float | None:
        """Record a Full step; at the end of a block return the predictor's confidence in the path."""
        if not self.config.max_predict_steps:
            return None
        self._trajectory.observe()
        if (self._steps_in_phase + 1) % self.config.full_steps or not self._trajectory.is_full:
            return None
        self._before_jump = None  # the last jump has stood a whole block: it is final
        return self._predictor.propose(self._gram(), self.config.max_predict_steps).confidence

    def _gram(self) -> Gram:
        return self._trajectory.gram(with_direction=self._predictor.needs_direction)

    # --- watching and deciding ---------------------------------------------------------------------------

    def _watch(self, result: StepResult) -> str | None:
        """Judge what was measured; read gradient steps one step late, so that it never stalls the device.

        Inside a jump the decision cannot wait: there the measurement is read at once.
        """
        ripe: StepResult | None = result
        if result.phase is not Phase.PREDICT:
            ripe, self._last = self._last, result
        if ripe is None or ripe.measured_loss is None:
            return None
        if ripe.gradient_norm is not None:
            self._predictor.observe(Signals(ripe.measured_loss, ripe.gradient_norm))
        verdict = self._monitor.judge(ripe.measured_loss, ripe.gradient_norm)
        return self._answer(verdict) if verdict else None

    def _answer(self, verdict: Verdict) -> str:
        """Take back the last jump if it may be the cause; stop where a number is not finite."""
        self._statistics.divergences += 1
        if self._before_jump is not None:
            self._trajectory.restore_(self._before_jump)
            self._before_jump = self._last = None
            self._statistics.rollbacks += 1
            return f"rolled back: {verdict.reason}"
        if verdict.not_finite:
            raise DivergenceError(
                f"{verdict.reason} by step {self._statistics.nominal_steps + 1} ({self._phase}), and there is no jump "
                "to take back: lower the learning rate or warm up for longer"
            )
        return verdict.reason

    def _advance(self, result: StepResult, started: float, *, diverged: bool) -> None:
        """Count the step, and let `next_phase` decide what comes after it."""
        self._statistics.nominal_steps += 1
        self._steps_in_phase += 1
        ended = self._jump is not None and self._jump.is_over
        moment = Moment(self._phase, self._steps_in_phase, result.confidence, jump_ended=ended, diverged=diverged)
        following = next_phase(moment, self.config)
        if following is not self._phase or diverged:
            self._enter(following)
        self._statistics.seconds_by_phase[str(result.phase)] += time.perf_counter() - started

    def _enter(self, phase: Phase) -> None:
        """Begin a phase; wait for the device first, so that its work is counted where it belongs."""
        if self._params[0].is_cuda:
            torch.cuda.synchronize(self._params[0].device)
        self._phase, self._steps_in_phase = phase, 0
        if phase is not Phase.PREDICT:
            self._jump = None
        if phase is Phase.FULL and self.config.max_predict_steps:
            self._trajectory.restart()

    # --- helpers -----------------------------------------------------------------------------------------

    def _forward(self, closure: Closure, *, same_noise: bool = False) -> Tensor:
        """A forward without backward; `same_noise` leaves the random streams as they were."""
        self._statistics.forward_only_passes += 1
        devices = [p.device for p in self._params[:1] if p.is_cuda]
        with torch.no_grad(), torch.random.fork_rng(devices, enabled=same_noise):
            return closure()

    def _clip_(self) -> Tensor:
        """Norm of all gradients, and gradients scaled down to `clip_norm` where it is exceeded."""
        gradients = [p.grad for p in self._params if p.grad is not None]
        if self.config.clip_norm is None:
            return nn.utils.get_total_norm(gradients)
        return nn.utils.clip_grad_norm_(self._params, self.config.clip_norm)

    def _result(self, **measured: Any) -> StepResult:
        return StepResult(self._statistics.nominal_steps + 1, self._phase, **measured)

    # --- looking from outside ----------------------------------------------------------------------------

    @property
    def current_phase(self) -> Phase:
        """The phase of the next step."""
        return self._phase

    @property
    def needs_backward(self) -> bool:
        """Whether the next step takes a backward pass, unless the gate refuses its jump."""
        return self._phase is not Phase.PREDICT

    def statistics(self) -> Statistics:
        """The counts so far, as a copy."""
        return replace(self._statistics, seconds_by_phase=dict(self._statistics.seconds_by_phase))

    # --- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, besides the model and the optimizer.

        Plain containers, numbers and tensors only, so that `torch.load(..., weights_only=True)` reads it.
        """
        last = self._last
        return {
            "config": asdict(self.config),
            "phase": str(self._phase),
            "steps_in_phase": self._steps_in_phase,
            "statistics": asdict(self._statistics),
            "predictor": self._predictor.state_dict(),
            "monitor": self._monitor.state_dict(),
            "trajectory": self._trajectory.state_dict(),
            "jump": self._jump.state_dict() if self._jump else None,
            "before_jump": self._before_jump.state_dict() if self._before_jump else None,
            "last": last and {"phase": str(last.phase), "loss": last.measured_loss, "norm": last.gradient_norm},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; load the model and the optimizer first.

        Raises UserError when the state was taken under other settings.
        """
        _refuse_other_settings(state["config"], asdict(self.config))
        self._phase, self._steps_in_phase = Phase(state["phase"]), state["steps_in_phase"]
        self._statistics = Statistics(**state["statistics"])
        self._predictor.load_state_dict(state["predictor"])
        self._monitor.load_state_dict(state["monitor"])
        self._trajectory.load_state_dict(state["trajectory"])
        self._jump = Jump.from_state(state["jump"]) if state["jump"] else None
        self._before_jump = Snapshot(**state["before_jump"]) if state["before_jump"] else None
        self._last = _restored_result(state["last"]) if state["last"] else None


def _restored_result(last: dict[str, Any]) -> StepResult:
    loss, norm = torch.tensor(last["loss"]), torch.tensor(last["norm"])
    return StepResult(0, Phase(last["phase"]), loss_tensor=loss, norm_tensor=norm)


def _refuse_other_settings(saved: dict[str, Any], mine: dict[str, Any]) -> None:
    changed = [f"{key} ({saved.get(key)!r} then, {mine[key]!r} now)" for key in mine if saved.get(key) != mine[key]]
    if changed:
        raise UserError(f"this state was saved under other settings: {', '.join(changed)}")
