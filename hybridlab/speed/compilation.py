"""torch.compile of a model, or of its repeated blocks alone."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import nn

from hybridlab.base.compiler import require_compiler
from hybridlab.memory.checkpointing import blocks_of

_compiled_for: Hashable = None


def compile_(model: nn.Module, *, by_block: bool = False, settings: Hashable = None) -> None:
    """Compile a model in place; names and weights stay as they are.

    Models of one shape share what was compiled: fifty runs that follow each other compile as often as one. Before a
    model of another shape all compiled code is dropped, since torch silently runs uncompiled once it has compiled a
    function too often.

    by_block: compile one block of the model's repeated blocks, for all of them, and the methods that the model names in
        `compiled_methods`: much sooner done, the same for any depth, and more work for the host, which a CUDA graph
        takes away. A model that repeats no block is compiled as a whole
    settings: further ones that the code depends on, such as the number format

    Raises UserError where nothing can compile.
    """
    global _compiled_for
    require_compiler(next(model.parameters()).device.type, "compiled=True")
    shapes = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in model.state_dict().items())
    key = (str(model), shapes, by_block, settings)
    if key != _compiled_for:
        torch._dynamo.reset()
        _compiled_for = key
    blocks = blocks_of(model) if by_block else []
    if not blocks:
        model.compile()
        return
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
    for name in getattr(model, "compiled_methods", ()):
        setattr(model, name, torch.compile(getattr(model, name), dynamic=False))
