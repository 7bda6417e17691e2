"""What compiled code needs of a machine, asked before anything trains."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec

from hybridlab.base.errors import UserError

CPP_COMPILERS = {"darwin": "clang++", "win32": "cl"}
"""That torch looks for, where it is not g++."""

ON_LINUX = "On Debian and Ubuntu: sudo apt install build-essential python3-dev"


def require_compiler(device_type: str, wanted_by: str) -> None:
    """Raise UserError where torch.compile would find nothing to compile with, saying what to install.

    For a GPU torch writes Triton, which builds its launchers with a C compiler; for a processor, C++.

    device_type: that the code is for, "cuda" or "cpu"; wanted_by: the setting that asks, for the message

    Source: triton/runtime/build.py, torch/_inductor/cpp_builder.py.
    """
    if device_type == "cuda":
        if find_spec("triton") is None:
            raise UserError(
                f"{wanted_by} compiles code for the GPU, which needs Triton: torch brings it on Linux and WSL2"
            )
        if sys.platform == "win32":
            return  # Triton's packages for Windows bring a compiler
        variable, usual = "CC", ["gcc", "clang"]
    else:
        variable, usual = "CXX", [CPP_COMPILERS.get(sys.platform, "g++")]
    named = os.environ.get(variable)
    names = [named] if named else usual
    if not any(map(shutil.which, names)):
        raise UserError(
            f"{wanted_by} compiles code, and there is no compiler ({' or '.join(names)}): install one, or name yours "
            f"in the variable {variable}. {ON_LINUX}"
        )
