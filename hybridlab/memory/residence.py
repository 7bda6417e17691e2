"""What lies on the card while no optimizer steps."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from hybridlab.memory.config import MemoryConfig, PredictAwareMemoryConfig
from hybridlab.memory.offload import StateOffload
from hybridlab.weights import Weights


class PredictResidence:
    """Clears the card for Predict, and makes all ready for the optimizer's next step.

    What leaves is the optimizer's state, by `predict_aware`, and the float32 weights, with `bf16_weights`. The state's
    return begins `lookahead` nominal steps before the jump's end, beside the predicted steps; the weights return last.

    is_clear: between what leaves and what returns
    """

    def __init__(self, weights: Weights, optimizer: Optimizer, memory: MemoryConfig) -> None:
        predict_aware = memory.predict_aware or PredictAwareMemoryConfig("none")
        self._weights, self._lookahead = weights, predict_aware.lookahead
        self._state = StateOffload(optimizer, predict_aware)
        self._releases = predict_aware.release and weights.device.type == "cuda"
        self._lowers = memory.lowers_weights
        self.is_clear = False

    def clear_(self, steps_left: int) -> None:
        """Put away what Predict does not need; near the end of a jump begin to fetch it."""
        returns = steps_left <= self._lookahead
        begins = not returns and not self.is_clear
        if begins:
            self._state.leave_()
        elif returns and self._state.is_away:
            self._state.prefetch_()
        if self._lowers:
            self._weights.lower_()  # near the end too, where a checkpoint has raised them: every step measures alike
        self.is_clear = not returns
        if begins and self._releases and (self._state.is_away or self._lowers):
            torch.cuda.synchronize(self._weights.device)
            torch.cuda.empty_cache()

    def fill_(self) -> None:
        """Bring everything back; returns when the next optimizer step may follow."""
        self._weights.raise_()
        self.is_clear = False
        if self._state.is_away:
            self._state.return_()
