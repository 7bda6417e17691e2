"""Memory features: what lets a model train in less memory, and what it costs."""

from hybridlab.memory.apply import optimizer_for, prepare_model_
from hybridlab.memory.config import (
    CheckpointingConfig,
    GradientAccumulationConfig,
    MemoryConfig,
    MixedPrecisionConfig,
    PredictAwareMemoryConfig,
)
from hybridlab.memory.nearest_fit import Situation, nearest_fit
from hybridlab.memory.planner import CardShare, Plan, plan

__all__ = [
    "CardShare",
    "CheckpointingConfig",
    "GradientAccumulationConfig",
    "MemoryConfig",
    "MixedPrecisionConfig",
    "Plan",
    "PredictAwareMemoryConfig",
    "Situation",
    "nearest_fit",
    "optimizer_for",
    "plan",
    "prepare_model_",
]
