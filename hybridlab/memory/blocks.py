"""Where a model repeats itself, and what is done block by block."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from hybridlab.errors import UserError
from hybridlab.memory.config import CheckpointingConfig


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks: the longest `nn.ModuleList` or `nn.Sequential` of modules of one class."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    uniform = [blocks for blocks in lists if len(blocks) > 1 and len({type(block) for block in blocks}) == 1]
    return max(uniform, key=len, default=[])


def checkpoint_blocks_(model: nn.Module, config: CheckpointingConfig) -> None:
    """Let every block but the last `keep_last` keep its input alone, and compute the rest again in backward.

    Parameters keep their names. Raises UserError for a model without repeated blocks.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise UserError(f"{type(model).__name__} repeats no block: checkpointing has nothing to work on, leave it off")
    for block in blocks[: len(blocks) - config.keep_last]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def buckets_of(model: nn.Module) -> list[list[nn.Parameter]]:
    """The trainable parameters block by block, and each of the others by itself."""
    blocks = [[p for p in block.parameters() if p.requires_grad] for block in blocks_of(model)]
    inside = {id(p) for bucket in blocks for p in bucket}
    return blocks + [[p] for p in model.parameters() if p.requires_grad and id(p) not in inside]
