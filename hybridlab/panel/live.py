"""The live panel: gauges that follow a run, and controls that act between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, Self

import ipywidgets as widgets
from IPython import get_ipython
from IPython.display import display

from hybridlab.base.errors import UserError
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.phases import Phase
from hybridlab.panel.controls import Controls, control_row, switch_off
from hybridlab.panel.html import Points, bar_html, panel_html, ranks_html, style_html
from hybridlab.panel.instruments import Instruments, memory_of
from hybridlab.panel.progress import INSTALL, SHOW_EVERY_SECONDS, Progress, seconds_left
from hybridlab.panel.timeline import timeline_of
from hybridlab.study.record import Run
from hybridlab.study.step_log import StepRecord
from hybridlab.study.study import BASELINE
from hybridlab.study.watched_run import WatchedRun

DRAWING_SHARE = 0.0025
"""Drawing may take this share of the time."""


class Live:
    """Gauges and controls of one cell.

    controls: what the buttons act on
    total: nominal steps of everything that the cell trains
    instruments: of the one run that is shown; by default each run gets its own
    settings: that sliders may change; None offers none
    clock: in seconds, for the pace of drawing and the time left
    arms: arm and seed of each run of the cell, where there are several
    """

    def __init__(
        self,
        controls: Controls,
        total: int,
        instruments: Instruments | None = None,
        settings: HybridTrainerConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        arms: Iterable[tuple[str, int]] = (),
    ) -> None:
        self.controls = controls
        self._total, self._done = total, 0
        self._instruments, self._one_run = instruments, instruments is not None
        self._finals = FinalLosses(arms)
        self._style, self._gauges = _style(), widgets.HTML()
        self._row = control_row(self.controls, settings)
        self._panel = widgets.VBox([self._style, self._gauges, self._row])
        self._reloads = ExitStack()
        self._clock = clock
        self._started = self._drawn = clock()
        self._pace = 0.0  # seconds between two drawings

    def __enter__(self) -> Self:
        """Show the panel below the cell."""
        show(self._panel)
        self._reloads.enter_context(answering_new_pages())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Show the last state, and switch the controls off; they stay, so that nothing below them moves."""
        failed = kind is not None and not issubclass(kind, GeneratorExit | KeyboardInterrupt | UserError)
        if self._instruments is not None:
            if not failed:  # else the device may answer no more
                self._instruments.read_losses()
            self.refresh("failed" if failed else "finished" if self._is_over and not kind else "stopped")
        switch_off(self._row)
        self._reloads.close()

    def step(self, label: str, total: int) -> None:
        """Count a nominal step of a total that may have grown."""
        self._done, self._total = self._done + 1, total

    def note_run(self, run: Run) -> None:
        """Keep the final loss of a run that has finished."""
        self._finals.note(run)

    def watch(self, run: WatchedRun, record: StepRecord) -> None:
        """Note a step, then do what is asked."""
        if self._instruments is None or self._instruments.run is not run:
            self._instruments = Instruments(run)
        self._instruments.note(record)
        self.between_steps(run)

    def between_steps(self, run: WatchedRun) -> None:
        """Do what is asked, draw when it is time, wait while paused."""
        if self.controls.have_requests:
            self._obey(run)
        if self._clock() - self._drawn >= self._pace:
            self.refresh("running")
        if self.controls.paused and not self.controls.take_step():
            self._pause(run)

    def refresh(self, status: str) -> None:
        """Bring the gauges up to date."""
        if self._instruments is None or self._instruments.latest is None:
            return
        started = self._clock()
        left = seconds_left(self._done, self._total, started - self._started)
        state = self._instruments.state(status, done=self._done, total=self._total, seconds_left=left)
        seed = self._instruments.run.config.seed
        state = replace(state, arms=self._finals.arms, baseline=self._finals.baselines.get(seed, ()))
        self._gauges.value = panel_html(state)
        self._drawn = self._clock()
        self._pace = max(SHOW_EVERY_SECONDS, (self._drawn - started) / DRAWING_SHARE)

    @property
    def _is_over(self) -> bool:
        """Whether the cell has trained all that it was to: of one run, its last step."""
        if not self._one_run:
            self._total = self._done  # controls that turned out not to be needed no longer count
            return True
        followed = self._instruments
        return bool(followed and followed.latest and followed.latest.result.nominal_step == followed.run.config.steps)

    def _obey(self, run: WatchedRun) -> None:
        if self.controls.take_save():
            run.save()
            if self._instruments:
                self._instruments.remark("checkpoint written")
                self._pace = 0.0
        if run.phase is not Phase.PREDICT and (settings := self.controls.take_settings()):
            run.change(**settings)

    def _pause(self, run: WatchedRun) -> None:
        """Wait while paused, with the clocks stopped."""
        paused = self._clock()
        run.pause()
        self.refresh("paused")
        while not self.controls.take_step():
            self.controls.wait(SHOW_EVERY_SECONDS)
            self._obey(run)
            if not self._pace:
                self.refresh("paused")
        self._started += self._clock() - paused


class FinalLosses:
    """What the runs of a cell ended with.

    arms: arm -> seed -> final validation loss in nats; None where the run has not finished
    baselines: seed -> the measured loss of the finished baseline, over shares of its length
    """

    def __init__(self, arms: Iterable[tuple[str, int]] = ()) -> None:
        self.arms: dict[str, dict[int, float | None]] = {}
        self.baselines: dict[int, Points] = {}
        for name, seed in arms:
            self.arms.setdefault(name, {})[seed] = None

    def note(self, run: Run) -> None:
        """Take in a run that has finished."""
        name, seed = run.config["name"], run.config["seed"]
        self.arms.setdefault(name, {})[seed] = run.closing_figures.get("validation_loss")
        if name == BASELINE:
            self.baselines[seed] = timeline_of(run, len(run.steps)).series("measured_loss")


class LiveBar(Progress):
    """A bar alone, for runs that train in processes of their own: their gauges cannot be read from here.

    total, label: as for `Progress`; arms: as for `Live`
    """

    draws_itself = True

    def __init__(self, total: int, label: str, arms: Iterable[tuple[str, int]] = ()) -> None:
        super().__init__(total, label)
        self._finals = FinalLosses(arms)

    def note_run(self, run: Run) -> None:
        """Keep the final loss of a run that has finished."""
        self._finals.note(run)

    def __enter__(self) -> Self:
        """Show the bar below the cell."""
        self._bar = widgets.HTML()
        super().__enter__()
        show(widgets.VBox([_style(), self._bar]))
        return self

    def show(self, status: str) -> None:
        """Bring the bar up to date."""
        left = self._times()["seconds_left"]
        bar = bar_html(self.label, self.done, self.total, status, left, self._finals.arms)
        gauges = {rank: memory_of(vars(news.memory), news.peak_bytes) for rank, news in sorted(self._ranks.items())}
        self._bar.value = bar + ranks_html(gauges)


def show(widget: widgets.Widget) -> None:
    """Display a widget; a page without widgets says what to install, and where progress can be read meanwhile."""
    instead = f"{INSTALL}. Meanwhile, `hybridlab runs` in a terminal says how far training has come."
    display(widget._repr_mimebundle_() | {"text/plain": instead}, raw=True)  # type: ignore[no-untyped-call]


def _style() -> widgets.Widget:
    """The gauges' style in a widget of its own, so that it is sent once and not at each drawing."""
    return widgets.HTML(style_html(), layout=widgets.Layout(display="none"))


@contextmanager
def interrupts(controls: Controls) -> Iterator[None]:
    """Ctrl-C, or the notebook's stop button, ends the loop after the current step; pressed again, at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if controls.stopping:
            raise KeyboardInterrupt
        controls.stop()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


COMM = ("comm_open", "comm_msg", "comm_close")
"""Messages between widgets and their views."""


@contextmanager
def answering_new_pages() -> Iterator[None]:
    """While the block runs, answer what a page asks first when it is loaded: about the kernel, and for its widgets.

    JupyterLab sends both to the thread that runs cells, which is busy with training. So the thread that receives
    messages (ipykernel 7 and later) answers them; the rest goes its usual way. Under an ipykernel without that thread
    nothing happens: the page waits until the cell has ended.
    """
    kernel: Any = getattr(get_ipython(), "kernel", None)
    thread, stream = getattr(kernel, "shell_channel_thread", None), getattr(kernel, "shell_stream", None)
    if thread is None or stream is None:
        yield
        return
    cell = kernel.get_parent("shell")

    async def receive(message: list[Any]) -> None:
        idents, parts = kernel.session.feed_identities(message, copy=False)
        header = kernel.session.unpack(parts[1].bytes)
        kind, is_for_cells = header.get("msg_type"), header.get("subshell_id") is None
        if not is_for_cells or kind not in ("kernel_info_request", *COMM):
            await kernel.shell_channel_thread_main(message)
            return
        request = kernel.session.deserialize(parts, copy=False)
        kernel._publish_status("busy", "shell", parent=request)
        if kind in COMM:
            getattr(kernel.comm_manager, kind)(stream, idents, request)
        else:
            await kernel.kernel_info_request(stream, idents, request)
        kernel._publish_status("idle", "shell", parent=request)
        kernel._publish_status("busy", "shell", parent=cell)  # as it is: a cell trains

    def listen(with_what: Any) -> None:
        thread.io_loop.add_callback(lambda: stream.on_recv(with_what, copy=False))

    listen(receive)
    try:
        yield
    finally:
        listen(kernel.shell_channel_thread_main)
