"""Hybrid predictive training, one nominal step at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridlab.base.checkpoint import differences
from hybridlab.base.device import wait_for_stream
from hybridlab.base.errors import UserError, nearest
from hybridlab.base.ranks import Ranks
from hybridlab.base.settings import check_choice
from hybridlab.engine.closures import Closure, MicroBatches
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.depth import Choice, DepthController
from hybridlab.engine.divergence import Action, not_finite
from hybridlab.engine.jumps import Decision, JumpController
from hybridlab.engine.passes import Passes
from hybridlab.engine.phases import Phase, PhaseInput, first_phase, next_phase
from hybridlab.engine.result import AsyncScalar, Statistics, StepResult
from hybridlab.memory.apply import refuse_unprepared
from hybridlab.memory.config import MemoryConfig
from hybridlab.memory.predict_offload import PredictOffload
from hybridlab.optim.averaging import method_of
from hybridlab.optim.build import MuonWithAdamW
from hybridlab.optim.muon import Muon
from hybridlab.weights.reach import refuse_own_step, refuse_unreachable
from hybridlab.weights.residency import Residency
from hybridlab.weights.snapshot import Snapshot, Weights

CLOCKS = ("nominal", "gradient", "worth")

CHANGEABLE = ("confidence_threshold", "max_predict_steps", "correction_interval")
"""Settings that may change while training."""


STATE = ("config", "changed", "phase", "steps_in_phase", "statistics", "depth", "jumps", "delayed")
"""What a trainer's state holds."""


class DivergenceError(UserError):
    """Training diverged, and there is no jump to roll back."""


class HybridTrainer:
    """Runs any model and torch optimizer through Warmup -> Full -> Predict -> Correct.

    Call `step(closure)` once per batch. The closure runs the forward pass on that batch and returns the loss; the
    trainer decides whether a backward pass follows. At the end of a Full block the predictor may propose a jump; the
    gate tries it on the next few batches while training goes on, and an accepted jump replaces steps.

    The closure is called up to six times per step (seven once), and not at all in most predicted ones: draw the batch
    before the step, not inside it. What it draws from the global random streams of torch, NumPy and Python is the same
    in all calls of a step. It computes in float32 or bfloat16: float16 with a GradScaler is not supported.

    A batch may also come in parts, one closure each: their gradients are averaged, as if it had come whole. Parts that
    count different numbers of targets need `step(closures, weights=numbers)`.

    Weights may be frozen, unfrozen or added between steps: a jump under way ends, and the path begins anew. A step
    whose closure raises an error counts nothing, and can be tried again.

    Several ranks train one model under `torch.distributed`: give the trainer the model after `fully_shard`, in
    DistributedDataParallel or, for passes that are CUDA graphs, as a `hybridlab.base.ranks.Replica`, and each rank an
    equal part of every batch. Losses, norms and products of the path are reduced before anything is decided, so that
    all ranks do the same.

    model: any `torch.nn.Module`
    optimizer: a torch optimizer over the model's parameters whose step needs no closure
    config: with `max_predict_steps=0` training equals the plain loop bit for bit. Of its memory settings the trainer
        applies number formats, parts of a batch and what leaves the GPU in Predict;
        `hybridlab.memory.prepare_model_` and `optimizer_for` apply the rest

    Raises UserError for an optimizer that wants a closure or holds other weights than the model's, for memory settings
    that the model or the optimizer was not prepared for, for what several ranks cannot do together, and, where it may
    predict, for complex weights. `step` raises DivergenceError when the loss is NaN or
    infinite and there is no jump to roll back; UserError when the closure runs backward by itself, when the batch does
    not come in the parts that the settings ask for, and, at the first proposal, when the optimizer keeps a copy of the
    weights.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig | None = None) -> None:
        config = config or HybridTrainerConfig()
        if isinstance(model, nn.Module):
            Ranks.of(model).reshard_()  # a pass before may have left whole weights in the place of what is trained
        _refuse_misfits(model, optimizer, config)
        memory = config.memory or MemoryConfig()
        refuse_unprepared(model, optimizer, memory)
        self.model, self.optimizer = model, optimizer
        self._initial_config = asdict(config)
        self._statistics = Statistics()
        self._depth = DepthController(model, optimizer, config)
        self._weights = Weights(model, optimizer, snapshots=config.path_storage.residency)
        self._passes = Passes(self._weights, optimizer, memory)
        self._offload = PredictOffload(model, self._weights, optimizer, memory)
        self._jumps = JumpController(self._weights, optimizer, config)
        self._delayed_result: StepResult | None = None
        self._growth: Choice | None = None  # of a step that has not been counted
        self._enter(first_phase(config))

    # --- the step ----------------------------------------------------------------------------------------

    def step(self, closure: Closure | Sequence[Closure], weights: Sequence[float] | None = None) -> StepResult:
        """Take one nominal step on the closure's batch, or on the batch whose parts the closures have.

        weights: what each part counts, such as its number of targets; None where the parts are equal
        """
        started = time.perf_counter()
        batch = MicroBatches.of(closure, weights)
        self._passes.check_parts(batch)
        self._weights.reshard_()
        if self._weights.have_changed:
            self._take_up_changes_()
        self._growth = self._growth or self._grow_(batch)
        match self._phase:
            case Phase.WARMUP:
                result = self._gradient_step(batch)
            case Phase.FULL:
                probed = self._jumps.probe_(lambda: self._passes.forward(batch, probing=True))
                result, gradient_steps = self._gradient_step(batch), self._statistics.gradient_steps + 1
                result = self._jumps.after_full_step(result, probed, self._steps_in_phase + 1, gradient_steps)
            case Phase.PREDICT:
                result = self._predicted_step(batch)
            case Phase.CORRECT:
                result = self._gradient_step(batch)
                self._jumps.correct_(result)
        result = self._growth.added_to(result)
        result = self._carry_out_(self._judge(result), result)
        self._advance(result)
        self._statistics.count(result, time.perf_counter() - started)
        self._growth = None
        return result

    def _gradient_step(self, batch: MicroBatches) -> StepResult:
        """Forward, backward, clip, optimizer."""
        self._offload.prefetch_()
        self.optimizer.zero_grad(set_to_none=True)
        with self._depth.gradient_step(self._statistics.nominal_steps):
            loss = self._passes.backward_(batch)
            norm = self._passes.clip_(self.config.clip_norm)
            self.optimizer.step()
        return self._result(
            loss, async_norm=AsyncScalar(norm), **self._depth.taking_part(self._statistics.nominal_steps)
        )

    def _predicted_step(self, batch: MicroBatches) -> StepResult:
        """The weights move at the start of a chunk; its last step measures the loss on the user's own batch."""
        jump = self._jumps.advance_()
        self._offload.offload_(jump.steps_left, jump.snapshot, last_motion_made=jump.last_motion_made)
        wait_for_stream(self._weights.device)  # here, so that the GPU is cleared beside the motion
        loss = self._passes.forward(batch, predicting=True) if jump.ends_chunk else None
        self._jumps.count_step()
        return self._result(loss, predicted_loss=jump.predicted_loss, forward_only_passes=int(jump.ends_chunk))

    def _result(self, loss: Tensor | None, **more: Any) -> StepResult:
        async_loss = None if loss is None else AsyncScalar(loss)
        step, depth = self._statistics.nominal_steps + 1, {"depth": self._depth.depth}
        return StepResult(step, self._phase, async_loss=async_loss, **depth | more)

    def _grow_(self, batch: MicroBatches) -> Choice:
        """Let blocks join where the schedule says so, between jumps; what was measured and done."""
        step, gate = self._statistics.nominal_steps, self._jumps.gate
        if self._phase in (Phase.PREDICT, Phase.CORRECT) or not self._depth.is_due(step):
            return Choice()
        if self._depth.asks_gate and not gate.within_budget(self._statistics.gradient_steps):
            return Choice()
        if not self._weights.are_finite():
            return Choice()  # the loss is read at the end of this step, and decides
        choice = self._depth.choose_(step, lambda: self._passes.forward(batch, probing=True))
        if not choice.rule:
            gate.charge(choice.passes)
            return choice
        snapshot = replace(self._weights.snapshot(), depth=self._depth.depth)
        done = self._depth.grow_(step, choice.rule)
        self._weights.list_again_()
        self._jumps.begin_growth(snapshot)
        if self._phase is Phase.FULL:
            self._enter(Phase.FULL)
        return replace(choice, said=f"{done} ({choice.said})")

    def _take_up_changes_(self) -> None:
        """Other weights are trained from here: the path begins anew, and a jump under way ends."""
        memory = self.config.memory or MemoryConfig()
        if memory.step_in_backward or memory.state_on_host:
            raise UserError(
                "the weights that are trained have changed, and an optimizer with step_in_backward or state_on_host "
                "knows those alone that it was built with: build optimizer and trainer anew"
            )
        self._offload.restore_()
        _refuse_misfits(self.model, self.optimizer, self.config)
        self._weights.list_again_()
        self._jumps.begin_path()
        if self._phase is not Phase.WARMUP:
            self._enter(Phase.FULL)

    # --- deciding ----------------------------------------------------------------------------------------

    def _judge(self, result: StepResult) -> Decision:
        """Judge what was measured; gradient steps are read one step late, so that it never stalls the device.

        Inside a jump the decision cannot wait: there the measurement is read at once.
        """
        measured: StepResult | None = result
        if result.phase is not Phase.PREDICT:
            measured, self._delayed_result = self._delayed_result, result
        return self._jumps.judge(measured) if measured else Decision()

    def _carry_out_(self, decision: Decision, result: StepResult) -> StepResult:
        """Roll back, or stop, as the jump controller says; the result with what was done."""
        if decision.divergence is None:
            return result
        if decision.action is Action.STOP:
            raise DivergenceError(
                f"{decision.divergence.reason} by step {result.nominal_step} ({result.phase}), and there is no jump "
                "to roll back: lower the learning rate, warm up for longer, or look for empty batches and NaN in the "
                "data; the weights may be spoilt, go back to a checkpoint"
            )
        rolled_back = decision.snapshot is not None
        if decision.snapshot is not None:
            self._offload.restore_()
            self._restore_(decision.snapshot, result.nominal_step)
            self._delayed_result = None
        return replace(result, event=decision.event, diverged=decision.diverged, rolled_back=rolled_back)

    def _restore_(self, snapshot: Snapshot, step: int) -> None:
        """Put back what was before a jump or a growth."""
        if snapshot.depth is None:
            self._weights.restore_(snapshot)
            return
        self._depth.shrink_(snapshot.depth, step)
        self._weights.list_again_()
        self._jumps.begin_path()
        self._weights.restore_(snapshot)
        self._depth.forget_()

    def _advance(self, result: StepResult) -> None:
        """Let `next_phase` decide what comes after the step."""
        self._steps_in_phase += 1
        accepted, ended = result.jump_accepted is True, self._jumps.jump_ended
        after = PhaseInput(self._phase, self._steps_in_phase, accepted, ended, result.diverged)
        following = next_phase(after, self.config)
        if following is not self._phase or (result.diverged and following is Phase.FULL):
            self._enter(following)

    def _enter(self, phase: Phase) -> None:
        """Begin a phase; wait for the computation first, so that its time is counted in the phase before."""
        wait_for_stream(self._weights.device)
        self._phase, self._steps_in_phase = phase, 0
        if phase is Phase.PREDICT:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._offload.restore_weights_()
        if phase is Phase.FULL:
            if self.config.max_predict_steps:
                self._weights.ranks.refuse_alone()
            self._jumps.begin_block()

    # --- steering from outside ---------------------------------------------------------------------------

    @property
    def config(self) -> HybridTrainerConfig:
        """The settings as they are now."""
        return self._jumps.config

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
        self._jumps.change(changed)

    # --- looking from outside ----------------------------------------------------------------------------

    @property
    def current_phase(self) -> Phase:
        """The phase of the next step."""
        return self._phase

    def statistics(self) -> Statistics:
        """The counts so far, as a copy."""
        return replace(self._statistics, seconds_by_phase=dict(self._statistics.seconds_by_phase))

    def reliability(self) -> list[dict[str, float]]:
        """Predicted confidence beside the share of proposals accepted, one row per bin of confidence."""
        return self._jumps.gate.reliability()

    def acceptance_reliability(self) -> list[dict[str, float]]:
        """The gate's acceptance probability beside the share of proposals accepted, one row per bin."""
        return self._jumps.gate.acceptance_reliability()

    def forecast_skill(self) -> float | None:
        """How much better than persistence the predictor's forecasts of the loss were; None where it makes none.

        1 - MSE(forecast) / MSE(persistence): 1 is perfect, 0 worth nothing.
        """
        return self._jumps.predictor.skill()

    def steps_by(self, clock: str) -> float:
        """Steps so far by the clock that a schedule may follow.

        "nominal" counts every step, so that a schedule planned for N steps ends with the run: the default, and what
        the truncated control is fitted against. "gradient" counts gradient steps alone. "worth" counts gradient steps,
        and for each jump the gradient steps that its change of the loss, measured by the gate or else forecast, would
        have taken at the loss's present slope.
        """
        by_clock = {
            "nominal": self._statistics.nominal_steps,
            "gradient": self._statistics.gradient_steps,
            "worth": self._statistics.gradient_steps + self._jumps.equivalent_gradient_steps,
        }
        check_choice("clock", clock, by_clock)
        return by_clock[clock]

    def stages_(self) -> Iterator[int | None]:
        """Show the model at each depth of its schedule, one after the other, then as it was; nothing is trained.

        For whoever compiles, captures or measures before training starts: exhaust the iterator. Yields the depths.
        """
        for depth in self._depth.stages_():
            self._weights.ranks.take_up_trained_()
            yield depth
            self._weights.reshard_()
        self._weights.ranks.take_up_trained_()

    def weigh_blocks_(self, closure: Closure) -> None:
        """Count what one block costs, so that each step's result says what the step did (`StepResult.cost`).

        closure: the loss of any batch; it runs three times, with few blocks. Gradients go nowhere, and nothing steps.
            Without a depth schedule nothing is run

        Until then the cost of a step with fewer blocks is not known (NaN).
        """
        self._depth.weigh_(closure, with_backward=not self._weights.ranks.sharded)
        self._weights.reshard_()

    def check_finite(self) -> None:
        """Raise DivergenceError where a weight, or what the last gradient step measured, is NaN or infinite; waits for
        the device.

        Call it after the last step: what a step measured is judged at the next one.
        """
        last = self._delayed_result
        found = not_finite(last.measured_loss, last.gradient_norm) if last and last.measured_loss is not None else None
        if found or not self._weights.are_finite():
            raise DivergenceError(
                f"{found.reason if found else 'the weights are not finite'} after step "
                f"{self._statistics.nominal_steps}, the last one: lower the learning rate, warm up for longer, or look "
                "for empty batches and NaN in the data"
            )

    # --- checkpoints -------------------------------------------------------------------------------------

    @property
    def is_offloaded(self) -> bool:
        """Whether the device holds nothing but what Predict needs."""
        return self._offload.residency is Residency.OFFLOADED

    def materialize_(self) -> None:
        """Bring back to the device what Predict has put away, as whoever saves the model or moves weights needs it."""
        self._offload.materialize_()
        self._weights.reshard_()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, besides the model and the optimizer.

        Plain containers, numbers and tensors only, so that `torch.load(..., weights_only=True)` reads it.
        """
        delayed = self._delayed_result
        return {
            "config": self._initial_config,
            "changed": {name: getattr(self.config, name) for name in CHANGEABLE},
            "phase": str(self._phase),
            "steps_in_phase": self._steps_in_phase,
            "statistics": asdict(self._statistics),
            "depth": self._depth.state_dict(),
            "jumps": self._jumps.state_dict(),
            "delayed": delayed and [str(delayed.phase), delayed.measured_loss, delayed.gradient_norm],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken; load the model and the optimizer first.

        Raises UserError when the state was taken under other settings, or is none of a trainer.
        """
        if lacks := [name for name in STATE if name not in state]:
            raise UserError(
                f"this is no whole state of a HybridTrainer, it lacks {', '.join(lacks)}: give state_dict()'s"
            )
        if changed := ", ".join(differences(state["config"], self._initial_config)):
            raise UserError(f"this state was saved under other settings: {changed}")
        self._jumps.change(replace(self.config, **state["changed"]))
        self._depth.load_state_dict(state["depth"])
        self._weights.list_again_()
        self._jumps.begin_path()
        self._jumps.load_state_dict(state["jumps"])
        self._phase, self._steps_in_phase = Phase(state["phase"]), state["steps_in_phase"]
        vars(self._statistics).update(state["statistics"])
        self._delayed_result = state["delayed"] and _restored_result(*state["delayed"])
        self._growth = None


def _refuse_misfits(model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig) -> None:
    """Refuse what could not train this model."""
    if not isinstance(config, HybridTrainerConfig):
        raise TypeError(f"config is a {type(config).__name__}: give a HybridTrainerConfig")
    if not isinstance(model, nn.Module) or not hasattr(optimizer, "param_groups"):
        kinds = f"{type(model).__name__} and {type(optimizer).__name__}"
        raise TypeError(f"model and optimizer are {kinds}: give a torch.nn.Module and a torch optimizer of it")
    refuse_own_step(optimizer)
    mine = {id(p) for p in model.parameters()}
    given = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not given:
        raise UserError("the optimizer holds no weight that requires gradients: there is nothing to train")
    if any(id(p) not in mine for p in given):
        raise UserError(
            "the optimizer holds weights that are not the model's: build it over model.parameters(), after the model; "
            "several modules go together in one nn.ModuleList, and load_state_dict goes without assign=True"
        )
    ranks = Ranks.of(model)
    ranks.refuse(_of_one_process(ranks, optimizer, config))
    if config.max_predict_steps:
        refuse_unreachable(optimizer, given)
        ranks.refuse_alone()
        if any(p.is_complex() for p in given):
            raise UserError(
                "complex weights cannot be predicted: keep them as real ones (torch.view_as_real), or set "
                "max_predict_steps=0"
            )


def _of_one_process(ranks: Ranks, optimizer: Optimizer, config: HybridTrainerConfig) -> list[str]:
    """What of these works in one process only, by name."""
    method = method_of(optimizer)
    features = {
        "a Muon such as torch.optim.Muon on shards (use OptimizerConfig('muon'), which gathers matrices)": ranks.sharded
        and "muon" in type(method).__name__.lower()
        and not isinstance(method, Muon | MuonWithAdamW),
        "a depth schedule in DistributedDataParallel (use fully_shard)": not ranks.sharded and config.depth is not None,
    }
    return (config.memory or MemoryConfig()).of_one_process + [name for name, wanted in features.items() if wanted]


def _restored_result(phase: str, loss: float, norm: float) -> StepResult:
    loss_scalar, norm_scalar = (AsyncScalar(torch.tensor(number, dtype=torch.float64)) for number in (loss, norm))
    return StepResult(0, Phase(phase), async_loss=loss_scalar, async_norm=norm_scalar)
