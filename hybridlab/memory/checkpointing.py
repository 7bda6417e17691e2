"""Where a model repeats itself, and what is done block by block."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from hybridlab.base.errors import UserError
from hybridlab.base.pinned_memory import SMALL_BYTES, CopyStream, host_empty_like
from hybridlab.memory.config import CheckpointingConfig


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks: the longest `nn.ModuleList` or `nn.Sequential` of modules of one class."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    uniform = [blocks for blocks in lists if len(blocks) > 1 and len({type(block) for block in blocks}) == 1]
    return max(uniform, key=len, default=[])


def checkpoint_blocks_(model: nn.Module, config: CheckpointingConfig, inputs: BlockInputs | None = None) -> None:
    """Let every block but the last `keep_last` keep its input alone, and compute the rest again in backward.

    Parameters keep their names. The same random numbers are drawn again; a block whose `draws_random_numbers` is False
    spares the host the saving and restoring of their state.

    inputs: keeps the blocks' inputs where they go to the host; None makes one

    Raises UserError for a model without repeated blocks.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise UserError(f"{type(model).__name__} repeats no block: checkpointing has nothing to work on, leave it off")
    hooks = (inputs or BlockInputs()).hooks if config.inputs == "host" else nullcontext
    for block in blocks[: len(blocks) - config.keep_last]:
        block.forward = partial(_checkpointed, hooks, block, block.forward)  # type: ignore[method-assign]
        block.is_checkpointed = True  # type: ignore[assignment]  # torch.compile hides the forward


def compile_block_(block: nn.Module) -> None:
    """Compile a block's forward in place. The hooks that send an input to the host stay in Python, around it."""
    forward = block.forward
    if isinstance(forward, partial) and forward.func is _checkpointed and forward.args[0] is not nullcontext:
        *around, computed = forward.args
        block.forward = partial(_checkpointed, *around, torch.compile(computed, dynamic=False))  # type: ignore[method-assign]
    else:
        block.forward = torch.compile(forward, dynamic=False)  # type: ignore[method-assign]


def is_checkpointed(model: nn.Module, config: CheckpointingConfig) -> bool:
    """Whether `checkpoint_blocks_` has been at work, or would find nothing to do."""
    blocks = blocks_of(model)
    chosen = blocks[: len(blocks) - config.keep_last]
    return all(getattr(block, "is_checkpointed", False) for block in chosen)


def _checkpointed(
    hooks: Callable[[], AbstractContextManager[Any]],
    block: nn.Module,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around the checkpoint, the hooks see what the checkpoint itself saves, and nothing of what it recomputes."""
    draws = getattr(block, "draws_random_numbers", True)
    with hooks():
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)


def buckets_of(model: nn.Module) -> list[list[nn.Parameter]]:
    """The trainable parameters block by block, and each of the others by itself."""
    blocks = [[p for p in block.parameters() if p.requires_grad] for block in blocks_of(model)]
    inside = {id(p) for bucket in blocks for p in bucket}
    return blocks + [[p] for p in model.parameters() if p.requires_grad and id(p) not in inside]


# --- inputs of checkpointed blocks, in host memory --------------------------------------------------------


@dataclass(eq=False)
class _Sent:
    """An input whose values are on the host, and the one that was sent before it, as long as that is wanted."""

    place: Tensor
    before: Callable[[], _Sent | None]


class BlockInputs:
    """Sends the inputs of checkpointed blocks to the host, and brings each back when its block is computed again.

        forward    a block's input leaves while the block computes
        backward   the input of the block before comes back while a block computes

    So at any moment the GPU has two of them, and the bus is used beside the computation. Every bit comes back. Only
    what the training itself computed is sent: positions and masks, which blocks share, stay. Host memory is taken in
    the first pass and used again. Without a GPU the same copies happen in line.

    host: makes the place for a tensor's values, of its shape and type

    The first forward pass raises UserError where host memory is short or cannot be pinned.
    """

    def __init__(self, host: Callable[[Tensor], Tensor] | None = None) -> None:
        self._host = host or _pinned_like
        self._free: defaultdict[tuple[object, ...], list[Tensor]] = defaultdict(list)
        self._stream = CopyStream(torch.device("cpu"))
        self._latest: Callable[[], _Sent | None] = lambda: None
        self._in_flight: tuple[_Sent, Tensor] | None = None

    def hooks(self) -> saved_tensors_hooks:
        """What is saved for backward inside this context goes to the host."""
        return saved_tensors_hooks(self._send, self._fetch)

    def _send(self, tensor: Tensor) -> Tensor | _Sent:
        if tensor.is_leaf or tensor.nbytes < SMALL_BYTES:
            return tensor
        if tensor.device != self._stream.device:
            self._stream = CopyStream(tensor.device)
        free = self._free[tensor.shape, tensor.dtype]
        sent, tensor = _Sent(free.pop() if free else self._host(tensor), self._latest), tensor.detach()
        self._copy(sent, tensor, to=sent.place, of=tensor)
        weakref.finalize(sent, free.append, sent.place).atexit = False
        self._latest = weakref.ref(sent)
        return sent

    def _fetch(self, sent: Tensor | _Sent) -> Tensor:
        if isinstance(sent, Tensor):
            return sent
        tensor = self._on_device(sent)
        self._stream.join()
        self._in_flight = None
        if before := sent.before():
            self._on_device(before)
        return tensor

    def _on_device(self, sent: _Sent) -> Tensor:
        """The tensor on the device, its values at least on their way."""
        if self._in_flight is None or self._in_flight[0] is not sent:
            tensor = torch.empty_like(sent.place, device=self._stream.device)
            self._copy(sent, tensor, to=tensor, of=sent.place)
        assert self._in_flight is not None
        return self._in_flight[1]

    def _copy(self, sent: _Sent, tensor: Tensor, *, to: Tensor, of: Tensor) -> None:
        """Beside the computation. The device's tensor lives until the computation has been told to wait for it."""
        if self._in_flight is not None:
            self._stream.join()
        with self._stream.copying():
            to.copy_(of, non_blocking=True)
        self._in_flight = sent, tensor


def _pinned_like(tensor: Tensor) -> Tensor:
    return host_empty_like([tensor], pinned=tensor.is_cuda)[0]
