"""What compiles code says in one line what it lacks, before anything trains."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hybridlab.base import compiler
from hybridlab.base.compiler import require_compiler
from hybridlab.base.errors import UserError
from hybridlab.study import RunConfig, TextTaskConfig, train
from tests.conftest import TINY_TEXT


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A Linux machine without a compiler, on which Triton is installed."""
    monkeypatch.setattr(compiler.sys, "platform", "linux")
    monkeypatch.setattr(compiler, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("device_type", "names", "variable"), [("cuda", r"gcc or clang", "CC"), ("cpu", r"g\+\+", "CXX")]
)
def test_a_missing_compiler_is_named(bare: pytest.MonkeyPatch, device_type: str, names: str, variable: str) -> None:
    with pytest.raises(
        UserError, match=rf"int8 compiles code, and there is no compiler \({names}\).* variable {variable}"
    ):
        require_compiler(device_type, "int8")
    bare.setenv(variable, "no-such-program")
    with pytest.raises(UserError, match=r"no compiler \(no-such-program\)"):
        require_compiler(device_type, "int8")
    bare.setenv(variable, sys.executable)
    require_compiler(device_type, "int8")


def test_without_triton_no_compiler_helps_a_card(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(compiler, "find_spec", lambda name: None)
    bare.setenv("CC", sys.executable)
    with pytest.raises(UserError, match="needs Triton: torch brings it on Linux and WSL2"):
        require_compiler("cuda", "int8")
    bare.setenv("CXX", sys.executable)
    require_compiler("cpu", "compiled=True")


@pytest.mark.usefixtures("bare")
def test_a_compiled_run_without_a_compiler_is_refused_before_it_begins(tmp_path: Path) -> None:
    config = RunConfig("compiled", TextTaskConfig(**TINY_TEXT), steps=2, device="cpu", compiled=True)
    with pytest.raises(UserError, match=r"^compiled=True compiles code"):
        train(config, tmp_path / "runs")
    train(replace(config, compiled=False), tmp_path / "runs")
