"""The step: what moves the weights, what is counted, what is refused, what survives a checkpoint."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from hybridlab import HybridTrainer, HybridTrainerConfig, Phase
from hybridlab.base.errors import UserError
from hybridlab.engine.gate import LENGTHS
from hybridlab.engine.trainer import DivergenceError
from hybridlab.memory import CheckpointingConfig, GradientAccumulationConfig, MemoryConfig, optimizer_for
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optim import OptimizerConfig
from hybridlab.predictors import PREDICTORS, Proposal
from hybridlab.weights.gram import Gram
from hybridlab.weights.path import optimizer_direction
from hybridlab.weights.snapshot import Weights
from tests.conftest import EAGER, Problem, gradient_step

GATED = replace(EAGER, gate=True)


def trained(config: HybridTrainerConfig, steps: int, **problem: float) -> tuple[Problem, HybridTrainer]:
    task = Problem(**problem)
    return task, task.trained(config, steps)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A predictor whose jump is the newest displacement times `script["scale"]`."""
    script = {"scale": 1.0}

    class Scripted(PREDICTORS["linear"]):  # type: ignore[misc]
        def propose(self, gram: Gram, horizon: float) -> Proposal:
            coefficients = gram.zeros()
            coefficients[:, -1] = script["scale"]
            return Proposal(coefficients, confidence=1.0, loss_change=0.0)

    monkeypatch.setitem(PREDICTORS, "linear", Scripted)
    return script


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_max_predict_steps_zero_is_the_plain_loop_bit_for_bit(clip_norm: float | None) -> None:
    plain = Problem(dropout=0.2)
    optimizer = plain.adamw()
    torch.manual_seed(3)
    for step in range(60):
        optimizer.zero_grad()
        plain.closure(step)().backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(plain.model.parameters(), clip_norm)
        optimizer.step()

    hybrid = Problem(dropout=0.2)
    trainer = HybridTrainer(hybrid.model, hybrid.adamw(), HybridTrainerConfig.plain(clip_norm=clip_norm))
    torch.manual_seed(3)
    for step in range(60):
        trainer.step(hybrid.closure(step))

    assert torch.equal(plain.weights(), hybrid.weights())
    assert trainer.statistics().gradient_steps == trainer.statistics().nominal_steps == 60


def test_null_predictor_takes_gradient_steps_alone_and_ends_where_the_plain_loop_ends() -> None:
    null, trainer = trained(HybridTrainerConfig(warmup_steps=10, predictor="null", confidence_threshold=0.0), 80)
    plain, _ = trained(HybridTrainerConfig.plain(), 80)
    assert torch.equal(null.weights(), plain.weights())
    assert trainer.statistics().forward_only_passes == 0


def test_phases_follow_each_other_and_every_step_is_counted_once() -> None:
    task = Problem()
    trainer = HybridTrainer(task.model, task.adamw(), EAGER)
    phases = [trainer.step(task.closure(step)).phase for step in range(60)]
    order = [phase for phase, _ in itertools.groupby(phases)]
    assert order[:5] == [Phase.WARMUP, Phase.FULL, Phase.PREDICT, Phase.CORRECT, Phase.FULL]
    counts = trainer.statistics()
    assert counts.nominal_steps == 60 == counts.gradient_steps + counts.predicted_steps
    assert counts.predicted_steps == phases.count(Phase.PREDICT) > 0
    assert counts.proposals_accepted == order.count(Phase.PREDICT)
    assert set(counts.seconds_by_phase) == {"warmup", "full", "predict", "correct"}


@pytest.mark.parametrize("predictor", ["linear", "adam_coast"])
def test_predicted_steps_move_the_weights_without_a_backward_pass(predictor: str) -> None:
    task = Problem()
    config = replace(EAGER, predictor=predictor)
    trainer = HybridTrainer(task.model, task.adamw(), config)
    step = 0
    while trainer.current_phase is not Phase.PREDICT:
        trainer.step(task.closure(step))
        step += 1
    before, gradient_steps = task.weights(), trainer.statistics().gradient_steps
    results = [trainer.step(task.closure(step + i)) for i in range(10)]
    assert [r.phase for r in results] == [Phase.PREDICT] * 10
    assert trainer.statistics().gradient_steps == gradient_steps
    assert not torch.equal(before, task.weights())
    measured = [r.measured_loss is not None for r in results]
    assert measured == [i in (3, 7, 9) for i in range(10)], "one forward a chunk, and one at the jump's end"
    assert all(r.predicted_loss is not None for r in results)


def test_a_linear_jump_goes_on_at_the_path_s_own_speed() -> None:
    """Constant drift: after a jump of H steps the weights are where H real steps would have taken them."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    model = nn.Module()
    model.register_parameter("weight", weight)
    optimizer = torch.optim.SGD([weight], lr=0.01)
    trainer = HybridTrainer(model, optimizer, EAGER)
    slope = torch.tensor([3.0, 1.0])
    for _ in range(10 + 8 + 10):
        trainer.step(lambda: weight @ slope)
    assert trainer.statistics().predicted_steps == 10
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0, -2.0]) - 28 * 0.01 * slope)


def test_the_gate_refuses_a_harmful_jump_and_puts_the_weights_back_exactly(scripted: dict[str, float]) -> None:
    scripted["scale"] = -50.0
    gated, trainer = trained(GATED, 40)
    plain, _ = trained(HybridTrainerConfig.plain(), 40)
    counts = trainer.statistics()
    assert (counts.proposals_rejected, counts.predicted_steps) == (1, 0)
    per_batch = len(LENGTHS) + 2  # the lengths from the weights, and two from the path's mean
    assert counts.forward_only_passes == per_batch * EAGER.gate_batches + 1, "and one to look at the closure"
    assert torch.equal(gated.weights(), plain.weights())


def test_a_refused_jump_leaves_the_random_stream_alone(scripted: dict[str, float]) -> None:
    scripted["scale"] = -1000.0
    torch.manual_seed(5)
    gated, trainer = trained(GATED, 40, dropout=0.3)
    torch.manual_seed(5)
    plain, _ = trained(HybridTrainerConfig.plain(), 40, dropout=0.3)
    assert trainer.statistics().proposals_rejected == 1
    assert torch.equal(gated.weights(), plain.weights())


class Quadratic:
    """The mean of |w - target|^2 / 2 over two groups, of which the second stays where it is; targets move by block."""

    def __init__(self) -> None:
        self.moving = nn.Parameter(torch.zeros(8, dtype=torch.float64))
        self.still = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.model = nn.ParameterList([self.moving, self.still])
        self.optimizer = SGD([{"params": [self.moving]}, {"params": [self.still], "lr": 0.0}], lr=1e-3)
        self.generator = torch.Generator().manual_seed(0)
        self.move_target()

    def move_target(self) -> None:
        self.target = self.moving.detach() + torch.randn(8, generator=self.generator, dtype=torch.float64)

    def loss(self) -> Tensor:
        return 0.5 * (self.moving - self.target).square().sum() + 0.5 * (self.still - 1e-3).square().sum()

    def jumps(self, trainer: HybridTrainer, count: int) -> list[float]:
        """How far each jump went, as a share of the way to the minimum, before it was corrected."""
        shares: list[float] = []
        last = Phase.FULL
        while len(shares) < count:
            start = self.moving.detach().clone()
            phase = trainer.step(self.loss).phase
            if phase is Phase.PREDICT and last is not phase:
                way = self.target - start
                shares.append(float((self.moving.detach() - start) @ way / (way @ way)))
            elif phase is Phase.CORRECT:
                self.move_target()
            last = phase
        return shares


ONE_MOTION = replace(EAGER, warmup_steps=1, max_predict_steps=40, correction_interval=40, correct_steps=1)


@pytest.mark.parametrize("times_too_long", [2.0, 4.0, 10.0])
def test_the_learned_length_of_a_jump_is_the_right_one(scripted: dict[str, float], times_too_long: float) -> None:
    """On a quadratic the right length is known. A group of weights that does not move has no say."""
    scripted["scale"] = times_too_long / 1e-3  # the newest displacement is a thousandth of the way to the minimum
    problem = Quadratic()
    shares = problem.jumps(HybridTrainer(problem.model, problem.optimizer, ONE_MOTION), 12)
    assert shares[0] > 0.9 * times_too_long
    assert shares[-1] == pytest.approx(1.0, rel=0.05)


def test_jumps_recover_from_a_time_in_which_they_went_uphill(scripted: dict[str, float]) -> None:
    scripted["scale"] = -1.0 / 1e-3
    problem = Quadratic()
    trainer = HybridTrainer(problem.model, problem.optimizer, replace(ONE_MOTION, divergence_threshold=1e9))
    problem.jumps(trainer, 8)
    scripted["scale"] = 1.0 / 1e-3
    assert problem.jumps(trainer, 60)[-1] == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_proposal_that_is_not_finite_is_never_applied(scripted: dict[str, float], scale: float) -> None:
    scripted["scale"] = scale
    task, trainer = trained(EAGER, 40)
    assert trainer.statistics().predicted_steps == 0
    assert torch.isfinite(task.weights()).all()


def test_divergence_after_a_jump_is_rolled_back_to_the_weights_and_the_optimizer_before_it(
    scripted: dict[str, float],
) -> None:
    scripted["scale"] = 1000.0
    task = Problem()
    optimizer = task.adamw()
    trainer = HybridTrainer(task.model, optimizer, replace(EAGER, warmup_steps=40))
    step = 0
    while trainer.current_phase is not Phase.PREDICT:
        trainer.step(task.closure(step))
        step += 1
    before = task.weights()
    moments = [optimizer.state[p]["exp_avg"].clone() for p in task.model.parameters()]
    events = [trainer.step(task.closure(step + i)).event or "" for i in range(4)]
    assert any(event.startswith("rolled back: loss band: the loss") for event in events)
    assert trainer.current_phase is Phase.FULL
    assert torch.equal(before, task.weights())
    assert all(map(torch.equal, moments, [optimizer.state[p]["exp_avg"] for p in task.model.parameters()]))
    counts = trainer.statistics()
    assert (counts.divergences, counts.rollbacks) == (1, 1)


def test_a_loss_that_is_nan_without_a_jump_stops_and_says_where() -> None:
    task = Problem()
    trainer = HybridTrainer(task.model, task.adamw(), EAGER)
    trainer.step(task.closure(0))
    trainer.step(lambda: task.closure(1)() * float("nan"))
    with pytest.raises(DivergenceError, match="the loss is nan by step 3"):
        trainer.step(task.closure(2))


def test_a_closure_that_runs_backward_is_refused() -> None:
    task = Problem()

    def closure() -> Tensor:
        loss = task.closure(0)()
        loss.backward()
        return loss

    with pytest.raises(UserError, match="the closure ran backward"):
        HybridTrainer(task.model, task.adamw(), EAGER).step(closure)


def test_adam_coast_refuses_an_optimizer_without_moments() -> None:
    task = Problem()
    sgd = torch.optim.SGD(task.model.parameters(), lr=0.01)
    trainer = task.trained(replace(EAGER, predictor="adam_coast"), 17, sgd)
    with pytest.raises(UserError, match="SGD keeps none"):
        trainer.step(task.closure(17))


def test_adam_coast_refuses_moments_that_were_made_and_never_stepped() -> None:
    """As those of a layer that no batch has used yet, where all are made before the first step."""
    task = Problem()
    task.model.unused = nn.Parameter(torch.zeros(4))
    optimizer = task.adamw()
    made = {name: torch.zeros(4) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[task.model.unused] = {"step": torch.tensor(0.0), **made}
    trainer = task.trained(replace(EAGER, predictor="adam_coast"), 17, optimizer)
    with pytest.raises(UserError, match=r"keeps none for a parameter of shape \(4,\)"):
        trainer.step(task.closure(17))


@pytest.mark.parametrize("config", [EAGER, GATED], ids=["unguarded", "gated"])
@pytest.mark.parametrize("stop", [5, 16, 18, 20, 22, 27, 29, 31, 33, 41])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(stop: int, config: HybridTrainerConfig) -> None:
    unbroken, whole = trained(config, 60)
    assert whole.statistics().predicted_steps > 0
    task = Problem()
    optimizer = task.adamw()
    trainer = task.trained(config, stop, optimizer)
    parts = {"model": task.model, "optimizer": optimizer, "trainer": trainer}
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)

    task = Problem(seed=9)
    optimizer = task.adamw()
    trainer = HybridTrainer(task.model, optimizer, config)
    saved = torch.load(file, weights_only=True)
    for name, part in {"model": task.model, "optimizer": optimizer, "trainer": trainer}.items():
        part.load_state_dict(saved[name])
    for step in range(stop, 60):
        trainer.step(task.closure(step))
    assert torch.equal(task.weights(), unbroken.weights())
    counts, expected = trainer.statistics(), whole.statistics()
    assert replace(counts, seconds_by_phase={}) == replace(expected, seconds_by_phase={})


def test_a_state_of_other_settings_is_refused() -> None:
    _, trainer = trained(EAGER, 5)
    other = Problem()
    with pytest.raises(UserError, match=r"full_steps \(8 then, 20 now\)"):
        HybridTrainer(other.model, other.adamw(), HybridTrainerConfig(warmup_steps=10)).load_state_dict(
            trainer.state_dict()
        )


def test_a_closure_that_makes_gradients_in_predict_is_refused() -> None:
    task = Problem()
    trainer = task.trained(EAGER, 18 + 3)
    assert trainer.current_phase is Phase.PREDICT

    def closure() -> Tensor:
        with torch.enable_grad():
            loss = task.closure(0)()
            loss.backward()
        return loss

    with pytest.raises(UserError, match="the closure ran backward"):
        trainer.step(closure)


def test_gradients_left_over_are_gone_in_predict() -> None:
    task = Problem()
    trainer = task.trained(EAGER, 18)
    assert trainer.current_phase is Phase.PREDICT
    assert all(p.grad is None for p in task.model.parameters())


def test_an_optimizer_that_hides_the_weights_is_refused_by_name() -> None:
    class Averaging(torch.optim.SGD):
        """Keeps a copy of the weights that a jump would not reach."""

        def step(self, closure: object = None) -> None:
            super().step()
            for p in self.param_groups[0]["params"]:
                self.state[p]["z"] = p.detach().clone()

    task = Problem()
    trainer = task.trained(EAGER, EAGER.warmup_steps, Averaging(task.model.parameters(), lr=0.01))
    with pytest.raises(UserError, match="Averaging keeps a copy of the weights in 'z'"):
        trainer.step(task.closure(EAGER.warmup_steps))


def test_an_optimizer_that_looks_after_its_copies_is_told_of_every_jump() -> None:
    class Told(torch.optim.SGD):
        moves = 0

        def weights_moved(self) -> None:
            self.moves += 1

    task = Problem()
    optimizer = Told(task.model.parameters(), lr=0.01)
    trainer = task.trained(EAGER, 18, optimizer)
    assert optimizer.moves == 0
    trainer.step(task.closure(18))
    assert optimizer.moves == 1


def test_the_clocks() -> None:
    _, trainer = trained(EAGER, 60)
    counts = trainer.statistics()
    assert trainer.steps_by("nominal") == 60
    assert trainer.steps_by("gradient") == counts.gradient_steps
    assert counts.gradient_steps <= trainer.steps_by("worth") <= 60


def test_every_proposal_is_in_the_reliability_table() -> None:
    _, trainer = trained(GATED, 60)
    counts = trainer.statistics()
    assert (
        sum(row["proposals"] for row in trainer.reliability()) == counts.proposals_accepted + counts.proposals_rejected
    )


# --- one step late, in parts, and beside odd optimizers ---------------------------------------------------


def test_a_loss_that_jumps_for_good_is_one_divergence_and_warmup_ends_when_it_should() -> None:
    weight = nn.Parameter(torch.ones(4))
    trainer = HybridTrainer(
        nn.ParameterList([weight]), torch.optim.SGD([weight], lr=0.0), HybridTrainerConfig(warmup_steps=60)
    )
    results = [trainer.step(lambda s=step: weight.mean() + 2.0 * (s >= 40)) for step in range(150)]  # type: ignore[misc]
    assert trainer.statistics().divergences == 1
    assert [r.phase for r in results[58:62]] == [Phase.WARMUP] * 2 + [Phase.FULL] * 2


@pytest.mark.parametrize("given", [1, 3])
def test_a_batch_that_does_not_come_in_the_parts_asked_for_is_refused(given: int, problem: Problem) -> None:
    memory = MemoryConfig(gradient_accumulation=GradientAccumulationConfig(2))
    trainer = HybridTrainer(problem.model, problem.adamw(), HybridTrainerConfig.plain(memory=memory))
    before = problem.weights()
    with pytest.raises(UserError, match=f"came in {given} parts and 2 are wanted"):
        trainer.step([problem.closure(0)] * given)
    assert torch.equal(problem.weights(), before)
    trainer.step([problem.closure(0)] * 2)
    assert trainer.statistics().nominal_steps == 1


def test_no_closure_at_all_is_refused(problem: Problem) -> None:
    trainer = HybridTrainer(problem.model, problem.adamw(), HybridTrainerConfig.plain())
    with pytest.raises(UserError, match="came in 0 parts and 1 are wanted"):
        trainer.step([])


def test_an_optimizer_that_runs_backward_itself_is_refused(problem: Problem) -> None:
    with pytest.raises(UserError, match="LBFGS runs forward and backward by itself"):
        HybridTrainer(problem.model, torch.optim.LBFGS(problem.model.parameters()))


def test_adam_coast_goes_by_the_settings_of_now_after_a_resume(problem: Problem) -> None:
    """`load_state_dict` gives an optimizer new groups; the learning rate is then changed in those."""
    optimizer = problem.adamw(lr=1e-2)
    weights = Weights(problem.model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 5e-4
    assert weights.settings[0]["lr"] == 5e-4


def test_adam_coast_reads_moments_that_are_kept_in_8_bits() -> None:
    pytest.importorskip("torchao")
    directions = []
    for state in ("fp32", "int8"):
        torch.manual_seed(0)
        model = nn.Linear(128, 64, bias=False)
        optimizer = optimizer_for(model, OptimizerConfig(lr=1e-2), MemoryConfig(optimizer_state=state))
        for step in range(3):
            inputs = torch.randn(8, 128, generator=torch.Generator().manual_seed(step))
            gradient_step(optimizer, model(inputs).square().mean())
        directions.append(optimizer_direction(optimizer, model.weight, optimizer.param_groups[0]).flatten())
    assert torch.cosine_similarity(*directions, dim=0) > 0.99


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda loss: None, "returned a NoneType: let it return the loss"),
        (lambda loss: loss.item(), "returned a float"),
        (lambda loss: (loss, loss), "returned a tuple"),
        (lambda loss: loss.detach(), "does not depend on the weights"),
        (lambda loss: loss.repeat(3), r"shape \(3,\): let it return the batch's mean loss"),
    ],
)
def test_a_closure_that_returns_no_loss_is_told_what_to_return(returned: Any, said: str, problem: Problem) -> None:
    trainer = HybridTrainer(problem.model, problem.adamw(), EAGER)
    before = problem.weights()
    with pytest.raises(UserError, match=said):
        trainer.step(lambda: returned(problem.closure(0)()))
    assert torch.equal(problem.weights(), before)


def test_a_loss_in_place_of_a_closure_is_refused(problem: Problem) -> None:
    trainer = HybridTrainer(problem.model, problem.adamw(), EAGER)
    with pytest.raises(UserError, match=r"give step\(\) a function that computes the loss"):
        trainer.step(problem.closure(0)())


def test_an_optimizer_of_another_model_is_refused(problem: Problem) -> None:
    with pytest.raises(UserError, match="holds weights that are not the model's"):
        HybridTrainer(Problem().model, problem.adamw())


def test_a_model_with_nothing_to_train_is_refused(problem: Problem) -> None:
    optimizer = problem.adamw()
    problem.model.requires_grad_(requires_grad=False)
    with pytest.raises(UserError, match="there is nothing to train"):
        HybridTrainer(problem.model, optimizer)


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (MemoryConfig(step_in_backward=True), r"step_in_backward=True.*optimizer_for"),
        (MemoryConfig(optimizer_state="int8"), r"optimizer_state='int8'.*AdamW was built without"),
        (MemoryConfig(state_on_host=True), "state_on_host=True"),
        (MemoryConfig(checkpointing=CheckpointingConfig()), "prepare_model_"),
        (MemoryConfig(weights="bf16", optimizer_state="int8"), "optimizer_state"),
    ],
)
def test_memory_settings_that_nobody_put_to_work_are_refused(memory: MemoryConfig, said: str) -> None:
    model = GPT2(GPT2Config.nano())
    with pytest.raises(UserError, match=said):
        HybridTrainer(model, torch.optim.AdamW(model.parameters()), HybridTrainerConfig.plain(memory=memory))
