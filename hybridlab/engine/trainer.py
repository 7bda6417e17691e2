"""Hybrid predictive training, one nominal step at a time."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.base.checkpoint import differences
from hybridlab.base.device import wait_for_stream
from hybridlab.base.errors import UserError, nearest
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.divergence import Answer, DivergenceMonitor, Thresholds, Verdict
from hybridlab.engine.jumps import Prediction
from hybridlab.engine.passes import Batch, Closure, Passes
from hybridlab.engine.phases import Moment, Phase, first_phase, next_phase
from hybridlab.engine.result import Reading, Statistics, StepResult
from hybridlab.memory.apply import refuse_unprepared
from hybridlab.memory.config import MemoryConfig
from hybridlab.memory.predict_offload import PredictResidence
from hybridlab.predictors import Signals
from hybridlab.weights.snapshot import Weights

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

    model: any `torch.nn.Module`; optimizer: a torch optimizer over its parameters whose step needs no closure
    config: `HybridTrainerConfig`; with `max_predict_steps=0` training equals the plain loop bit for bit. Of its memory
        settings, formats, parts of a batch and what leaves the card in Predict are seen to here, the rest by
        `hybridlab.memory.prepare_model_` and `optimizer_for`

    Raises UserError for an optimizer that wants a closure or holds other weights than the model's, and for memory
    settings that the model or the optimizer was not prepared for. `step` raises DivergenceError when the loss is NaN or
    infinite and there is no jump to take back; UserError when the closure runs backward by itself, when the batch does
    not come in the parts that the settings ask for, and, at the first proposal, when the optimizer keeps a copy of the
    weights.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig | None = None) -> None:
        config = config or HybridTrainerConfig()
        memory = config.memory or MemoryConfig()
        _refuse_misfits(model, optimizer, config)
        refuse_unprepared(model, optimizer, memory)
        self.model, self.optimizer = model, optimizer
        self.config = self._first_config = config
        self._statistics = Statistics()
        self._weights = Weights(model, optimizer, on_host=config.path_device == "host")
        self._passes = Passes(self._weights.params, optimizer, memory, self._statistics)
        self._residence = PredictResidence(model, self._weights, optimizer, memory)
        self._monitor = DivergenceMonitor(Thresholds(band=config.divergence_threshold))
        self._prediction = Prediction(self._weights, optimizer, config, self._monitor, self._statistics)
        self._last: StepResult | None = None
        self._highest_lr = 0.0
        self._enter(first_phase(config))

    # --- the step ----------------------------------------------------------------------------------------

    def step(self, closure: Closure | Batch) -> StepResult:
        """Take one nominal step on the closure's batch, or on the batch whose equal parts the closures have."""
        started = time.perf_counter()
        batch = self._passes.parts_of(closure)
        match self._phase:
            case Phase.WARMUP:
                result = self._gradient_step(batch)
            case Phase.FULL:
                self._prediction.probe(lambda: self._passes.forward(batch, same_noise=True))
                result = self._gradient_step(batch)
                result = self._prediction.look_ahead(result, self._steps_in_phase + 1)
            case Phase.PREDICT:
                result = self._predicted_step(batch)
            case Phase.CORRECT:
                result = self._gradient_step(batch)
                self._prediction.correct_(result)
        verdict = self._watch(result)
        if verdict:
            result = replace(result, event=self._answer(verdict))
        self._advance(result, started, diverged=verdict is not None and verdict.answer is Answer.ROLL_BACK)
        return result

    def _gradient_step(self, batch: Batch) -> StepResult:
        """Forward, backward, clip, optimizer."""
        self._residence.get_ready_()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._passes.backward_(batch)
        norm = self._passes.clip_(self.config.clip_norm)
        self.optimizer.step()
        self._statistics.gradient_steps += 1
        return self._result(loss, norm_reading=Reading(norm))

    def _predicted_step(self, batch: Batch) -> StepResult:
        """The weights move at the start of a chunk; its last step measures the loss on the user's own batch."""
        jump = self._prediction.jump
        assert jump is not None
        steps_left = jump.length - jump.taken
        chunk_ends = self._prediction.advance_(jump)
        self._residence.clear_(steps_left, settled=jump.is_settled(self.config.correction_interval))
        wait_for_stream(self._weights.device)  # here, so that the card is cleared beside the motion
        loss = self._passes.forward(batch, predicting=True) if chunk_ends else None
        return self._result(loss, predicted_loss=jump.predicted_loss)

    def _result(self, loss: Tensor | None, **more: Any) -> StepResult:
        reading = None if loss is None else Reading(loss)
        return StepResult(self._statistics.nominal_steps + 1, self._phase, loss_reading=reading, **more)

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
        jump = self._prediction.jump
        if ripe.gradient_norm is not None:
            self._prediction.observe(Signals(ripe.measured_loss, ripe.gradient_norm, self._lr_share()))
        elif jump is not None and ripe.predicted_loss is not None:
            jump.loss_error = ripe.measured_loss - ripe.predicted_loss
        return self._monitor.judge(ripe.measured_loss, ripe.gradient_norm, ripe.predicted_loss)

    def _lr_share(self) -> float:
        """The learning rate over the highest one so far."""
        lr = float(self.optimizer.param_groups[0].get("lr", 1.0))
        self._highest_lr = max(self._highest_lr, lr)
        return lr / self._highest_lr if self._highest_lr else 1.0

    def _answer(self, verdict: Verdict) -> str:
        """Shorten the jump, end it, or take it back; say what was done, and why."""
        jump = self._prediction.jump if self._phase is Phase.PREDICT else None
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
        if self._prediction.can_be_taken_back:
            self._residence.fill_()
            self._prediction.take_back_()
            self._last = None
            self._statistics.rollbacks += 1
            return f"rolled back: {verdict}"
        if verdict.kind == "not finite":
            raise DivergenceError(
                f"{verdict.reason} by step {self._statistics.nominal_steps + 1} ({self._phase}), and there is no jump "
                "to take back: lower the learning rate, warm up for longer, or look for empty batches and NaN in the "
                "data; the weights may be spoilt, go back to a checkpoint"
            )
        self._monitor.settle_anew()
        return f"diverged: {verdict}"

    def _advance(self, result: StepResult, started: float, *, diverged: bool) -> None:
        """Count the step, and let `next_phase` decide what comes after it."""
        self._statistics.nominal_steps += 1
        self._steps_in_phase += 1
        jump = self._prediction.jump
        accepted, ended = jump is not None, jump is not None and jump.is_over
        moment = Moment(self._phase, self._steps_in_phase, accepted, jump_ended=ended, diverged=diverged)
        following = next_phase(moment, self.config)
        if following is not self._phase or (diverged and following is Phase.FULL):
            self._enter(following)
        self._statistics.seconds_by_phase[str(result.phase)] += time.perf_counter() - started

    def _enter(self, phase: Phase) -> None:
        """Begin a phase; wait for the computation first, so that it is counted where it belongs."""
        wait_for_stream(self._weights.device)
        self._phase, self._steps_in_phase = phase, 0
        if phase is Phase.PREDICT:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._residence.settle_()
        if phase is Phase.FULL:
            self._prediction.begin_block()

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
        self.config = self._prediction.config = changed
        self._prediction.reach(changed.max_predict_steps)

    # --- looking from outside ----------------------------------------------------------------------------

    @property
    def current_phase(self) -> Phase:
        """The phase of the next step."""
        return self._phase

    def statistics(self) -> Statistics:
        """The counts so far, as a copy."""
        return replace(self._statistics, seconds_by_phase=dict(self._statistics.seconds_by_phase))

    def reliability(self) -> list[dict[str, float]]:
        """Predicted confidence against how often proposals were accepted, a row a bin of confidence."""
        return self._prediction.reliability()

    def forecast_skill(self) -> float | None:
        """How much better than persistence the predictor's forecasts of the loss were; None where it makes none.

        1 - MSE(forecast) / MSE(persistence): 1 is perfect, 0 worth nothing.
        """
        return self._prediction.forecast_skill()

    def steps_by(self, clock: str) -> float:
        """Steps so far by the clock that a schedule may follow.

        "nominal" counts every step, so that a schedule planned for N steps ends with the run: the default, and what
        the truncated control is fitted against. "gradient" counts real steps alone. "worth" counts real steps, and
        for each jump the steps that its change of the loss, measured by the gate or else forecast, would have taken at
        the loss's own pace.
        """
        by_clock = {
            "nominal": self._statistics.nominal_steps,
            "gradient": self._statistics.gradient_steps,
            "worth": self._statistics.gradient_steps + self._prediction.worth_steps,
        }
        return by_clock[clock]

    # --- checkpoints -------------------------------------------------------------------------------------

    @property
    def card_is_clear(self) -> bool:
        """Whether the device holds nothing but what Predict needs."""
        return self._residence.is_clear

    def make_whole_(self) -> None:
        """Bring back to the device what Predict has put away, as whoever saves the model needs it."""
        self._residence.make_whole_()

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
            "prediction": self._prediction.state_dict(),
            "monitor": self._monitor.state_dict(),
            "last": last and {"phase": str(last.phase), "loss": last.measured_loss, "norm": last.gradient_norm},
            "highest_lr": self._highest_lr,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; load the model and the optimizer first.

        Raises UserError when the state was taken under other settings.
        """
        if changed := ", ".join(differences(state["config"], asdict(self._first_config))):
            raise UserError(f"this state was saved under other settings: {changed}")
        self.config = self._prediction.config = replace(self._first_config, **state["changed"])
        self._phase, self._steps_in_phase = Phase(state["phase"]), state["steps_in_phase"]
        vars(self._statistics).update(state["statistics"])
        self._prediction.load_state_dict(state["prediction"])
        self._monitor.load_state_dict(state["monitor"])
        self._last = _restored_result(state["last"]) if state["last"] else None
        self._highest_lr = state["highest_lr"]


def _refuse_misfits(model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig) -> None:
    """Refuse what could not train this model."""
    if not isinstance(config, HybridTrainerConfig):
        raise TypeError(f"config is a {type(config).__name__}: give a HybridTrainerConfig")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError("LBFGS runs forward and backward by itself, several times a step: use AdamW, Muon or SGD")
    mine = {id(p) for p in model.parameters()}
    given = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not given:
        raise UserError("the optimizer holds no weight that requires gradients: there is nothing to train")
    if any(id(p) not in mine for p in given):
        raise UserError(
            "the optimizer holds weights that are not the model's: build it over model.parameters(), after the model; "
            "several modules go together in one nn.ModuleList"
        )


def _restored_result(last: dict[str, Any]) -> StepResult:
    loss, norm = (Reading(torch.tensor(last[name])) for name in ("loss", "norm"))
    return StepResult(0, Phase(last["phase"]), loss_reading=loss, norm_reading=norm)
