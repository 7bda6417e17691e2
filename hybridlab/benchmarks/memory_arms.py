"""Training arms that differ in their memory features alone."""

from __future__ import annotations

from typing import Any

from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.memory import MemoryConfig, MixedPrecisionConfig, PredictAwareMemoryConfig
from hybridlab.memory.config import CLIP_NORM


def plain_with(memory: MemoryConfig) -> HybridTrainerConfig:
    """Plain training with these memory features; inside backward they clip themselves (`clip_in_backward`)."""
    return HybridTrainerConfig.plain(clip_norm=_clip_norm(memory), memory=memory)


def jumping_with(memory: MemoryConfig, *, full_steps: int, **changes: Any) -> HybridTrainerConfig:
    """Jumps on every occasion, so that there is a Predict phase to look at; the path lies on the host, in bf16.

    full_steps: gradient steps between two jumps; changes: further settings of `HybridTrainerConfig`
    """
    settings: dict[str, Any] = {
        "warmup_steps": 2,
        "max_predict_steps": 20,
        "correction_interval": 10,
        "correct_steps": 1,
        "confidence_threshold": 0.0,
        "gate": False,
        "predictor": "ema_nesterov",
        "path_device": "host",
        "path_dtype": "bf16",
    }
    return HybridTrainerConfig(full_steps=full_steps, clip_norm=_clip_norm(memory), memory=memory, **settings | changes)


def ways_to_predict() -> dict[str, MemoryConfig]:
    """`fit_16gb` with everything put away in Predict, the same fetched after the jump, and with nothing put away."""
    late = PredictAwareMemoryConfig("pinned", lookahead=0)
    return {
        "all away": MemoryConfig.fit_16gb(),
        "all away, no lookahead": MemoryConfig.fit_16gb(predict_aware=late),
        "nothing away": MemoryConfig.fit_16gb(predict_aware=None, mixed_precision=MixedPrecisionConfig.conservative()),
    }


def _clip_norm(memory: MemoryConfig) -> float | None:
    return None if memory.step_in_backward else CLIP_NORM
