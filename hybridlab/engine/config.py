"""The settings of hybrid predictive training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from hybridlab.base.settings import check_bounds, check_choice, check_types
from hybridlab.depth import BEST, DepthSchedule
from hybridlab.memory.config import MemoryConfig, refuse_conflicts
from hybridlab.predictors import PREDICTORS
from hybridlab.weights.gram import PathNeeds
from hybridlab.weights.path import PathStorage
from hybridlab.weights.residency import Residency


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
    gate_batches: fresh batches that a jump is tried on, one per step
    gate_budget: share of the training, between 0 and 1, that refused trials may cost
    path_device: "same" keeps the remembered path beside the weights, "host" in (pinned) host memory
    path_dtype: "fp32" or "bf16", of the path's rows; each row is as large as the trainable weights
    clip_norm: gradient norm above which gradients are scaled down; None leaves them alone
    memory: what lets the model train in less memory; None is plain training. The trainer itself takes from it the
        number formats of each phase and what leaves the GPU in Predict; `hybridlab.memory.apply` does the rest
    depth: how many blocks are trained when; None trains all from the start. Growth has a rollback snapshot as a jump
        has, for `full_steps` steps, where `path_device` says

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
    depth: DepthSchedule | None = None

    @property
    def path_needs(self) -> PathNeeds | None:
        """What the predictor wants recorded of the path; None where nothing is predicted."""
        return PREDICTORS[self.predictor]().needs(self.full_steps) if self.max_predict_steps else None

    @property
    def predicts(self) -> bool:
        """Whether weights may be predicted, in time or in depth."""
        return self.max_predict_steps > 0 or (self.depth is not None and self.depth.grows)

    @property
    def path_storage(self) -> PathStorage:
        """Where the path is kept, and in which type."""
        dtype = torch.bfloat16 if self.path_dtype == "bf16" else torch.float32
        return PathStorage(Residency.OFFLOADED if self.path_device == "host" else Residency.DEVICE, dtype)

    def fitted_to(self, steps: int) -> Self:
        """The same settings for a run of this length: a depth schedule in shares of it becomes one in steps."""
        return replace(self, depth=self.depth.fitted_to(steps)) if self.depth else self

    @classmethod
    def conservative(cls, **changes: Any) -> Self:
        """The plan's careful preset: confidence 0.60, 50 steps per jump, a correction every 15."""
        return cls(**{"confidence_threshold": 0.60, "max_predict_steps": 50, "correction_interval": 15} | changes)

    @classmethod
    def aggressive(cls, **changes: Any) -> Self:
        """The plan's bold preset: confidence 0.55, 75 steps per jump, a correction every 10."""
        return cls(**{"confidence_threshold": 0.55, "max_predict_steps": 75, "correction_interval": 10} | changes)

    @classmethod
    def plain(cls, **changes: Any) -> Self:
        """Plain training through the same step: nothing is ever predicted."""
        return cls(**{"max_predict_steps": 0} | changes)

    def __post_init__(self) -> None:
        """Refuse nonsense."""
        check_types(self)
        check_bounds(self, "warmup_steps", "max_predict_steps", "correct_steps", least=0)
        check_bounds(self, "full_steps", "correction_interval", "gate_batches", least=1)
        check_bounds(self, "confidence_threshold", "gate_budget", least=0, most=1)
        check_bounds(self, "divergence_threshold", "clip_norm", above=0)
        check_choice("predictor", self.predictor, PREDICTORS)
        check_choice("path_device", self.path_device, ("same", "host"))
        check_choice("path_dtype", self.path_dtype, ("fp32", "bf16"))
        refuse_conflicts(self._memory_conflicts())

    def _memory_conflicts(self) -> dict[str, bool]:
        """What the memory features and the trainer's own settings cannot do together, why, and whether they are to."""
        memory, jumps = self.memory or MemoryConfig(), self.max_predict_steps > 0
        leaves = memory.predict_strategy in ("cpu", "pinned") or memory.offloads_weights
        stays = jumps and leaves and self.path_device == "same"
        return {
            "step_in_backward does not go with clip_norm: the norm of all gradients is not known before the first of "
            "them is used; set memory.clip_in_backward": memory.step_in_backward and self.clip_norm is not None,
            f"weights={memory.weights!r} does not go with max_predict_steps above 0: a prediction would drown in the "
            "rounding; use float32 weights, as MemoryConfig.fit_16gb(predict_aware=PredictAwareMemoryConfig('pinned')) "
            "has them (hybridlab plan: fit_16gb_predict), or max_predict_steps=0": jumps and memory.lowers_weights,
            "leaving the GPU in Predict does not go with path_device='same': the path and the rollback snapshot, "
            "larger than what leaves, would stay on it; set path_device='host'": stays,
            "depth rule='best' does not go with gate=False: the gate tries the rules; set gate=True, or name a rule": (
                self.depth is not None and self.depth.rule == BEST and not self.gate
            ),
            "depth does not go with state_on_host: the optimizer on the host holds the state of all blocks from the "
            "start; leave one of them off": self.depth is not None and memory.state_on_host,
        }
