"""Where a model repeats itself, and what is done block by block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from hybridlab.base.errors import UserError
from hybridlab.memory.block_inputs import BlockInputs
from hybridlab.memory.config import CheckpointingConfig


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks: the longest `nn.ModuleList` or `nn.Sequential` of modules of one class."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    uniform = [blocks for blocks in lists if len(blocks) > 1 and len({type(block) for block in blocks}) == 1]
    return max(uniform, key=len, default=[])


def checkpoint_blocks_(model: nn.Module, config: CheckpointingConfig, inputs: BlockInputs | None = None) -> None:
    """Let every block but the last `keep_last` keep its input alone, and compute the rest again in backward.

    Parameters keep their names. The same random numbers are drawn again; a block whose `draws_random_numbers` is False
    spares the host the saving and restoring of their state. `inputs` looks after the inputs where they go to the host;
    None makes one.

    Raises UserError for a model without repeated blocks.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise UserError(f"{type(model).__name__} repeats no block: checkpointing has nothing to work on, leave it off")
    keeping = (inputs or BlockInputs()).kept if config.inputs == "host" else nullcontext
    for block in blocks[: len(blocks) - config.keep_last]:
        block.forward = partial(_checkpointed, keeping, block, block.forward)  # type: ignore[method-assign]


def is_checkpointed(model: nn.Module, config: CheckpointingConfig) -> bool:
    """Whether `checkpoint_blocks_` has been at work, or would find nothing to do."""
    blocks = blocks_of(model)
    chosen = blocks[: len(blocks) - config.keep_last]
    return all(getattr(block.forward, "func", None) is _checkpointed for block in chosen)


def _checkpointed(
    keeping: Callable[[], AbstractContextManager[Any]],
    block: nn.Module,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around the checkpoint, `keeping` sees what the checkpoint itself saves, and nothing of what it forgets."""
    draws = getattr(block, "draws_random_numbers", True)
    with keeping():
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)


def buckets_of(model: nn.Module) -> list[list[nn.Parameter]]:
    """The trainable parameters block by block, and each of the others by itself."""
    blocks = [[p for p in block.parameters() if p.requires_grad] for block in blocks_of(model)]
    inside = {id(p) for bucket in blocks for p in bucket}
    return blocks + [[p] for p in model.parameters() if p.requires_grad and id(p) not in inside]
