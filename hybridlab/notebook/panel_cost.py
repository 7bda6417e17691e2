"""What the live panel costs: a step with it over a step without, measured in turns."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from hybridlab.notebook.controls import Controls
from hybridlab.notebook.live import Live
from hybridlab.study.run_config import RunConfig
from hybridlab.study.train import TrainingRun


def panel_overhead(config: RunConfig, *, rounds: int = 20, steps: int = 50) -> dict[str, float]:
    """Step times of one run with the panel on over off, in turns; the first two rounds are thrown away.

    rounds: how often each has its turn; steps: nominal steps a turn, best a second or more together

    Returns the median over rounds of paired ratios (`panel_over_none`), the median step without it (`step_ms`), and how
    often the panel was drawn (`updates`). Run it in a notebook, and sending the panel to the page is counted too.
    """
    config = replace(config, steps=2 * steps * (rounds + 2), evaluate_every=10**9, checkpoint_every=0)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    live = _Counting(Controls(), config.steps)
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(config, Path(folder))
        run.start()
        with live, closing(run.steps()) as taken:
            for number in range(2 * (rounds + 2)):
                watched = (number % 2 == 1) != (number // 2 % 2 == 1)  # who goes first changes from round to round
                started = _now()
                for record in islice(taken, steps):
                    if watched:
                        live.step("", config.steps)
                        live.watch(run, record)
                seconds[watched].append(_now() - started)
    without, with_panel = seconds[False][2:], seconds[True][2:]
    return {
        "panel_over_none": median(on / off for on, off in zip(with_panel, without, strict=True)),
        "step_ms": 1e3 * median(without) / steps,
        "updates": live.updates,
    }


class _Counting(Live):
    updates = 0

    def draw(self, status: str) -> None:
        super().draw(status)
        self.updates += 1


def _now() -> float:
    """The time when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
