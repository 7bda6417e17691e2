"""What a result depends on beside its parameters."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from hybridlab import __version__
from hybridlab.base.device import device_name, find_device, host
from hybridlab.base.files import marked_root
from hybridlab.study.code_version import code_hashes


def environment() -> dict[str, Any]:
    """Record what a result depends on beside its parameters: device, versions, commit, the code's hashes.

    `environment_fingerprint` is one line; where it is equal, seeded CPU runs repeat to four decimals. `host` is a hash
    of the machine's name: times differ between hosts of one kind.
    """
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "hybridlab": __version__}
    capability = torch.backends.cpu.get_cpu_capability()
    fingerprint = f"python {versions['python']}, torch {versions['torch']}, {capability}, {platform.machine()}"
    return {
        "device": device_name(find_device()),
        "versions": versions,
        "host": host(),
        "git_commit": git_commit(),
        "code": code_hashes(),
        "environment_fingerprint": fingerprint,
    }


def git_commit() -> str:
    """Give the short commit of the project, "+dirty" where its sources differ from it, or "unknown".

    What runs write themselves (`executed/`, `docs/`) does not count as a difference. Where the sources travel without
    their history, a file `COMMIT` beside them names it: `git describe --always --dirty=+dirty > COMMIT`.
    """
    if not (root := marked_root()):
        return "unknown"
    if commit := _git(root, "rev-parse", "--short", "HEAD"):
        changed = _git(root, "status", "--porcelain", "--", ".", ":(exclude)executed", ":(exclude)docs")
        return f"{commit}+dirty" if changed else commit
    named = root / "COMMIT"
    return named.read_text(encoding="utf-8").strip() if named.is_file() else "unknown"


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
