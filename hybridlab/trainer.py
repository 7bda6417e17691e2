"""Hybrid predictive training, one nominal step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.config import HybridTrainerConfig
from hybridlab.corrector import Case, ResidualStore, wanted_length
from hybridlab.divergence import Answer, DivergenceMonitor, Thresholds, Verdict
from hybridlab.errors import UserError, nearest
from hybridlab.gate import Gate
from hybridlab.jump import Jump, Trial
from hybridlab.memory.config import MemoryConfig
from hybridlab.memory.host_optimizer import HostAdamW
from hybridlab.memory.in_backward import StepInBackward
from hybridlab.memory.precision import autocast
from hybridlab.memory.residence import PredictResidence
from hybridlab.phases import Moment, Phase, first_phase, may_propose, next_phase
from hybridlab.predictors import PREDICTORS, Proposal, Signals
from hybridlab.step_result import Statistics, StepResult
from hybridlab.trajectory import Trajectory
from hybridlab.weights import Snapshot, Weights

Closure = Callable[[], Tensor]
"""Forward only: returns the scalar loss of one batch, and leaves backward to the trainer."""

CLOCKS = ("nominal", "gradient", "worth")

CHANGEABLE = ("confidence_threshold", "max_predict_steps", "correction_interval")
"""Settings that may change while training."""


class DivergenceError(UserError):
    """Training diverged, and there is no jump to take back."""


class HybridTrainer:
    """Runs any model and torch optimizer through Warmup -> Full -> Predict -> Correct.

    Call `step(closure)` once for each batch. The closure runs the forward pass on that batch and returns the loss;
    whether a backward pass follows is the trainer's decision. A batch may also come in equal parts, one closure each:
    their gradients are averaged, as if it had come whole. At the end of a Full block the predictor may propose a jump;
    the gate tries it on the next few batches while training goes on, and an accepted jump replaces steps.

    model: any `torch.nn.Module`; optimizer: any torch optimizer over its parameters
    config: `HybridTrainerConfig`; with `max_predict_steps=0` training equals the plain loop bit for bit

    Raises DivergenceError when the loss is NaN or infinite and there is no jump to take back, UserError when the
    closure runs backward by itself or the optimizer keeps a copy of the weights.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.config = self._first_config = config = config or HybridTrainerConfig()
        self._memory = config.memory or MemoryConfig()
        self._weights = Weights(model, optimizer, on_host=config.path_device == "host")
        self._residence = PredictResidence(self._weights, optimizer, self._memory)
        self._params = self._weights.params
        self._predictor = PREDICTORS[config.predictor]()
        self._needs = self._predictor.needs(config.full_steps)
        self._trajectory = Trajectory(self._weights, optimizer, self._needs, config.path_storage)
        self._gate = Gate(config.gate_budget, config.max_predict_steps, float(config.max_predict_steps))
        self._monitor = DivergenceMonitor(Thresholds(band=config.divergence_threshold))
        self._residuals = ResidualStore()
        self._statistics = Statistics()
        self._trial: Trial | None = None
        self._jump: Jump | None = None
        self._before_jump: Snapshot | None = None
        self._last: StepResult | None = None
        self._highest_lr = 0.0
        self._worth_steps = self._worth_at_risk = 0.0
        self._enter(first_phase(config))

    # --- the step ----------------------------------------------------------------------------------------

    def step(self, closure: Closure | Sequence[Closure]) -> StepResult:
        """Take one nominal step on the closure's batch, or on the batch whose equal parts the closures have."""
        started = time.perf_counter()
        parts = [closure] if callable(closure) else closure
        if not parts:
            raise UserError("there is no closure: give one, or one for each part of the batch")
        match self._phase:
            case Phase.WARMUP:
                result = self._gradient_step(parts)
            case Phase.FULL:
                self._probe(parts)
                result = self._gradient_step(parts)
                result = self._look_ahead(result)
            case Phase.PREDICT:
                result = self._predicted_step(parts)
            case Phase.CORRECT:
                result = self._gradient_step(parts)
                self._correct_(result)
        verdict = self._watch(result)
        if verdict:
            result = replace(result, event=self._answer(verdict))
        self._advance(result, started, diverged=verdict is not None and verdict.answer is Answer.ROLL_BACK)
        return result

    def _gradient_step(self, parts: Sequence[Closure]) -> StepResult:
        """Forward, backward, clip, optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = [self._backward(closure, i, len(parts)) for i, closure in enumerate(parts)]
        norm = self._clip_()
        self.optimizer.step()
        self._statistics.gradient_steps += 1
        return self._result(loss_tensor=_mean(losses), norm_tensor=norm)

    def _backward(self, closure: Closure, part: int, parts: int) -> Tensor:
        """Forward and backward of one part of a batch; its gradients add to those of the parts before."""
        with self._precision():
            loss = closure()
        if not part:
            self._refuse_gradients()
        (loss / parts if parts > 1 else loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _predicted_step(self, parts: Sequence[Closure]) -> StepResult:
        """The weights move at the start of a chunk; its last step measures the loss on the user's own batch."""
        jump, interval = self._jump, self.config.correction_interval
        assert jump is not None
        if jump.taken % interval == 0:
            self._trajectory.move_(jump.proposal.coefficients, jump.next_chunk(interval))
        jump.taken += 1
        self._residence.clear_(jump.length - jump.taken)
        self._statistics.predicted_steps += 1
        self._worth_at_risk += jump.worth_per_step
        result = self._result(predicted_loss=jump.predicted_loss)
        if jump.taken % interval and not jump.is_over:
            return result
        return replace(result, loss_tensor=self._forward(parts))

    # --- proposing and trying ----------------------------------------------------------------------------

    def _look_ahead(self, result: StepResult) -> StepResult:
        """After a Full step: carry on with the trial under way, or see whether to open one."""
        if self._trial is not None:
            return self._pursue(self._trial, result)
        if not self.config.max_predict_steps or not self._trajectory.observe() or not self._block_ended:
            return result
        self._settle_jump()
        if self.config.gate and not self._gate.may_ask(self._statistics.gradient_steps):
            return result
        return self._propose(result)

    def _settle_jump(self) -> None:
        """The last jump has stood a whole block of real steps: it is final."""
        self._worth_steps += self._worth_at_risk
        self._before_jump, self._worth_at_risk = None, 0.0

    @property
    def _block_ended(self) -> bool:
        """Whether this record is the first since a Full block was completed, on a path that is full."""
        steps, block = self._steps_in_phase + 1, self.config.full_steps
        return self._trajectory.is_full and steps >= block and steps % block < self._needs.every

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

    def _probe(self, parts: Sequence[Closure]) -> None:
        """Try every length of the trial on this step's batch, before it is trained on; put the weights back."""
        if self._trial is None:
            return
        saved = self._weights.snapshot(optimizer=False)
        try:
            for length, losses in self._trial.losses.items():
                self._trajectory.move_(self._trial.at(length))
                losses.append(self._forward(parts, same_noise=True))
                self._weights.restore_(saved)
        finally:
            self._weights.restore_(saved)

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
        self._jump = Jump(trial.proposal, trial.horizon, steps, self._monitor.mean, change, worth, slopes)
        self._before_jump = self._weights.snapshot()
        self._statistics.proposals_accepted += 1
        return replace(result, event="accepted")

    # --- correcting --------------------------------------------------------------------------------------

    def _correct_(self, result: StepResult) -> None:
        """Note the slopes after the jump; at the end of Correct pull each group to where its slope vanishes."""
        jump = self._jump
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
        if self.config.clip_norm is None or result.norm_tensor is None:
            return slopes
        return slopes * (result.norm_tensor.double() / self.config.clip_norm).clamp(min=1.0).to(slopes.device)

    # --- watching and deciding ---------------------------------------------------------------------------

    def _watch(self, result: StepResult) -> Verdict | None:
        """Judge what was measured; read gradient steps one step late, so that it never stalls the device.

        Inside a jump the decision cannot wait: there the measurement is read at once.
        """
        ripe: StepResult | None = result
        if result.phase is not Phase.PREDICT:
            ripe, self._last = self._last, result
        if ripe is None or ripe.measured_loss is None:
            return None
        if ripe.gradient_norm is not None:
            self._predictor.observe(Signals(ripe.measured_loss, ripe.gradient_norm, self._lr_share()))
        elif self._jump is not None and ripe.predicted_loss is not None:
            self._jump.loss_error = ripe.measured_loss - ripe.predicted_loss
        return self._monitor.judge(ripe.measured_loss, ripe.gradient_norm, ripe.predicted_loss)

    def _answer(self, verdict: Verdict) -> str:
        """Shorten the jump, end it, or take it back; say what was done, and why."""
        jump = self._jump if self._phase is Phase.PREDICT else None
        if verdict.answer is Answer.ROLL_BACK:
            return self._roll_back_(verdict)
        if jump is not None and verdict.answer is Answer.LEAVE_PREDICT:
            jump.length = jump.taken
            return f"left Predict: {verdict}"
        if jump is not None:
            jump.share *= 0.5
            return f"shortened: {verdict}"
        return f"noted: {verdict}"

    def _roll_back_(self, verdict: Verdict) -> str:
        """Restore what was before the last jump, if it may be the cause; stop where a number is not finite."""
        self._statistics.divergences += 1
        if self._before_jump is not None:
            self._residence.fill_()
            self._weights.restore_(self._before_jump)
            self._worth_at_risk = 0.0
            self._before_jump = self._last = self._trial = None
            self._gate.shorten()
            self._statistics.rollbacks += 1
            return f"rolled back: {verdict}"
        if verdict.kind == "not finite":
            raise DivergenceError(
                f"{verdict.reason} by step {self._statistics.nominal_steps + 1} ({self._phase}), and there is no jump "
                "to take back: lower the learning rate or warm up for longer"
            )
        return f"diverged: {verdict}"

    def _advance(self, result: StepResult, started: float, *, diverged: bool) -> None:
        """Count the step, and let `next_phase` decide what comes after it."""
        self._statistics.nominal_steps += 1
        self._steps_in_phase += 1
        jump = self._jump
        accepted, ended = jump is not None, jump is not None and jump.is_over
        moment = Moment(self._phase, self._steps_in_phase, accepted, jump_ended=ended, diverged=diverged)
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
            self._residence.fill_()
        if phase is Phase.PREDICT:
            self.optimizer.zero_grad(set_to_none=True)
        if phase is Phase.FULL and self.config.max_predict_steps:
            self._jump = None
            self._trajectory.anchor()

    # --- helpers -----------------------------------------------------------------------------------------

    def _precision(self) -> AbstractContextManager[object]:
        """The number format of the phase, where the settings name one; else the closure's own."""
        numbers = self._memory.mixed_precision
        if numbers is None:
            return nullcontext()
        name = numbers.predict if self._phase is Phase.PREDICT else numbers.training
        return autocast("fp32" if name == "fp32" else "bf16", self._weights.device)

    def _forward(self, parts: Sequence[Closure], *, same_noise: bool = False) -> Tensor:
        """A forward without backward; `same_noise` leaves the random streams as they were."""
        self._statistics.forward_only_passes += 1
        devices = [p.device for p in self._params[:1] if p.is_cuda]
        gradients = [p.grad for p in self._params]
        with torch.no_grad(), torch.random.fork_rng(devices, enabled=same_noise), self._precision():
            losses = [closure() for closure in parts]
        if any(p.grad is not g for p, g in zip(self._params, gradients, strict=True)):
            self._refuse_gradients()
        return _mean(losses)

    def _refuse_gradients(self) -> None:
        if any(p.grad is not None for p in self._params):
            raise UserError("the closure ran backward: let it return the loss only, the trainer decides about backward")

    def _clip_(self) -> Tensor:
        """Norm of all gradients, and gradients scaled down to `clip_norm` where it is exceeded."""
        limit = self.config.clip_norm
        if isinstance(self.optimizer, StepInBackward | HostAdamW):  # they have taken the gradients away
            return self.optimizer.clip_(limit)
        if limit is None:
            return nn.utils.get_total_norm([p.grad for p in self._params if p.grad is not None])
        return nn.utils.clip_grad_norm_(self._params, limit)

    def _lr_share(self) -> float:
        """The learning rate over the highest one so far."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        self._highest_lr = max(self._highest_lr, lr)
        return lr / self._highest_lr if self._highest_lr else 1.0

    def _result(self, **measured: Any) -> StepResult:
        return StepResult(self._statistics.nominal_steps + 1, self._phase, **measured)

    # --- steering from outside ---------------------------------------------------------------------------

    def change(self, **settings: Any) -> None:
        """Change settings between two steps: `confidence_threshold`, `max_predict_steps`, `correction_interval`.

        Raises UserError for other settings, while a jump is under way (`current_phase` is Predict), and where
        prediction would be turned on or off; ValueError and TypeError as `HybridTrainerConfig` does.
        """
        for name in settings:
            if name not in CHANGEABLE:
                raise UserError(f"{name} cannot change while training: {nearest(name, CHANGEABLE)}")
        if self._phase is Phase.PREDICT:
            raise UserError("a jump is under way: change settings when it is over")
        changed = replace(self.config, **settings)
        if bool(changed.max_predict_steps) != bool(self.config.max_predict_steps):
            raise UserError("max_predict_steps=0 is plain training from start to end: begin another run for it")
        self.config = changed
        self._gate.reach(changed.max_predict_steps)

    # --- looking from outside ----------------------------------------------------------------------------

    @property
    def current_phase(self) -> Phase:
        """The phase of the next step."""
        return self._phase

    @property
    def needs_backward(self) -> bool:
        """Whether the next step takes a backward pass."""
        return self._phase is not Phase.PREDICT

    def statistics(self) -> Statistics:
        """The counts so far, as a copy."""
        return replace(self._statistics, seconds_by_phase=dict(self._statistics.seconds_by_phase))

    def reliability(self) -> list[dict[str, float]]:
        """Predicted confidence against how often proposals were accepted, a row a bin of confidence."""
        return self._gate.reliability()

    def steps_by(self, clock: str) -> float:
        """Steps so far by the clock that a schedule may follow.

        "nominal" counts every step, so that a schedule planned for N steps ends with the run: the default, and what
        the truncated control is fitted against. "gradient" counts real steps alone. "worth" counts real steps, and
        for each jump the steps that its measured change of the loss would have taken at the loss's own pace.
        """
        by_clock = {
            "nominal": self._statistics.nominal_steps,
            "gradient": self._statistics.gradient_steps,
            "worth": self._statistics.gradient_steps + self._worth_steps + self._worth_at_risk,
        }
        return by_clock[clock]

    # --- checkpoints -------------------------------------------------------------------------------------

    @property
    def card_is_clear(self) -> bool:
        """Whether the device holds nothing but what Predict needs."""
        return self._residence.is_clear

    def make_whole_(self) -> None:
        """Bring back to the device what Predict has put away, as whoever saves the model needs it."""
        self._residence.fill_()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, besides the model and the optimizer.

        Plain containers, numbers and tensors only, so that `torch.load(..., weights_only=True)` reads it.
        """
        last = self._last
        return {
            "config": asdict(self._first_config),
            "changed": {name: getattr(self.config, name) for name in CHANGEABLE},
            "phase": str(self._phase),
            "steps_in_phase": self._steps_in_phase,
            "statistics": asdict(self._statistics),
            **{name: part.state_dict() for name, part in self._parts().items()},
            "trial": self._trial.state_dict() if self._trial else None,
            "jump": self._jump.state_dict() if self._jump else None,
            "before_jump": self._before_jump.state_dict() if self._before_jump else None,
            "last": last and {"phase": str(last.phase), "loss": last.measured_loss, "norm": last.gradient_norm},
            "numbers": [self._highest_lr, self._worth_steps, self._worth_at_risk],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; load the model and the optimizer first.

        Raises UserError when the state was taken under other settings.
        """
        _refuse_other_settings(state["config"], asdict(self._first_config))
        self.config = replace(self._first_config, **state["changed"])
        self._phase, self._steps_in_phase = Phase(state["phase"]), state["steps_in_phase"]
        self._statistics = Statistics(**state["statistics"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        device = self._params[0].device
        self._trial = Trial.from_state(state["trial"], device) if state["trial"] else None
        self._jump = Jump.from_state(state["jump"], device) if state["jump"] else None
        self._before_jump = Snapshot(**state["before_jump"]) if state["before_jump"] else None
        self._last = _restored_result(state["last"]) if state["last"] else None
        self._highest_lr, self._worth_steps, self._worth_at_risk = state["numbers"]

    def _parts(self) -> dict[str, Any]:
        """The parts that keep a state of their own."""
        return {
            "trajectory": self._trajectory,
            "predictor": self._predictor,
            "gate": self._gate,
            "monitor": self._monitor,
            "residuals": self._residuals,
        }


def _mean(losses: list[Tensor]) -> Tensor:
    """Mean of the parts' losses; of one part, its very loss."""
    return (losses[0] if len(losses) == 1 else torch.stack(losses).mean()).detach()


def _restored_result(last: dict[str, Any]) -> StepResult:
    loss, norm = torch.tensor(last["loss"]), torch.tensor(last["norm"])
    return StepResult(0, Phase(last["phase"]), loss_tensor=loss, norm_tensor=norm)


def _refuse_other_settings(saved: dict[str, Any], mine: dict[str, Any]) -> None:
    changed = [f"{key} ({saved.get(key)!r} then, {mine[key]!r} now)" for key in mine if saved.get(key) != mine[key]]
    if changed:
        raise UserError(f"this state was saved under other settings: {', '.join(changed)}")
