"""Errors that a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the person at the keyboard can mend; its message is one line that says how.

    The command line prints the message without a traceback and exits with code 2; a notebook shows the message alone.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [printable(str(self))]


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def told(error: OSError) -> str:
    """What the system refused, and of which file."""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or first_line(error)}"


def printable(text: str) -> str:
    """A text from a file, for a terminal: control characters, which would move the cursor or recolor, spelled out."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


FEW, MANY = 8, 24
"""A hint lists all names, or so few of them where they are more than many."""


def nearest(name: object, known: Iterable[str]) -> str:
    """A hint for a name that is not among the known ones: the likeliest of them, and all, or the likeliest few."""
    names = list(known)
    near = difflib.get_close_matches(str(name).lower(), names, n=1)
    likeliest = difflib.get_close_matches(str(name).lower(), names, n=FEW, cutoff=0.0)
    listed = ", ".join(names if len(names) <= MANY else [*likeliest, "..."])
    return f"did you mean {near[0]!r}? ({listed})" if near else f"choose one of {listed}"
