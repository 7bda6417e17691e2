"""Charts: one bundle, the same every time, with nothing lost that the eye needs."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from matplotlib import pyplot
from PIL import Image

from hybridlab.charts import display
from hybridlab.charts.builders import interval_chart, loss_curves, phase_bands, phase_chart
from hybridlab.charts.display import Chart, Panels
from hybridlab.charts.model import Band, Line, Series, kept, rounded
from hybridlab.charts.style import CONTROL, end_labels
from hybridlab.charts.tables import table
from hybridlab.engine.phases import Phase

PLOTLY = "application/vnd.plotly.v1+json"


def frame(n: int = 40, end: float = 3.0) -> pd.DataFrame:
    step = np.arange(1, n + 1)
    loss = end + 5 * np.exp(-step / 10)
    return pd.DataFrame(
        {"nominal_step": step, "gradient_step": step // 2, "seconds": step * 0.5, "validation_loss": loss}
    )


def steps() -> pd.DataFrame:
    phases = ["warmup"] * 3 + ["full"] * 2 + ["predict"] * 2 + ["correct"] + ["full"] * 2
    measured = [5.0, 4.9, 4.8, 4.7, 4.6, np.nan, 4.5, 4.4, 4.3, 4.2]
    predicted = [np.nan] * 6 + [4.45] + [np.nan] * 3
    nominal = [1, 2, 3, 4, 5, 15, 25, 26, 27, 28]
    return pd.DataFrame(
        {"nominal_step": nominal, "phase": phases, "measured_loss": measured, "predicted_loss": predicted}
    )


def line_chart(**settings: Any) -> Chart:
    series = (
        Series("a", range(5), [5.0, 4.0, 3.5, 3.2, 3.1]),
        Series("b", range(5), [5, 4.5, 4, 3.9, 3.8], control=True),
    )
    return Chart("Loss", "nominal steps", "loss (nats)", series, **settings)


CHARTS: dict[str, Chart | Panels] = {
    "line": line_chart(lines=(Line(3.5, "target"),)),
    "curves": loss_curves({"base": [frame(), frame(end=3.1)], "cut": frame(20)}, against="seconds", control=["cut"]),
    "phases": phase_chart(steps(), "Phases"),
    "intervals": interval_chart("q", "step value", [("linear", -0.5, -1, 0.1), ("river", 0.1, -0.1, 0.3)]),
    "bars": Chart(
        "Time",
        "ms",
        "",
        (Series("measured", [85.9, 27.6], [0, 1], kind="bar"), Series("predicted", [80], [0], kind="bar", dash=True)),
        names=("fp32", "bf16"),
    ),
    "panels": Panels("Both", (line_chart(), loss_curves({"a": frame()}, against="nominal_step")), columns=2),
}


@pytest.fixture(params=CHARTS, name="chart")
def _chart(request: pytest.FixtureRequest) -> Chart | Panels:
    return CHARTS[request.param]


def test_a_bundle_is_plotly_png_and_text_the_same_twice(chart: Chart | Panels) -> None:
    bundle = chart._repr_mimebundle_()
    assert json.dumps(bundle) == json.dumps(chart._repr_mimebundle_())
    assert set(bundle) == {PLOTLY, "image/png", "text/plain"}
    assert bundle["text/plain"].startswith(chart.title)
    refuse_unfit_plotly(json.dumps(bundle[PLOTLY], allow_nan=False))
    refuse_unfit_picture(base64.b64decode(bundle["image/png"]))


def refuse_unfit_plotly(text: str) -> None:
    """It is plain, small and valid, lies on the page's own ground, and says what it can."""
    assert "bdata" not in text
    assert len(text) < 20_000
    figure = json.loads(text)
    go.Figure(data=figure["data"], layout=figure["layout"])  # raises on any unknown property
    assert figure["layout"]["paper_bgcolor"] == figure["layout"]["plot_bgcolor"] == "rgba(0,0,0,0)"
    assert any("drag to zoom" in note["text"] for note in figure["layout"]["annotations"])


def refuse_unfit_picture(png: bytes) -> None:
    """It is small, the same with every version of matplotlib, and has no ground of its own."""
    assert png.startswith(b"\x89PNG\r\n")
    assert len(png) < 60_000
    assert b"Software" not in png
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    corners = [picture.getpixel(place) for place in ((0, 0), (picture.width - 1, picture.height - 1))]
    assert [corner[3] for corner in corners] == [0, 0]
    assert picture.getcolors(1 << 20)[0]


def test_in_jupyterlab_a_chart_is_interactive_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "in_jupyterlab", lambda: True)
    assert set(CHARTS["line"]._repr_mimebundle_()) == {PLOTLY, "text/plain"}, "a picture would be shown first"


def test_each_name_is_once_beside_its_line_or_in_the_legend(chart: Chart | Panels) -> None:
    figure = chart.plotly()
    named = [trace.name for trace in figure.data if trace.showlegend is not False]
    names = [series.name for one in getattr(chart, "charts", [chart]) for series in one.series]
    beside = [note.text for note in figure.layout.annotations if note.text in names]
    assert sorted({*named, *beside}) == sorted({*names, *(trace.name for trace in figure.data if trace.name)})
    assert len(named + beside) == len({*named, *beside})


def test_names_beside_lines_that_end_together_stand_apart() -> None:
    chart = loss_curves({f"arm {i}": frame() for i in range(9)}, against="seconds")
    places = sorted(end_labels(chart).values())
    assert len(places) == 9
    assert min(b - a for a, b in itertools.pairwise(places)) > 0.04
    assert 0 <= places[0] < places[-1] <= 1
    assert end_labels(loss_curves({f"arm {i}": frame() for i in range(30)}, against="seconds")) == {}


def test_a_control_stands_out_in_the_color_of_its_arm() -> None:
    runs = {name: frame() for name in ("baseline", "bold", "control of bold")}
    plain = ["baseline", "control of bold"]
    chart = loss_curves(runs, against="seconds", control=plain, control_of={"control of bold": "bold"})
    base, bold, control = chart.plotly().data
    assert control.line.color == bold.line.color != base.line.color
    assert control.line.dash == "dash"
    assert control.line.width > max(bold.line.width, base.line.width)


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    with matplotlib.rc_context({"font.size": 31.0}):
        figures, settings = pyplot.get_fignums(), dict(matplotlib.rcParams)
        CHARTS["bars"].png()
        assert pyplot.get_fignums() == figures
        assert dict(matplotlib.rcParams) == settings


def test_picture_does_not_depend_on_the_notebook_s_matplotlib_settings() -> None:
    before = CHARTS["line"].png()
    with matplotlib.rc_context({"font.size": 20, "figure.dpi": 50, "savefig.dpi": 300, "axes.grid": False}):
        assert CHARTS["line"].png() == before


def test_noise_beyond_the_fourth_decimal_changes_nothing() -> None:
    y = np.array([5.0, 4.12341, 3.5])
    first, second = (Chart("c", "x", "y", (Series("a", range(3), list(v)),)) for v in (y, y + 3e-6))
    assert first._repr_mimebundle_() == second._repr_mimebundle_()


def test_rounding_keeps_small_series_apart() -> None:
    assert rounded([6e-4, 1.23456e-4]) == [6e-4, 1.23e-4]
    assert rounded([3.00004, 1e-6]) == [3.0, 0.0]
    assert str(rounded([1.0, -1e-9])[1]) == "0.0"


@pytest.mark.parametrize("count", [301, 302, 1000, 12345])
def test_thinning_keeps_ends_and_extremes(count: int) -> None:
    y = np.random.default_rng(count).normal(size=count)
    y[count // 3], y[count // 2] = 9, -9
    index = kept(list(y))
    assert len(index) <= 300
    assert index == sorted(set(index))
    assert {0, count // 3, count // 2, count - 1} <= set(index)


def test_short_series_are_not_thinned() -> None:
    assert kept([1.0] * 300) == list(range(300))


def test_long_run_stays_small_and_its_text_counts_every_point() -> None:
    chart = loss_curves({"long": frame(20_000)}, against="nominal_step")
    assert len(chart.plotly().data[0].x) <= 300
    assert "long: 20000 points" in str(chart)


@pytest.mark.parametrize("values", [[], [float("nan")], [float("inf")]])
def test_series_without_finite_points_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="series 'a'"):
        Series("a", range(len(values)), values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Series("a", [1, 2], [1.0]), "y has 1 values, x has 2"),
        (lambda: Series("a", [1], [1.0], low=[0.5]), "both low and high"),
        (lambda: Series("a", [1], [1.0], kind="area"), "kind must be one of"),  # type: ignore[arg-type]
        (lambda: Chart("c", "x", "y", ()), "has no series"),
        (lambda: Chart("c", "x", "y", (Series("a", [1], [1]), Series("a", [1], [1]))), "'a' is used twice"),
        (lambda: Chart("c", "x", "y", (Series("a", [1], [1], kind="bar"),)), "bars need names"),
        (lambda: Chart("c", "x", "", (Series("a", [1], [3], kind="bar"),), names=("one",)), "row numbers 0 to 0"),
        (lambda: line_chart(y_zoom=(4, 3)), "y_zoom"),
        (lambda: Band(3, 3, "Full"), "must end after"),
        (lambda: Panels("p", ()), "hold no chart"),
        (lambda: interval_chart("i", "x", []), "no rows"),
        (lambda: phase_bands(steps().iloc[:0]), "no steps"),
        (lambda: loss_curves({}, against="seconds"), "no series"),
        (lambda: loss_curves({"a": []}, against="seconds"), "'a' has no runs"),
        (
            lambda: loss_curves({"a": frame()}, against="seconds", value="gradient_norm"),
            "no column 'gradient_norm' in arm 'a'",
        ),
        (lambda: loss_curves({"a": frame()}, against="seconds", control=["b"]), "control names"),
        (lambda: loss_curves({"a": frame() * np.nan}, against="seconds"), "no finite validation_loss in arm 'a'"),
        (lambda: table([]), "no rows"),
        (lambda: table([{"a": 1}], formats={"b": "g"}), "formats name"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_control_is_grey_and_dashed() -> None:
    chart = loss_curves({"cut": frame(), "base": frame()}, against="seconds", control=["cut"])
    cut, base = chart.plotly().data
    assert (cut.line.color, cut.line.dash) == (CONTROL, "dash")
    assert base.line.color != CONTROL
    assert base.line.dash == "solid"


def test_arms_and_controls_can_be_told_apart() -> None:
    names = [f"arm {i}" for i in range(9)]
    chart = loss_curves({name: frame() for name in names}, against="seconds", control=names[:3])
    assert len({(trace.line.color, trace.line.dash) for trace in chart.plotly().data}) == 9


def test_a_name_looks_alike_in_all_panels() -> None:
    a, b = Series("a", [1, 2], [1, 2]), Series("b", [1, 2], [2, 1])
    panels = Panels("p", (Chart("one", "x", "y", (a, b)), Chart("two", "x", "y", (b, a))))
    colors: dict[str, set[str]] = {}
    for trace in panels.plotly().data:
        colors.setdefault(trace.name, set()).add(trace.line.color)
    assert [len(used) for used in colors.values()] == [1, 1]


def test_color_by_index_is_not_given_to_another() -> None:
    chart = Chart("c", "x", "y", (Series("a", [1], [1]), Series("b", [1], [1], color=0)))
    a, b = chart.plotly().data
    assert a.line.color != b.line.color


def test_seeds_become_a_mean_with_their_range() -> None:
    short, long = frame(10, end=3.0), frame(12, end=4.0)
    (series,) = loss_curves({"a": [short, long]}, against="nominal_step").series
    assert series.bounds() is not None
    np.testing.assert_allclose(series.y, short["validation_loss"] + 0.5)
    np.testing.assert_allclose(series.low or (), short["validation_loss"])
    np.testing.assert_allclose(series.high or (), short["validation_loss"] + 1)


def test_rows_without_a_value_are_left_out() -> None:
    gaps = frame(6)
    gaps.loc[[0, 3], "validation_loss"] = np.nan
    gaps.loc[5, "validation_loss"] = np.inf
    (series,) = loss_curves({"a": gaps}, against="nominal_step").series
    assert series.x == (2, 3, 5)
    assert series.bounds() is None


def test_smoothing_is_centered_and_named() -> None:
    rows = frame(5).assign(validation_loss=[0.0, 3.0, 0.0, 3.0, 0.0])
    chart = loss_curves({"a": rows}, against="nominal_step", smooth=3)
    assert chart.series[0].y == (1.5, 1.0, 2.0, 1.0, 1.5)
    assert chart.y_label.endswith("mean of 3 rows")


def test_bands_merge_consecutive_phases_and_touch() -> None:
    assert phase_bands(steps()) == (
        Band(0, 3, "Warmup"),
        Band(3, 5, "Full"),
        Band(5, 25, "Predict"),
        Band(25, 26, "Correct"),
        Band(26, 28, "Full"),
    )


def test_bands_take_a_phase_for_its_name() -> None:
    assert phase_bands(pd.DataFrame({"nominal_step": [1], "phase": [Phase.FULL]})) == (Band(0, 1, "Full"),)


def test_phase_chart_keeps_measured_and_predicted_apart() -> None:
    measured, predicted = phase_chart(steps(), "t").series
    assert (measured.name, measured.kind, len(measured.x)) == ("measured", "line", 9)
    assert (predicted.name, predicted.kind, predicted.x, predicted.y) == ("predicted", "points", (25,), (4.45,))
    plain = steps().assign(predicted_loss=np.nan)
    assert [s.name for s in phase_chart(plain, "t").series] == ["measured"]


def test_interval_is_drawn_from_low_to_high() -> None:
    segments, dots = CHARTS["intervals"].plotly().data
    assert list(segments.x) == [-1, 0.1, None, -0.1, 0.3, None]
    assert list(dots.x) == [-0.5, 0.1]


def test_bars_start_at_zero_and_groups_may_lack_rows() -> None:
    chart = CHARTS["bars"]
    assert isinstance(chart, Chart)
    assert chart.x_limits()[0] == 0
    assert "predicted, fp32: 80.0000" in str(chart)
    assert "predicted, bf16" not in str(chart)


def test_text_says_first_min_and_last() -> None:
    assert str(CHARTS["line"]).splitlines() == [
        "Loss",
        "  x: nominal steps; y: loss (nats)",
        "  a: 5 points, first 5.0000, min 3.1000, last 3.1000",
        "  b: 5 points, first 5.0000, min 3.8000, last 3.8000",
        "  line at 3.5000: target",
    ]


def test_markup_in_names_is_shown_not_obeyed() -> None:
    figure = Chart("<i>t</i>", "x", "y", (Series("lr < 1e-3 & $b$", [1, 2], [1, 2]),))
    assert figure.plotly().data[0].name == "lr &lt; 1e-3 &amp; $b$"
    assert figure.plotly().layout.title.text == "&lt;i&gt;t&lt;/i&gt;"
    assert figure.png()


def test_table_is_readable_html_and_text() -> None:
    rows = [
        {"arm": "base & <b>", "steps": np.int64(1000), "loss": 3.01236, "lr": 6e-4, "better": True},
        {"arm": "cut", "steps": 800, "loss": None, "lr": np.float32(3e-5), "better": np.bool_(False)},
    ]
    bundle = table(rows, "A > B", formats={"lr": ".1e"})._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert bundle["text/plain"].splitlines() == [
        "A > B",
        "arm         steps    loss       lr  better",
        "----------  -----  ------  -------  ------",
        "base & <b>   1000  3.0124  6.0e-04  yes",
        "cut           800       –  3.0e-05  no",
    ]
    page = bundle["text/html"]
    assert "base &amp; &lt;b&gt;</th>" in page
    assert "A &gt; B</caption>" in page
    assert '<td style="text-align: right">3.0124</td>' in page
    assert "<b>" not in page
    assert "id=" not in page


def test_a_table_colors_its_verdicts() -> None:
    rows = [{"arm": "open (air)", "answer": "better than stopping earlier (p = 0.01, corrected for 4 arms)"}]
    page = table([*rows, {"arm": "b", "answer": "open (1 of 3 seeds)"}, {"arm": "c", "answer": "opened"}]).html()
    colored = re.findall(r"color: (#\w+); font-weight: 600\">([\w ]+)", page)
    assert ("#2a9d4a", "better than stopping earlier ") in colored
    assert "opened" not in [text for _, text in colored]


def test_an_interval_stays_on_one_line_beside_its_value() -> None:
    assert (
        '>-0.1 <span style="white-space: nowrap">[-0.2, open]</span></td>'
        in table([{"a": 1, "d": "-0.1 [-0.2, open]"}]).html()
    )


def test_table_has_no_negative_zero() -> None:
    assert table([{"difference": -1e-9}]).cells() == [["0.0000"]]


@pytest.mark.parametrize(("ends", "side"), [((0.1, 0.2), "left"), ((-0.2, -0.1), "right"), ((-0.1, 0.1), "center")])
def test_a_reference_at_the_end_of_an_axis_keeps_its_whole_label(ends: tuple[float, float], side: str) -> None:
    chart = interval_chart("losses", "nats", [("hybrid", sum(ends) / 2, *ends)], lines=(Line(0.0, "as good"),))
    notes = chart._repr_mimebundle_()[PLOTLY]["layout"]["annotations"]
    assert [note["xanchor"] for note in notes if note["text"] == "as good"] == [side]
