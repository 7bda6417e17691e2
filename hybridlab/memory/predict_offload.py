"""What lies on the GPU while no optimizer steps."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from hybridlab.base.device import wait_for
from hybridlab.base.weak_hook import register_weak_hook
from hybridlab.memory.config import MemoryConfig, PredictAwareMemoryConfig
from hybridlab.memory.state_offload import StateOffload
from hybridlab.weights.residency import Residency
from hybridlab.weights.snapshot import Snapshot, Weights


class PredictOffload:
    """Offloads what Predict does not need, and brings it back for the optimizer's next step.

    What leaves is the optimizer's state, by `predict_aware`, and the float32 weights, with `bf16_weights`. The jump's
    rollback snapshot has both already: leaving is giving up their memory. With a lookahead, the weights return with the
    last of several motions, so that they cross the bus once less; the state's return begins beside the last predicted
    steps, or with the weights. Without, the weights return after the jump, and the state beside the next forward pass.
    The optimizer waits for it. Whoever saves or loads the model meanwhile finds the float32 weights in place.

    residency: OFFLOADED between what leaves and what returns, else DEVICE
    """

    def __init__(self, model: nn.Module, weights: Weights, optimizer: Optimizer, memory: MemoryConfig) -> None:
        self._weights, self._memory = weights, memory
        self._predict_aware = memory.predict_aware or PredictAwareMemoryConfig("none")
        self._state = StateOffload(optimizer, self._predict_aware)
        self.residency = Residency.DEVICE
        if memory.offloads_weights or self._predict_aware.strategy != "none":
            register_weak_hook(optimizer, "load_state_dict_pre", self.restore_)
        if memory.offloads_weights:
            register_weak_hook(model, "state_dict_pre", self.materialize_)
            register_weak_hook(model, "load_state_dict_pre", self.restore_)

    def offload_(self, steps_left: int, snapshot: Snapshot | None, *, last_motion_made: bool) -> None:
        """Free what Predict does not need; near the end of a jump begin to bring it back.

        steps_left: predicted steps of the jump that are still to come, the one under way included
        snapshot: the jump's rollback snapshot
        last_motion_made: the last of several motions is made
        """
        offloads, lookahead = self._memory.offloads_weights, self._predict_aware.lookahead
        weights_return = offloads and last_motion_made and lookahead > 0
        returns = weights_return or steps_left <= lookahead
        begins = not returns and self.residency is Residency.DEVICE
        if begins:
            self._state.offload_(lambda: self._weights.copies_of_state(snapshot))
            self._release_cache()  # the bf16 weights need the memory before the float32 ones free theirs
        elif returns:
            if weights_return:
                self.restore_weights_(keep_base=True)
            self._state.prefetch_()
        if offloads and not weights_return:  # also where a checkpoint restored them: all steps measure alike
            self._weights.fp32.offload_(snapshot.tensors if snapshot else None)
        if begins:
            self._release_cache()
        self.residency = Residency.DEVICE if returns else Residency.OFFLOADED

    def restore_weights_(self, *, keep_base: bool = False) -> None:
        """The jump is over: the weights return for good, or to be looked at with `keep_base`. The state may be away.

        Memory for the state is taken first, if it is away: while the weights come, the driver would give none. It comes
        second, for no weight then lies in it: with the next jump it goes back to the GPU whole.
        """
        self._weights.fp32.allocate_()
        self._state.allocate_()
        self._weights.fp32.restore_(keep_base=keep_base)
        self.residency = Residency.DEVICE

    def prefetch_(self) -> None:
        """The optimizer steps soon: the state returns beside what the computation does until then."""
        self.restore_weights_()
        self._state.prefetch_()

    def restore_(self, *_: object) -> None:
        """Bring everything back for good, whatever a hook gives; what the computation does next finds it in place."""
        self.restore_weights_()
        self._state.restore_()

    def materialize_(self, *_: object) -> None:
        """Bring everything back to be looked at, as by whoever saves the model; a jump under way may go on."""
        self.restore_weights_(keep_base=True)
        self._state.restore_()

    def _release_cache(self) -> None:
        """Hand what has been freed back to the GPU, where that is asked for and anything leaves."""
        leaves = self._memory.offloads_weights or self._predict_aware.strategy != "none"
        if leaves and self._predict_aware.release and self._weights.device.type == "cuda":
            wait_for(self._weights.device)
            torch.cuda.empty_cache()
