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

    Yields what to call, between two steps, when more has come to stay, such as compiled code: what is garbage by then
    goes, and the rest counts as older.
    """
    gc.freeze()
    try:
        yield _spare_the_rest
    finally:
        gc.unfreeze()


def _spare_the_rest() -> None:
    gc.collect()  # or garbage that is frozen with the rest would hold memory of the card
    gc.freeze()
