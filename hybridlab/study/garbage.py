"""Python's garbage collector, kept from stopping a run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collector_spared() -> Iterator[Callable[[], None]]:
    """Inside, the collector looks through what has come since, and through nothing older.

    Torch and what a notebook imports are more than half a million objects. To look through all of them takes a third of
    a second, every so many steps, in the middle of whichever step it is. What is garbage by now goes afterwards.

    Yields what to call when more has come to stay, such as compiled code: it then counts as older too.
    """
    gc.freeze()
    try:
        yield gc.freeze
    finally:
        gc.unfreeze()
