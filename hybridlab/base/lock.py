"""One process at a time in a folder: a lock that the system releases when its holder ends, however it ends."""

from __future__ import annotations

import errno
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from hybridlab.base.errors import UserError
from hybridlab.base.files import writing_to

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""In the folder that is in use, while it is; it holds the process's number and the host's name, as JSON."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What a file system without locks answers: nothing is locked there."""


def in_use(folder: Path) -> bool:
    """Whether a process trains in a folder, as its lock says; one of another host is believed to live."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        held = json.loads((folder / LOCK).read_text())
        return held["host"] != platform.node() or psutil.pid_exists(held["pid"])
    return False


@contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Refuse every other start in `folder`, by this process too, while the block runs; the folder is made.

    name: of the lock's file, where the folder has several

    Raises UserError that names the process that holds the lock, before anything else is touched.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquired(folder / name)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / name).unlink()  # while it is held: whoever opened it before sees that it is gone
        os.close(descriptor)


def _acquired(path: Path) -> int:
    """The lock's open file, once it is ours and still lies at `path`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if _is_ours(descriptor, path):
                with suppress(OSError):  # a full disk: the lock holds without its words
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_ours(descriptor: int, path: Path) -> bool:
    """Whether the lock was free, and no earlier holder has removed its file meanwhile."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return True
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise UserError(f"{path.parent} is in use: {_holder(descriptor)}; nothing was changed") from None


def _holder(descriptor: int) -> str:
    """Who holds a lock, and what to do."""
    try:
        held = json.loads(os.pread(descriptor, 1000, 0))
        pid, host = held["pid"], held["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return "another process trains there; wait for it, or stop it"
    if (pid, host) == (os.getpid(), platform.node()):
        return "this process trains there already; close its session first"
    return f"process {pid} on {host} trains there; wait for it, or stop it"
