"""The only file that talks to a process group."""

from __future__ import annotations

from torch import distributed

from hybridlab.base.errors import UserError


def refuse_ranks() -> None:
    """Raise UserError where several processes train one model: each would decide by its own batches about jumps."""
    ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if ranks > 1:
        raise UserError(
            f"torch.distributed runs {ranks} ranks, and each would decide alone whether to predict: "
            "set max_predict_steps=0 (HybridTrainerConfig.plain()), or train in one process"
        )
