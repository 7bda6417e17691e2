"""What compiled code needs of a machine, asked before anything trains."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec

from hybridlab.errors import UserError

ON_LINUX = "On Debian and Ubuntu: sudo apt install build-essential python3-dev"


def require_compiler(device_type: str, wanted_by: str) -> None:
    """Raise UserError where torch.compile would find nothing to compile with, saying what to install.

    For a card torch writes Triton, which builds its launchers with a C compiler; for a processor, C++.

    device_type: that the code is for, "cuda" or "cpu"; wanted_by: the setting that asks, for the message

    Source: triton/runtime/build.py, torch/_inductor/cpp_builder.py.
    """
    on_card, on_windows = device_type == "cuda", sys.platform == "win32"
    if on_card and find_spec("triton") is None:
        raise UserError(
            f"{wanted_by} compiles code for the card, which needs Triton: torch brings it on Linux and WSL2"
        )
    if on_card and on_windows:
        return  # Triton's packages for Windows bring a compiler
    variable, names = ("CC", ("gcc", "clang")) if on_card else ("CXX", (_cpp_compiler(),))
    names = (os.environ[variable],) if os.environ.get(variable) else names
    if not any(map(shutil.which, names)):
        raise UserError(
            f"{wanted_by} compiles code, and there is no compiler ({' or '.join(names)}): install one, or name yours "
            f"in the variable {variable}. {ON_LINUX}"
        )


def _cpp_compiler() -> str:
    return {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
