"""What the live panel costs: a step with it over a step without, measured in turns."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean, median

from hybridlab.base.device import find_device
from hybridlab.benchmarks.interleaved import SETTLING_ROUNDS, Ratio, seconds_in_turns
from hybridlab.panel.controls import Controls
from hybridlab.panel.live import Live
from hybridlab.study.config import RunConfig
from hybridlab.study.run import TrainingRun
from hybridlab.study.step_log import TrainingTimer

LOOPS = 3
"""Alone, alone again, and watched."""


@dataclass(frozen=True)
class PanelCost:
    """What the panel costs per step, beside a control.

    panel_over_none: time of a step with the panel over one without
    none_over_none: the control: a step without the panel over another without, in turns of their own; it differs from 1
        by the error of the measurement alone
    step_ms: median time of a step without the panel
    panel_itself_ms: the host's time per step in the panel's own code, drawings included: the least that it can cost
    drawings: per round
    """

    panel_over_none: Ratio
    none_over_none: Ratio
    step_ms: float
    panel_itself_ms: float
    drawings: float

    @property
    def panel_itself_over_none(self) -> float:
        """The host's time in the panel's own code, over a step without it."""
        return self.panel_itself_ms / self.step_ms


def panel_overhead(config: RunConfig, *, rounds: int = 20, turns: int = 6, steps: int = 15) -> PanelCost:
    """Measure what the panel costs, in one run whose steps are taken in turns: alone, alone again, and watched.

    rounds: that count; two more at the start are dropped
    turns: of each loop per round, best a multiple of six: then each loop has each place equally often
    steps: nominal steps per turn; the watched ones of a round should take a second or more, for several drawings

    The panel's clock stops while the panel is off, so that it is drawn as often per watched second as in use. In a
    notebook, sending the panel to the page is measured too. Raises ValueError for fewer than one round, or turn.
    """
    watched_steps = turns * steps * (SETTLING_ROUNDS + rounds)
    length = LOOPS * watched_steps + 1  # the last step of a run evaluates: it is not taken
    schedule = config.lr_schedule.fitted_to(length)
    config = replace(config, steps=length, schedule=schedule, evaluate_every=10**9, checkpoint_every=0)
    device = find_device(config.device)
    clock = TrainingTimer(device)
    live = _Counting(Controls(), watched_steps, clock=lambda: clock.seconds)
    itself: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(config, Path(folder))
        run.start()
        with live, closing(run.steps()) as taken:

            def alone() -> None:
                for _ in islice(taken, steps):
                    pass

            def watched() -> None:
                clock.start()
                for record in islice(taken, steps):
                    began = time.perf_counter()
                    live.step("", watched_steps)
                    live.watch(run, record)
                    itself.append(time.perf_counter() - began)
                clock.pause()

            loops = {"alone": alone, "again": alone, "watched": watched}
            seconds = seconds_in_turns(loops, device, rounds, turns)
            drawings = live.drawings / (SETTLING_ROUNDS + rounds)
    return PanelCost(
        panel_over_none=Ratio.of(seconds["watched"], seconds["alone"]),
        none_over_none=Ratio.of(seconds["again"], seconds["alone"]),
        step_ms=1e3 * median(seconds["alone"]) / (turns * steps),
        panel_itself_ms=1e3 * mean(itself[SETTLING_ROUNDS * turns * steps :]),
        drawings=drawings,
    )


class _Counting(Live):
    drawings = 0

    def refresh(self, status: str) -> None:
        super().refresh(status)
        self.drawings += 1
