"""A LightningModule with jumps and predicted depth."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from hybridlab.base.errors import UserError
from hybridlab.integrations.recorded_loop import HybridLoop

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule
else:
    LightningModule = object

STATE = "hybridlab"
"""Its key in a Lightning checkpoint."""


class HybridModule(HybridLoop, LightningModule):
    """Mixin that lets a LightningModule take hybrid steps, by Lightning's manual optimization.

        class Mine(HybridModule, MyModule): ...

        Trainer(max_steps=1000).fit(Mine(hybrid=HybridTrainerConfig(...), record="my_run"), data)

    `training_step` of the module stays as it is: forward only, it returns the loss, or a dictionary that holds it. It
    may run several times per step, and in most predicted steps not at all; what it logs last counts.
    `configure_optimizers` gives one optimizer; its schedulers step with each nominal step, or with each epoch.
    Gradients are clipped to `hybrid.clip_norm`.

    hybrid, record: as for `HybridLoop`

    Raises UserError for several optimizers and for float16; Lightning refuses accumulation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self._latest: Tensor | None = None

    def on_train_start(self) -> None:
        """Make the hybrid trainer, when model and optimizer are where they train."""
        super().on_train_start()
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, Optimizer):
            raise UserError("configure_optimizers gives several optimizers, and hybrid steps take one: give one")
        if str(self.trainer.precision).startswith("16"):
            raise UserError("hybrid steps take no float16, which needs a GradScaler: set precision='bf16-mixed'")
        self._begin(self, optimizer, self.hybrid_config, int(self.trainer.estimated_stepping_batches))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Take a nominal step; returns the loss that was computed last."""
        assert self.hybrid_trainer is not None
        module_step = super().training_step

        def closure() -> Tensor:
            output: Any = module_step(*args, **kwargs)
            loss: Tensor = output["loss"] if isinstance(output, dict) else output
            self._latest = loss.detach()
            return loss

        with self._stepping():
            result = self.hybrid_trainer.step(closure)
        optimizer: Any = self.optimizers()
        optimizer.step()  # counts the step for Lightning; the optimizer is held
        self._step_schedulers("step")
        if self._loop:
            self._loop.note(result)
            self.trainer.should_stop |= self._loop.stopping
        return self._latest

    def on_train_epoch_end(self) -> None:
        """Step the schedulers that go by epochs."""
        super().on_train_epoch_end()
        self._step_schedulers("epoch")

    def on_validation_start(self) -> None:
        """Judge the exact weights, wherever Predict keeps them."""
        super().on_validation_start()
        self._materialize()

    def on_fit_end(self) -> None:
        """Finish the record."""
        super().on_fit_end()
        self._end(lambda: {name: float(value) for name, value in self.trainer.callback_metrics.items()})

    def configure_callbacks(self) -> list[Any]:
        """The module's own, and one that closes the record where an error ends training."""
        module = next(base for base in type(self).__mro__ if base.__name__ == "LightningModule")
        package: Any = import_module(module.__module__.partition(".core.")[0])  # pytorch_lightning or lightning.pytorch

        class ClosesRecord(package.Callback):  # type: ignore[misc]
            def on_exception(self, trainer: Any, module: HybridModule, error: BaseException) -> None:
                module._close(error)

        given = super().configure_callbacks()
        return [*(given if isinstance(given, Sequence) else [given]), ClosesRecord()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the hybrid trainer's state beside the optimizer's."""
        super().on_save_checkpoint(checkpoint)
        if self.hybrid_trainer:
            checkpoint[STATE] = self.hybrid_trainer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from such a state, where it is loaded to train."""
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit":
            self._restored = checkpoint.get(STATE)

    def _step_schedulers(self, interval: str) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval:
                config.scheduler.step()  # type: ignore[call-arg]
