"""What every outer loop shares: it makes the hybrid trainer, which alone decides about steps, and keeps a record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.trainer import HybridTrainer
from hybridlab.integrations.recorded_loop import RecordedLoop


class HybridLoop:
    """Mixin of another library's trainer or module that takes hybrid steps.

    hybrid: the settings; None is plain training. A depth schedule in shares is fitted to the run's length
    record: folder below `runs` for a record, and gauges in JupyterLab; None keeps none

    hybrid_trainer: the `HybridTrainer`, once training has begun
    """

    def __init__(
        self, *args: Any, hybrid: HybridTrainerConfig | None = None, record: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.hybrid_config = hybrid or HybridTrainerConfig.plain()
        self.hybrid_trainer: HybridTrainer | None = None
        self._record = record
        self._loop: RecordedLoop | None = None
        self._restored: dict[str, Any] | None = None

    def _begin(
        self, model: nn.Module, optimizer: Optimizer, config: HybridTrainerConfig, steps: int, seed: int = 0
    ) -> HybridTrainer:
        """Make the hybrid trainer of a run of so many steps, go on from a restored state, and begin the record."""
        self.hybrid_trainer = trainer = HybridTrainer(model, optimizer, config.fitted_to(steps))
        self._stepping = hold_(optimizer)
        if self._restored:
            trainer.load_state_dict(self._restored)
        if self._record:
            self._loop = RecordedLoop(trainer, self._record, steps, seed)
        return trainer

    def _materialize(self) -> None:
        if self.hybrid_trainer:
            self.hybrid_trainer.materialize_()


def hold_(optimizer: Optimizer) -> Callable[[], AbstractContextManager[None]]:
    """Let `optimizer.step()` do nothing, but within the context that is returned."""
    take, held = optimizer.step, [True]

    def step(self: Optimizer, closure: Callable[[], float] | None = None) -> Any:
        return None if held[0] else take(closure) if closure else take()

    @contextmanager
    def stepping() -> Iterator[None]:
        held[0] = False
        try:
            yield
        finally:
            held[0] = True

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return stepping
