"""A person's way through JupyterLab: gauges that move, buttons that act while a cell trains, in both themes.

Needs the `browser` extra and a Chromium (Debian's `chromium`, Chrome, or `playwright install chromium`).
Screenshots go to the folder that HYBRIDLAB_SCREENSHOTS names, if it names one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from tests.notebook_maker import KERNEL, project, save

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is missing: .venv/bin/pip install -e '.[browser]'"
)

pytestmark = [pytest.mark.slow, pytest.mark.browser]

ROOT = Path(__file__).parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SMALLER = {
    "steps": "240",
    "seeds": "1",
    "warmup_steps": "30",
    "predict_after": "30",
    "data": '"markov"',
    "validation_batches": "4",
}
SESSION = """\
from hybridlab import HybridTrainerConfig
from hybridlab.notebook import Session
from hybridlab.study import RunConfig, TextTaskConfig
hybrid = HybridTrainerConfig.conservative(warmup_steps=20, gate=False, confidence_threshold=0.0)
task = TextTaskConfig("nano", "markov", vocab_size=64, block_size=16, validation_batches=2, max_bytes=40_000)
session = Session(RunConfig("steered", task, steps=20_000, hybrid=hybrid, device="cpu", cpu_threads=1), "browser")
"""
ISOLATED = """\
from dataclasses import replace
from hybridlab.notebook import run_configs
session.close()
runs = run_configs([replace(session.config, steps=60)], "browser", isolated=True)
"""
SCROLL = "element => element.scrollIntoView({block: 'center'})"
RUN = "for result in session.run({}): pass\nprint(session)"


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, NAMES)), playwright.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip("no Chromium: install Debian's chromium, or run playwright install chromium")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(params=["JupyterLab Light", "JupyterLab Dark"])
def theme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def lab(browser: sync_api.Browser, theme: str, tmp_path: Path) -> Iterator[Lab]:
    """A JupyterLab of its own, on a project that holds the notebooks alone."""
    project(tmp_path)
    settings = {
        "apputils-extension/themes": {"theme": theme},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},
    }
    for name, values in settings.items():
        path = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
    }
    options = ["--no-browser", "--allow-root", "--port=0", "--IdentityProvider.token=", "--ServerApp.log_level=ERROR"]
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={tmp_path}"]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        records = tmp_path / "runtime"
        until(lambda: list(records.glob("jpserver-*.json")), "JupyterLab has started")
        address = json.loads(next(records.glob("jpserver-*.json")).read_text())["url"]
        page = browser.new_page(viewport={"width": 1366, "height": 900})
        lab = Lab(page, address, tmp_path, theme.split()[-1].lower())
        yield lab
        lab.shot("last")
        page.close()
    finally:
        server.terminate()
        server.wait(20)


class Lab:
    """What a person does and sees."""

    def __init__(self, page: sync_api.Page, address: str, folder: Path, theme: str) -> None:
        self.page, self.folder, self._address, self._theme = page, folder, address, theme
        self._shots = os.environ.get("HYBRIDLAB_SCREENSHOTS")

    def open(self, notebook: nbformat.NotebookNode, name: str) -> None:
        save(notebook, self.folder / "notebooks" / name)
        self.page.goto(f"{self._address}lab/tree/notebooks/{name}")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self.page.wait_for_selector("#jp-main-statusbar :text('| Idle')", timeout=60_000)
        until(self.is_idle, "the kernel is ready")

    def menu(self, menu: str, entry: str) -> None:
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).click()

    def run_cell(self, number: int) -> sync_api.Locator:
        """Click into a code cell and run it; returns its output area."""
        cell = self.page.locator(".jp-CodeCell").nth(number)
        cell.locator(".jp-InputPrompt").click()
        self.page.keyboard.press("Control+Enter")
        return cell

    def press(self, button: str) -> None:
        self.page.locator(".jupyter-button:visible:enabled", has_text=re.compile(f"^ *{button}$")).last.click()

    @property
    def height(self) -> float:
        """Of the panel with its buttons, in pixels."""
        panel = self.page.locator(".jp-OutputArea-output", has=self.page.locator(".hl")).first
        return panel.evaluate("element => element.offsetHeight")

    def hover(self) -> None:
        """Point into the loss curve, and see the values of a step."""
        self.page.locator(".hl-hover i[data-t]").nth(4).hover(force=True)
        shown = "getComputedStyle(document.querySelector('.hl-hover i:hover'), '::after').content"
        until(
            lambda: "loss" in (self.page.evaluate(f"document.querySelector('.hl-hover i:hover') && {shown}") or ""),
            "values",
        )

    def _head(self, number: int) -> str:
        return self.page.locator(".hl-status").last.locator("b").nth(number).inner_text()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).last.inner_text(timeout=60_000)

    @property
    def status(self) -> str:
        return self._head(0)

    @property
    def step(self) -> int:
        return int(self._head(1).replace(",", ""))

    @property
    def phase(self) -> str:
        return self.text(".hl-lamp.on")

    @property
    def has_jumped(self) -> bool:
        """Whether the time line shows a stretch of Predict, which itself may pass between two drawings."""
        return self.page.locator(".hl").last.locator(".hl-band.hl-predict").count() > 0

    def shot(self, name: str, *, scroll: bool = True) -> None:
        """A picture of the page, by default of the panel in it."""
        if self._shots:
            if scroll and self.page.locator(".hl").count():
                self.page.locator(".widget-html", has=self.page.locator(".hl")).last.evaluate(SCROLL)
            self.page.screenshot(path=Path(self._shots) / f"{name}_{self._theme}.png")

    def is_idle(self) -> bool:
        return self.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").count() > 0


def until(holds: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait for something to hold."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.05)


def smaller(path: Path) -> nbformat.NotebookNode:
    """A notebook with other values in its parameters cell, as a person would type them."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.kernelspec = KERNEL  # so that JupyterLab does not ask
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in SMALLER.items():
        cell.source = re.sub(rf"^({name}: \w+ = ).*?(  #)", rf"\g<1>{value}\g<2>", cell.source, flags=re.MULTILINE)
    return notebook


def test_a_study_is_watched_paused_and_resumed(lab: Lab) -> None:
    lab.open(smaller(ROOT / "notebooks" / "03_gpt2_small_hybrid.ipynb"), "study.ipynb")
    lab.menu("Run", "Run All Cells")
    lab.page.wait_for_selector(".hl", timeout=30_000)
    seen: set[str] = set()
    until(lambda: seen.add(lab.phase) or lab.step > 20, "the step counter moves")
    height = lab.height
    lab.hover()
    lab.shot("1_training")
    until(lambda: seen.add(lab.phase) or lab.has_jumped, "a jump is taken", 240)
    assert "Full" in seen
    lab.press("Pause")
    until(lambda: lab.status == "paused", "the run pauses")
    paused_at = lab.step
    lab.shot("2_jump_paused")
    time.sleep(0.7)
    assert lab.step == paused_at
    lab.press("Step")
    until(lambda: lab.step == paused_at + 1, "a single step is taken")
    until(lambda: lab.status == "paused", "the run pauses again")
    lab.press("Resume")
    until(lambda: lab.status in ("running", "finished"), "the run goes on")

    until(lambda: lab.status == "finished" and lab.is_idle(), "the study finishes", 400)
    lab.shot("3_finished")
    assert lab.height == height, "nothing below the panel moved, from the first run to the end"
    assert lab.page.locator(".hl-arm b", has_text=re.compile(r"\d\.\d{3}")).count() >= 7, "every arm's final loss stays"
    assert lab.page.locator(".hl polyline[stroke='var(--baseline)']").count() == 1, "the baseline lies behind"

    chart = lab.page.locator(".js-plotly-plot").first
    chart.evaluate(SCROLL)
    ground = chart.locator(".main-svg").first.evaluate("element => getComputedStyle(element).backgroundColor")
    assert ground == "rgba(0, 0, 0, 0)", "no white box"
    assert "drag to zoom" in chart.inner_text()
    lab.shot("8_chart", scroll=False)
    lab.page.locator("caption", has_text="The control is a plain run").last.evaluate(SCROLL)
    lab.shot("9_table", scroll=False)
    assert lab.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0
    assert lab.page.locator(".jp-CodeCell .jp-InputPrompt", has_text=re.compile(r"\[[ *]\]")).count() == 0


def test_a_session_is_steered_stopped_and_gone_on_with(lab: Lab) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in (SESSION, RUN.format(""), RUN.format("40"))]
    lab.open(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), "session.ipynb")
    lab.run_cell(0)
    until(lab.is_idle, "the session is made")
    first = lab.run_cell(1)
    lab.page.wait_for_selector(".hl")
    until(lambda: lab.step > 30, "the step counter moves")

    slider = lab.page.locator(".widget-hslider", has_text="horizon").locator(".widget-readout")
    slider.click()
    lab.page.keyboard.press("Control+A")
    lab.page.keyboard.type("7")
    lab.page.keyboard.press("Enter")
    lab.shot("4_session")

    lab.press("Checkpoint")
    until(lambda: list(lab.folder.glob("runs/browser/*/checkpoint.pt")), "a checkpoint is written")
    lab.press("Stop")
    until(lambda: "goes on from here" in first.inner_text(), "the cell ends with one line")
    steps = pd.read_parquet(next(lab.folder.glob("runs/browser/*/steps.parquet")))
    assert steps["changed"].dropna().tolist() == ["max_predict_steps=7"]
    stopped_at = int(re.search(r"stopped at step (\d+) of 20000", first.inner_text()).group(1))

    second = lab.run_cell(2)
    until(lambda: f"step {stopped_at + 40} of 20000" in second.inner_text(), "the next cell goes on")
    lab.shot("5_stopped")

    lab.run_cell(1)
    until(lambda: lab.page.locator(".hl").first.is_visible() and not lab.is_idle(), "it trains again")
    until(lambda: "running" in first.inner_text(), "the first cell's gauges move again")
    lab.menu("Kernel", "Interrupt Kernel")
    until(lambda: "goes on from here" in first.inner_text(), "an interrupt ends the cell with one line")
    assert lab.page.locator(".jp-OutputArea-output[data-mime-type*=error]").count() == 0


def test_an_isolated_run_shows_a_bar_and_a_mistake_one_line(lab: Lab) -> None:
    mistake = "list(session.run(1))"
    cells = [nbformat.v4.new_code_cell(source) for source in (SESSION, ISOLATED, mistake)]
    lab.open(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), "isolated.ipynb")
    lab.run_cell(0)
    until(lab.is_idle, "the session is made")
    isolated = lab.run_cell(1)
    until(lambda: "finished · step 60 of 60 in all" in " ".join(isolated.inner_text().split()), "the run ends")
    assert lab.page.locator("[data-mime-type*=stderr], .jupyter-button:visible").count() == 0
    refused = lab.run_cell(2).locator(".jp-OutputArea-output")
    until(lambda: refused.count() == 1, "the mistake is told")
    assert refused.inner_text() == "this session has ended: Session(..., resume=True) goes on from its last checkpoint"


def test_a_last_frame_is_a_panel_where_it_was_run_and_a_picture_where_it_is_not_trusted(lab: Lab) -> None:
    show = "list(session.run(30))\nsession.frame()"
    cells = [nbformat.v4.new_code_cell(source) for source in (SESSION, show)]
    lab.open(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), "frame.ipynb")
    panel, picture = lab.page.locator(".hl-styled .hl-cards").last, lab.page.locator(".hl-unstyled").last
    lab.run_cell(0)
    lab.run_cell(1)
    until(lambda: panel.count() and panel.is_visible() and not picture.is_visible(), "the panel is shown")

    lab.page.keyboard.press("Control+s")
    path = lab.folder / "notebooks" / "frame.ipynb"
    until(lambda: "hl-styled" in path.read_text(), "the notebook is saved")
    executed = nbformat.read(path, as_version=4)
    executed.cells.append(nbformat.v4.new_markdown_cell("changed by another hand"))
    lab.open(executed, "untrusted.ipynb")
    until(lambda: picture.count() and picture.is_visible() and not panel.is_visible(), "the picture is shown")
    assert picture.evaluate("image => image.naturalWidth") > 500
    lab.shot("6_untrusted")


def test_a_panel_comes_back_when_the_page_is_loaded_again(lab: Lab) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in (SESSION, RUN.format(""))]
    lab.open(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL}), "reloaded.ipynb")
    lab.run_cell(0)
    until(lab.is_idle, "the session is made")
    lab.run_cell(1)
    lab.page.wait_for_selector(".hl")
    until(lambda: lab.step > 10, "the step counter moves")
    lab.page.keyboard.press("Control+s")
    until(lambda: "widget-view" in (lab.folder / "notebooks" / "reloaded.ipynb").read_text(), "the notebook is saved")
    lab.page.reload()
    lab.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    lab.page.wait_for_selector(".hl", timeout=60_000)
    before = lab.step
    until(lambda: lab.step > before, "the step counter moves again")
    lab.shot("7_reloaded")
    lab.press("Pause")
    until(lambda: lab.status == "paused", "its buttons act")
    lab.press("Stop")
    until(lambda: lab.status == "stopped", "and end the cell")
