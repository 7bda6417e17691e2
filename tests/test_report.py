"""The documents say what the results say, and a changed number is seen."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy

from hybridlab.base.errors import UserError
from hybridlab.cli import main
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.notebook.views.memory_charts import vram_rows
from hybridlab.notebook.views.side_by_side import BESIDE
from hybridlab.planner.gpu_specs import GPUS
from hybridlab.planner.suggest import FEATURES
from hybridlab.report import report_files, stale_files, write_report
from hybridlab.report.criteria import CRITERIA, DEPTH, IN_DEPTH, LADDER, OURS, OVERALL, Criterion
from hybridlab.report.depth_advice import depth_advice
from hybridlab.report.documents import BEGIN, END, headline, readme_section
from hybridlab.report.evidence import MAIN, REPORT, Evidence, least_difference
from hybridlab.report.gpu_guide import FORMER_PRESETS, by_model, gpu_guide, recommended
from hybridlab.report.pictures import charts_of, shows, signed, vram_frame
from hybridlab.report.rules import Claims, Peak, Ran, Savings, least_time
from hybridlab.report.validation import at_a_glance, claims_document, copies, predicted_share, validation_document
from hybridlab.report.words import markdown_table
from hybridlab.results.claims import Claim, Quantity, Verdict
from hybridlab.results.publish import publish
from hybridlab.results.reading import load_results
from hybridlab.results.words import interval, quantities_in_words
from hybridlab.study.code_version import code_hashes
from hybridlab.study.statistics import formatted
from tests.notebook_maker import project
from tests.test_memory_charts import MEMORY_ROWS, vram

ROOT = Path(__file__).parents[1]
HYBRID, MEMORY = "03_gpt2_small_hybrid", "04_gpt2_small_memory"


def claim(kind: str, verdict: Verdict, *quantities: Quantity, arm: str = "") -> Claim:
    return Claim(kind, f"{arm or kind}: a sentence", verdict, quantities, arm)


def pays(arm: str, verdict: Verdict, predicted: float, gradient: float, *more: Quantity) -> Claim:
    counts = Quantity("predicted_steps", predicted, unit="steps"), Quantity("gradient_steps", gradient, unit="steps")
    test = (Quantity("p_value", 0.01, unit="probability"), Quantity("arms_corrected_for", 3)) if predicted else ()
    return claim("pays", verdict, *counts, *test, *more, arm=arm)


def quality(
    arm: str, verdict: Verdict, value: float = 0.0, low: float | None = None, high: float | None = None
) -> Claim:
    return claim("quality", verdict, Quantity("loss_to_baseline", value, low, high, "nats"), arm=arm)


def entry(*claims: Claim, **more: Any) -> dict[str, Any]:
    parameters = {"steps": 1000, "seeds": 3, "batch_size": 8, "block_size": 512}
    records = [claim.record() for claim in claims]
    return {"device": "a GPU", "claims": records, "summary": [], "parameters": parameters} | more


def evidence(**entries: dict[str, Any]) -> Evidence:
    """What the main profile holds; the notebooks' numbers are given as n03 for the third."""
    names = {"n02": "02_gpt2_small_baseline", "n03": HYBRID, "n04": MEMORY, "n07": "07_step_value"}
    return Evidence({MAIN: {names[key]: value for key, value in entries.items()}})


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A project with the committed results and documents of this one."""
    project(tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for results in ROOT.glob("executed/*/*.json"):
        place = tmp_path / results.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(results, place)
    return tmp_path


def test_the_documents_say_what_the_results_say() -> None:
    """Run `hybridlab report` when this fails: a document and the results disagree."""
    assert [str(path.relative_to(ROOT)) for path in stale_files(ROOT)] == []


def test_the_executed_report_has_read_these_results() -> None:
    """Run notebook 09 again when this fails: `hybridlab run notebooks/09_report.ipynb ...` as params/cpu says."""
    own = load_results(ROOT / "executed" / "cpu" / "results.json")[REPORT]
    assert own["results_sha256"] == Evidence.read(ROOT).sha256()


def test_a_changed_number_of_any_profile_is_seen_and_a_changed_verdict_reaches_the_readme(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(copy)
    assert stale_files(copy) == []
    for profile in ("rtx5080", "cpu", "cpu_long"):
        path = copy / "executed" / profile / "results.json"
        before = path.read_text()
        results = json.loads(before)
        quantities = [q for claim in results["07_step_value"]["claims"] for q in claim["quantities"]]
        *_, loss = (q for q in quantities if q["name"] == "loss_to_control")
        loss["value"] += 0.01
        path.write_text(json.dumps(results))
        assert copy / "docs" / "CLAIMS.md" in stale_files(copy), profile
        path.write_text(before)
    path = copy / "executed" / MAIN / "results.json"
    results = json.loads(path.read_text())
    (fits,) = [claim for claim in results["06_gpt2_xl"]["claims"] if claim["kind"] == "fits-16gb"]
    fits["verdict"] = "open"
    path.write_text(json.dumps(results))
    assert copy / "README.md" in stale_files(copy)
    monkeypatch.chdir(copy)
    assert main(["report", "--check"]) == 1
    assert main(["report"]) == 0
    assert stale_files(copy) == []


def test_a_report_replaces_its_own_section_only(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nwhat stood here\n{END}\nafter\n")
    (tmp_path / "executed" / MAIN).mkdir(parents=True)
    results = {"02_gpt2_small_baseline": entry(claim("lr-is-tuned", "holds", Quantity("loss", 3.0)))}
    (tmp_path / "executed" / MAIN / "results.json").write_text(json.dumps(results))
    assert tmp_path / "README.md" in write_report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "**holds**" in text
    assert "what stood here" not in text
    assert write_report(tmp_path) == []


def test_without_results_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `make milestones` first"):
        report_files(tmp_path)


@pytest.mark.parametrize("readme", [None, b"a stranger's, \xff"])
def test_a_readme_without_the_markers_stays_as_it_is(tmp_path: Path, readme: bytes | None) -> None:
    (tmp_path / "executed" / MAIN).mkdir(parents=True)
    (tmp_path / "executed" / MAIN / "results.json").write_text(json.dumps({HYBRID: entry()}))
    if readme:
        (tmp_path / "README.md").write_bytes(readme)
    with pytest.warns(UserWarning, match="lacks the lines") if readme else nullcontext():
        changed = write_report(tmp_path)
    assert {path.name for path in changed} == {"VALIDATION_RESULTS.md", "CLAIMS.md", "RTX_5080_GUIDE.md"}
    assert not readme or (tmp_path / "README.md").read_bytes() == readme


@pytest.mark.parametrize("readme", [f"a\n{BEGIN}\nb\n", f"a\n{END}\nb\n", f"{END}\n{BEGIN}\n"])
def test_a_readme_with_one_marker_is_refused(tmp_path: Path, readme: str) -> None:
    (tmp_path / "executed" / MAIN).mkdir(parents=True)
    (tmp_path / "executed" / MAIN / "results.json").write_text(json.dumps({HYBRID: entry()}))
    (tmp_path / "README.md").write_text(readme)
    with pytest.raises(UserError, match="put both back"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["README.md"]


# What is no results file of ours, and what cannot be written.

GOOD = {HYBRID: entry(pays("a", "holds", 100.0, 900.0, Quantity("loss_to_control", -0.1, -0.2, -0.05, "nats")))}


def changed(*place: str | int, to: Any) -> str:
    """A results file with the value at one place replaced."""
    results = json.loads(json.dumps(GOOD))
    *way, last = (HYBRID, *place)
    inner = results
    for key in way:
        inner = inner[key]
    inner[last] = to
    return json.dumps(results)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ('{"a', "not valid JSON"),
        ("", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "the whole: Input should be an object"),
        ("null", "the whole: Input should be an object, not None"),
        (json.dumps({HYBRID: None}), f"{HYBRID}: Input should be an object"),
        (json.dumps({"../../x <script>": entry()}), "should match pattern"),
        (changed("device", to=None), f"{HYBRID}.device"),
        (changed("claims", to=None), f"{HYBRID}.claims"),
        (changed("claims", 0, "note", to="x"), f"{HYBRID}.claims[0].note"),
        (changed("claims", 0, "verdict", to="maybe"), "verdict: Input should be 'holds'"),
        (changed("claims", 0, "quantities", 0, "value", to="many"), "claims[0].quantities[0].value"),
        (changed("claims", 0, "quantities", 0, "value", to=[1]), "claims[0].quantities[0].value"),
        (changed("claims", 0, "quantities", 0, "value", to=10**400), "its predicted_steps must be a number"),
        (changed("claims", 0, "quantities", 0, "value", to=1e308), "its predicted_steps must be a number"),
        (changed("claims", 0, "quantities", 0, "value", to=float("nan")), "its predicted_steps must be a number"),
        (changed("parameters", "steps", to="many"), "parameters.steps"),
        (changed("tables", to={"memory": [{"arm": "x"}]}), "tables.memory[0].model: Field required"),
        (changed("tables", to={"vram": [{"run": "", "seconds": [1], "used_gb": [], "phase": []}]}), "one length"),
    ],
)
def test_a_file_that_is_no_results_file_is_refused_in_one_line(
    content: str | bytes, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "executed" / MAIN / "results.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    monkeypatch.chdir(project(tmp_path))
    assert main(["report"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hybridlab: {path}: ")
    assert wrong in line
    assert len(line) < len(str(path)) + 400


def test_a_damaged_file_of_recipes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "executed" / MAIN / "recipes.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"recipes": [')
    monkeypatch.chdir(project(tmp_path))
    assert main(["report"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hybridlab: {path}: not valid JSON (")
    assert line.endswith("restore the file with git checkout, or delete it")


def test_what_is_missing_is_left_out_of_a_chart_and_said() -> None:
    def arm(name: str, *ends: float | None) -> Claim:
        return pays(name, "open", 100.0, 900.0, Quantity("loss_to_control", *ends, unit="nats"))

    found = evidence(n07=entry(arm("whole", -0.1, -0.2, -0.05), arm("one seed", 0.3, None, None), arm("lost", None)))
    text = str(charts_of(found)[f"against_control_{MAIN}.png"])
    assert "right is worse (not measured: lost (07))" in text
    assert "whole (07): -0.1000 [-0.2000, -0.0500]" in text
    assert "one seed (07): 0.3000 [0.3000, 0.3000]" in text
    assert "lost (07):" not in text
    assert charts_of(evidence(n07=entry(arm("lost", None)))) == {}


def test_an_arm_whose_loss_is_missing_is_no_second_control() -> None:
    rows = [XL | {"loss_change": None}, LARGE | {"loss_change": 0.1}, CONTROL]
    text = str(charts_of(rows_of(*rows))[f"quality_against_memory_{MEMORY}.png"])
    assert "not measured: fit_16gb, fp32" in text
    assert "no limits: 1 point" in text
    assert "fit_16gb: 1" not in text


def test_counts_that_are_missing_are_no_zeros() -> None:
    loss = Quantity("loss_to_control", 0.5, 0.4, 0.6, "nats")
    unknown = claim("pays", "fails", Quantity("predicted_steps", None, unit="steps"), loss, arm="a")
    known = [Quantity("gradient_steps", 9.0), Quantity("predicted_steps", 1.0), Quantity("time_over_baseline", 0.9)]
    page = validation_document(evidence(n03=entry(unknown, claim("pays", "fails", loss, *known, arm="b"))), {})
    assert "| a | – | – | – | +0.500" in page
    (ran,) = Ran(HYBRID, 1000).findings(evidence(n03=entry(parameters={})))
    assert ran.outcome == "not measured"


@pytest.mark.parametrize("part", ["value", "low", "high", "quantities", "claims"])
def test_documents_are_made_of_results_that_lack_numbers(part: str, tmp_path: Path) -> None:
    """Whatever was not finite stands there as null."""
    root = project(tmp_path)
    for file in ROOT.glob("executed/*/results.json"):
        results = json.loads(file.read_text())
        for entry in results.values():
            for cut in [entry, *entry["claims"], *(q for claim in entry["claims"] for q in claim["quantities"])]:
                if part in cut:
                    cut[part] = [] if isinstance(cut[part], list) else None
        (place := root / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(results))
    assert stale_files(root)


def test_an_entry_that_lacks_a_setting_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    results = json.loads((ROOT / "executed" / MAIN / "results.json").read_text())
    (folder := project(tmp_path) / "executed" / MAIN).mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({name: e | {"parameters": {}} for name, e in results.items()}))
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 2
    assert "lacks 'model': restore its results.json with git checkout" in capsys.readouterr().err


def test_texts_of_results_mark_nothing_in_a_document() -> None:
    evil = "<img src=x> [x](javascript:y) ![x][y] | *a* `b`\n\n# Heading \x1b[31m"
    shown = r"&lt;img src=x&gt; [x]\(javascript:y) ![x]\[y] \| \*a\* \`b\` # Heading \\x1b[31m"
    found = evidence(n03=entry(Claim("pays", evil, "open", (), evil, "id"), device=evil))
    page = validation_document(found, {"against_control.png": evil})
    assert page.count(shown) >= 4
    assert not re.search(r"<img|(?<!\\)\]\(javascript|^# Heading|\x1b", page, re.MULTILINE)
    assert "<img" not in gpu_guide(found, {}) + readme_section(found)


@pytest.mark.parametrize("fails", ["write_bytes", "replace"])
def test_documents_are_replaced_all_or_none(copy: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """Where the third file finds no room, or its name cannot be taken: in use, on Windows."""
    texts = [copy / "README.md", copy / "docs" / "VALIDATION_RESULTS.md", copy / "docs" / "RTX_5080_GUIDE.md"]
    monkeypatch.setattr("hybridlab.report.documents.report_files", lambda _: dict.fromkeys(texts, "new"))
    before, calls = {path: path.read_bytes() for path in texts}, iter(range(100))
    owner, original = (Path, Path.write_bytes) if fails == "write_bytes" else (os, os.replace)

    def third_time(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(owner, fails, third_time)
    with pytest.raises(UserError, match="cannot write"):
        write_report(copy)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in texts} == before
    assert not list(copy.rglob("*.tmp"))


def test_a_picture_that_is_none_is_drawn_anew(memory: Path) -> None:
    write_report(memory)
    picture = memory / "docs" / "images" / f"vram_{MEMORY}_0.png"
    picture.write_bytes(b"half")
    assert write_report(memory) == [picture]


def test_links_lead_to_what_is_there() -> None:
    files = report_files(ROOT)
    for path, content in files.items():
        if isinstance(content, str):
            for link in re.findall(r"\]\(([^)#:]+)\)", content):
                target = (path.parent / link).resolve()
                assert target.exists() or target in files, f"{path.name}: {link}"


# Criteria.


def test_every_kind_of_a_notebook_that_ran_finds_a_claim() -> None:
    """On every arm that a criterion names."""
    committed = Evidence.read(ROOT)
    rules = [rule for group in CRITERIA.values() for criterion in group for rule in criterion.rules]
    ran = [rule for rule in rules if isinstance(rule, Claims) and committed.entry(rule.notebook)]
    wanted = {(rule.notebook, rule.kind, arm) for rule in ran for arm in rule.arms or (None,)}
    missing = {(kind, arm) for notebook, kind, arm in wanted if not committed.claims(notebook, kind=kind, arm=arm)}
    missing -= {(kind, "grown") for kind in ("pays", "depth-pays")}  # these await 03 on a GPU
    assert missing <= {("speedup", "conservative"), ("speedup", "aggressive")}, "these await notebook 01's next run"


def less_time(saved: str, **entries: dict[str, Any]) -> tuple[str, str]:
    """The verdict on so many percent less time, and the page's table of it."""
    names = {"n03": HYBRID, "n08": LADDER, "n10": DEPTH}
    found = Evidence({MAIN: {names[key]: value for key, value in entries.items()}})
    (criterion,) = (c for group in CRITERIA.values() for c in group if c.text.startswith(f"{saved} % less time on"))
    page = validation_document(found, {})
    return criterion.outcome(found), page[page.index(f"**{saved} % less time on") :].partition("\n| **")[0]


def stack_of(ratio: float) -> dict[str, Any]:
    """What notebook 08 published of a stack that is so many times as fast, a tenth to either side."""
    fast = Quantity("stack_time_ratio", ratio, 0.9 * ratio, 1.1 * ratio, "time ratio", bound=15.0)
    rungs = [("vanilla", 100.0, None), ("bf16", 20.0, None), ("tuned rates", 10.0, 4), ("predicted depth", 8.0, 3)]
    table = [{"rung": name, "time to it (s)": seconds, "lengths tried": tried} for name, seconds, tried in rungs]
    return entry(claim("stack-is-fast", "fails", fast), tables={"ladder": table})


ALWAYS = ("conservative", "aggressive", "conservative, unguarded", "aggressive, unguarded")


def test_time_that_other_means_save_is_said_with_what_each_of_them_brought() -> None:
    took = Quantity("time_over_baseline", 0.9, unit="time ratio")
    slow = entry(*(claim("speed", "fails", took, arm=arm) for arm in ALWAYS))
    verdict, rows = less_time("40 to 60", n03=slow, n08=stack_of(12.5))
    assert verdict == "holds, but by other means"
    assert "compilation and graphs (taken to need as many steps) 5.00 times, optimizer and rates 2.00 times" in rows
    assert "predicted depth (one value, without a shallow control) 1.25 times" in rows
    assert "| by other means: the whole stack, against the vanilla FP32 run | holds |" in rows
    assert less_time("40 to 60", n03=slow, n08=stack_of(1.8))[0] == "fails", "its interval reaches below 1/0.6"
    fast = claim("pays", "holds", Quantity("time_to_loss", 1.9, 1.8, 2.0, "time ratio"), arm="grown from 3, 1000 steps")
    untried, rows = less_time("40 to 60", n03=slow, n10=entry(fast))
    assert untried == "fails", "at another learning rate the plain run may need less time"
    assert "predicted depth, grown from 3, 1000 steps | open | time to its loss 1.900 [1.800, 2.000]; learning" in rows
    tried = {"parameters": {"budgets": [1000], "seeds": 3, "batch_size": 8, "block_size": 512, "rate_trials": 4}}
    verdict, rows = less_time("40 to 60", n03=slow, n10=entry(fast, **tried))
    assert verdict == "holds, but by other means"
    assert "| by other means: predicted depth, grown from 3, 1000 steps | holds | time to its loss 1.900" in rows
    assert less_time("60", n03=slow, n10=entry(fast, **tried))[0] == "fails", "1.8 times as fast is no 60 % less"
    unbracketed = replace(fast, quantities=(Quantity("time_to_loss", 1.9, unit="time ratio"),), verdict="open")
    verdict, rows = less_time("40 to 60", n03=slow, n10=entry(unbracketed, **tried))
    assert verdict == "fails", "what rests on a rate at an edge saves nothing yet"
    assert "predicted depth, grown from 3, 1000 steps | open | time to its loss 1.900 [open, open]" in rows


def test_what_the_passes_of_the_presets_exclude_cannot_hold() -> None:
    """Conservative: 25 gradient steps and 4 forward passes for 75 steps; aggressive: 25 and 8 for 100."""
    assert least_time(HybridTrainerConfig.conservative()) == pytest.approx((25 + 4 / 3) / 75)
    assert least_time(HybridTrainerConfig.aggressive()) == pytest.approx((25 + 8 / 3) / 100)
    verdict, rows = less_time("78", n08=stack_of(12.5))
    assert verdict == "cannot hold, but by other means it does"
    assert less_time("78", n08=stack_of(3.0))[0] == "cannot hold"
    assert "25 gradient steps and 8 forward passes, each a third of a step, for 100 steps: at least 0.28 of" in rows
    assert "| by other means: the whole stack, against the vanilla FP32 run | holds |" in rows
    assert less_time("60")[0] == "not run yet"


def test_each_copy_says_whether_the_code_that_trains_is_today_s() -> None:
    now = code_hashes()
    found = evidence(n02=entry(code=now), n03=entry(code=now | {"trains": "0ld"}, git_commit="abc1234"), n04=entry())
    states = [(row["code that trains"], row["code that measures"]) for row in copies(found)]
    assert states == [("today's", "today's"), ("changed since (0ld)", "today's"), ("not recorded", "not recorded")]
    page = validation_document(found, {})
    assert "3 copies on 1 kind of GPU, at 2 commits" in page
    assert "today's in 1, changed since (0ld) in 1, not recorded in 1." in page


def test_a_copy_names_the_parameters_that_have_changed_since(copy: Path) -> None:
    (folder := copy / "params" / MAIN).mkdir(parents=True)
    ran = load_results(copy / "executed" / MAIN / "results.json")[MEMORY]["parameters"]
    (folder / f"{MEMORY}.yaml").write_text(f"seeds: {ran['seeds'] + 1}\nmodel: {ran['model']}\nlonger: true\n")
    found = Evidence.read(copy)
    changed = {row["notebook"]: row["parameters changed since"] for row in copies(found) if row["profile"] == MAIN}
    assert [names for names in changed.values() if names] == ["seeds, longer"]
    assert "| seeds, longer |" in validation_document(found, {})


def test_a_figure_that_was_measured_more_than_once_stands_with_all_its_values() -> None:
    ratio = Quantity("step_ratio", 1.85, 1.8, 1.9, "time ratio", bound=2.0)
    earlier = {"slow.step_ratio": {"value": 1.33, "low": 1.3, "high": 1.4}, "slow.other": {"value": 3.0}}
    repeat = {"git_commit": "abc1234", "device": "another GPU", "figures": earlier}
    found = evidence(n04=entry(replace(claim("slow", "holds", ratio), arm=""), repeats=[repeat], git_commit="def5678"))
    page = validation_document(found, {})
    values = "1.850 [1.800, 1.900] (def5678, a GPU); 1.330 [1.300, 1.400] (abc1234, another GPU)"
    assert f"{values} | 2 | 1.330 | 1.850 |" in page
    loss = Quantity("loss_to_control", -0.2, -0.3, -0.1, "nats", bound=0.0)
    grew = claim("pays", "holds", loss, Quantity("cost_in_full_steps", 475.0, unit="steps"), arm="grown")
    again = {"git_commit": "abc1234", "device": "a GPU", "figures": {"grown-pays.loss_to_control": {"value": -0.1}}}
    page = validation_document(evidence(n03=entry(grew, repeats=[again])), {})
    assert "| grown (predicted depth): loss against a plain run of as much computation |" in page
    diverged = again | {"figures": {"grown-pays.loss_to_control": {"value": None, "low": None, "high": None}}}
    page = validation_document(evidence(n03=entry(grew, repeats=[diverged])), {})
    assert "measured more than once, with" not in page, "there is one value to show"
    assert "measured more than once, with" not in validation_document(
        evidence(n04=entry(claim("slow", "holds", ratio))), {}
    )


def test_what_was_not_run_is_not_judged() -> None:
    nothing = Evidence({MAIN: {}})
    outcomes = Counter(criterion.outcome(nothing) for group in CRITERIA.values() for criterion in group)
    assert outcomes.pop("cannot hold") == 1, "what arithmetic excludes needs no run"
    assert set(outcomes) == {"not run yet"}


@pytest.mark.parametrize(
    ("verdicts", "need", "outcome"),
    [
        (["holds", "holds"], "all", "holds"),
        (["holds", "open"], "all", "open"),
        (["open", "fails"], "all", "fails"),
        (["fails", "holds"], "any", "holds"),
        (["fails", "open"], "any", "open"),
        (["fails", "fails"], "any", "fails"),
        (["fails", None], "all", "fails"),
        (["holds", None], "all", "open"),
        (["open", None], "all", "open"),
        (["predicted nothing", None], "all", "not measured"),
        ([None, None], "all", "not measured"),
        (["holds", None], "any", "holds"),
        (["fails", None], "any", "open"),
        ([None, None], "any", "not measured"),
    ],
)
def test_a_criterion_is_as_good_as_its_claims(verdicts: list[Verdict | None], need: Any, outcome: str) -> None:
    """None: the notebook ran without the arm."""
    arms = {f"arm{i}": verdict for i, verdict in enumerate(verdicts)}
    found = evidence(n03=entry(*(quality(arm, verdict) for arm, verdict in arms.items() if verdict)))
    assert Criterion("q", (Claims(HYBRID, "quality", tuple(arms)),), need).outcome(found) == outcome


def test_a_notebook_that_has_not_run_leaves_open_what_others_measured() -> None:
    unrun, measured = Claims(MEMORY, "quality"), Claims(HYBRID, "quality")
    for verdict, outcome in (("holds", "open"), ("fails", "fails"), ("predicted nothing", "not run yet")):
        found = evidence(n03=entry(quality("conservative", verdict)))
        assert Criterion("q", (measured, unrun)).outcome(found) == outcome


def side_by_side(device: str, value: float, spread: float) -> dict[str, Any]:
    """What the benchmark of loops side by side wrote on one machine."""
    figure = {"value": value, "low": value - spread, "high": value + spread, "rests_on": {"device": device}}
    return {"figures": {"library_over_nanogpt_step": figure}}


def test_a_step_beside_other_loops_has_to_hold_on_every_machine() -> None:
    ratio = Quantity("library_over_nanogpt_step", 0.6, 0.55, 0.65, "time ratio", bound=0.75)
    entries = {MAIN: {LADDER: entry(claim("step-beside-nanogpt", "holds", ratio), device="GPU A")}}
    (criterion,) = (c for c in CRITERIA[OURS] if "nanoGPT" in c.text)
    own = side_by_side("GPU A", 0.6, 0.05)
    for others, outcomes in (
        ([own], ["holds"]),
        ([own, side_by_side("GPU B", 0.74, 0.05)], ["holds", "open"]),
        ([own, side_by_side("GPU B", 0.74, 0.05), side_by_side("GPU A", 0.9, 0.05)], ["holds", "open", "fails"]),
    ):
        found = Evidence(entries, side_by_side=others)
        assert [finding.outcome for finding in criterion.findings(found)] == outcomes
        assert criterion.outcome(found) == outcomes[-1]
    assert "| GPU B (docs/experiments) | open | the library's step over nanoGPT's 0.740" in validation_document(
        found, {}
    )
    assert criterion.outcome(Evidence({MAIN: {}})) == "not run yet"


@pytest.mark.parametrize(
    ("verdict", "value", "low", "high", "outcome"),
    [
        ("holds", 0.005, 0.001, 0.009, "holds"),
        ("holds", 0.005, -0.01, 0.015, "open"),
        ("open", 0.03, 0.02, 0.04, "fails"),
        ("fails", 0.005, 0.001, 0.009, "fails"),
        ("holds", 0.005, 0.001, None, "open"),
        ("holds", 0.03, None, 0.04, "open"),
    ],
)
def test_a_tighter_bound_is_held_against_the_whole_interval(
    verdict: Verdict, value: float, low: float | None, high: float | None, outcome: str
) -> None:
    found = evidence(n03=entry(quality("arm", verdict, value, low, high)))
    assert [f.outcome for f in Claims(HYBRID, "quality", below=0.01).findings(found)] == [outcome]


def test_an_arm_that_diverged_fails_a_tighter_bound_too() -> None:
    """Its loss is no number, which is not the same as one that was not measured."""
    diverged = quality("arm", "fails", math.inf, math.inf, math.inf).record()
    diverged["quantities"][0]["value"] = None
    found = evidence(n03=entry() | {"claims": [diverged]})
    assert [f.outcome for f in Claims(HYBRID, "quality", below=0.01).findings(found)] == ["fails"]


def test_a_tighter_bound_decides_nothing_where_too_little_was_trained() -> None:
    one_seed = {"steps": 1000, "seeds": 1, "batch_size": 8, "block_size": 512}
    found = evidence(n03=entry(quality("arm", "holds", 0.03), parameters=one_seed))
    assert [f.outcome for f in Claims(HYBRID, "quality", below=0.01).findings(found)] == ["open"]


def test_a_run_that_was_shorter_than_the_plan_s_does_not_count() -> None:
    short = entry(parameters={"steps": 500})
    assert [f.outcome for f in Ran(HYBRID, 1000).findings(evidence(n03=short))] == ["fails"]
    assert [f.outcome for f in Ran(HYBRID, 1000).findings(evidence(n03=entry()))] == ["holds"]


def test_an_arm_that_predicted_nothing_is_said_to_be_the_baseline() -> None:
    found = evidence(n03=entry(pays("arm", "fails", 0.0, 1000.0), quality("arm", "holds")))
    (finding,) = Claims(HYBRID, "quality", ("arm",)).findings(found)
    assert finding.outcome == "predicted nothing"
    page = validation_document(found, {})
    assert "| *predicted nothing* | predicted steps 0; gradient steps 1000 |" in claims_document(found)
    assert "| arm | *predicted nothing* |" in page


# Memory, from the tables that notebooks publish.


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which the memory notebook has published."""
    monkeypatch.chdir(project(tmp_path))
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    tables = {"memory": MEMORY_ROWS, "vram": vram_rows({"everything": vram()})}
    claims = [claim("predicted-within-10-percent", "holds", arm="everything")]
    where = {"record": {"parameters": ENOUGH}, "folder": f"executed/{MAIN}"}
    publish(MEMORY, claims=claims, summary=[], tables=tables, **where)
    return tmp_path


def test_published_tables_become_tables_and_pictures(memory: Path) -> None:
    changed = {path.name for path in write_report(memory)}
    pictures = {f"memory_breakdown_{MEMORY}.png", f"quality_against_memory_{MEMORY}.png", f"vram_{MEMORY}_0.png"}
    assert pictures <= changed
    results = (memory / "docs" / "VALIDATION_RESULTS.md").read_text()
    assert all(f"images/{name}" in results for name in pictures)
    assert "| small | everything | 1.50 GB | 1.53 GB | 0.980 | 1.80 GB | [04]" in results
    guide = (memory / "docs" / "RTX_5080_GUIDE.md").read_text()
    assert guide.count("| **take this** |") == 1
    assert "| small | bf16 | 6.00 GB | yes | 28.0 ms | +0.002 [-0.003, +0.006] |" in guide
    assert "| 200 steps, 3 seeds, to a loss of 3.90 | **take this** |" in guide


def test_only_what_fits_and_keeps_the_quality_is_recommended() -> None:
    best = {"arm": "a", "peak_memory_bytes": 13e9, "loss_change": 0.001, "step_ms": 10.0}
    assert recommended([best | {"peak_memory_bytes": 14e9}]) is None
    assert recommended([best | {"loss_change": 0.02}]) is None
    assert recommended([best | {"loss_change": None}]) is None
    assert recommended([best | {"step_ms": 11.0}, best]) == best


ENOUGH = {"steps": 200, "seeds": 3, "batch_size": 8, "block_size": 512}


@pytest.mark.parametrize(
    ("doubt", "parameters"),
    [({"loss_change_high": None}, ENOUGH), ({"loss_change_high": 0.025}, ENOUGH), ({}, ENOUGH | {"steps": 40})],
)
def test_what_is_recommended_without_certainty_says_so(
    memory: Path, doubt: dict[str, Any], parameters: dict[str, Any]
) -> None:
    """With one seed, an interval that reaches beyond 2 %, or too few steps for a verdict."""
    rows = [row | (doubt if row["arm"] == "bf16" else {}) for row in MEMORY_ROWS]
    where = {"record": {"parameters": parameters}, "folder": f"executed/{MAIN}"}
    publish(MEMORY, claims=[], summary=[], tables={"memory": rows}, **where)
    write_report(memory)
    guide = (memory / "docs" / "RTX_5080_GUIDE.md").read_text()
    (line,) = [line for line in guide.splitlines() if "take this" in line and line.startswith("|")]
    assert line.startswith("| small | bf16 |")
    assert line.split("|")[-3].strip() == "**take this, watch its loss**"


def rows_of(*rows: dict[str, Any], **parameters: Any) -> Evidence:
    """Evidence of the memory notebook with these rows of its table."""
    return evidence(n04=entry(tables={"memory": list(rows)}, parameters=parameters))


XL = {
    "arm": "fit_16gb",
    "model": "xl",
    "peak_memory_bytes": 13e9,
    "step_ms": 200.0,
    "validation_loss": 4.0,
    "parts": {"weights": 6e9},
}
LARGE = XL | {"arm": "no limits", "peak_memory_bytes": 27e9}
CONTROL = XL | {"arm": "fp32", "peak_memory_bytes": 42e9, "loss_change": None}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([XL | {"loss_change": None}], "**xl** fits with fit_16gb; its loss could not be judged on this GPU"),
        ([XL | {"loss_change": None}, LARGE | {"loss_change": None}], "**xl** fits with fit_16gb; its loss could not"),
        (
            [XL | {"loss_change": 0.6}, LARGE | {"loss_change": 0.0}, CONTROL],
            "no arm stayed below 14 GB *and* within 2 %",
        ),
        ([LARGE | {"loss_change": 0.0}, CONTROL], "no arm that was measured stayed below 14 GB"),
    ],
)
def test_a_model_without_a_recommendation_says_why(rows: list[dict[str, Any]], words: str) -> None:
    text = by_model(rows_of(*rows))
    assert words in text
    assert text.count("**xl**") == 1
    assert "take this" not in text


@pytest.mark.parametrize(("trains", "told"), [("4ef0d9fd", True), ("0123abcd", False)])
def test_rows_of_a_preset_that_has_changed_since_say_what_it_was(trains: str, told: bool) -> None:
    found = evidence(n04=entry(tables={"memory": [XL | {"loss_change": 0.001}, CONTROL]}, code={"trains": trains}))
    assert ("The rows `fit_16gb` (former) of xl ran before that preset had 24-bit weights" in by_model(found)) == told


def test_what_a_loss_was_judged_over_names_the_control_s_loss() -> None:
    text = by_model(rows_of(XL | {"loss_change": 0.001}, CONTROL | {"validation_loss": 6.7359}, steps=40, seeds=3))
    assert "| 40 steps, 3 seeds, to a loss of 6.74 | **take this, watch its loss** |" in text
    assert "to a loss" not in by_model(rows_of(XL | {"loss_change": None}, steps=40, seeds=3))


def test_the_seeds_of_a_loss_are_those_of_its_own_claim() -> None:
    counted = replace(quality("fit_16gb", "holds"), quantities=(Quantity("loss_change", 0.001), Quantity("seeds", 3)))
    row = XL | {"loss_change": 0.001, "loss_change_high": 0.002}
    parameters = {"steps": 200, "seeds": 4, "batch_size": 8, "block_size": 512}
    tables = {"memory": [row, row | {"arm": "few"}, CONTROL]}
    text = by_model(evidence(n04=entry(counted, tables=tables, parameters=parameters)))
    assert "| 200 steps, 3 seeds, to a loss of 4.00 | **take this** |" in text
    assert "| 200 steps, 4 seeds, to a loss of 4.00 |  |" in text


@pytest.mark.parametrize(
    ("ratios", "taken", "alike"),
    [
        ((1.3, 1.48, 1.65), "fit_16gb", True),
        ((1.3, 1.31, 1.30), "24-bit weights", False),
        ((1.0, 1.7, 1.3), "24-bit weights", True),
        ((1.7, 1.71, 1.72), "fit_16gb", False),
    ],
)
def test_the_fastest_arm_is_so_over_all_seeds_and_what_is_not_told_apart_is_named(
    ratios: tuple[float, ...], taken: str, alike: bool
) -> None:
    """As older results have it, whose claims name no arm: fit_16gb takes 1.4 of the step without limits."""
    loss = {"loss_change": 0.001, "loss_change_high": 0.002}
    rows = [XL | loss | {"step_ms": 140.0}, XL | loss | {"arm": "24-bit weights", "step_ms": 100 * ratios[0]}, CONTROL]
    steps = {"step-time": (1.41, 1.43, 1.36), "few-bits-step-time": ratios}
    claims = [claim(kind, "open", Quantity("step_ratio", 1.4, per_seed=seeds)) for kind, seeds in steps.items()]
    text = by_model(evidence(n04=entry(*claims, tables={"memory": rows})))
    (line,) = [line for line in text.splitlines() if "take this" in line]
    assert line.startswith(f"| xl | {taken} |")
    assert ("not told apart from that of" in line) is alike


def test_the_estimated_time_is_shown_where_rows_have_it() -> None:
    row = XL | {"loss_change": 0.001}
    assert "est. on a 5080" not in by_model(rows_of(row, CONTROL))
    text = by_model(rows_of(row | {"estimated_5080_ms": 412.3}, CONTROL))
    assert "| step time | est. on a 5080 | loss" in text
    assert "| 200.0 ms | 412 ms |" in text
    assert "| 200.0 ms | – |" in text


@pytest.mark.parametrize(("device", "shown"), [("NVIDIA H100 80GB HBM3", "at least 200 ms"), ("RTX 4080", "150 ms")])
def test_an_estimate_below_what_a_faster_gpu_took_is_no_estimate(device: str, shown: str) -> None:
    rows = [XL | {"loss_change": 0.001, "estimated_5080_ms": 150.0}, CONTROL]
    assert f"| 200.0 ms | {shown} |" in by_model(evidence(n04=entry(tables={"memory": rows}, device=device)))


def test_where_no_control_ran_no_loss_is_drawn() -> None:
    assert f"quality_against_memory_{MEMORY}.png" not in charts_of(rows_of(XL | {"loss_change": None}))


@pytest.mark.parametrize("device", ["GeForce RTX 5080", "H200 as an emulated 16 GB card"])
def test_only_an_emulated_card_is_excused(device: str) -> None:
    guide = gpu_guide(evidence(n02=entry(), n03=entry(device=device)), {})
    assert ("## What we could only emulate" in guide) == ("emulated" in device)
    assert device.replace(" card", " GPU") in guide
    assert "A GB is decimal" in guide


def test_ratios_of_speeds_come_from_the_data_sheets() -> None:
    guide = gpu_guide(evidence(n03=entry(device="an emulated GPU")), {})
    for card in (GPUS["h100"], GPUS["rtx5080"]):
        assert f"{card.bfloat16_flops / card.float32_flops:.1f} times ({card.name})" in guide


def test_the_text_climbs_the_planner_s_ladder() -> None:
    """Each option of `suggest.FEATURES` by a word of its name, and what the text calls it."""
    words = {
        "autocast": "`mixed_precision`",
        "chunks": "`loss_chunk_tokens`",
        "path": "`path_device=",
        "checkpointing of every": "(`checkpointing`)",
        "int8": "`optimizer_state=",
        "inside backward": "(`step_in_backward`)",
        "inputs": '`inputs="host"`',
        "state on the host": "(`state_on_host`)",
        "bf16 weights": "`weights=",
        "micro batches": "(`gradient_accumulation`)",
    }
    options = [next(key for key in reversed(words) if key in name) for name, _ in FEATURES]
    assert list(dict.fromkeys(options)) == list(words)
    guide = gpu_guide(evidence(n03=entry()), {})
    order = guide[guide.index("## When it does not fit") :]
    places = [order.index(text) for text in words.values()]
    assert places == sorted(places)


def test_prediction_is_advised_only_where_it_was_shown_to_pay() -> None:
    idle, lost = pays("conservative", "holds", 0.0, 1000.0), pays("aggressive", "fails", 100.0, 900.0)
    guide = gpu_guide(evidence(n03=entry(idle, lost)), {})
    assert "leave it off" in guide
    guide = gpu_guide(evidence(n03=entry(idle, replace(lost, verdict="holds"))), {})
    assert "leave it off" not in guide
    assert "switch it on only as here: aggressive (prediction preset)." in guide


def test_what_prediction_takes_of_the_gpu_is_shown_where_it_was_claimed() -> None:
    loss = Quantity("loss_to_control", 0.5, 0.4, 0.6, "nats")
    predicted = pays("aggressive", "fails", 100.0, 900.0, loss, Quantity("step_value", -0.5, unit="steps"))
    assert "peak VRAM | pays" not in gpu_guide(evidence(n03=entry(predicted)), {})
    vram = claim("vram", "holds", Quantity("peak_memory", 4.9e9, unit="bytes"), arm="aggressive")
    guide = gpu_guide(evidence(n03=entry(predicted, vram)), {})
    assert "| peak VRAM | pays |" in guide
    assert "| +0.500 [+0.400, +0.600] | 0.01 | 4.90 GB | **fails** |" in guide


def test_older_verdicts_are_corrected_for_all_arms_and_lose_their_step_value() -> None:
    """From their intervals: alone 0.035 is below 5 %, of two arms it is not."""
    seeds = Quantity("seeds", 1)  # of the step value: the others predicted nothing
    counts = seeds, Quantity("predicted_steps", 100.0, unit="steps"), Quantity("step_value", 0.7, unit="steps")
    loss = Quantity("loss_to_control", -0.03, -0.03 - 0.0248, -0.03 + 0.0248, "nats")
    first, second = (claim("pays", "holds", loss, *counts, arm=arm) for arm in ("a", "b"))
    (alone,) = evidence(n07=entry(first)).claims(kind="pays")
    assert alone.verdict == "holds"
    assert alone.value("p_value") == pytest.approx(0.0353, abs=1e-3)
    assert alone.quantity("step_value") is None
    for one in evidence(n07=entry(first, second)).claims(kind="pays"):
        assert (one.verdict, one.value("arms_corrected_for"), one.value("seeds")) == ("open", 2, 3)
        assert one.value("p_value") == pytest.approx(0.0706, abs=2e-3)


@pytest.mark.parametrize(
    ("parameters", "lacks"),
    [
        ({"steps": 80, "seeds": 3, "batch_size": 8, "block_size": 512}, "80 of 200 steps"),
        ({"steps": 1000, "batch_size": 8, "block_size": 512}, "1 of 3 seeds"),
        ({"steps": 250, "seeds": 3, "batch_size": 8, "block_size": 32}, "64000 of 100000 tokens"),
        ({"steps": 40, "reference_steps": 500, "seeds": 3, "batch_size": 8, "block_size": 512}, ""),
    ],
)
def test_a_claim_on_losses_is_open_where_too_little_was_trained(parameters: dict[str, Any], lacks: str) -> None:
    claims = quality("arm", "holds"), claim("stable", "holds", arm="arm")
    on_losses, other = evidence(n04=entry(*claims, parameters=parameters)).claims()
    assert on_losses.verdict == ("open" if lacks else "holds")
    assert other.verdict == "holds"
    assert f"too little to tell: {lacks}" in on_losses.text or not lacks


@pytest.mark.parametrize("kind", ["lr-is-tuned", "beats-vanilla"])
def test_an_older_rate_of_one_seed_is_not_shown_to_be_tuned(kind: str) -> None:
    one_seed = {"steps": 1000, "batch_size": 8, "block_size": 512}
    (tuned,) = evidence(n02=entry(claim(kind, "holds", Quantity("loss", 3.9)), parameters=one_seed)).claims()
    assert (tuned.verdict, tuned.rests_on_too_little) == ("open", True)


@pytest.mark.parametrize(
    ("name", "verdict", "judged_as"),
    [
        ("loss_to_shallow", "holds", "open"),
        ("loss_to_shallow", "fails", "fails"),
        ("loss_to_shallow_control", "holds", "holds"),
    ],
)
def test_that_depth_pays_is_open_where_the_shallow_model_had_less_computation(
    name: str, verdict: Verdict, judged_as: Verdict
) -> None:
    against = Quantity(name, -0.1, -0.2, -0.05, "nats", bound=0.0)
    found = Evidence({MAIN: {"10_predicted_depth": entry(claim("depth-pays", verdict, against, arm="grown"))}})
    (judged,) = found.claims("10_predicted_depth", kind="depth-pays")
    assert judged.verdict == judged_as
    assert ("no shallow run had as much computation" in judged.text) == (verdict != judged_as)


def test_one_ratio_of_times_without_an_interval_decides_nothing() -> None:
    ratio = Quantity("null_over_bare", 1.001, unit="time ratio", bound=1.02)
    thin, sure = claim("trainer-is-thin", "holds", ratio), claim("thin", "holds", replace(ratio, low=0.99, high=1.01))
    older, newer = evidence(n02=entry(thin, sure)).claims()
    assert (older.verdict, newer.verdict) == ("open", "holds")
    assert "one ratio, without an interval" in older.text


def test_divergences_of_every_model_count_where_the_plan_wants_none_at_all() -> None:
    (stable,) = [it for it in CRITERIA[OVERALL[0]] if it.text == "Training stable, zero divergences"]
    names = ("01_mnist_cnn", HYBRID, "06_gpt2_xl")
    arms = [f"{preset}{suffix}" for preset in ("conservative", "aggressive") for suffix in ("", ", unguarded")]
    good = {name: entry(*(claim("stable", "holds", arm=arm) for arm in arms)) for name in names[:2]}
    good |= {names[2]: entry(claim("stable-1000-steps", "holds"))}
    assert stable.outcome(Evidence({MAIN: good})) == "holds"
    for name in names[:2]:
        bad = entry(*(claim("stable", "fails" if "unguarded" in arm else "holds", arm=arm) for arm in arms))
        assert stable.outcome(Evidence({MAIN: good | {name: bad}})) == "fails"


def test_the_plan_s_estimates_stand_beside_what_was_measured() -> None:
    rows = [row | {"model": "small"} for row in MEMORY_ROWS]
    fp32 = rows[0] | {"arm": "fp32", "measured_allocated_bytes": 10e9, "peak_memory_bytes": 4.9e9}
    mixed = fp32 | {"arm": "mixed precision", "measured_allocated_bytes": 5.4e9}
    parts = fp32 | {"arm": "gradient accumulation", "measured_allocated_bytes": 3e9}
    found = evidence(n04=entry(tables={"memory": [fp32, mixed, parts]}))
    outcomes = {finding.about: finding.outcome for finding in Savings(("small",)).findings(found)}
    assert outcomes["mixed precision"] == "holds", "46 % where 50 % was expected"
    assert outcomes["gradient accumulation"] == "fails", "70 % where 30 % was expected"
    assert outcomes["predict-aware, in Predict"] == "not measured"
    page = validation_document(found, {})
    assert "| small | mixed precision | 1.00 GB | 5.40 GB | 50 % | 46.0 % | holds |" in page
    (peak,) = Peak(MEMORY, "fp32", 5e9).findings(found)
    assert (peak.outcome, peak.words) == ("holds", "peak memory 4.90 GB")


FASTEST = {"model": "small", "vocab_size": 50257, "block_size": 512, "batch_size": 8, "steps": 500, "muon_lr": 0.0012}


@pytest.mark.parametrize(
    ("muon", "verdict", "found"),
    [("47.22 [31.57, open]", "holds", True), ("47.22 [31.57, open]", "open", False), ("open", "holds", False)],
)
def test_the_readme_says_first_what_to_run_beside_its_control_and_as_code(
    muon: str, verdict: Verdict, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridlab.notebook.Session", lambda config, name: SimpleNamespace(config=config))
    times = {"bf16": "2.38", "compiled": "3.02", "CUDA graph": "7.08", "Muon": muon}
    rungs = [{"rung": rung, "vanilla's time over it": ratio} for rung, ratio in times.items()]
    hybrids = pays("aggressive", "fails", 100.0, 900.0), pays("conservative", "holds", 0.0, 1000.0)
    lost = entry(*hybrids, parameters={"model": "small", "steps": 1000})
    ran = {"tables": {"ladder": rungs}, "parameters": FASTEST, "device": "NVIDIA H100 80GB HBM3"}
    ladder = entry(claim("stack-is-fast", verdict), **ran)
    section = readme_section(Evidence({MAIN: {HYBRID: lost, LADDER: ladder}}))
    assert section.startswith("## What should I run?")
    assert "of 1 setting on a GPU (1 of GPT-2 small over 1,000 steps), none was shown to end lower than its" in section
    assert ("final loss of the control, an FP32 run of 500 steps, 47.2 [31.6, open] times as fast" in section) is found
    assert ("small and one NVIDIA H100 80GB HBM3 this reached" in section) is found
    h100, rtx5080 = (GPUS[name].bfloat16_flops / GPUS[name].float32_flops for name in ("h100", "rtx5080"))
    ratios = f"bf16 is {h100:.1f} times (H100 SXM 80GB) and {rtx5080:.1f} times (GeForce RTX 5080) as fast as FP32."
    assert (ratios in section) is found
    for code in re.findall("```python\n(.*?)for result in", section, re.DOTALL):
        names: dict[str, Any] = {}
        exec(code, names)
        config = names["session"].config
        assert (config.task.block_size, config.optimizer.lr, config.keep_weights) == (512, 0.0012, True)
    assert ("```python" in section) is found


def test_the_readme_names_the_stack_s_tuned_control_and_the_shallow_model_that_is_better_still() -> None:
    times = {"bf16": "2.38", "compiled": "3.02", "CUDA graph": "7.08", "tuned rates": "25.18 [18.84, 31.76]"}
    rungs = [{"rung": rung, "vanilla's time over it": ratio} for rung, ratio in times.items()]
    muon = {"rung": "Muon", "vanilla's time over it": "47.22 [31.57, open]", "steps to the loss": "54 [open, 81]"}
    ladder = entry(claim("stack-is-fast", "holds"), tables={"ladder": [*rungs, muon]}, parameters=FASTEST)
    for verdict in ("fails", "holds"):
        depth = entry(claim("depth-pays", verdict, arm="grown"), parameters={"budgets": [1000]})
        section = " ".join(readme_section(Evidence({MAIN: {LADDER: ladder, DEPTH: depth}})).split())
        assert "in 54 [open, 81] steps, 47.2 [31.6, open] times as fast (" in section
        assert "AdamW at a tuned rate, in the same formats, was 25.2 [18.8, 31.8] times as fast" in section
        assert ("the shallow model that never grows ends lower still" in section) is (verdict == "fails")


def test_the_readme_says_which_difference_could_have_been_shown() -> None:
    """With three seeds: at the bound, the p-value that Holm makes of it for 15 arms is 5 %."""
    loss = Quantity("loss_to_control", 0.01, -0.02, 0.04, "nats")
    counts = Quantity("seeds", 3), Quantity("predicted_steps", 10.0, unit="steps")
    corrected = Quantity("p_value", 0.5, unit="probability"), Quantity("arms_corrected_for", 15)
    setting = claim("pays", "open", loss, *counts, *corrected, arm="linear")
    least = least_difference(setting)
    assert least is not None
    standard_error = 0.03 / scipy.stats.t.ppf(0.975, 2)
    assert 15 * 2 * scipy.stats.t.sf(least / standard_error, 2) == pytest.approx(0.05)
    ran = {"model": "small", "steps": 230, "seeds": 3, "batch_size": 4, "block_size": 512}
    section = " ".join(readme_section(evidence(n07=entry(setting, parameters=ran))).split())
    assert "With 3 seeds each, and corrected for all settings of a study (Holm), only a difference above " in section
    assert f"above {least:.2f} nats would have been shown" in section
    assert "- GPT-2 small, 230 steps of 4 x 512 tokens, a GPU (" in section


def test_one_percent_of_a_loss_is_told_in_perplexity_with_what_stands_for_fp32() -> None:
    loss = Quantity("loss_change", 0.01, 0.005, 0.015, "nats", bound=0.057)
    memory = claim("quality", "holds", loss, arm="fit_16gb")
    stands = claim("tf32-stands-for-fp32", "open", Quantity("difference_in_loss", 0.0, unit="nats"))
    asked = {"steps": 1000, "reference_steps": 200, "seeds": 3, "batch_size": 8, "block_size": 512}
    found = Evidence({MAIN: {"06_gpt2_xl": entry(memory, stands, parameters=asked)}})
    percent = 100 * math.expm1(0.057)
    section, page = readme_section(found), validation_document(found, {})
    assert (
        f"XL's losses are compared after 200 steps; 1 % of them is {percent:.1f} % of the perplexity. Whether TF32 "
        "stands for strict FP32 there: open." in section
    )
    assert "earlier `fit_16gb()`" not in section
    former = Evidence({MAIN: {"06_gpt2_xl": entry(memory, parameters=asked, code={"trains": FORMER_PRESETS[0]})}})
    assert "XL ran with an earlier `fit_16gb()`: float32 weights" in readme_section(former)
    assert f"of its perplexity: {percent:.1f} % ([06](../" in page
    (finding,) = Claims("06_gpt2_xl", "quality", below=0.02).findings(found)
    assert finding.outcome == "holds"
    assert finding.words.endswith(
        "; after 200 steps; the control is FP32 in TF32, whether that stands for strict FP32: open"
    )
    without = Evidence({MAIN: {"06_gpt2_xl": entry(memory)}})
    assert "TF32" not in Claims("06_gpt2_xl", "quality").findings(without)[0].words


def test_criteria_that_repeat_each_other_count_once_and_ours_not_among_the_plan_s() -> None:
    plan = [criterion for title, group in CRITERIA.items() if title not in (IN_DEPTH, OURS) for criterion in group]
    once = {(criterion.rules, criterion.need) for criterion in plan}
    assert len(once) < len(plan)
    assert f"The plan's {len(once)} criteria" in at_a_glance(Evidence({MAIN: {}}))


def test_a_project_without_results_of_a_gpu_is_told_so_and_shows_no_picture_that_is_not_there() -> None:
    found = Evidence({"cpu": {HYBRID: entry(pays("conservative", "fails", 10.0, 90.0))}})
    assert f"{MAIN}: nothing has run yet." in validation_document(found, {})
    assert "images/" not in readme_section(found)


def test_presets_that_predicted_nothing_say_so_on_mnist() -> None:
    found = Evidence({MAIN: {"01_mnist_cnn": entry(pays("conservative", "fails", 0.0, 1800.0))}})
    (conservative,) = Claims("01_mnist_cnn", "speedup", ("conservative",)).findings(found)
    (aggressive,) = Claims("01_mnist_cnn", "speedup", ("aggressive",)).findings(found)
    assert (conservative.outcome, aggressive.outcome) == ("predicted nothing", "not measured")


def test_an_arm_that_predicted_nothing_stands_with_what_asking_cost_it() -> None:
    cost = Quantity("time_over_baseline", 4.4, 4.3, 4.5, "time ratio")
    page = validation_document(evidence(n07=entry(pays("rssm, conservative", "fails", 0.0, 300.0, cost))), {})
    assert "rssm, conservative (07; 4.40 times the baseline's time)" in page
    earlier = pays("conservative", "fails", 0.0, 1000.0), claim("speed", "open", cost, arm="conservative")
    assert "(03; 4.40 times the baseline's time)" in validation_document(evidence(n03=entry(*earlier)), {})


def test_the_documents_tell_how_well_acceptance_was_told() -> None:
    """Pooled over runs; a bin of few proposals says nothing."""
    few = {"confidence": 0.75, "accepted_share": 1.0, "proposals": 2}
    sure = {"acceptance_probability": 0.9, "accepted_share": 0.5, "proposals": 24}
    known = {"acceptance_probability": 0.1, "accepted_share": 0.0, "proposals": 10}
    rows = [{"reliability": [few]}, {"acceptance_reliability": [sure, known]}, {"acceptance_reliability": [known]}]
    page = validation_document(evidence(n07=entry(tables={"runs": rows})), {})
    assert "| rtx5080 | confidence | 0.75 | 1.00 | 2 | too few |" in page
    assert "| rtx5080 | acceptance probability | 0.90 | 0.50 | 24 | no |" in page
    assert "| rtx5080 | acceptance probability | 0.10 | 0.00 | 20 | yes |" in page


def test_a_jump_s_time_stands_in_the_documents_with_its_proposal() -> None:
    times = [Quantity(n, v, unit="ms") for n, v in (("whole_jump", 1950.0), ("of_that_proposing", 1070.0))]
    jumping = claim("transition", "holds", *times, Quantity("gradient_step", 325.0, unit="ms"), arm="all away")
    page = validation_document(evidence(n04=entry(jumping)), {})
    assert "| all away | 1950.000 ms | 1070.000 ms | 6.0 | [04]" in page


def test_presets_of_one_name_are_told_apart_in_every_claim() -> None:
    same = claim("stable", "holds", arm="conservative")
    every = claims_document(evidence(n03=entry(same), n04=entry(same)))
    assert "| conservative (prediction preset): a sentence |" in every
    assert "| conservative (memory preset): a sentence |" in every


def test_open_ends_are_told() -> None:
    assert interval(0.5, 0.1, None) == "+0.500 [+0.100, open]"
    assert interval(None, 1.0, None) == "open [+1.000, open]"
    assert quantities_in_words([Quantity("step_value", None, unit="steps")]) == "worth of a predicted step open"


def test_a_headline_on_arms_that_predicted_nothing_says_so() -> None:
    conservative, aggressive = (pays(arm, "fails", 0.0, 1000.0) for arm in ("conservative", "aggressive"))
    assert readme_section(evidence(n03=entry(conservative, aggressive))).count("*predicted nothing*") == 1
    predicted = evidence(n03=entry(pays("conservative", "fails", 10.0, 1000.0), aggressive))
    criterion = Criterion("q", (Claims(HYBRID, "pays", ("conservative", "aggressive")),))
    assert headline(criterion, predicted)["verdict"] == "**fails**"
    assert "predicted nothing" not in readme_section(evidence(n03=entry()))


def test_arms_of_one_name_are_told_apart_where_a_criterion_mixes_notebooks() -> None:
    same = quality("conservative", "holds")
    text = validation_document(evidence(n03=entry(same), n04=entry(same)), {})
    mixed = text[text.index("### Overall: must have") :]
    assert "| small, hybrid: conservative (prediction preset) |" in mixed
    assert "| small, memory: conservative (memory preset) |" in mixed
    assert "| small, " not in text[: text.index("### Overall: must have")]


def test_a_picture_is_known_by_its_numbers(memory: Path) -> None:
    chart = charts_of(Evidence.read(memory))[f"vram_{MEMORY}_0.png"]
    assert shows(signed(chart), chart)
    assert not shows(signed(chart), replace(chart, title="another"))
    assert not shows(chart.png(), chart)
    (rows,) = vram_rows({"everything": vram()})
    frame = vram_frame(rows)
    assert frame["used_bytes"].max() == pytest.approx(vram()["used_bytes"].max())
    assert list(dict.fromkeys(frame["phase"])) == ["warmup", "full", "predict"]


# Words.


def test_numbers_are_written_with_their_units() -> None:
    quantities = [
        Quantity("loss_to_control", 0.1149, -0.12, 0.349, "nats"),
        Quantity("seeds", 3),
        Quantity("peak_memory", 4.68e9, unit="bytes"),
        Quantity("perplexity_change", 0.293, unit="share"),
        Quantity("time_over_baseline", 0.96, unit="time ratio"),
        Quantity("gradient_steps", 176.5, unit="steps"),
        Quantity("rollbacks", 0),
    ]
    assert quantities_in_words(quantities) == (
        "loss against a plain run with as many gradient steps +0.115 [-0.120, +0.349] nats; seeds 3; peak memory "
        "4.68 GB; perplexity +29.3 %; time over the baseline's 0.960; gradient steps 176.5; rollbacks 0"
    )


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (-0.0002, "+.3f", "0.000"),
        (0.0002, "+.3f", "0.000"),
        (-0.0006, "+.3f", "-0.001"),
        (-0.0, ".1f", "0.0"),
        (-0.0001, "+.1%", "0.0%"),
        (-2e-9, ".2g", "-2e-09"),
        (-math.inf, "+.3f", "-inf"),
        (0.5, "+.2f", "+0.50"),
    ],
)
def test_what_is_rounded_to_zero_has_no_sign(value: float, spec: str, text: str) -> None:
    assert formatted(value, spec) == text


def test_no_document_signs_a_zero() -> None:
    texts = [content for content in report_files(ROOT).values() if isinstance(content, str)]
    assert not re.findall(r"(?<![\d.e])[-+]0\.0+(?![\d.])", "".join(texts))
    small = Quantity("loss_change", -0.0002, -0.0004, 0.0004, "nats")
    assert quantities_in_words([small]) == "loss against the control 0.000 [0.000, 0.000] nats"


def test_a_ratio_has_no_sign_before_it_or_its_bounds() -> None:
    ratio = Quantity("panel_over_none", 1.0, 0.998, 1.0031, "time ratio")
    assert quantities_in_words([ratio]) == "panel over none 1.000 [0.998, 1.003]"
    assert quantities_in_words([replace(ratio, low=None, high=None)]) == "panel over none 1.000"
    busy = Quantity("gpu_busy", 58.6, unit="percent"), Quantity("busy_ratio", 1.21, unit="time ratio")
    assert quantities_in_words(busy) == "GPU busy 59 %; step ratio, of the time in which the GPU was busy 1.210"


def test_an_interval_of_one_seed_has_no_bounds() -> None:
    assert interval(0.5, 0.5, 0.5, "+.2f") == "+0.50"
    assert interval(None, None, None) is None


def test_a_table_keeps_its_shape_whatever_the_cells_hold() -> None:
    text = markdown_table([{"a": "x | y", "b": None}, {"a": "z", "c": 1}])
    assert text.splitlines()[0] == "| a | b | c |"
    assert text.splitlines()[2] == "| x \\| y | – | – |"


SHALLOW_PAYS = "train the shallow model: depth does not pay yet"
OPEN_WHICH = "train all blocks from the start, or the shallow model: open which"


@pytest.mark.parametrize(
    ("growing", "depth", "advice"),
    [
        ("holds", "holds", "grow it"),
        ("holds", "fails", SHALLOW_PAYS),
        ("fails", "holds", "train all blocks from the start"),
        ("open", "holds", "grow it, or train all blocks from the start: open which"),
        ("open", "fails", OPEN_WHICH),
        ("open", "open", "open"),
    ],
)
def test_what_to_run_follows_from_growing_and_from_the_shallow_control(
    growing: Verdict, depth: Verdict, advice: str
) -> None:
    arm, parameters = "grown from 3, 800 steps", {"model": "micro", "batch_size": 8, "block_size": 64, "budgets": [800]}
    claims = [
        claim(kind, verdict, Quantity(name, -0.2, -0.3, -0.1, "nats", bound=0.0), Quantity("seeds", 3), steps, arm=arm)
        for kind, name, verdict in (
            ("pays", "loss_to_control", growing),
            ("depth-pays", "loss_to_shallow_control", depth),
        )
        for steps in [Quantity("gradient_steps", 800.0, unit="steps")]
    ]
    for trials, rates in ((0, "not tried"), (4, "tried")):
        published = entry(*claims, parameters=parameters | {"seeds": 3, "rate_trials": trials})
        found = Evidence({"cpu": {"10_predicted_depth": published}})
        (row,) = depth_advice(found)
        assert (row["what to run"], row["rates"]) == (advice, rates)
    pay = [growing == "holds", depth == "holds"]
    told = "growing is shown to pay in {:d}, depth in {:d}, and both in {:d}.".format(*pay, all(pay))
    assert told in readme_section(found)
    assert row["against as much computation"] == "-0.200 [-0.300, -0.100]"
    assert row["computation to its loss"] == "open"


@pytest.mark.parametrize(
    ("to_plain", "to_shallow", "beside", "advice"),
    [
        ((-0.07, 0.01, -0.15), (0.24, 0.31, 0.25), "loss_to_shallow_control", SHALLOW_PAYS),
        ((0.24, 0.31, 0.25), (0.07, 0.01, 0.1), "loss_to_shallow_control", "train all blocks from the start"),
        ((0.24, 0.31, 0.25), (0.07, 0.01, 0.1), "loss_to_shallow", OPEN_WHICH),
        ((0.0, 0.2, -0.2), (0.1, 0.11, 0.1), "loss_to_shallow_control", OPEN_WHICH),
        ((None, 0.01, -0.15), (0.24, None, 0.25), "loss_to_shallow", OPEN_WHICH),
        ((), (0.24, 0.31, 0.25), "loss_to_shallow", OPEN_WHICH),
        ((-0.07, 0.01), (0.24, 0.31, 0.25), "loss_to_shallow", OPEN_WHICH),
    ],
)
def test_where_depth_fails_and_growing_too_the_plain_run_stands_beside_the_shallow_model(
    to_plain: tuple[float | None, ...], to_shallow: tuple[float | None, ...], beside: str, advice: str
) -> None:
    """Their difference, by seed, is that of the grown run's two; a shallow model that computed less cannot lose."""
    arm, steps = "grown from 3, 800 steps", Quantity("gradient_steps", 800.0, unit="steps")
    claims = [
        claim(kind, verdict, Quantity(name, 0.1, unit="nats", bound=0.0, per_seed=values), steps, arm=arm)
        for kind, verdict, name, values in (
            ("pays", "open", "loss_to_control", to_plain),
            ("depth-pays", "fails", beside, to_shallow),
        )
    ]
    parameters = {"model": "micro", "batch_size": 8, "block_size": 64, "vocab_size": 2048, "budgets": [800]}
    for seeds, expected in ((3, advice), (2, OPEN_WHICH)):  # two are too few for a verdict
        published = entry(*claims, parameters=parameters | {"seeds": seeds})
        (row,) = depth_advice(Evidence({"cpu": {DEPTH: published}}))
        assert row["what to run"] == expected


def test_the_guide_says_what_controls_of_as_much_computation_took_of_the_grown_run_s_time() -> None:
    """A study has several budgets: those of the arm's own count."""
    arms = {"grown from 3": (6.0, 60), "control of grown from 3": (6.6, 60), "shallow, 3 blocks": (2.4, 20)}
    names = ("arm", "seconds", "cost_in_full_steps")
    rows = [dict(zip(names, (arm, *cost), strict=True)) | {"budget": 800} for arm, cost in arms.items() for _ in "ab"]
    rows += [row | {"budget": 80, "seconds": 99.0} for row in rows]
    taken, loss = Quantity("gradient_steps", 800.0, unit="steps"), Quantity("loss_to_shallow", 0.1, 0.1, 0.1, "nats")
    claims = [claim(kind, "fails", loss, taken, arm="grown from 3, 800 steps") for kind in ("pays", "depth-pays")]
    parameters = {"model": "mini", "vocab_size": 2048, "batch_size": 8, "block_size": 64, "budgets": [80, 800]}
    for device, times in (("NVIDIA H200", "plain 1.10, shallow 1.20"), ("a processor that others use", None)):
        published = entry(*claims, parameters=parameters, tables={"runs": rows}, device=device)
        found = Evidence({MAIN: {DEPTH: published}})
        (row,) = depth_advice(found)
        assert row["time of as much computation"] == times
        assert row["against the shallow model"] == "+0.100, as many steps"
        section = " ".join(readme_section(found).split())
        assert "Of this row, growing is shown to pay in 0, depth in 0, and both in 0. Growing is corrected" in section
        told = (
            "plain run took 1.10 times the grown run's time, the shallow model took 1.20 times the grown run's time (of"
        )
        assert (told in section) is bool(times)
        assert "Millions of parameters: mini 2." in section


STEADY_TIMES = (6.6, 6.7)


@pytest.mark.parametrize(
    ("grown", "plain", "told"),
    [
        ((6.0, 6.1), STEADY_TIMES, "plain 1.10, shallow 1.10"),
        ((6.0, 6.1), (6.6, 9.9), "shallow 1.10"),
        ((6.0, 9.0), STEADY_TIMES, None),
        ((6.0,), (6.6,), None),
    ],
)
def test_times_that_vary_from_seed_to_seed_are_no_times_of_a_control(
    grown: tuple[float, ...], plain: tuple[float, ...], told: str | None
) -> None:
    """Nor is that of one seed."""
    costs = {"grown from 3": grown, "control of grown from 3": plain, "shallow, 3 blocks": STEADY_TIMES}
    rows = [
        {"arm": arm, "seconds": seconds, "cost_in_full_steps": 60, "budget": 800}
        for arm, times in costs.items()
        for seconds in times
    ]
    steps = Quantity("gradient_steps", 800.0, unit="steps")
    claims = [claim(kind, "fails", steps, arm="grown from 3, 800 steps") for kind in ("pays", "depth-pays")]
    parameters = {"model": "mini", "vocab_size": 2048, "batch_size": 8, "block_size": 64, "budgets": [800]}
    found = Evidence(
        {MAIN: {DEPTH: entry(*claims, parameters=parameters, tables={"runs": rows}, device="NVIDIA H200")}}
    )
    (row,) = depth_advice(found)
    assert row["time of as much computation"] == told
    assert ("the shallow model took 1.10 times" in " ".join(readme_section(found).split())) is bool(told)


@pytest.mark.parametrize(("verdict", "told"), [("open", "open (2 of 3 seeds)"), ("holds", "holds")])
def test_an_open_verdict_on_depth_names_the_seeds_that_it_lacks(verdict: Verdict, told: str) -> None:
    counts = Quantity("gradient_steps", 800.0, unit="steps"), Quantity("seeds", 2)
    claims = [claim(kind, verdict, *counts, arm="grown from 3, 800 steps") for kind in ("pays", "depth-pays")]
    parameters = {"model": "mini", "vocab_size": 2048, "batch_size": 8, "block_size": 64, "budgets": [800], "seeds": 3}
    (row,) = depth_advice(Evidence({MAIN: {DEPTH: entry(*claims, parameters=parameters)}}))
    assert row["growing pays"] == told


def test_the_readme_says_what_is_estimated_for_the_gpu_that_nothing_ran_on() -> None:
    times = {"bf16": "2.38", "compiled": "3.02", "CUDA graph": "7.08", "Muon": "47.22 [31.57, open]"}
    rungs = [{"rung": rung, "vanilla's time over it": ratio} for rung, ratio in times.items()]
    ladder = entry(claim("stack-is-fast", "holds"), tables={"ladder": rungs}, parameters=FASTEST)
    steps = {"fp32": 120.0, "mixed precision": 80.0}
    arms = [{"model": "small", "arm": arm, "estimated_5080_ms": ms} for arm, ms in steps.items()]
    planned = {
        "recipes": [{"model": "small", "step_ms": 80.0, "batch": [8, 512]}],
        "largest": [{"way": name, "parameters": count} for name, count in (("a", 2.5e9), ("b", 3.2e9), ("c", 4e9))],
        "trained": [
            {"way": "a", "stopped": None, "steps": 200, "peak_memory_bytes": 15e9},
            {"way": "b", "stopped": None, "steps": 200, "peak_memory_bytes": 15.5e9},
            {"way": "c", "stopped": "no room"},
        ],
    }
    found = Evidence({MAIN: {LADDER: ladder, MEMORY: entry(tables={"memory": arms})}}, planned=planned)
    section = " ".join(readme_section(found).split())
    there = ladder | {"device": "NVIDIA GeForce RTX 5080"}
    assert "Expect less" not in readme_section(Evidence({MAIN: {LADDER: there}}))
    told = "are a factor of 7.08 in it; for an RTX 5080 bf16 alone is estimated at a factor of 1.5, and compilation's"
    assert told in section
    assert "8 x 512 tokens: small 80 ms." in section
    assert "in an emulated 16 GB: 3.20 billion parameters (b; 200 steps, peak 15.50 GB)." in section


def grown_at(steps: int, depth: Verdict) -> list[Claim]:
    """What notebook 10 claims at one budget."""
    loss, control = (
        Quantity("loss_to_control", -0.2, unit="nats"),
        Quantity("loss_to_shallow_control", -0.1, unit="nats"),
    )
    arm, cost = f"grown from 6, {steps} steps", Quantity("cost_in_full_steps", 0.75 * steps, unit="steps")
    taken = Quantity("gradient_steps", float(steps), unit="steps")
    return [claim("pays", "holds", loss, taken, cost, arm=arm), claim("depth-pays", depth, control, arm=arm)]


def test_another_profile_needs_no_code_and_its_depths_stand_by_tokens_per_parameter(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.hybridlab.profiles]\nrtx5080 = "main"\nrtx5080_mini = "a mini one"\n'
    )
    parameters = {"model": "mini", "batch_size": 128, "block_size": 256, "vocab_size": 2048, "budgets": [408, 1632]}
    mini = {"10_predicted_depth": entry(*grown_at(1632, "holds"), *grown_at(408, "fails"), parameters=parameters)}
    for profile, results in {"aside": {HYBRID: entry()}, "rtx5080_mini": mini, MAIN: {HYBRID: entry()}}.items():
        (tmp_path / "executed" / profile).mkdir(parents=True)
        (tmp_path / "executed" / profile / "results.json").write_text(json.dumps(results))
    found = Evidence.read(tmp_path)
    assert list(found.entries) == [MAIN, "rtx5080_mini", "aside"]
    assert [found.label(profile) for profile in found.entries] == ["main", "a mini one", "aside"]
    assert "## A mini one (`params/rtx5080_mini`)" in claims_document(found)
    rows = [(row["tokens per parameter"], row["depth pays"], row["profile"]) for row in depth_advice(found)]
    assert rows == [("5", "fails", "rtx5080_mini"), ("20", "holds", "rtx5080_mini")]
    assert "| mini | 20 | AdamW | grown from 6, 1632 steps | holds | holds |" in readme_section(found)


GROWS = (
    Quantity("loss_to_control", -0.2, -0.3, -0.1, "nats", bound=0.0),
    Quantity("gradient_steps", 1000.0, unit="steps"),
    Quantity("predicted_steps", 0.0, unit="steps"),
    Quantity("cost_in_full_steps", 475.0, unit="steps"),
)


def test_a_grown_arm_that_diverged_fails_the_plans_promise() -> None:
    """It has no ratio of times, as a notebook without depth has none."""
    unknown = Quantity("loss_to_control", None, unit="nats", bound=0.0)
    diverged = claim("pays", "fails", unknown, *GROWS[1:], arm="grown")
    found = Evidence({MAIN: {"05_gpt2_medium": entry(diverged)}})
    outcomes = {criterion.text: criterion.outcome(found) for criterion in CRITERIA[IN_DEPTH]}
    assert outcomes["GPT-2 Medium: 40 to 60 % less time than a plain run to the same loss"] == "fails"


def test_the_plans_promise_is_judged_for_predicted_depth_under_its_own_name() -> None:
    """By the base of its own runs: the notebook's other arms take fewer steps."""
    time = Quantity("time_to_loss", None, 2.4, None, "time ratio")
    claims = [claim("pays", "holds", *GROWS, time, arm="grown")]
    parameters = {
        "model": "medium",
        "steps": 80,
        "depth_steps": 1000,
        "first_blocks": 3,
        "batch_size": 8,
        "block_size": 512,
        "rate_trials": 4,
    }
    shallow = claim("depth-pays", "fails", Quantity("loss_to_shallow", 0.1, unit="nats"), arm="grown")
    untried = Evidence({MAIN: {"05_gpt2_medium": entry(*claims, shallow, parameters=parameters | {"rate_trials": 0})}})
    medium = "GPT-2 Medium: 40 to 60 % less time than a plain run to the same loss"
    (criterion,) = (criterion for criterion in CRITERIA[IN_DEPTH] if criterion.text == medium)
    assert criterion.outcome(untried) == "open"
    found = validation_document(untried, {})
    assert "loss against the shallow model of as many steps 0.100 nats; learning rates not tried |" in found
    found = Evidence({MAIN: {"05_gpt2_medium": entry(*claims, shallow, parameters=parameters)}})
    page = validation_document(found, {})
    assert "| The plan's promise of time, by predicting depth | GPT-2 Medium: 40 to 60 % less time than a plain" in page
    outcomes = {criterion.text: criterion.outcome(found) for criterion in CRITERIA[IN_DEPTH]}
    assert outcomes["GPT-2 Medium: 40 to 60 % less time than a plain run to the same loss"] == "holds"
    assert outcomes["GPT-2 Small: 40 to 60 % less time than a plain run to the same loss"] == "not run yet"
    assert outcomes["60 to 78 % less time than a plain run to the same loss, of one model at least"] == "open"
    assert "| grown (predicted depth) | in depth: 1000 at the computation of 475 full ones |" in page
    assert "loss against a plain run of as much computation -0.200" in page
    assert at_a_glance(found) == at_a_glance(Evidence({MAIN: {"05_gpt2_medium": entry(parameters=parameters)}}))
    with_muon = entry(*claims, shallow, parameters=parameters | {"optimizer": "muon"})
    rows = depth_advice(Evidence({MAIN: found.entries[MAIN], "rtx5080_muon": {"05_gpt2_medium": with_muon}}))
    told = [(row["model"], row["optimizer"], row["arm"]) for row in rows]
    assert told == [("medium", optimizer, "grown from 3, 1000 steps") for optimizer in ("AdamW", "Muon")]


@pytest.mark.parametrize(("cost", "share"), [(475, "in depth: 1000 at the computation of 475 full ones"), (None, None)])
def test_the_share_of_a_grown_arm_is_its_cost_alone(cost: float | None, share: str | None) -> None:
    counts = {"gradient_steps": 1000, "cost_in_full_steps": cost, "predicted_steps": 0 if cost is None else None}
    grown = claim("pays", "open", *(Quantity(name, count, unit="steps") for name, count in counts.items()), arm="grown")
    (published,) = evidence(n03=entry(grown)).claims(kind="pays")
    assert predicted_share(published) == share


RECIPE = {
    "model": "small",
    "parameters": 124_439_808,
    "compiled": True,
    "cuda_graphs": True,
    "optimizer": "OptimizerConfig()",
    "memory": "MemoryConfig()",
    "exact": False,
    "batch": [8, 512],
    "peak_on_gpu_bytes": 5_131_721_088,
    "host_bytes": 0,
    "step_ms": 100.0,
    "tokens_per_second": 40960.0,
    "largest_batch": 48,
    "longest_sequence": 24576,
    "host_bytes_with_jumps": 3_983_229_520,
}


def test_recipes_say_how_long_a_size_trains_and_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridlab.notebook.Session", lambda config, name: SimpleNamespace(config=config))
    planned = {"gpu": {"name": "GeForce RTX 5080"}, "spared_bytes": 2_000_000_000, "recipes": [RECIPE]}
    guide = gpu_guide(Evidence(evidence(n03=entry()).entries, planned), {})
    assert "for a GeForce RTX 5080 of which 2.00 GB are spared" in guide
    hours = 124_439_808 / 40960 / 3600
    assert f"| {hours:.1f} hours | {20 * hours:.1f} hours |" in guide
    assert "**small**, inexact" in guide
    assert "memory = MemoryConfig()\noptimizer = OptimizerConfig()\n" in guide
    names: dict[str, Any] = {}
    exec(guide.partition("```python\n")[2].partition("for result in")[0], names)
    assert (names["config"].compiled, names["config"].task.batch_size, names["config"].steps) == (True, 8, 1000)
    assert "A recipe for each size" not in gpu_guide(evidence(n03=entry()), {})


# --- docs/experiments.md ----------------------------------------------------------------------------------


def numbers_in(value: object) -> Iterator[float]:
    """Every number of a results file, those in its texts too."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(item)
    elif isinstance(value, str):
        yield from map(float, re.findall(r"-?\d+\.\d+", value))
    elif isinstance(value, int | float):
        yield float(value)


DEPTH_OF_SMALL = "executed/rtx5080/10_predicted_depth.ipynb"


@pytest.mark.parametrize(
    ("title", "source"),
    [
        ("Predicted depth of GPT-2 Small at 1,000 steps", DEPTH_OF_SMALL),
        ("Predicted depth of GPT-2 Small with Muon", "executed/rtx5080_muon/10_predicted_depth.ipynb"),
        ("Predicted depth of GPT-2 Medium at 1,000 steps", "executed/rtx5080/05_gpt2_medium.ipynb"),
        ("Predicted depth of GPT-2 Small at 10,000 steps", "executed/rtx5080_10k/10_predicted_depth.ipynb"),
        ("GPT-2 XL in 16 GB", "docs/experiments/xl_graphs.json"),
        ("The trainer beside the bare loop", "docs/experiments/step_overhead.json"),
        ("A step beside other loops", "docs/experiments/against_others.json"),
        ("AdamW's beta1", "docs/experiments/beta1_cpu.json"),
        ("Short windows or few at first", "docs/experiments/ramps.json"),
    ],
)
def test_numbers_of_an_experiment_are_those_of_its_committed_file(title: str, source: str) -> None:
    """Rounded as they stand there; the bounds are those of the claims."""
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    section = page.partition(f"## {title}")[2].partition("\n## ")[0]
    content = json.loads((ROOT / source).read_text(encoding="utf-8"))
    if source.endswith(".ipynb"):
        outputs = [output for cell in content["cells"] for output in cell.get("outputs", [])]
        content = [output["data"]["text/plain"] for output in outputs if "data" in output]
    known = [*numbers_in(content), *(bound for *_, bound in BESIDE.values())]
    for word in re.findall(r"(?<![\w./])[-+]?\d+\.\d+(?![\w/])", section):
        rounding = 0.501 * 10.0 ** -len(word.partition(".")[2])
        assert any(abs(number - float(word)) <= rounding for number in known), word
