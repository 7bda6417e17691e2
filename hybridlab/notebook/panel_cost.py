"""What the live panel costs: a step with it over a step without, measured in turns."""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

from hybridlab.device import find_device
from hybridlab.notebook.controls import Controls
from hybridlab.notebook.live import Live
from hybridlab.study.run_config import RunConfig
from hybridlab.study.training_run import TrainingRun
from hybridlab.study.turns import SETTLING_ROUNDS, median_ratio, median_ratio_ends, seconds_in_turns


def panel_overhead(config: RunConfig, *, rounds: int = 20, steps: int = 50) -> dict[str, float]:
    """Step times of one run with the panel on over off, in turns; the first two rounds are thrown away.

    rounds: how often each has its turn; steps: nominal steps a turn, best a second or more together

    Returns the median over rounds of paired ratios (`panel_over_none`) with the ends of its 95 % interval (`low`,
    `high`), the median step without it (`step_ms`), and how often the panel was drawn (`updates`). Run it in a
    notebook, and sending the panel to the page is counted too.
    """
    total = 2 * steps * (SETTLING_ROUNDS + rounds)
    length = total + 1  # a run's last step evaluates, which belongs to no turn: it is not taken
    schedule = config.lr_schedule.fitted_to(length)
    config = replace(config, steps=length, schedule=schedule, evaluate_every=10**9, checkpoint_every=0)
    live = _Counting(Controls(), total)
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(config, Path(folder))
        run.start()
        with live, closing(run.steps()) as taken:

            def alone() -> None:
                for _ in islice(taken, steps):
                    pass

            def watched() -> None:
                for record in islice(taken, steps):
                    live.step("", total)
                    live.watch(run, record)

            loops = {"alone": alone, "watched": watched}
            seconds = seconds_in_turns(loops, find_device(config.device), rounds)
    low, high = median_ratio_ends(seconds["watched"], seconds["alone"])
    return {
        "panel_over_none": median_ratio(seconds["watched"], seconds["alone"]),
        "low": low,
        "high": high,
        "step_ms": 1e3 * median(seconds["alone"]) / steps,
        "updates": live.updates,
    }


class _Counting(Live):
    updates = 0

    def draw(self, status: str) -> None:
        super().draw(status)
        self.updates += 1
