"""torch.compile, once for all runs of one shape that follow each other."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import nn

from hybridlab.base.compiler import require_compiler
from hybridlab.memory.config import MemoryConfig
from hybridlab.study.tasks import Task


@dataclass
class _Kept:
    """A compiled model, what it was compiled for, and the task that has it, or had."""

    key: tuple[object, ...]
    model: nn.Module
    wrapped: nn.Module
    task: weakref.ref[Task]

    def is_free_for(self, key: tuple[object, ...]) -> bool:
        """Whether it is of this shape, and nobody's any more."""
        return self.key == key and self.task() is None


_KEPT: _Kept | None = None


def compile_(task: Task, memory: MemoryConfig) -> nn.Module:
    """Give the task's model through torch.compile; the two share their parameters.

    Of tasks that follow each other with models of one shape, the model of the first is kept: when that task is gone,
    the next one takes the model over, as its `model`, with its own weights copied in. So a study of fifty runs
    compiles as often as one, and torch's limit on recompilations, beyond which it silently runs uncompiled, is never
    reached. While the first task lives on, in a paused session, its model is left alone, and the next is compiled anew.

    Raises UserError where nothing can compile.
    """
    global _KEPT
    if memory.step_in_backward or memory.state_on_host:  # an optimizer hangs on these very parameters
        drop_compiled()
        return _fresh(task.model)
    key = _key(task.model, memory)
    if _KEPT is None or not _KEPT.is_free_for(key):
        _KEPT = _Kept(key, task.model, _fresh(task.model), weakref.ref(task))
        return _KEPT.wrapped
    _KEPT.model.load_state_dict(task.model.state_dict())
    _KEPT.model.zero_grad(set_to_none=True)
    task.model, _KEPT.task = _KEPT.model, weakref.ref(task)
    return _KEPT.wrapped


def drop_compiled() -> None:
    """Free the memory of the model that waits for a next compiled task: another run's figures must not count it.

    A model whose task lives on is left alone.
    """
    global _KEPT
    if _KEPT is not None and _KEPT.task() is None:
        _KEPT = None
        torch._dynamo.reset()


def _fresh(model: nn.Module) -> nn.Module:
    require_compiler(next(model.parameters()).device.type, "compiled=True")
    torch._dynamo.reset()
    return torch.compile(model)  # type: ignore[return-value]


def _key(model: nn.Module, memory: MemoryConfig) -> tuple[object, ...]:
    shapes = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in model.state_dict().items())
    return str(model), shapes, memory.checkpointing, memory.loss_chunk_tokens
