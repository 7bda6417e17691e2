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
from hybridlab.study.timer import TrainingTimer

LOOPS = 3
"""Alone, alone again, and watched."""


@dataclass(frozen=True)
class PanelCost:
    """What the panel costs a step, and what the measurement of it is worth.

    panel_over_none: a step with the panel over one without
    none_over_none: a step without it over another without, in turns of their own: the control, which is 1 but for what
        the measurement cannot tell
    step_ms: the median step without it
    panel_itself_ms: the host's time in the panel's own code a step, drawings included: the least that it can cost
    drawings: in a round
    """

    panel_over_none: Ratio
    none_over_none: Ratio
    step_ms: float
    panel_itself_ms: float
    drawings: float


def panel_overhead(config: RunConfig, *, rounds: int = 20, turns: int = 6, steps: int = 15) -> PanelCost:
    """Measure what the panel costs, in one run whose steps are taken in turns: alone, alone again, and watched.

    rounds: that count, beside the first two, which are thrown away
    turns: of each loop in a round, best a multiple of six: then each has each place equally often
    steps: nominal steps a turn; a round's watched ones best take a second or more, so that it holds several drawings

    While the panel is off its clock stands, so that it is drawn as often a watched second as in use. Run it in a
    notebook, and sending the panel to the page is counted too. Raises ValueError for fewer than one round, or turn.
    """
    watched_steps = turns * steps * (SETTLING_ROUNDS + rounds)
    length = LOOPS * watched_steps + 1  # a run's last step evaluates, which belongs to no turn: it is not taken
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
