"""Hooks that keep nothing alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle

from hybridlab.base.errors import UserError


def weak_hook(method: Callable[..., Any], *first: Any) -> Callable[..., None]:
    """Calls a bound method with `first` and what the hook is given, for as long as the method's object is alive.

    What a model or an optimizer calls back would otherwise live, with all its memory, as long as they do.
    """
    alive = weakref.WeakMethod(method)

    def call(*given: Any) -> None:
        if (bound := alive()) is not None:
            bound(*first, *given)

    return call


def register_hook(owner: Any, moment: str, call: Callable[..., None]) -> RemovableHandle:
    """Have `owner.register_MOMENT_hook` call this.

    owner: a model or an optimizer; moment: such as "step_pre"

    Raises UserError where the owner, such as a wrapper around an optimizer, takes no hooks.
    """
    try:
        return getattr(owner, f"register_{moment}_hook")(call)
    except AttributeError:
        name = type(owner).__name__
        raise UserError(f"{name} takes no hooks, so its state cannot leave the GPU: give the optimizer in it") from None


def register_weak_hook(owner: Any, moment: str, method: Callable[..., Any]) -> None:
    """As `register_hook`, for as long as a bound method's object is alive, and no longer."""
    handle = register_hook(owner, moment, weak_hook(method))
    weakref.finalize(method.__self__, handle.remove).atexit = False  # type: ignore[attr-defined]
