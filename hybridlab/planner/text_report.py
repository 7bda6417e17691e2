"""The answer of `hybridlab plan`, in lines of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass

from hybridlab.base.errors import UserError
from hybridlab.base.settings import check_choice
from hybridlab.memory.config import MemoryConfig
from hybridlab.models import GPT2Config
from hybridlab.planner.gpu_specs import GpuSpec, step_time_ms
from hybridlab.planner.plan import PARTS, Plan
from hybridlab.planner.spec import BatchShape, TrainingSpec
from hybridlab.planner.suggest import Option, smallest_fit

MEMORY_PRESETS: dict[str, Callable[[], MemoryConfig]] = {
    "none": MemoryConfig,
    "conservative": MemoryConfig.conservative,
    "aggressive": MemoryConfig.aggressive,
    "fit_16gb": MemoryConfig.fit_16gb,
}

NAME, NUMBER = 60, 12
"""Widths of a line's columns."""

WINDOWS, TOKENS = 8, 512
"""The batch, unless one is given."""


def report_lines(spec: TrainingSpec, gpu_bytes: int, gpu: GpuSpec) -> Iterator[str]:
    """Memory by part and phase, whether the GPU holds it, the least to switch on if not, and times per step.

    Where something must be switched on, and that is enough, the last lines are the Python that does it.
    """
    options = smallest_fit(spec, gpu_bytes)
    asked, last = options[0], options[-1]
    yield from _by_part(asked.plan)
    yield ""
    yield _verdict(asked.plan, last.plan, gpu_bytes)
    yield ""
    yield from _by_option(options, gpu_bytes, gpu)
    if last.plan.host_memory != asked.plan.host_memory:
        yield from _host_memory(last.plan, "With all of these, ")
    yield f"Times per step are estimated, apart from the memory, from the data sheet of a {gpu.name}; measure to know."
    if last is not asked and last.plan.fits(gpu_bytes):
        yield ""
        yield from _in_python(spec, last.spec)


def _by_part(plan: Plan) -> Iterator[str]:
    yield _line("at the peak of", *plan.phases)
    for part in PARTS:
        yield _line(part, *(_size(parts[part]) for parts in plan.phases.values()))
    yield _line("allocated", *(_size(sum(parts.values())) for parts in plan.phases.values()))
    yield (
        f"On the GPU: {_size(plan.peak_on_gpu_bytes)}: {_size(plan.reserved_bytes)} that torch's allocator holds, "
        f"and {_size(plan.overhead.context_bytes)} of CUDA context (assumed)."
    )
    yield from _host_memory(plan)


def _host_memory(plan: Plan, begin: str = "") -> Iterator[str]:
    """What the training keeps in host memory, if it keeps anything there."""
    if plan.host_memory:
        uses = ", ".join(f"{use} {_size(size)}" for use, size in plan.host_memory.items())
        line = f"{begin}host memory, most of it page-locked: {_size(plan.host_memory_bytes)} ({uses})."
        yield line[0].upper() + line[1:]


def _verdict(asked: Plan, last: Plan, gpu_bytes: int) -> str:
    size = f"{gpu_bytes / 1e9:g} GB"
    if asked.fits(gpu_bytes):
        return f"It fits a GPU of {size}: {_size(gpu_bytes - asked.peak_on_gpu_bytes)} are left."
    excess = f"It does not fit a GPU of {size}: {_size(asked.peak_on_gpu_bytes - gpu_bytes)} too much."
    if last.fits(gpu_bytes):
        return f"{excess} The least to switch on, from harmless to costly:"
    return f"{excess} Nor does it with everything switched on; take a shorter batch or a smaller model:"


def _by_option(options: list[Option], gpu_bytes: int, gpu: GpuSpec) -> Iterator[str]:
    yield _line("each with those above it", "allocated", "on GPU", "est. step")
    for i, option in enumerate(options):
        mark = "  fits" if option.plan.fits(gpu_bytes) else ""
        peaks = (_size(option.plan.peak_allocated_bytes), _size(option.plan.peak_on_gpu_bytes))
        yield _line(f"{'+ ' if i else ''}{option.name}", *peaks, _ms(step_time_ms(option.plan, gpu))) + mark


def _in_python(asked: TrainingSpec, fits: TrainingSpec) -> Iterator[str]:
    """What to paste, and where the path goes if it went to the host."""
    memory = code_of(fits.memory)
    yield "# prepare_model_ and optimizer_for put it to work: README.md, In less memory"
    yield f"from hybridlab.memory import {', '.join(sorted(set(re.findall(r'[A-Z][A-Za-z]+Config', memory))))}"
    yield f"memory = {memory}"
    if fits.path_storage.on_host and not asked.path_storage.on_host:
        yield "hybrid = HybridTrainerConfig(path_device='host', memory=memory)  # beside your other settings"


def code_of(settings: object) -> str:
    """Settings as Python makes them again: only those that are not at their default."""
    if not is_dataclass(settings):
        return repr(settings)
    values = ((field, getattr(settings, field.name)) for field in fields(settings) if field.init)
    changed = (f"{field.name}={code_of(value)}" for field, value in values if value != field.default)
    return f"{type(settings).__name__}({', '.join(changed)})"


def _line(name: str, *columns: str) -> str:
    return name.ljust(NAME) + "".join(column.rjust(NUMBER) for column in columns)


def _size(size: int) -> str:
    """In gigabytes; in megabytes, or less, where two digits behind the point would not show it."""
    if size >= 10**7:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.2f} MB" if size >= 10**4 else f"{size} B" if size else "0"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.2g} ms"


def default_batch(model: str) -> BatchShape:
    """Windows of 512 tokens, or of as many as the model takes. Raises ValueError for an unknown size."""
    return WINDOWS, min(TOKENS, GPT2Config.named(model).block_size)


def read_batch(text: str) -> BatchShape:
    """(8, 512) of "8x512". Raises UserError for anything else."""
    windows, sign, tokens = text.lower().partition("x")
    if not (sign and windows.isdecimal() and tokens.isdecimal() and int(windows) and int(tokens)):
        raise UserError(f"batch {text!r} is none: give windows and tokens, such as 8x512")
    return int(windows), int(tokens)


def memory_named(name: str) -> MemoryConfig:
    """The preset of that name; "none" is plain training. Raises ValueError for an unknown one."""
    check_choice("memory", name, MEMORY_PRESETS)
    return MEMORY_PRESETS[name]()
