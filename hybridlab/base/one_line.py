"""Messages in one line."""

from __future__ import annotations

from hybridlab.base.errors import printable


def in_one_line(message: object) -> str:
    """A message, or an error's, for a terminal: its lines and spaces joined, control characters spelled out."""
    return printable(" ".join(str(message).split()))
