"""How a command ends: its exit codes, signals, and a standard output that may be closed or full."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130
STDERR = 2  # the last of the standard descriptors

SIGNALS = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]
"""What a system sends to end a program, a closed terminal to all of its own; Windows has no SIGHUP."""


class RunFailed(Exception):
    """The notebook stopped before its end, or its copy found no place; the message says where it is and why."""


class RunInterrupted(RunFailed):
    """Somebody stopped the run."""


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """The first of `SIGNALS` raises KeyboardInterrupt, as Ctrl-C does; more of them leave the clean-up alone.

    What is ignored already, as under nohup, stays ignored.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heeded = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]

    def interrupt(*_: object) -> None:
        for number in heeded:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in heeded:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


class Output:
    """A stream that may be closed or full: what it does not take is dropped, so that no work is lost for it.

    error: why it took no more; None as long as it takes all
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.error = None if stream else OSError(errno.EBADF, os.strerror(errno.EBADF))
        self._stream = stream or io.StringIO()

    def write(self, text: str) -> int:
        """Write, or drop."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Bring what was written to where it goes, or drop it."""
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, call: Callable[..., object], *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError as error:
            self.error = self.error or error
            with suppress(OSError), open(os.devnull, "w") as nowhere:  # for what the stream still holds
                os.dup2(nowhere.fileno(), self._stream.fileno())


def _open_standard_descriptors() -> None:
    """Open those that are closed as the null device: a kernel that inherits a closed one dies."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


@contextmanager
def guarded_output() -> Iterator[Output]:
    """Both standard streams as `Output` while the block runs; gives standard output."""
    _open_standard_descriptors()
    out, said = Output(sys.stdout), Output(sys.stderr)
    with redirect_stdout(out), redirect_stderr(said):  # type: ignore[type-var]
        try:
            yield out
        finally:
            out.flush()
            said.flush()
