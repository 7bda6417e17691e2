"""Hugging Face's Trainer, Accelerate and Lightning, their real classes: hybrid steps, depth, record and checkpoints."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ipywidgets import VBox
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hybridlab import DepthSchedule, HybridTrainer, HybridTrainerConfig
from hybridlab.engine.trainer import DivergenceError
from hybridlab.integrations import HybridModule, HybridTraining, RecordedLoop, recorded_loop
from hybridlab.memory import MemoryConfig, MixedPrecisionConfig
from hybridlab.notebook import find_runs
from hybridlab.panel import live
from tests.conftest import jumping, vector

JUMPS = jumping(4, 8, 6)
GATED = replace(JUMPS, gate=True)
DEPTH = HybridTrainerConfig.plain(depth=DepthSchedule.shares(((0.0, 2), (0.5, 4))))
STEPS = 40


@pytest.fixture(autouse=True)
def _project(root: Path) -> None:
    warnings.filterwarnings("ignore", module="pytorch_lightning")


# --- Hugging Face ----------------------------------------------------------------------------------------


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    size = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 4, "n_head": 2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **no_dropout, bos_token_id=0, eos_token_id=0))


def rows(count: int = 96) -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 8, (count, 1), generator=draws) + torch.arange(16)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_of(model: Any, *, mixed_in: bool = True, hybrid: dict[str, Any] | None = None, **arguments: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    settings = {"output_dir": "out", "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 10}
    bases = (HybridTraining, transformers.Trainer) if mixed_in else (transformers.Trainer,)
    kind = type("Mine", bases, {})
    given = transformers.TrainingArguments(**settings | quiet | arguments)
    return kind(model, given, train_dataset=rows(), eval_dataset=rows(8), **hybrid or {})


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 0.0), (2, 0.5)])
def test_without_prediction_the_hugging_face_trainer_trains_as_it_does_alone(accumulation: int, clip: float) -> None:
    """Bit for bit; where norms and parts are added up, within rounding."""
    ours, theirs = gpt2(), gpt2()
    arguments = {"gradient_accumulation_steps": accumulation, "max_grad_norm": clip}
    trainer_of(ours, **arguments).train()
    trainer_of(theirs, mixed_in=False, **arguments).train()
    torch.testing.assert_close(vector(ours), vector(theirs), rtol=0, atol=1e-4 if clip else 0)


@pytest.mark.parametrize("config", [JUMPS, GATED], ids=["jumps", "gated"])
def test_it_jumps_evaluates_and_leaves_a_record(config: HybridTrainerConfig) -> None:
    trainer = trainer_of(
        gpt2(), hybrid={"hybrid": config, "record": "mine"}, eval_strategy="steps", eval_steps=20, warmup_steps=5
    )
    output = trainer.train()
    counts = trainer.hybrid_trainer.statistics()
    assert output.global_step == counts.nominal_steps == STEPS
    assert counts.predicted_steps or config.gate
    assert trainer.optimizer.param_groups[0]["lr"] == 0
    (run,) = find_runs("runs", where=["name=mine", "state=finished"])
    assert len(run.steps) == STEPS
    assert run.closing_figures["predicted_steps"] == counts.predicted_steps
    assert run.closing_figures["validation_loss"] == trainer.state.log_history[-2]["eval_loss"]


def test_predicted_depth_grows_within_the_hugging_face_trainer() -> None:
    trainer = trainer_of(gpt2(), hybrid={"hybrid": DEPTH, "record": "deep"})
    trainer.train()
    (run,) = find_runs("runs", where=["name=deep"])
    assert run.steps["depth"].tolist() == [2] * 20 + [4] * 20
    losses = run.steps["measured_loss"]
    assert losses.tail(5).mean() < losses.head(5).mean()


def test_a_checkpoint_of_the_hugging_face_trainer_goes_on_as_if_it_had_not_stopped() -> None:
    hybrid = {"hybrid": JUMPS}
    whole = gpt2()
    trainer_of(whole, hybrid=hybrid, save_strategy="steps", save_steps=18).train()
    part = gpt2()
    resumed = trainer_of(part, hybrid=hybrid)
    resumed.train(resume_from_checkpoint="out/checkpoint-18")
    assert resumed.hybrid_trainer.statistics().nominal_steps == STEPS
    assert torch.equal(vector(whole), vector(part))


def test_each_training_of_one_trainer_begins_anew_and_leaves_its_optimizer_free() -> None:
    """A second one makes its model again, as a search of hyperparameters does; an optimizer that was given steps on."""
    models: list[Any] = []
    trainer = trainer_of(None, hybrid={"hybrid": JUMPS, "record": "twice", "model_init": gpt2})
    for _ in range(2):
        trainer.train()
        assert trainer.hybrid_trainer.model is trainer.model
        assert trainer.hybrid_trainer.statistics().nominal_steps == STEPS
        models.append(trainer.model)
    assert models[0] is not models[1]
    assert torch.equal(*map(vector, models))
    assert len(find_runs("runs", where=["name=twice", "state=finished"])) == 1
    optimizer, model = trainer.optimizer, trainer.model
    before = vector(model).clone()
    trainer_of(model, mixed_in=False, hybrid={"optimizers": (optimizer, None)}).train()
    assert not torch.equal(vector(model), before)


NARROW = replace(
    JUMPS,
    path_device="host",
    memory=MemoryConfig(mixed_precision=MixedPrecisionConfig(training="bf16", predict="bf16_weights")),
)
"""While it predicts, the model has no float32 weights."""


def failing_once(at_step: int) -> Callable[[int], None]:
    waiting = [at_step]

    def fail(step: int) -> None:
        if step in waiting:
            waiting.clear()
            raise ZeroDivisionError

    return fail


def test_an_error_in_a_jump_leaves_a_model_that_trains_again() -> None:
    transformers = pytest.importorskip("transformers")
    trainer, fail = trainer_of(gpt2(), hybrid={"hybrid": NARROW}), failing_once(14)
    callback = type("Fails", (transformers.TrainerCallback,), {})()
    callback.on_step_end = lambda args, state, control, **_: fail(state.global_step)
    trainer.add_callback(callback)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.hybrid_trainer.current_phase == "predict"
    assert {param.dtype for param in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    assert trainer.hybrid_trainer.statistics().nominal_steps == STEPS


def test_accelerates_prepared_model_and_optimizer_work() -> None:
    accelerate = pytest.importorskip("accelerate")
    pairs = []
    for prepared in (True, False):
        model = gpt2()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        if prepared:
            model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
        trainer = HybridTrainer(model, optimizer, JUMPS)
        for row in rows(30):
            batch = {name: value[None] for name, value in row.items()}
            trainer.step(lambda: model(**batch).loss)  # noqa: B023
        assert trainer.statistics().predicted_steps
        pairs.append(vector(model))
    assert torch.equal(*pairs)


# --- Lightning -------------------------------------------------------------------------------------------


def module_of(mixed_in: bool = True, **hybrid: Any) -> Any:
    lightning = pytest.importorskip("pytorch_lightning")

    class Net(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
            self.layers = nn.ModuleList(Residual(block) for block in blocks)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = layer(x)
            return self.last(x)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = F.mse_loss(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.log("validation_loss", F.mse_loss(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    torch.manual_seed(0)
    return type("Mine", (HybridModule, Net), {})(**hybrid) if mixed_in else Net()


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def fit(module: Any, **settings: Any) -> Any:
    lightning = pytest.importorskip("pytorch_lightning")
    draws = torch.Generator().manual_seed(2)
    inputs = torch.randn(64, 4, generator=draws)
    data = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=16)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    resume = settings.pop("resume", None)
    given = {"max_steps": STEPS, "enable_checkpointing": False} | quiet | settings
    trainer = lightning.Trainer(**given)
    trainer.fit(module, data, data, ckpt_path=resume)
    return trainer


def test_without_prediction_lightning_trains_as_it_does_alone() -> None:
    ours, theirs = module_of(), module_of(mixed_in=False)
    assert fit(ours).global_step == fit(theirs).global_step == STEPS
    assert torch.equal(vector(ours), vector(theirs))


@pytest.mark.filterwarnings("error:.*optimizer.step:UserWarning")
def test_lightning_jumps_grows_and_leaves_a_record() -> None:
    jumping, growing = module_of(hybrid=JUMPS, record="light"), module_of(hybrid=DEPTH, record="deep")
    assert fit(jumping).global_step == STEPS
    assert jumping.hybrid_trainer.statistics().predicted_steps
    fit(growing)
    (run,) = find_runs("runs", where=["name=light", "state=finished"])
    assert len(run.steps) == STEPS
    assert run.closing_figures["validation_loss"] < 1.0
    (run,) = find_runs("runs", where=["name=deep"])
    assert run.steps["depth"].tolist() == [2] * 20 + [4] * 20


def test_a_lightning_checkpoint_goes_on_as_if_it_had_not_stopped() -> None:
    whole, part, rest = module_of(hybrid=JUMPS), module_of(hybrid=JUMPS), module_of(hybrid=JUMPS)
    fit(whole)
    fit(part, max_steps=20).save_checkpoint("part.ckpt")
    fit(rest, resume="part.ckpt")
    assert rest.hybrid_trainer.statistics().nominal_steps == STEPS
    assert torch.equal(vector(whole), vector(rest))


def test_a_later_fit_begins_anew_after_a_checkpoint_and_after_an_error_in_a_jump() -> None:
    lightning = pytest.importorskip("pytorch_lightning")
    part, rest = module_of(hybrid=JUMPS), module_of(hybrid=JUMPS)
    fit(part, max_steps=20).save_checkpoint("part.ckpt")
    for resume in ("part.ckpt", None):
        fit(rest, resume=resume)
        assert rest.hybrid_trainer.statistics().nominal_steps == STEPS
    broken, fail = module_of(hybrid=NARROW), failing_once(14)
    callback = type("Fails", (lightning.Callback,), {})()
    callback.on_train_batch_end = lambda trainer, *_: fail(trainer.global_step)
    with pytest.raises(ZeroDivisionError):
        fit(broken, callbacks=[callback], num_sanity_val_steps=0)
    assert {param.dtype for param in broken.parameters()} == {torch.float32}
    fit(broken, num_sanity_val_steps=0)
    assert broken.hybrid_trainer.statistics().nominal_steps == STEPS


def test_lightning_does_not_finish_with_weights_that_are_not_finite() -> None:
    lightning = pytest.importorskip("pytorch_lightning")
    module, callback = module_of(record="light"), type("Spoils", (lightning.Callback,), {})()
    callback.on_train_end = lambda *_: nn.init.constant_(next(module.parameters()), math.nan)
    with pytest.raises(DivergenceError, match="the weights are not finite after step 40"):
        fit(module, callbacks=[callback])
    assert find_runs("runs", where=["state=finished"]) == []


# --- any loop --------------------------------------------------------------------------------------------


def linear() -> HybridTrainer:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), JUMPS)


def drive(loop: RecordedLoop, steps: int) -> RecordedLoop:
    trainer = loop._trainer
    for step in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        result = trainer.step(lambda: F.mse_loss(trainer.model(x), x.sum(1, keepdim=True)))  # noqa: B023
        loop.note(result, {"validation_loss": 1.0 / (step + 1)} if step % 5 == 4 else None)
    return loop


def test_any_loop_leaves_a_record() -> None:
    run = drive(RecordedLoop(linear(), "loop", steps=20, more={"task": {"batch_size": 8}}), 20).finish()
    assert run.validation_loss() == run.validation_loss(at_step=20) == 1 / 20
    assert run.closing_figures["nominal_steps"] == 20
    assert run.closing_figures["seconds"] > 0


@pytest.fixture
def panel(monkeypatch: pytest.MonkeyPatch) -> list[VBox]:
    """As if a person looked; gives the panels that were shown."""
    shown: list[VBox] = []
    monkeypatch.setattr(recorded_loop, "shows_panel", lambda: True)
    monkeypatch.setattr(live, "show", shown.append)
    return shown


def status(panel: VBox) -> str:
    return panel.children[1].value.split("hl-status'><b>")[1].split("<")[0]


def test_the_panel_tells_a_loop_that_ended_early_from_one_that_finished(panel: list[VBox]) -> None:
    drive(RecordedLoop(linear(), "whole", steps=5), 5).finish()
    drive(early := RecordedLoop(linear(), "early", steps=20), 5).close()
    with pytest.raises(ZeroDivisionError), drive(RecordedLoop(linear(), "failed", steps=20), 5):
        _ = 1 / 0
    assert [status(each) for each in panel] == ["finished", "stopped", "failed"]
    assert len(early.record.steps) == 5


def test_an_error_in_another_library_s_loop_closes_the_record(panel: list[VBox]) -> None:
    face, module = trainer_of(gpt2(), hybrid={"record": "face"}), module_of(record="light")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no data is left")

    face.evaluate = module.validation_step = fail
    face.args.eval_strategy, face.args.eval_steps = "steps", 5
    face.control.should_evaluate = True
    for train, record in ((face.train, "face"), (lambda: fit(module, num_sanity_val_steps=0), "light")):
        with pytest.raises(RuntimeError, match="no data is left"):
            train()
        (run,) = find_runs("runs", where=[f"name={record}"])
        assert len(run.steps)
    assert [status(each) for each in panel] == ["failed", "failed"]
    assert "memory sampler" not in {thread.name for thread in threading.enumerate()}


def test_a_paused_loop_samples_no_memory() -> None:
    with RecordedLoop(linear(), "paused", steps=20) as loop:
        drive(loop, 2).pause()
        assert "memory sampler" not in {thread.name for thread in threading.enumerate()}
        drive(loop, 1)
        assert "memory sampler" in {thread.name for thread in threading.enumerate()}
