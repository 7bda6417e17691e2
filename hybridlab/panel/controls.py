"""Buttons and sliders beside the gauges, and what they ask for.

JupyterLab (4.4 and later, with ipykernel 7 and later) hands what a person presses to a subshell of the kernel, a thread
beside the one that runs cells. So a button notes a wish, and the loop looks at the wishes between two steps. Front ends
without subshells deliver presses when the cell has ended; there, interrupting the kernel stops a run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import ipywidgets as widgets

from hybridlab.engine.config import HybridTrainerConfig

_SLIDER = {
    "continuous_update": False,
    "style": {"description_width": "initial"},
    "layout": {"width": "300px"},
}


class Controls:
    """What a person wants of the loop: pause, go on, one step, stop, a checkpoint, other settings."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.paused = self.stopping = False
        self._single_steps = 0
        self._saving = False
        self._settings: dict[str, float] = {}

    def toggle(self) -> None:
        """Pause, or go on."""
        with self._changed:
            self.paused = not self.paused
            self._changed.notify_all()

    def step(self) -> None:
        """Take one step, and pause."""
        with self._changed:
            self.paused = True
            self._single_steps += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """End the loop after the step under way."""
        with self._changed:
            self.stopping = True
            self._changed.notify_all()

    def save(self) -> None:
        """Write a checkpoint after the step under way."""
        with self._changed:
            self._saving = True
            self._changed.notify_all()

    def set(self, name: str, value: float) -> None:
        """Change a setting after the step under way."""
        with self._changed:
            self._settings[name] = value
            self._changed.notify_all()

    @property
    def have_wishes(self) -> bool:
        """Whether there is anything to take, without a lock: a step is to cost little."""
        return self._saving or bool(self._settings)

    def take_save(self) -> bool:
        """Whether a checkpoint is wanted; it is wanted once."""
        with self._changed:
            wanted, self._saving = self._saving, False
            return wanted

    def take_settings(self) -> dict[str, float]:
        """The settings that are to change; each change is given out once."""
        with self._changed:
            settings, self._settings = self._settings, {}
            return settings

    def may_go_on(self) -> bool:
        """Whether the next step may be taken; uses up a single step."""
        with self._changed:
            if self.paused and self._single_steps and not self.stopping:
                self._single_steps -= 1
                return True
            return self.stopping or not self.paused

    def wait(self, seconds: float) -> None:
        """Wait for the next wish, or for so long."""
        with self._changed:
            self._changed.wait(seconds)


def control_row(controls: Controls, settings: HybridTrainerConfig | None) -> widgets.Widget:
    """The buttons, and sliders for `settings`; without any where a comparison must not be steered."""
    pause = _button("Pause", "pause", "Pause after the step under way; the clock stands", controls.toggle)
    step = _button("Step", "step-forward", "Take one step, and pause", controls.step)

    def relabel(_: object) -> None:
        pause.description, pause.icon = ("Resume", "play") if controls.paused else ("Pause", "pause")

    for button in (pause, step):
        button.on_click(relabel)
    save = _button("Checkpoint", "save", "Write a checkpoint to go on from", controls.save)
    stop = _button("Stop", "stop", "End the cell after the step under way", controls.stop)
    row = widgets.HBox([pause, step, save, stop])
    if settings is None:
        return row
    sliders = widgets.HBox(_sliders(controls, settings), layout=widgets.Layout(flex_flow="row wrap"))
    return widgets.VBox([row, sliders])


def _button(text: str, icon: str, tooltip: str, action: Callable[[], None]) -> widgets.Button:
    button = widgets.Button(description=text, icon=icon, tooltip=tooltip, layout=widgets.Layout(width="118px"))
    button.on_click(lambda _: action())
    _heard_while_training(button)
    return button


def _sliders(controls: Controls, settings: HybridTrainerConfig) -> list[widgets.Widget]:
    """What may change while training; a plain run has nothing to steer."""
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
        _heard_while_training(slider)
    return list(made.values())


def _heard_while_training(widget: widgets.Widget) -> None:
    """Let the front end's choice of a subshell stand: ipykernel 7.4 answers on the thread that made a widget, and that
    one trains.
    """
    widget.comm._reply_subshell_for = lambda data, asked: asked
