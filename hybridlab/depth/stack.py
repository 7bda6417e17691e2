"""The repeated blocks of a model, some of which may be bypassed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridlab.base.device import gpus
from hybridlab.base.errors import UserError
from hybridlab.base.ranks import is_sharded

HOW_TO_NAME = "name it as DepthSchedule(blocks='model.layers')"


class BlockStack:
    """The residual stack of a model: the blocks of one `nn.ModuleList`, each of which adds to what it is given.

    A bypassed block gives its input back. It stays where it is, under its own name, so that state dicts, parameter
    groups and tied weights are as they were; its weights require no gradient meanwhile.

    name: of the list, as "h" or "model.layers"
    blocks: all of them, in order; active: positions of those that take part, at first all

    Raises UserError for a model without such a list or with several, and for a list whose blocks differ.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        restore_blocks_(model)
        self.name, stack = _named(model, name) if name else _found(model)
        self.blocks: list[nn.Module] = list(stack)
        self.active: tuple[int, ...] = tuple(range(len(self.blocks)))
        if said := _difference(self.blocks):
            raise UserError(f"the blocks of {self.name} {said}: a depth schedule copies weights from block to block")
        self._bypasses: dict[int, partial[Any]] = {}
        self._kind = _Kind(copies=any(is_sharded(p) for p in self.blocks[0].parameters()))

    def __len__(self) -> int:
        return len(self.blocks)

    def activate_(self, positions: Collection[int]) -> None:
        """Bypass all blocks but those at these positions.

        A block that is bypassed again has the same function in its place: CUDA graphs know a stage by it.
        """
        self.active = tuple(sorted(positions))
        for position, block in enumerate(self.blocks):
            if position in self.active:
                _restore_(block)
            elif not _is_bypassed(block):
                trained = [p for p in block.parameters() if p.requires_grad]
                known = self._bypasses.get(position)
                self._bypasses[position] = _bypass_(block, self._kind, trained, known)

    @contextmanager
    def without(self, positions: Sequence[int]) -> Iterator[None]:
        """Inside, bypass these active blocks too; their weights stay trainable, and get no gradient."""
        for position in positions:
            _bypass_(self.blocks[position], self._kind, frozen=[])
        try:
            yield
        finally:
            for position in positions:
                _restore_(self.blocks[position])


def restore_blocks_(model: nn.Module) -> list[nn.Parameter]:
    """Let every block of a model take part, whatever an earlier training left bypassed; the weights of those."""
    return [param for module in model.modules() for param in _restore_(module)]


# --- bypassing -------------------------------------------------------------------------------------------


@dataclass
class _Kind:
    """What the blocks of a stack return.

    copies: whether a bypassed one copies the stream: FSDP2 makes a view of it, and warns where a view is returned
    returns_tuple: whether it is a tuple, whose first item is the residual stream; unknown until one has run
    """

    copies: bool
    returns_tuple: bool | None = None


def _give_back(kind: _Kind, forward: Any, own: bool, frozen: object, *args: Any, **kwargs: Any) -> Any:
    """What a bypassed block returns: its first argument, in the form in which the block itself would.

    forward: the block's; own: whether it was set on the block itself, as by activation checkpointing
    frozen: parameters of the block that require no gradient while it is bypassed
    """
    if not args and "hidden_states" not in kwargs:
        raise UserError(
            f"a block is called with {', '.join(kwargs)} by name, and a bypassed one gives back its first argument: "
            "let the model pass the residual stream by position"
        )
    stream = args[0] if args else kwargs["hidden_states"]
    stream = stream.clone() if kind.copies else stream
    if kind.returns_tuple is None:
        with torch.no_grad(), torch.random.fork_rng(gpus(stream.device)):
            kind.returns_tuple = isinstance(forward(*args, **kwargs), tuple)
    return (stream,) if kind.returns_tuple else stream


def _bypass_(
    block: nn.Module, kind: _Kind, frozen: list[nn.Parameter], known: partial[Any] | None = None
) -> partial[Any]:
    """known: what bypassed it before, to take again; returns what does now."""
    forward, own = block.forward, "forward" in vars(block)
    if known is None or known.args[1] != forward:
        known = partial(_give_back, kind, forward, own, [])
    known.args[-1][:] = frozen
    block.forward = known  # type: ignore[method-assign]
    for param in frozen:
        param.requires_grad_(False)
        param.grad = None
    return known


def _restore_(block: nn.Module) -> list[nn.Parameter]:
    """Let a block take part; the weights that are trained again by it."""
    if not _is_bypassed(block):
        return []
    _, forward, own, frozen = block.forward.args  # type: ignore[attr-defined]
    del block.forward
    if own:
        block.forward = forward  # type: ignore[method-assign]
    for param in frozen:
        param.requires_grad_(True)
    return list(frozen)


def _is_bypassed(block: nn.Module) -> bool:
    return getattr(block.forward, "func", None) is _give_back


# --- finding it ------------------------------------------------------------------------------------------


def _named(model: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    lists = dict(_lists(model))
    if name not in lists:
        raise UserError(
            f"{type(model).__name__} has no list of blocks named {name!r}: it has {', '.join(lists) or 'none'}"
        )
    return name, lists[name]


def _found(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one list of equal blocks that lies in no other one."""
    found = {name: blocks for name, blocks in _lists(model) if len(blocks) > 1 and not _difference(list(blocks))}
    outer = {n: b for n, b in found.items() if not any(n.startswith(f"{other}.") for other in found if other != n)}
    if len(outer) != 1:
        what = f"has several stacks of blocks, {', '.join(outer)}" if outer else "has no stack of equal blocks"
        raise UserError(f"{type(model).__name__} {what}, and a depth schedule needs one: {HOW_TO_NAME}")
    return next(iter(outer.items()))


def _lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def _difference(blocks: Sequence[nn.Module]) -> str | None:
    """How blocks differ in class or shapes, or what they share; None where each could take another's weights."""
    shapes = [(type(block), [(name, t.shape, t.dtype) for name, t in tensors_of(block).items()]) for block in blocks]
    if any(shape != shapes[0] for shape in shapes) or not shapes[0][1]:
        return "have not the same class, shapes and types"
    parameters = [id(p) for block in blocks for p in block.parameters()]
    return None if len(set(parameters)) == len(parameters) else "share weights with each other"


def tensors_of(block: nn.Module) -> dict[str, Tensor]:
    """A block's parameters and buffers by name."""
    return dict(block.named_parameters()) | dict(block.named_buffers())
