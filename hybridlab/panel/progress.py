"""Progress of training, where somebody looks: gauges in JupyterLab, a bar in a terminal, a file in batch."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tqdm.std import tqdm

from hybridlab.base.errors import UserError, printable
from hybridlab.base.files import replaced
from hybridlab.base.front_end import PROGRESS_FILE, in_jupyterlab

if TYPE_CHECKING:
    from hybridlab.study.launched import RankNews
    from hybridlab.study.record import Run

SHOW_EVERY_SECONDS = 0.25  # at most four drawings per second
LOG_EVERY_SECONDS = 15.0
INSTALL = (
    "the live panel needs widgets; install them where JupyterLab runs, with `pip install jupyterlab_widgets`, and load "
    "the page again"
)
LEAST_SHARE = 0.01
"""Of all steps: before so many are done, no time left is given."""


class Progress:
    """Counts towards a total: in the file of a batch run, else as a bar of text in a notebook or a terminal.

    total: how many steps there are, at least 1
    label: what is being done, in a few words

    Raises ValueError for a `total` below 1.
    """

    draws_itself = False
    """Whether a notebook shows something else than text."""

    def __init__(self, total: int, label: str) -> None:
        if total < 1:
            raise ValueError(f"total is {total}: progress needs at least 1 step to count")
        self.total, self.label, self.done = total, label, 0
        self._ranks: dict[int, RankNews] = {}
        self._file = os.environ.get(PROGRESS_FILE)
        hidden = (
            self.draws_itself if in_jupyterlab() else bool(self._file) or None
        )  # None: where standard error is no terminal
        self._line = tqdm(total=total, desc=label, file=sys.stderr, disable=hidden)
        self._started = time.monotonic()
        self._shown = self._started

    def __enter__(self) -> Self:
        self.show("running")
        return self

    def __exit__(self, *_: object) -> None:
        self.show("finished" if self.done == self.total else "stopped")
        self._line.close()

    def step(self, label: str, total: int) -> None:
        """Count one step of a total that may have grown; `label` replaces the words shown."""
        self.done, self.label = self.done + 1, label
        self.total = self._line.total = total
        self._line.set_description(label, refresh=False)
        self._line.update()
        if time.monotonic() - self._shown >= SHOW_EVERY_SECONDS:
            self._shown = time.monotonic()
            self.show("running")

    def note_run(self, run: Run) -> None:
        """A bar shows no final losses."""

    def note_rank(self, news: RankNews) -> None:
        """Keep how one of several processes stands that train the run."""
        self._ranks[news.rank] = news

    @property
    def of_ranks(self) -> str:
        """Their loss, and the memory of each, in words; empty without ranks."""
        loss = next((news.loss for news in self._ranks.values() if news.loss is not None), None)
        known = sorted(self._ranks.items())
        places = {rank: "process" if news.memory.source == "process" else "GPU" for rank, news in known}
        memory = [f"{places[rank]} {rank} {news.memory.used_bytes / 1e9:.2f} GB" for rank, news in known]
        return ", ".join(["", *([] if loss is None else [f"loss {loss:.4f}"]), *memory])

    def between_steps(self, run: object) -> None:
        """Nothing is asked between two steps, since there are no buttons."""

    def show(self, status: str) -> None:
        """Write the counts to the file of a batch run; a file that cannot be written ends no training."""
        if not self._file:
            return
        counts = {"done": self.done, "total": self.total, "label": self.label}
        with suppress(UserError), replaced(Path(self._file), lasting=False) as beside:
            beside.write_text(json.dumps(counts | self._times()) + "\n", encoding="utf-8")

    def _times(self) -> dict[str, float | None]:
        seconds = time.monotonic() - self._started
        return {"seconds": seconds, "seconds_left": seconds_left(self.done, self.total, seconds)}


def seconds_left(done: int, total: int, seconds: float) -> float | None:
    """The time left at the pace so far; None during the first steps, which include loading data and compilation."""
    known = done and done >= LEAST_SHARE * total
    return seconds / done * max(total - done, 0) if known else None


def shows_panel() -> bool:
    """Whether a person has a notebook open and the panel's widgets are installed; says what to install if not."""
    if not in_jupyterlab():
        return False
    if find_spec("jupyterlab_widgets") is None:
        print(f"progress is shown as text: {INSTALL}")
        return False
    return True


@contextmanager
def watched(path: Path) -> Iterator[None]:
    """Print the state that `path` holds while the block runs: a bar in a terminal, else a line every 15 seconds."""
    show = _show_bar if sys.stdout.isatty() else _show_lines
    finished = threading.Event()
    thread = threading.Thread(target=show, args=(path, finished), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _show_bar(path: Path, finished: threading.Event) -> None:
    parts = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}"
    with tqdm(desc="starting the kernel", file=sys.stdout, leave=False, bar_format=parts) as bar:
        while not finished.wait(SHOW_EVERY_SECONDS):
            if state := _state(path):
                bar.n, bar.total = state["done"], state["total"]
                bar.set_description(state["label"], refresh=False)
                bar.set_postfix_str(_left(state))


def _show_lines(path: Path, finished: threading.Event) -> None:
    while not finished.wait(LOG_EVERY_SECONDS):
        if state := _state(path):
            print(printable(f"{state['label']}: {state['done']} of {state['total']}, {_left(state)}"), flush=True)


def _left(state: dict[str, Any]) -> str:
    seconds = state["seconds_left"]
    return "time left unknown" if seconds is None else f"{clock(seconds)} left"


def clock(seconds: float) -> str:
    """A stretch of time in words that fit a line."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _state(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, json.JSONDecodeError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None
