"""How long the jumps of a run took, and the way there and back, read off its record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby

import pandas as pd

from hybridlab.engine.phases import Phase


@dataclass(frozen=True)
class JumpTimes:
    """One jump and the steps of Correct after it, in ms of wall time.

    Parts count beyond ordinary steps: the run's median step of Full, and its median predicted step that neither moves
    the weights nor measures the loss.

    proposing: the gradient step before: Gram matrix of the path, and a copy to go back to
    leaving: the first predicted step: the weights move, and what leaves the GPU leaves it
    moving: the first steps of its further chunks: the weights move again, wherever they are, and return with the last
    returning: what follows in Predict and Correct: what else left returns, and the path begins anew
    whole: all of the time from the end of an ordinary step to the end of Correct: what proposing takes, the predicted
        steps, and the steps of Correct with their forward passes
    steps: predicted ones

    The trainer waits for the device before Predict, after Correct, and in every predicted step, so that the host's
    clock is right there. What is put away or fetched in a step goes beside its motion. Before `proposing` one step may
    be under way.
    """

    proposing: float
    leaving: float
    moving: float
    returning: float
    whole: float
    steps: int


def jump_times(steps: pd.DataFrame) -> list[JumpTimes]:
    """Every jump that was followed by Correct, whole, and by another step.

    steps: a run's, as its steps.parquet has them
    """
    timed = pd.DataFrame({"phase": steps["phase"].map(str), "ms": 1e3 * steps["seconds"].diff()})
    predicted, measured = timed["phase"] == Phase.PREDICT, steps["measured_loss"].notna()
    timed["moves"] = predicted & ~(predicted & ~measured).shift(fill_value=False)
    resting = timed["ms"][predicted & ~timed["moves"] & ~measured]
    ordinary = {True: resting.median() if len(resting) else 0.0, False: gradient_step_ms(steps)}
    timed["beyond"] = timed["ms"] - predicted.map(ordinary)
    return [_times(timed, *jump) for jump in _whole_jumps(timed["phase"].tolist())]


def gradient_step_ms(steps: pd.DataFrame) -> float:
    """The median step of Full, in ms of wall time."""
    return float(1e3 * steps["seconds"].diff()[steps["phase"].map(str) == Phase.FULL].median())


def _whole_jumps(phases: list[str]) -> Iterator[tuple[int, int, int]]:
    """Where Predict begins, where Correct begins after it, and where that has ended."""
    stretches = [(phase, len(list(stretch))) for phase, stretch in groupby(phases)]
    begins = [0, *accumulate(length for _, length in stretches)]
    for i in range(1, len(stretches) - 2):
        if [phase for phase, _ in stretches[i : i + 2]] == [Phase.PREDICT, Phase.CORRECT]:
            yield begins[i], begins[i + 1], begins[i + 2]


def _times(timed: pd.DataFrame, predict: int, correct: int, end: int) -> JumpTimes:
    """Of one jump, in ms; a step that moves the weights begins a chunk."""
    beyond = timed["beyond"]
    moves = [i for i in range(predict, correct) if timed["moves"][i]]
    return JumpTimes(
        proposing=float(beyond[predict - 1]),
        leaving=float(beyond[predict]),
        moving=float(beyond[moves[1:]].sum()),
        returning=float(beyond[moves[-1] + 1 : end].sum()),
        whole=float(beyond[predict - 1] + timed["ms"][predict:end].sum()),
        steps=correct - predict,
    )
