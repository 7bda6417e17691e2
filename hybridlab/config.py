"""The settings of hybrid predictive training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from hybridlab.errors import nearest
from hybridlab.memory.config import Conflict, MemoryConfig, refuse_conflicts
from hybridlab.predictors import PREDICTORS
from hybridlab.trajectory import PathStorage


@dataclass(frozen=True)
class HybridTrainerConfig:
    """When to predict, how far, and what to trust.

    warmup_steps: gradient steps before the path of the weights is looked at
    full_steps: gradient steps of a Full block; the predictor is asked at the end of each
    max_predict_steps: nominal steps that one jump may replace; 0 is plain training, bit for bit
    correct_steps: gradient steps of the Correct phase
    confidence_threshold: confidence, in [0, 1], below which nothing is predicted
    correction_interval: nominal steps between two measurements inside a jump
    divergence_threshold: how many standard deviations above its running mean a loss counts as divergence
    predictor: a name in `hybridlab.predictors.PREDICTORS`
    gate: try every jump forward-only before it is taken, and refuse it unless the loss falls
    gate_batches: fresh batches that a jump is tried on, one a step
    gate_budget: share of the training, between 0 and 1, that refused trials may cost
    path_device: "same" keeps the remembered path beside the weights, "host" in (pinned) host memory
    path_dtype: "fp32" or "bf16", of the path's rows; each row is as large as the trainable weights
    clip_norm: gradient norm above which gradients are scaled down; None leaves them alone
    memory: what lets the model train in less memory; None is plain training. The trainer itself takes from it the
        number formats of each phase and what leaves the card in Predict; `hybridlab.memory.apply` does the rest

    Raises TypeError and ValueError that name the setting and its remedy.
    """

    warmup_steps: int = 100
    full_steps: int = 20
    max_predict_steps: int = 50
    confidence_threshold: float = 0.60
    correction_interval: int = 15
    divergence_threshold: float = 6.0
    predictor: str = "linear"
    correct_steps: int = 5
    gate: bool = True
    gate_batches: int = 4
    gate_budget: float = 0.02
    path_device: str = "same"
    path_dtype: str = "fp32"
    clip_norm: float | None = None
    memory: MemoryConfig | None = None

    @property
    def path_storage(self) -> PathStorage:
        """Where the path is kept, and in which type."""
        dtype = torch.bfloat16 if self.path_dtype == "bf16" else torch.float32
        return PathStorage(self.path_device == "host", dtype)

    @classmethod
    def conservative(cls, **changes: Any) -> Self:
        """The plan's careful preset: confidence 0.60, 50 steps a jump, a correction every 15."""
        return cls(**{"confidence_threshold": 0.60, "max_predict_steps": 50, "correction_interval": 15} | changes)

    @classmethod
    def aggressive(cls, **changes: Any) -> Self:
        """The plan's bold preset: confidence 0.55, 75 steps a jump, a correction every 10."""
        return cls(**{"confidence_threshold": 0.55, "max_predict_steps": 75, "correction_interval": 10} | changes)

    @classmethod
    def plain(cls, **changes: Any) -> Self:
        """Plain training through the same step: nothing is ever predicted."""
        return cls(**{"max_predict_steps": 0} | changes)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), str(field.type))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        for name in ("confidence_threshold", "gate_budget"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must lie in [0, 1]")
        if self.divergence_threshold <= 0 or (self.clip_norm is not None and self.clip_norm <= 0):
            raise ValueError("divergence_threshold and clip_norm must be above 0 (clip_norm=None turns clipping off)")
        choices = {"predictor": PREDICTORS, "path_device": ("same", "host"), "path_dtype": ("fp32", "bf16")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown: {nearest(getattr(self, name), known)}")
        refuse_conflicts(self._memory_conflicts())

    def _memory_conflicts(self) -> list[Conflict]:
        """What the memory features and the trainer's own settings cannot do together."""
        memory, jumps = self.memory or MemoryConfig(), self.max_predict_steps > 0
        leaves = memory.predict_strategy in ("cpu", "pinned") or memory.lowers_weights
        return [
            (
                memory.step_in_backward and self.clip_norm is not None,
                ("step_in_backward", "clip_norm"),
                "the norm of all gradients is not known before the first of them is used; set memory.clip_in_backward",
            ),
            (
                jumps and memory.weights == "bf16",
                ("weights='bf16'", "max_predict_steps above 0"),
                "a prediction would drown in the rounding; use float32 weights, or max_predict_steps=0",
            ),
            (
                jumps and leaves and self.path_device == "same",
                ("leaving the card in Predict", "path_device='same'"),
                "the path and the way back, larger than what leaves, would stay on it; set path_device='host'",
            ),
        ]


_LEAST = {
    "warmup_steps": 0,
    "full_steps": 1,
    "max_predict_steps": 0,
    "correct_steps": 0,
    "correction_interval": 1,
    "gate_batches": 1,
}


def _check_type(name: str, value: object, wanted: str) -> None:
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "str": (str,),
        "float | None": (int, float, type(None)),
        "MemoryConfig | None": (MemoryConfig, type(None)),
    }
    if not isinstance(value, kinds[wanted]) or (isinstance(value, bool) and wanted != "bool"):
        hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if isinstance(value, str) and "float" in wanted else ""
        raise TypeError(f"{name} is {value!r}: {wanted} is wanted{hint}")
