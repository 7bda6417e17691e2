"""Buttons and sliders beside the gauges, and what they ask of the loop.

JupyterLab (4.4 and later, with ipykernel 7 and later) hands what a person presses to a subshell of the kernel, a thread
beside the one that runs cells. So a button leaves a request, and the loop reads the requests between two steps. Front
ends without subshells deliver presses when the cell has ended; there, interrupting the kernel stops a run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ipywidgets as widgets

from hybridlab.engine.config import HybridTrainerConfig

_SLIDER = {
    "continuous_update": False,
    "style": {"description_width": "initial"},
    "layout": {"width": "300px"},
}


class Controls:
    """What a person asks of the loop: pause, resume, one step, stop, a checkpoint, other settings.

    Buttons ask from a thread of their own; the loop takes what was asked between two steps.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.paused = self.stopping = False
        self._single_steps = 0
        self._saving = False
        self._settings: dict[str, float] = {}

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """A change that wakes the loop, should it wait."""
        with self._changed:
            yield
            self._changed.notify_all()

    def toggle(self) -> None:
        """Pause, or resume."""
        with self._asking():
            self.paused = not self.paused

    def step(self) -> None:
        """Take one step, and pause."""
        with self._asking():
            self.paused = True
            self._single_steps += 1

    def stop(self) -> None:
        """End the loop after the current step."""
        with self._asking():
            self.stopping = True

    def save(self) -> None:
        """Write a checkpoint after the current step."""
        with self._asking():
            self._saving = True

    def set(self, name: str, value: float) -> None:
        """Change a setting after the current step."""
        with self._asking():
            self._settings[name] = value

    @property
    def have_requests(self) -> bool:
        """Whether there is anything to take; needs no lock, so that a step costs little."""
        return self._saving or bool(self._settings)

    def take_save(self) -> bool:
        """Whether a checkpoint is asked for; True once per request."""
        with self._changed:
            asked, self._saving = self._saving, False
            return asked

    def take_settings(self) -> dict[str, float]:
        """The settings to change; each change is returned once."""
        with self._changed:
            settings, self._settings = self._settings, {}
            return settings

    def take_step(self) -> bool:
        """Whether the next step may be taken; uses up a single step."""
        with self._changed:
            if self.paused and self._single_steps and not self.stopping:
                self._single_steps -= 1
                return True
            return self.stopping or not self.paused

    def wait(self, seconds: float) -> None:
        """Wait for the next request, at most so long."""
        with self._changed:
            self._changed.wait(seconds)


def control_row(controls: Controls, settings: HybridTrainerConfig | None) -> widgets.Widget:
    """The buttons, and sliders for `settings`; None offers no sliders, as a comparison must not be changed."""
    pause = _button("Pause", "pause", "Pause after the current step; the clock stops", controls.toggle)
    step = _button("Step", "step-forward", "Take one step, and pause", controls.step)

    def relabel(_: object) -> None:
        pause.description, pause.icon = ("Resume", "play") if controls.paused else ("Pause", "pause")

    for button in (pause, step):
        button.on_click(relabel)
    save = _button("Checkpoint", "save", "Write a checkpoint to resume from", controls.save)
    stop = _button("Stop", "stop", "End the cell after the current step", controls.stop)
    row = widgets.HBox([pause, step, save, stop])
    if settings is None:
        return row
    sliders = widgets.HBox(_sliders(controls, settings), layout=widgets.Layout(flex_flow="row wrap"))
    return widgets.VBox([row, sliders])


def switch_off(widget: widgets.Widget) -> None:
    """Disable every button and slider of a row; they stay where they are."""
    for child in getattr(widget, "children", ()):
        switch_off(child)
    if hasattr(widget, "disabled"):
        widget.disabled = True


def _button(text: str, icon: str, tooltip: str, action: Callable[[], None]) -> widgets.Button:
    button = widgets.Button(description=text, icon=icon, tooltip=tooltip, layout=widgets.Layout(width="118px"))
    button.on_click(lambda _: action())
    _hear_while_training(button)
    return button


def _sliders(controls: Controls, settings: HybridTrainerConfig) -> list[widgets.Widget]:
    """Sliders for what may change while training; disabled for a plain run."""
    longest = max(200, settings.max_predict_steps)
    made = {
        "confidence_threshold": widgets.FloatSlider(min=0, max=1, step=0.01, description="confidence", **_SLIDER),
        "max_predict_steps": widgets.IntSlider(min=1, max=longest, description="horizon (steps)", **_SLIDER),
        "correction_interval": widgets.IntSlider(min=1, max=longest, description="correct every (steps)", **_SLIDER),
    }
    for name, slider in made.items():
        slider.value = getattr(settings, name)
        slider.disabled = settings.max_predict_steps == 0
        slider.observe(lambda change, name=name: controls.set(name, change["new"]), "value")
        _hear_while_training(slider)
    return list(made.values())


def _hear_while_training(widget: widgets.Widget) -> None:
    """Keep the front end's choice of a subshell: ipykernel 7.4 answers on the thread that made a widget, and that
    thread is busy training.
    """
    widget.comm._reply_subshell_for = lambda data, asked: asked
