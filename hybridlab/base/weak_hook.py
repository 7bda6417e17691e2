"""Hooks that keep nothing alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


def weak_hook(method: Callable[..., Any], *first: Any) -> Callable[..., None]:
    """Calls a bound method with `first` and what the hook is given, for as long as the method's object is alive.

    What a model or an optimizer calls back would otherwise live, with all its memory, as long as they do.
    """
    alive = weakref.WeakMethod(method)

    def call(*given: Any) -> None:
        if (bound := alive()) is not None:
            bound(*first, *given)

    return call
