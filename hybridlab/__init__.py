"""hybridlab: does predicting weights instead of running the backward pass pay, on your model and your card?"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridlab.engine.config import HybridTrainerConfig
    from hybridlab.engine.phases import Phase
    from hybridlab.engine.result import StepResult
    from hybridlab.engine.trainer import HybridTrainer

__all__ = ["HybridTrainer", "HybridTrainerConfig", "Phase", "StepResult"]
__version__ = "0.1.0"

_HOMES = {"HybridTrainer": "trainer", "HybridTrainerConfig": "config", "Phase": "phases", "StepResult": "result"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the command line answers without waiting for torch."""
    if name in _HOMES:
        return getattr(import_module(f"hybridlab.engine.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hybridlab' has no attribute {name!r}")
