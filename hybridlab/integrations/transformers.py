"""Hugging Face's Trainer with jumps and predicted depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hybridlab.base.errors import UserError
from hybridlab.engine.result import StepResult
from hybridlab.engine.trainer import HybridTrainer
from hybridlab.integrations.recorded_loop import HybridLoop

HYBRID_STATE = "hybrid.pt"
"""In a checkpoint's folder, beside the optimizer's state."""

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object


class HybridTraining(HybridLoop, Trainer):
    """Mixin that lets a `transformers.Trainer` take hybrid steps.

        class MyTrainer(HybridTraining, transformers.Trainer): ...

        MyTrainer(model, arguments, train_dataset=..., hybrid=HybridTrainerConfig(...), record="my_run").train()

    The Trainer keeps its data, schedule, logging, evaluation and checkpoints; each of its steps is a nominal step, and
    whether a backward pass is run is decided by the `HybridTrainer`. Gradients are clipped to the arguments'
    `max_grad_norm`. With accumulation the loss of a step is the mean over its parts, as the Trainer has it.

    hybrid, record: as for `HybridLoop`

    Raises UserError for fp16, whose GradScaler is not supported, and for steps on several GPUs by DataParallel.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.fp16 or self.args.n_gpu > 1:
            raise UserError("hybrid steps take neither fp16 nor DataParallel: set bf16=True, or name one GPU")
        self._parts: list[Callable[[], Tensor]] = []
        self._losses: dict[int, Tensor] = {}
        self._result: StepResult | None = None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Keep a part of the batch; with its last part, take the nominal step. Returns the step's loss."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        self._parts.append(partial(self._part_loss, model, inputs, num_items_in_batch, len(self._parts)))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        parts, self._parts = self._parts, []
        trainer = self.hybrid_trainer or self._begin_with(model)
        with self._stepping():
            self._result = trainer.step(parts, weights=[1.0] * len(parts) if len(parts) > 1 else None)
        if self._loop:
            self._loop.note(self._result)
            self.control.should_training_stop |= self._loop.stopping
        return torch.stack([self._losses[part] for part in range(len(parts))]).mean()

    def _part_loss(self, model: nn.Module, inputs: Any, count: Any, part: int) -> Tensor:
        """The part's mean loss; where the Trainer divides by the whole batch's count, times the number of parts."""
        with self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=count)
        if (self.model_accepts_loss_kwargs and count is not None) or self.compute_loss_func is not None:
            loss = loss * self.current_gradient_accumulation_steps
        self._losses[part] = loss.detach()
        return loss

    def _begin_with(self, model: nn.Module) -> HybridTrainer:
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper steps the same one
        config = replace(self.hybrid_config, clip_norm=self.args.max_grad_norm or None)
        inner = self.accelerator.unwrap_model(model)
        return self._begin(inner, optimizer, config, self.state.max_steps, self.args.seed)

    def _clip_grad_norm(self, model: nn.Module) -> float:
        """Gradients were clipped within the step: their norm, for the Trainer's log; 0 where none were computed."""
        return (self._result and self._result.gradient_norm) or 0.0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with a hybrid trainer of its own, and finish the record."""
        self.hybrid_trainer = self._result = None
        self._parts = []
        try:
            output = super().train(*args, **kwargs)
            self._end(self._evaluated)
            return output
        except BaseException as error:
            self._close(error)
            raise

    def _evaluated(self) -> dict[str, float]:
        """The Trainer's last evaluation, with its loss under our name."""
        logs: dict[str, float] = next((log for log in reversed(self.state.log_history) if "eval_loss" in log), {})
        return logs | {"validation_loss": logs["eval_loss"]} if logs else {}

    # --- evaluation and checkpoints ----------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the exact weights, wherever Predict keeps them."""
        self._materialize()
        return super().evaluate(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the exact weights."""
        self._materialize()
        super().save_model(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.hybrid_trainer:
            torch.save(self.hybrid_trainer.state_dict(), Path(output_dir) / HYBRID_STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and (path := Path(checkpoint) / HYBRID_STATE).exists():
            self._restored = torch.load(path, map_location="cpu", weights_only=True)
