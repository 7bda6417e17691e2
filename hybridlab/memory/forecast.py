"""The answer of `hybridlab plan`, in lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hybridlab.errors import UserError, nearest
from hybridlab.memory.config import MemoryConfig
from hybridlab.memory.nearest_fit import Rung, Situation, climb
from hybridlab.memory.planner import PARTS, Batch, Plan
from hybridlab.memory.step_time import Card, step_time_ms

PRESETS: dict[str, Callable[[], MemoryConfig]] = {
    "none": MemoryConfig,
    "conservative": MemoryConfig.conservative,
    "aggressive": MemoryConfig.aggressive,
    "fit_16gb": MemoryConfig.fit_16gb,
}

NAME, NUMBER = 58, 12
"""Widths of a line's columns."""


def forecast(situation: Situation, card_bytes: int, card: Card) -> Iterator[str]:
    """Memory by part and phase, whether the card holds it, the least to switch on if not, and times a step."""
    rungs = climb(situation, card_bytes)
    yield from _by_part(rungs[0].plan)
    yield ""
    yield _verdict(rungs, card_bytes)
    yield ""
    yield from _rungs(rungs, card_bytes, card)
    yield f"Times a step are estimated, apart from the memory, from the data sheet of a {card.name}; measure to know."


def _by_part(plan: Plan) -> Iterator[str]:
    yield _line("GB at the peak of", *plan.phases)
    for part in PARTS:
        yield _line(part, *(_gb(parts[part]) for parts in plan.phases.values()))
    yield _line("allocated", *(_gb(sum(parts.values())) for parts in plan.phases.values()))
    share = plan.share
    yield (
        f"On the card: {_gb(plan.peak_on_card_bytes)} GB, with {share.slack:.0%} of slack in torch's allocator and "
        f"{_gb(share.context_bytes)} GB of CUDA context (assumed)."
    )


def _verdict(rungs: list[Rung], card_bytes: int) -> str:
    size, asked, last = f"{card_bytes / 1e9:g} GB", rungs[0].plan, rungs[-1].plan
    if asked.fits(card_bytes):
        return f"It fits a card of {size}: {_gb(card_bytes - asked.peak_on_card_bytes)} GB are left."
    excess = f"It does not fit a card of {size}: {_gb(asked.peak_on_card_bytes - card_bytes)} GB too much."
    if last.fits(card_bytes):
        return f"{excess} The least to switch on, from harmless to costly:"
    return f"{excess} Nor does it with everything switched on; take a shorter batch or a smaller model:"


def _rungs(rungs: list[Rung], card_bytes: int, card: Card) -> Iterator[str]:
    yield _line("each with those above it", "allocated", "on card", "est. step")
    for i, rung in enumerate(rungs):
        mark = "  fits" if rung.plan.fits(card_bytes) else ""
        peaks = (_gb(rung.plan.peak_allocated_bytes), _gb(rung.plan.peak_on_card_bytes))
        yield _line(f"{'+ ' if i else ''}{rung.name}", *peaks, f"{step_time_ms(rung.plan, card):.0f} ms") + mark


def _line(name: str, *columns: str) -> str:
    return name.ljust(NAME) + "".join(column.rjust(NUMBER) for column in columns)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


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
