"""What a committed notebook must be; each check returns the list of what is wrong, one line each."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from hybridlab.base.errors import UserError
from hybridlab.batch.executed import INJECTED, WIDGET_VIEW, code_cells, read_notebook, unfinished
from hybridlab.batch.given import checked_values, declared_parameters, defaults
from hybridlab.batch.yaml_files import values_in_file
from hybridlab.results.claims import VOLATILE_UNITS, Claim, rounded
from hybridlab.results.parameters import HOW_IT_RUNS, asked, parameters_sha256
from hybridlab.results.words import quantities_in_words

MAX_NOTEBOOK_BYTES = 1_000_000
WIDEST = 116
"""Characters of a line of code that JupyterLab shows whole, 1366 pixels wide."""

MACHINE_PATH = re.compile(r"(?<![\w+/.~])(?:/(?:home|root|work|tmp|Users|opt)/|[A-Z]:\\Users\\)[^\s\"'<>]*")


def source_problems(path: Path) -> list[str]:
    """Check a source notebook: stripped, small, with ids and a parameters cell of literals."""
    notebook = read_notebook(path)
    problems = _size_problems(path) + _widget_problems(notebook)
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
            problems.append(f"cell {number} is not stripped: run nbstripout {path.name}")
        shown = cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])
        if shown and (longest := max(map(len, cell.source.splitlines()), default=0)) > WIDEST:
            problems.append(
                f"cell {number} has a line of {longest} characters, cut off at the right: wrap it at {WIDEST}"
            )
        if not cell.source.strip():
            problems.append(f"cell {number} is empty: take it out")
        if INJECTED in cell.metadata.get("tags", []):
            problems.append(f"cell {number} is an injected one: this is an executed notebook")
    try:
        declared_parameters(notebook, path.name)
    except UserError as error:
        problems.append(str(error))
    return problems + ([] if notebook.nbformat_minor >= 5 else ["it has no cell ids: save it in format 4.5"])


def parameter_file_problems(notebook: Path, parameters: Path) -> list[str]:
    """Check that a parameter file is accepted by its notebook."""
    try:
        declared = declared_parameters(read_notebook(notebook), notebook.name)
        checked_values(values_in_file(parameters), declared, notebook.name)
    except UserError as error:
        return [str(error)]
    return []


def executed_problems(executed: Path, source: Path, parameters: Path) -> list[str]:
    """Check an executed notebook: run whole, of this source, with these parameters, clean."""
    notebook = read_notebook(executed)
    return [
        *_size_problems(executed),
        *_widget_problems(notebook),
        *_run_problems(notebook),
        *_source_differences(notebook, read_notebook(source)),
        *_parameter_differences(notebook, read_notebook(source), parameters),
        *(f"machine path in an output: {path}" for path in _machine_paths(notebook)),
    ]


def _size_problems(path: Path) -> list[str]:
    size = path.stat().st_size
    return [f"{size} bytes: keep it below {MAX_NOTEBOOK_BYTES}"] if size >= MAX_NOTEBOOK_BYTES else []


def _widget_problems(notebook: NotebookNode) -> list[str]:
    views = any(WIDGET_VIEW in output.get("data", {}) for output in _outputs(notebook))
    return ["it carries widget state: run it with hybridlab run"] if views or "widgets" in notebook.metadata else []


def _run_problems(notebook: NotebookNode) -> list[str]:
    reason = unfinished(notebook)
    problems = [f"not fully run: {reason}"] if reason else []
    return problems if any(True for _ in _outputs(notebook)) else [*problems, "its outputs were cleared"]


def _source_differences(executed: NotebookNode, source: NotebookNode) -> list[str]:
    ran = [(cell.cell_type, cell.source) for cell in executed.cells if INJECTED not in cell.metadata.get("tags", [])]
    now = [(cell.cell_type, cell.source) for cell in source.cells]
    changed = [number for number, (a, b) in enumerate(zip(ran, now, strict=False), start=1) if a != b]
    if len(ran) != len(now):
        return [f"it has {len(ran)} cells, its source has {len(now)}: run it again"]
    return [f"cell {number} of the source has changed since: run it again" for number in changed]


def _parameter_differences(executed: NotebookNode, source: NotebookNode, parameters: Path) -> list[str]:
    try:
        wanted = {given.name: given.value for given in values_in_file(parameters)}
    except UserError as error:
        return [str(error)]
    whole = asked(defaults(declared_parameters(source, "the source")) | wanted)
    record = executed.metadata.get("hybridlab", {})
    how = {name: value for name, value in record.get("parameters", {}).items() if name in HOW_IT_RUNS}
    problems = []
    if asked(injected_parameters(executed)) != asked(wanted):
        problems.append(f"its injected parameters are not those of {parameters.name}: run it again")
    if asked(record.get("parameters", {})) != whole:
        problems.append("its recorded parameters are not the defaults and the file's: run it again")
    if record.get("parameters_sha256") != parameters_sha256(whole | how):
        problems.append("its recorded parameter hash is another: run it again")
    return problems


def injected_parameters(notebook: NotebookNode) -> dict[str, Any]:
    """Read the literals of the cell that papermill injected; empty when there is none."""
    cells = [cell for cell in notebook.cells if INJECTED in cell.metadata.get("tags", [])]
    lines = [line for cell in cells for line in ast.parse(cell.source).body if isinstance(line, ast.Assign)]
    return {ast.unparse(line.targets[0]): ast.literal_eval(line.value) for line in lines}


def _outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    return (output for cell in code_cells(notebook) for output in cell.outputs)


def _texts(notebook: NotebookNode) -> Iterator[str]:
    """Yield every text that the outputs hold; pictures are skipped."""
    for output in _outputs(notebook):
        yield output.get("text", "")
        for kind, content in output.get("data", {}).items():
            if not kind.startswith("image/") or kind == "image/svg+xml":
                yield content if isinstance(content, str) else json.dumps(content)


def _machine_paths(notebook: NotebookNode) -> list[str]:
    return sorted({path for text in _texts(notebook) for path in MACHINE_PATH.findall(text)})


SIGNED_ZERO = re.compile(r"[+-](0\.0+)(?!\d)")
"""As copies of earlier code show what is rounded to zero."""


def results_problems(executed: Path, results: dict[str, Any]) -> list[str]:
    """Hold an executed notebook against its entry: same parameters, every claim and number shown.

    In words, as `claims_table` shows them; copies from before it did show them at four decimals, times and bytes aside.
    """
    entry = results.get(executed.stem)
    if entry is None:
        return [f"results.json has no entry '{executed.stem}': run it again"]
    notebook = read_notebook(executed)
    text = SIGNED_ZERO.sub(r"\1", "\n".join(_texts(notebook)))
    recorded = notebook.metadata.get("hybridlab", {}).get("parameters_sha256")
    problems = [] if recorded == entry["parameters_sha256"] else ["its parameter hash is not that of results.json"]
    if parameters_sha256(entry["parameters"]) != entry["parameters_sha256"]:
        problems.append("the parameters in results.json do not have the hash beside them")
    return problems + [line for claim in entry["claims"] for line in _claim_problems(Claim.from_record(claim), text)]


def _claim_problems(claim: Claim, text: str) -> list[str]:
    numbers = quantities_in_words(claim.quantities)
    if _appears(claim.id, text):
        return _older_claim_problems(claim, text)
    return [
        f"claim {claim.id}: the notebook does not show: {said}" for said in (claim.text, numbers) if said not in text
    ]


def _older_claim_problems(claim: Claim, text: str) -> list[str]:
    return [
        f"claim {claim.id}: {name} is {value} in results.json, which the notebook does not show"
        for name, value in _lasting_values(claim).items()
        if not _appears(SIGNED_ZERO.sub(r"\1", value), text)
    ]


def shown(value: float | None) -> str:
    """A value at four decimals, to compare two runs; what is not finite in words."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{rounded(value):.4f}" if isinstance(value, float) else str(value)


def _lasting_values(claim: Claim) -> dict[str, str]:
    """What repeats in every run, as notebooks show it, by name."""
    return {
        f"{q.name}{end}": shown(value)
        for q in claim.quantities
        if q.unit not in VOLATILE_UNITS
        for end, value in (("", q.value), ("_low", q.low), ("_high", q.high))
        if value is not None or not end
    }


def _appears(word: str, text: str) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(word)}(?!\w|\.\d)", text) is not None


def claim_differences(committed: dict[str, Any], again: dict[str, Any]) -> list[str]:
    """Compare the claims of two runs of one notebook, numbers at four decimals.

    Times, bytes and the verdicts that they decide may differ: another machine, or a busy one, is slower.
    """
    before, after = _repeatable(committed), _repeatable(again)
    return [
        f"{name} was {before.get(name, 'missing')}, is now {after.get(name, 'missing')}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]


def _repeatable(entry: dict[str, Any]) -> dict[str, str]:
    """Lay an entry's claims out as name -> text, for comparison."""
    claims = [Claim.from_record(claim) for claim in entry["claims"]]
    verdicts = {claim.id: claim.verdict for claim in claims if not _is_decided_by_the_machine(claim)}
    values = {f"{c.id}.{name}": value for c in claims for name, value in _lasting_values(c).items()}
    return {f"{id}.verdict": verdict for id, verdict in verdicts.items()} | values


def _is_decided_by_the_machine(claim: Claim) -> bool:
    """Whether times or bytes decide a claim: one of them has its bound, or there is nothing else in it."""
    quantities = claim.quantities
    bounded = any(quantity.unit in VOLATILE_UNITS and quantity.bound is not None for quantity in quantities)
    return bounded or all(quantity.unit in VOLATILE_UNITS for quantity in quantities)
