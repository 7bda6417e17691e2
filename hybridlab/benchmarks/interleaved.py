"""Times loops beside each other, in turns, so that whatever slows the machine slows them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

import torch

from hybridlab.base.device import wait_for
from hybridlab.study.statistics import median_ends

SETTLING_ROUNDS = 2
"""At the start; they are thrown away."""


def seconds_in_turns(
    loops: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, turns: int = 1
) -> dict[str, list[float]]:
    """Seconds that each loop took, round by round.

    loops: by name; each call is one turn, and returns when all is asked of the device
    rounds: that count, beside the first two, which are thrown away
    turns: of each loop in a round, which sums them: the shorter they are, the more alike a drift falls on all loops

    The loops' order is mirrored from one time to the next, and another loop begins after every two, so that with twice
    as many turns as loops each has each place equally often. Raises ValueError for fewer than one round, or turn.
    """
    for name, count in (("rounds", rounds), ("turns", turns)):
        if count < 1:
            raise ValueError(f"{name} is {count}: it must be at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range((SETTLING_ROUNDS + rounds) * turns):
        for name in _order(list(loops), number):
            seconds[name].append(_timed(loops[name], device))
    starts = range(SETTLING_ROUNDS * turns, (SETTLING_ROUNDS + rounds) * turns, turns)
    return {name: [sum(times[start : start + turns]) for start in starts] for name, times in seconds.items()}


@dataclass(frozen=True)
class Ratio:
    """A median over rounds of paired ratios, with the ends of its 95 % interval; infinite for fewer than six rounds."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...] = ()

    @classmethod
    def of(cls, seconds: Sequence[float], others: Sequence[float]) -> Self:
        """One loop's time over another's in the same round."""
        ratios = [mine / other for mine, other in zip(seconds, others, strict=True)]
        return cls(median(ratios), *median_ends(ratios), tuple(ratios))

    def record(self) -> dict[str, Any]:
        """The median and its interval, without the rounds; an end that is not known is None."""
        known = {"median": self.median, "low": self.low, "high": self.high}
        return {name: value if math.isfinite(value) else None for name, value in known.items()}


def _order(names: list[str], number: int) -> list[str]:
    """Who follows whom the `number`-th time."""
    first = number // 2 % len(names)
    return (names[first:] + names[:first])[:: -1 if number % 2 else 1]


def _timed(turn: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    started = time.perf_counter()
    turn()
    wait_for(device)
    return time.perf_counter() - started
