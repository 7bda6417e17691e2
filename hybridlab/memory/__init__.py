"""Memory features: what lets a model train in less memory, and what it costs."""

from hybridlab.memory.apply import optimizer_for, prepare_model_
from hybridlab.memory.config import (
    CheckpointingConfig,
    GradientAccumulationConfig,
    MemoryConfig,
    MixedPrecisionConfig,
    PredictAwareMemoryConfig,
)
