"""The answer of `hybridlab plan`, in lines of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass

from hybridlab.base.errors import UserError, nearest
from hybridlab.memory.config import MemoryConfig
from hybridlab.models import GPT2Config
from hybridlab.planner.gpu_specs import Card, step_time_ms
from hybridlab.planner.plan import PARTS, Batch, Plan
from hybridlab.planner.suggest import Rung, Situation, climb

PRESETS: dict[str, Callable[[], MemoryConfig]] = {
    "none": MemoryConfig,
    "conservative": MemoryConfig.conservative,
    "aggressive": MemoryConfig.aggressive,
    "fit_16gb": MemoryConfig.fit_16gb,
}

NAME, NUMBER = 60, 12
"""Widths of a line's columns."""

WINDOWS, TOKENS = 8, 512
"""The batch, unless one is given."""


def forecast(situation: Situation, card_bytes: int, card: Card) -> Iterator[str]:
    """Memory by part and phase, whether the card holds it, the least to switch on if not, and times a step.

    Where something must be switched on, and that is enough, the last lines are the Python that does it.
    """
    rungs = climb(situation, card_bytes)
    yield from _by_part(rungs[0].plan)
    yield ""
    yield _verdict(rungs, card_bytes)
    yield ""
    yield from _rungs(rungs, card_bytes, card)
    if rungs[-1].plan.held_on_host != rungs[0].plan.held_on_host:
        yield from _on_host(rungs[-1].plan, "With all of these, ")
    yield f"Times a step are estimated, apart from the memory, from the data sheet of a {card.name}; measure to know."
    if len(rungs) > 1 and rungs[-1].plan.fits(card_bytes):
        yield ""
        yield from _in_python(situation, rungs[-1].situation)


def _by_part(plan: Plan) -> Iterator[str]:
    yield _line("at the peak of", *plan.phases)
    for part in PARTS:
        yield _line(part, *(_size(parts[part]) for parts in plan.phases.values()))
    yield _line("allocated", *(_size(sum(parts.values())) for parts in plan.phases.values()))
    share = plan.share
    yield (
        f"On the card: {_size(plan.peak_on_card_bytes)}, with {share.slack:.0%} of slack in torch's allocator and "
        f"{_size(share.context_bytes)} of CUDA context (assumed)."
    )
    yield from _on_host(plan)


def _on_host(plan: Plan, begin: str = "") -> Iterator[str]:
    """What the training keeps in host memory, if it keeps anything there."""
    if plan.held_on_host:
        held = ", ".join(f"{name} {_size(size)}" for name, size in plan.held_on_host.items())
        line = f"{begin}host memory, most of it page-locked: {_size(plan.held_on_host_bytes)} ({held})."
        yield line[0].upper() + line[1:]


def _verdict(rungs: list[Rung], card_bytes: int) -> str:
    size, asked, last = f"{card_bytes / 1e9:g} GB", rungs[0].plan, rungs[-1].plan
    if asked.fits(card_bytes):
        return f"It fits a card of {size}: {_size(card_bytes - asked.peak_on_card_bytes)} are left."
    excess = f"It does not fit a card of {size}: {_size(asked.peak_on_card_bytes - card_bytes)} too much."
    if last.fits(card_bytes):
        return f"{excess} The least to switch on, from harmless to costly:"
    return f"{excess} Nor does it with everything switched on; take a shorter batch or a smaller model:"


def _rungs(rungs: list[Rung], card_bytes: int, card: Card) -> Iterator[str]:
    yield _line("each with those above it", "allocated", "on card", "est. step")
    for i, rung in enumerate(rungs):
        mark = "  fits" if rung.plan.fits(card_bytes) else ""
        peaks = (_size(rung.plan.peak_allocated_bytes), _size(rung.plan.peak_on_card_bytes))
        yield _line(f"{'+ ' if i else ''}{rung.name}", *peaks, _ms(step_time_ms(rung.plan, card))) + mark


def _in_python(asked: Situation, fits: Situation) -> Iterator[str]:
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
    values = ((field, getattr(settings, field.name)) for field in fields(settings))
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


def default_batch(model: str) -> Batch:
    """Windows of 512 tokens, or of as many as the model takes. Raises ValueError for an unknown size."""
    return WINDOWS, min(TOKENS, GPT2Config.named(model).block_size)


def read_batch(text: str) -> Batch:
    """(8, 512) of "8x512". Raises UserError for anything else."""
    windows, sign, tokens = text.lower().partition("x")
    if not (sign and windows.isdecimal() and tokens.isdecimal() and int(windows) and int(tokens)):
        raise UserError(f"batch {text!r} is none: give windows and tokens, such as 8x512")
    return int(windows), int(tokens)


def memory_named(name: str) -> MemoryConfig:
    """The preset of that name; "none" is plain training. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"memory {name!r} is unknown: {nearest(name, PRESETS)}")
    return PRESETS[name]()
