"""What lies on the card while no optimizer steps."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from hybridlab.base.device import wait_for
from hybridlab.base.weak_hook import weak_hook
from hybridlab.memory.config import MemoryConfig, PredictAwareMemoryConfig
from hybridlab.memory.state_offload import StateOffload
from hybridlab.weights.snapshot import Weights


class PredictResidence:
    """Clears the card for Predict, and makes all ready for the optimizer's next step.

    What leaves is the optimizer's state, by `predict_aware`, and the float32 weights, with `bf16_weights`. The jump's
    way back holds both already: leaving is giving up their memory. With a lookahead, the weights return with the last
    of several motions, so that they cross the bus once less; the state's return begins beside the last predicted steps,
    or with the weights. Without, the weights return after the jump, and the state beside the next forward pass. The
    optimizer waits for it. Whoever saves or loads the model meanwhile finds the float32 weights in place.

    is_clear: between what leaves and what returns
    """

    def __init__(self, model: nn.Module, weights: Weights, optimizer: Optimizer, memory: MemoryConfig) -> None:
        predict_aware = memory.predict_aware or PredictAwareMemoryConfig("none")
        self._weights, self._lookahead = weights, predict_aware.lookahead
        self._state = StateOffload(optimizer, predict_aware)
        self._lowers = memory.lowers_weights
        leaves = self._lowers or predict_aware.strategy != "none"
        self._releases = leaves and predict_aware.release and weights.device.type == "cuda"
        self.is_clear = False
        optimizer.register_load_state_dict_pre_hook(weak_hook(self._fill_first))
        if self._lowers:
            model.register_state_dict_pre_hook(weak_hook(self._make_whole_first))  # type: ignore[no-untyped-call]
            model.register_load_state_dict_pre_hook(weak_hook(self._fill_first))  # type: ignore[no-untyped-call]

    def clear_(self, steps_left: int, *, settled: bool) -> None:
        """Put away what Predict does not need; near the end of a jump begin to fetch it.

        steps_left: predicted steps of the jump that are still to come, the one under way included
        settled: the last of several motions is made
        """
        is_whole = self._lowers and settled and self._lookahead > 0
        returns = is_whole or steps_left <= self._lookahead
        begins = not returns and not self.is_clear
        if begins:
            self._state.leave_(self._weights.copies_of_state)
            self._hand_back()  # the bf16 weights need the room before the float32 ones leave theirs
        elif returns:
            if is_whole:
                self._raise_(for_now=True)
            self._state.prefetch_()
        if self._lowers and not is_whole:
            self._weights.lower_()  # or let them follow; also where a checkpoint raised them: all steps measure alike
        if begins:
            self._hand_back()
        self.is_clear = not returns

    def settle_(self) -> None:
        """The jump is over: the weights return for good. The state may still be away."""
        self._raise_(for_now=False)
        self.is_clear = False

    def get_ready_(self) -> None:
        """The optimizer steps soon: the state returns beside what the computation does until then."""
        self.settle_()
        self._state.prefetch_()

    def fill_(self) -> None:
        """Bring everything back for good; what the computation does next finds it in place."""
        self.settle_()
        self._state.return_()

    def make_whole_(self) -> None:
        """Bring everything back to be looked at, as by whoever saves the model; a jump under way may go on."""
        self._raise_(for_now=True)
        self.is_clear = False
        self._state.return_()

    def _raise_(self, *, for_now: bool) -> None:
        """Bring the weights back, when there is room for the state too: while they come, the driver would give none.

        The state's comes second, for no weight then lies in it: with the next jump it goes back to the card whole.
        """
        self._weights.make_room_()
        self._state.make_room_()
        self._weights.raise_(for_now=for_now)

    def _fill_first(self, *_: object) -> None:
        self.fill_()

    def _make_whole_first(self, *_: object) -> None:
        self.make_whole_()

    def _hand_back(self) -> None:
        """What has been freed goes back to the card."""
        if self._releases:
            wait_for(self._weights.device)
            torch.cuda.empty_cache()
