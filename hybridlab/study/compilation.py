"""torch.compile, once for all runs of one shape."""

from __future__ import annotations

import torch
from torch import nn

from hybridlab.memory.config import MemoryConfig

_COMPILED: dict[tuple[object, ...], tuple[nn.Module, nn.Module]] = {}


def compiled(model: nn.Module, memory: MemoryConfig) -> tuple[nn.Module, nn.Module]:
    """A model with these weights, and the same through torch.compile; the two share their parameters.

    A process compiles each shape once: of models of one shape the first is kept, and the weights of the later ones are
    copied into it. So a study of fifty runs compiles as often as one, and torch's limit on recompilations, beyond
    which it silently runs uncompiled, is never reached. Only the latest model of a shape is valid.
    """
    shapes = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in model.state_dict().items())
    key = (str(model), shapes, memory.checkpointing, memory.loss_chunk_tokens)
    if memory.step_in_backward or memory.state_on_host:  # an optimizer hangs on these very parameters
        torch._dynamo.reset()
        return model, torch.compile(model)  # type: ignore[return-value]
    if key not in _COMPILED:
        torch._dynamo.reset()
        _COMPILED.clear()
        _COMPILED[key] = (model, torch.compile(model))  # type: ignore[assignment]
    kept, wrapped = _COMPILED[key]
    kept.load_state_dict(model.state_dict())
    kept.zero_grad(set_to_none=True)
    return kept, wrapped
