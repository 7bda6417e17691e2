"""Values that a notebook cannot mean are refused in one line, at once, before a kernel starts."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import hybridlab
from hybridlab import HybridTrainer, Phase
from hybridlab.base.errors import UserError
from hybridlab.batch import limits
from hybridlab.batch.executed import read_document
from hybridlab.batch.given import declared_parameters, defaults
from hybridlab.batch.run import prepared
from hybridlab.benchmarks.footprint import jumping_with
from hybridlab.data.images import SOURCES as IMAGE_SOURCES
from hybridlab.data.text import SOURCES as TEXT_SOURCES
from hybridlab.depth import BEST, RULES
from hybridlab.memory import MemoryConfig
from hybridlab.memory.precision import PRECISIONS
from hybridlab.models.gpt2 import SIZES, GPT2Config
from hybridlab.optim.build import OPTIMIZERS
from hybridlab.study.ranks import RanksConfig
from tests.conftest import Problem
from tests.notebook_maker import save, tiny_notebook
from tests.test_batch import refusal

ROOT = Path(hybridlab.__file__).parents[1]
NOTEBOOKS = {path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
PROFILES = sorted((ROOT / "params").rglob("*.yaml"))


@pytest.mark.parametrize(
    ("notebook", "settings", "message"),
    [
        ("03", "predictor foo", "predictor: 'foo' after -p: 'foo' is unknown: choose one of null, linear"),
        ("03", "predictor linaer", "did you mean 'linear'?"),
        ("03", "model xxl", "model: 'xxl' after -p: 'xxl' is unknown: did you mean 'xl'?"),
        ("03", "steps -5", "steps: -5 after -p: it must be at least 1"),
        ("00", "minutes -1", "minutes: -1 after -p: it must be above 0"),
        ("03", "seeds 0", "seeds: 0 after -p: it must be at least 1"),
        ("03", "device gpu", "device: 'gpu'"),
        ("03", "precision fp16", "precision: 'fp16'"),
        ("03", "lr nan", "lr: nan is no finite number, a number is wanted: write for example 0.002"),
        ("03", "lr 0", "lr: 0 after -p: it must be above 0"),
        ("03", "beta2 1", "beta2: 1 after -p: it must be at least 0 and below 1"),
        ("03", "lr 0x10", "lr: '0x10' is text, a number is wanted"),
        ("03", "steps 0200", "steps: '0200' is text, a whole number is wanted: write 200"),
        ("03", "cpu_threads 100000", "cpu_threads: 100000 after -p: it must be at least 0 and at most 1024"),
        ("03", "at_once 0", "at_once: 0 after -p: it must be at least 1"),
        ("10", "optimizer lion", "optimizer: 'lion' after -p: 'lion' is unknown: choose one of adamw"),
        ("10", "budgets [200,0]", "budgets: [200, 0] after -p: it must be at least 1"),
        ("06", "long_seeds 0", "long_seeds: 0 after -p: it must be at least 1"),
        ("02", "beta1_tried [0.8,1.0]", "beta1_tried: [0.8, 1.0] after -p: it must be at least 0 and below 1"),
        ("11", "wrap fsdp2", "wrap: 'fsdp2' after -p: 'fsdp2' is unknown: did you mean 'fsdp'?"),
        (
            "03",
            "first_blocks -1",
            "first_blocks: -1 must be at least 0 and below the blocks of nano, 2 (given after -p)",
        ),
        ("06", "model xl first_blocks 48", "first_blocks: 48 must be at least 0 and below the blocks of xl, 48"),
        ("10", "first_blocks [1,6]", "first_blocks: [1, 6] must be at least 0 and below the blocks of micro, 6"),
        ("10", "rate_trials 2", "rate_trials: 2 must be at least 3, or 0 to try none (given after -p)"),
        ("03", "warmup_steps 360", "warmup_steps: 360 must be below steps, which is 360 (given after -p)"),
        ("03", "steps 40", "evaluate_every: 90 must be at most steps, which is 40"),
        ("03", "evaluate_every 361", "evaluate_every: 361 must be at most steps, which is 360 (given after -p)"),
        ("03", "data digits", "data: 'digits' is no source: choose one of python"),
        ("03", "data bin:", "data: 'bin:' is no source"),
        ("01", "data python", "data: 'python' is no source: choose one of digits"),
        ("03", "vocab_size 100", "vocab_size: 100 must be at least 257"),
        ("02", "lr_factors [0.5,-2.0]", "lr_factors: [0.5, -2.0] after -p: it must be above 0"),
        ("02", "overhead_rounds 0", "overhead_rounds: 0 after -p: it must be at least 1"),
        ("06", "reference_steps 61", "reference_steps: 61 must be at most steps, which is 60"),
        ("06", "strict_steps 21", "strict_steps: 21 must be at most reference_steps, which is 20"),
        ("06", "strict_steps 0", "strict_steps: 0 after -p: it must be at least 1"),
        ("06", "full_steps -1", "full_steps: -1 after -p: it must be at least 1"),
        ("06", "seeds -1", "seeds: -1 after -p: it must be at least 1"),
        ("06", "predict_steps 60", "predict_steps: 60 must be above 102, where the first jump comes, or 0"),
        ("06", "predict_steps 127 full_steps 60", "predict_steps: 127 must be above 127, where the first jump comes"),
        ("04", "predict_steps 14", "predict_steps: 14 must be above 14, where the first jump comes"),
        (
            "03",
            "batch_size 1000000000000",
            "batch_size: 1000000000000 after -p: it must be at least 1 and at most 1e+06",
        ),
        ("03", "lr 1e38", "lr: 1e+38 after -p: it must be above 0 and at most 1000"),
        ("03", "steps 99999999999999999999", "it must be at least 1 and at most 1e+18"),
        ("03", "results s3://bucket/x", "an address is no place to write to: name a file or folder"),
        ("05", "full_steps 220", "full_steps: 220 must be below predict_steps, which is 220"),
        ("04", "predict_steps 0", "predict_steps: 0 must be above 14, where the first jump comes, since"),
        ("07", "predictors []", "predictors: none is left: name one at least"),
        ("07", "predictors [linear,linear]", "'linear' is named twice: keep one"),
        ("07", 'predictors ["null"] guarded false', "predictors: none of them makes an arm"),
        ("07", "predictors [linear,foo]", "'foo' is unknown"),
    ],
)
def test_a_value_that_a_notebook_cannot_mean_is_refused(root, notebook, settings, message):
    words = settings.split()
    assert message in refusal(NOTEBOOKS[notebook], None, *zip(words[::2], words[1::2], strict=True))


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("steps: 0200", "steps: YAML reads 0200 as 128, a whole number is wanted: write 200, or 128 in params.yaml"),
        ("lr: 0x10", "lr: YAML reads 0x10 as 16, a number is wanted: write 16 in params.yaml"),
        ("steps: 1_000", "write 1000 in params.yaml"),
        ("lr: .nan", "lr: .nan is no finite number"),
        ("lr_factors: [0.5, 010]", "lr_factors: YAML reads ['0.5', '010'] as [0.5, 8]"),
        ("steps: -1", "steps: -1 in params.yaml: it must be at least 1"),
        ("lr: 1.0e+400", "lr: inf in params.yaml: it must be finite"),
        ("steps: on", "steps: YAML reads on as True, a whole number is wanted"),
        ("data: no", "data: YAML reads no as False, text is wanted: write 'no' in quotes"),
        ("steps: 12:30", "steps: YAML reads 12:30 as 750"),
        ("steps: !!int '0200'", "YAML reads 0200 as 128"),
        ("a: &a [1]\nlr_factors: *a", "aliases and merges (*name, <<) are not read: write the values themselves"),
        ("<<: {steps: 5}", "aliases and merges (*name, <<) are not read"),
        ("steps: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
        ("steps: !!python/object:os.system x", "not valid YAML"),
    ],
)
def test_a_number_that_is_no_plain_decimal_in_yaml_is_refused(root, yaml, message):
    assert message in refusal(NOTEBOOKS["02"], yaml)


@pytest.mark.parametrize(
    "settings", ["data bin:tokens.bin", "data markov", "lr 1e-4", "cpu_threads 0", "beta2 .95", "lr +1.0e-3"]
)
def test_values_that_can_be_meant_pass(root, settings):
    prepared(NOTEBOOKS["03"], Path("out/out.ipynb"), [], [tuple(settings.split())])


@pytest.mark.parametrize(
    ("content", "most", "message"),
    [
        ("naïve café".encode("latin-1"), 4, "data: own.txt is not UTF-8 text (byte 2): convert it (given after -p)"),
        ("naïve café".encode("latin-1"), 0, "is not UTF-8 text (byte 2)"),
        ("text".encode("utf-16"), 100, "is not UTF-8 text (byte 0)"),
        (None, 100, "own.txt cannot be read: No such file or directory; name a text file"),
    ],
)
def test_a_text_file_that_cannot_be_read_whole_is_refused_before_anything_runs(root, content, most, message):
    if content is not None:
        Path("own.txt").write_bytes(content)
    assert message in refusal(NOTEBOOKS["03"], None, ("data", "file:own.txt"), ("max_bytes", str(most)))


@pytest.mark.parametrize("most", [3, 4, 0])
def test_a_character_that_max_bytes_cuts_is_no_fault(root, most):
    Path("own.txt").write_text("naïve", encoding="utf-8")
    prepared(NOTEBOOKS["03"], Path("out/out.ipynb"), [], [("data", "file:own.txt"), ("max_bytes", str(most))])


def test_what_is_switched_off_bounds_nothing(root):
    off = [("reference_steps", "0"), ("strict_steps", "30"), ("predict_steps", "0")]
    prepared(NOTEBOOKS["06"], Path("out/out.ipynb"), [], off)


@pytest.mark.parametrize("file", PROFILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_profiles_and_defaults_are_within_the_limits(root, file):
    for files in ([file], []):
        prepared(ROOT / "notebooks" / f"{file.stem}.ipynb", Path("out/out.ipynb"), files)
    declared = defaults(declared_parameters(read_document(ROOT / "notebooks" / f"{file.stem}.ipynb"), file.stem))
    assert [name for name, value in declared.items() if limits.broken(name, value)] == []


def test_every_limit_is_of_a_parameter_that_some_notebook_has():
    documents = [declared_parameters(read_document(path), path.name) for path in NOTEBOOKS.values()]
    assert set(limits.LIMITS) <= {name for declared in documents for name in declared}


@pytest.mark.parametrize("full_steps", [7, 10, 25, 30, 60])
@pytest.mark.parametrize("predictor", ["linear", "ema_nesterov"])
def test_the_first_jump_comes_where_the_limits_say(predictor, full_steps):
    config = replace(jumping_with(MemoryConfig(), full_steps=full_steps, predictor=predictor), path_device="same")
    task, first = Problem(), limits.first_jump(predictor, full_steps)
    trainer = HybridTrainer(task.model, task.adamw(), config)
    phases = [trainer.step(task.closure(step)).phase for step in range(first + 1)]
    assert phases.index(Phase.PREDICT) == first


def test_choices_are_those_that_the_library_knows():
    assert tuple(TEXT_SOURCES.values()) == limits.TEXTS
    assert {form.partition(":")[0] for form in limits.IMAGES} == {name.partition(":")[0] for name in IMAGE_SOURCES}
    assert limits.LIMITS["model"] == SIZES
    assert {name: GPT2Config.named(name).n_layer for name in SIZES} == limits.BLOCKS
    assert limits.LIMITS["rules"] == (*RULES, BEST)
    assert limits.LIMITS["precision"] == PRECISIONS
    assert limits.LIMITS["optimizer"] == OPTIMIZERS
    assert [RanksConfig(wrap=wrap).wrap for wrap in limits.LIMITS["wrap"]]
    assert [RanksConfig(gather=gather).gather for gather in limits.LIMITS["gather"]]


def test_a_name_that_means_something_else_in_a_notebook_is_let_be(root):
    save(tiny_notebook("print(model)", declared='model: str = "mine.pt"'), root / "own.ipynb")
    assert prepared(Path("own.ipynb"), Path("out/own.ipynb"), [], [("model", "other.pt")]).parameters["model"]


@pytest.mark.parametrize("output", ["s3://bucket/out.ipynb", "https://host/out.ipynb", "hdfs+x://a/out.ipynb"])
def test_an_address_is_no_output(root, output):
    with pytest.raises(UserError, match="an address is no place to write to"):
        prepared(NOTEBOOKS["03"], Path(output))


REFUSED = ["run", str(NOTEBOOKS["03"]), "-o", "out.ipynb", "-p", "steps", "-5"]


@pytest.mark.parametrize("arguments", [["--help"], REFUSED], ids=["help", "refusal"])
def test_help_and_a_refusal_import_nothing_that_takes_seconds(root, arguments):
    source = f"""
import sys
from hybridlab.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print([name for name in ("torch", "papermill", "nbformat", "pandas", "sklearn") if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("[]\n")
