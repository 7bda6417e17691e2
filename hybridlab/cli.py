"""The command line: `hybridlab run`, `plan`, `rates`, `data`, `report` and `runs`."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridlab import __version__
from hybridlab.base.errors import UserError, printable, told
from hybridlab.base.one_line import in_one_line
from hybridlab.batch.terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    RunFailed,
    RunInterrupted,
    guarded_output,
    signals_as_interrupts,
)

if TYPE_CHECKING:
    from hybridlab.memory import MemoryConfig
    from hybridlab.planner.spec import TrainingSpec
    from hybridlab.study.record import Run

app = typer.Typer(
    help="Measure whether predicting weights and saving memory pay, on your model and your GPU.",
    epilog="What should I run? `hybridlab run 00_your_model` answers it for your model, text and GPU. Interactively: "
    "`make lab`. All notebooks: `make milestones PROFILE=cpu`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"hybridlab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """Hold what goes before a command."""


@app.command()
def run(
    notebook: Annotated[
        Path, typer.Argument(metavar="NOTEBOOK", help="A file, or a notebook of ours, as 00_your_model.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="OUT", help="Where the executed copy goes; by default into runs/."),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", metavar="PARAMS", help="YAML file of parameters; may repeat, the last wins."),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="NAME VALUE", help="One parameter; may repeat, wins over files."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training runs that an interrupted start left in runs/.")
    ] = False,
    nproc: Annotated[
        int | None,
        typer.Option(metavar="N", help="For 11_several_gpus: how many processes train its run, each on its own GPU."),
    ] = None,
) -> None:
    """Run a notebook whole, and keep a clean executed copy.

    Parameters are checked before anything runs. A copy is written only when every cell has run;
    what is left of a run that stopped goes to OUT with the ending .failed.ipynb.

    The results, results.json, go where the copy goes; -p results FOLDER puts them elsewhere.

    Exit codes: 0 done, 1 a cell failed or OUT could not be written, 2 refused before the start, 130 stopped.
    """
    from hybridlab.base.files import marked_root, project_root, shipped
    from hybridlab.batch.run import prepared, run_notebook

    output = output or Path(os.path.relpath(project_root() / "runs" / f"{notebook.stem}.ipynb"))
    settings = [_pair(text) for text in parameter or []]
    for sentence in run_notebook(prepared(notebook, output, file or [], settings, resume=resume, nproc=nproc)):
        print(printable(sentence))
    print(f"Notebook: {output}")
    look = "make lab" if marked_root() == shipped() else f"jupyter lab {shlex.quote(str(output))}"
    print(f"Open it:  {look}")


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"-p {text}: a value is missing: write -p {text} VALUE")
    return name, value


@app.command()
def data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="python, markov, uniform, file:PATH, bin:PATH, hf:NAME, digits or mnist[:PATH]."
        ),
    ],
    vocab_size: Annotated[int | None, typer.Option(help="Vocabulary of text sources that build one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split and of synthetic sources.")] = 0,
) -> None:
    """Load a data source and print its record: hashes, counts, provenance."""
    from hybridlab.data import load_images, load_text

    is_images = source.partition(":")[0] in ("digits", "mnist")
    loaded = load_images(source) if is_images else load_text(source, vocab_size=vocab_size, seed=seed)
    print(json.dumps(loaded.record(), indent=2))


@app.command()
def report(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 where a document is stale.")] = False,
) -> None:
    """Write README's results and the documents in docs/ that follow from executed/*/results.json, from these alone."""
    from hybridlab.base.files import project_root
    from hybridlab.report import stale_files, write_report

    root = project_root()
    changed = stale_files(root) if check else write_report(root)
    word = "stale" if check else "written"
    print("\n".join(f"{word}: {path.relative_to(root)}" for path in changed) or "everything is up to date")
    if check and changed:
        print("`hybridlab report` writes them")
        raise typer.Exit(EXIT_FAILED)


runs_app = typer.Typer()
app.add_typer(runs_app, name="runs")
Folder = Annotated[Path, typer.Option(help="Where to look for runs, from the project's root.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for other programs.")]
RunName = Annotated[
    str, typer.Argument(metavar="NAME", help="As `hybridlab runs` has it, or a part that no other has.")
]


@runs_app.callback(invoke_without_command=True)
def runs(
    context: typer.Context,
    sort: Annotated[str, typer.Option(metavar="COLUMN", help="Sort by it; -COLUMN from the greatest down.")] = "run",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=PATTERN", help="Only these, as name=*unguarded; may repeat, all must hold."),
    ] = None,
    folder: Folder = Path("runs"),
    as_json: AsJson = False,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="Also write every step of them there.")
    ] = None,
    memory_csv: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write their memory there, in nvidia-smi's columns.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write their scalars there, for TensorBoard.")
    ] = None,
) -> None:
    """List recorded runs with their key figures; `show`, `diff` and `tag` look closer."""
    if context.invoked_subcommand:
        return
    from hybridlab.base.files import project_root
    from hybridlab.notebook.compare_runs import figures_table, runs_with_figures

    root = project_root() / folder
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root}: name another after --folder, or train a run: hybridlab run NOTEBOOK"
        )
    found = runs_with_figures(folder, sort, where or [])
    shown = figures_table(found, folder, where or [])
    if not shown.table:
        raise UserError(shown.empty)
    print(json.dumps(shown.table.rows, indent=1, default=str) if as_json else shown)
    if csv or memory_csv or tensorboard:
        named = {figures["run"]: run for run, figures in found}
        say = partial(print, file=sys.stderr if as_json else sys.stdout)
        _export(named, csv, memory_csv, tensorboard, say)


def _export(
    named: Mapping[str, Run],
    csv: Path | None,
    memory_csv: Path | None,
    tensorboard: Path | None,
    say: Callable[[str], None],
) -> None:
    """Write runs, by their names, in each of the formats for which there is a place."""
    from hybridlab.study import exports

    if csv:
        exports.export_steps(named, csv)
        say(f"written: {csv}")
    if memory_csv:
        for name, run in named.items():
            exports.export_nvidia_smi(run, memory_csv / f"{name}.csv")
        say(f"written: {memory_csv}")
    if tensorboard:
        for name, run in named.items():
            exports.export_tensorboard(run, tensorboard / name)
        say(f"written: {tensorboard}; look at it with: tensorboard --logdir {tensorboard}")


@runs_app.command()
def show(name: RunName, folder: Folder = Path("runs"), as_json: AsJson = False) -> None:
    """Show one run: settings, final figures, what was decided at which step, tags."""
    from hybridlab.notebook.one_run import find_run, run_record, show_lines

    run = find_run(name, folder)
    print(json.dumps(run_record(run), indent=1, default=str) if as_json else "\n".join(show_lines(run)))


@runs_app.command()
def diff(first: RunName, second: RunName, folder: Folder = Path("runs"), as_json: AsJson = False) -> None:
    """Compare two runs: the settings and final figures that differ."""
    from hybridlab.notebook.one_run import difference_lines, differences, find_run

    rows = differences(find_run(first, folder), find_run(second, folder))
    lines = difference_lines([{"key": "", "first": first, "second": second}, *rows])
    print(json.dumps(rows, indent=1, default=str) if as_json else "\n".join(lines))


@runs_app.command()
def tag(
    name: RunName,
    tags: Annotated[
        list[str], typer.Argument(metavar="TAG", help="Words of your own; `--where tags=*WORD*` finds them.")
    ],
    remove: Annotated[bool, typer.Option("--remove", help="Take these tags away.")] = False,
    folder: Folder = Path("runs"),
) -> None:
    """Give a run tags."""
    from hybridlab.notebook.one_run import find_run, set_tags

    if not remove and not all(tag.strip() and tag.isprintable() for tag in tags):
        raise UserError("a tag is empty, or cannot be printed: give a word, such as baseline")
    run = find_run(name, folder)
    print(", ".join(set_tags(run, remove=tags) if remove else set_tags(run, add=tags)) or "no tags")


@app.command()
def rates(
    model: Annotated[str, typer.Option(help="A GPT-2 size.")] = "tiny",
    data: Annotated[str, typer.Option(help="A source of text, as `hybridlab data` takes it.")] = "python",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each trial: as many as the run that you plan.")] = 200,
    batch: Annotated[str, typer.Option(metavar="WINDOWSxTOKENS", help="The batch of the run that you plan.")] = "8x64",
    optimizer: Annotated[str, typer.Option(help="adamw, adam, muon or sgd.")] = "adamw",
    lr: Annotated[float | None, typer.Option(help="Where to begin; by default the method's best known rate.")] = None,
    momentum: Annotated[
        list[float] | None,
        typer.Option(help="Beta1 of adamw and adam, else the momentum; each one is bracketed."),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, tf32 or bf16.")] = "fp32",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Through torch.compile; on a GPU as CUDA graphs.")
    ] = False,
    most: Annotated[int, typer.Option(min=3, help="The largest number of trials.")] = 7,
    folder: Annotated[Path, typer.Option(help="Where the trials are recorded.")] = Path("runs/rates"),
    resume: Annotated[bool, typer.Option("--resume", help="Keep the trials that have finished.")] = False,
) -> None:
    """Find the best learning rate of a run, by trials at its own length and batch on both sides of it."""
    from hybridlab.base.settings import broken_bound
    from hybridlab.models import GPT2Config
    from hybridlab.optim import OptimizerConfig
    from hybridlab.planner.text_report import read_batch
    from hybridlab.study import RunConfig, TextTaskConfig, bracket_rates

    for value in momentum or ():
        if said := broken_bound(value, least=0, below=1):
            raise UserError(f"momentum is {value:g}: it must be {said}")
    windows, tokens = read_batch(batch)
    vocab_size = GPT2Config.named(model).vocab_size
    task = TextTaskConfig(model, data, vocab_size=vocab_size, block_size=tokens, batch_size=windows)
    method = OptimizerConfig.tuned(optimizer, **({} if lr is None else {"lr": lr}))
    name = f"{model}, {optimizer}"
    methods = {f"{name}, momentum {it}": method.with_momentum(it) for it in momentum or ()} or {name: method}
    run = RunConfig(name, task, steps, precision=precision, compiled=compiled)
    runs = [replace(run, name=name, optimizer=method) for name, method in methods.items()]
    trials = bracket_rates(runs, folder, most=most, resume=resume)
    print("\n".join(f"{name}: {trial}" for name, trial in trials.items()))


@app.command()
def plan(
    model: Annotated[
        str | None,
        typer.Option(help="A GPT-2 size: nano, micro, tiny, mini, small, medium, large or xl; by default small."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="MODULE:OBJECT", help="A task of your own, in place of model and batch.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A Hugging Face config.json, or its folder, instead of a GPT-2 size."),
    ] = None,
    card: Annotated[str, typer.Option(help="The GPU: its memory, as 16GB, or its name, as rtx5080.")] = "16GB",
    taken: Annotated[
        float, typer.Option(min=0, help="GB of the GPU that other programs hold, such as a desktop.")
    ] = 0.0,
    batch: Annotated[
        str | None, typer.Option(metavar="WINDOWSxTOKENS", help="By default 8x512, or what the model takes.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, muon or sgd.")] = "adamw",
    memory: Annotated[
        str,
        typer.Option(
            help="none, conservative, aggressive, fit_16gb (weights of 24 bits, moments of 4), fit_16gb_fp32 (float32 "
            "weights) or fit_16gb_predict (for prediction in time)."
        ),
    ] = "none",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compiled",
            help="With torch.compile; a GPT-2 also in CUDA graphs, where the memory settings allow.",
        ),
    ] = False,
    predictor: Annotated[str, typer.Option(help="Of prediction in time, such as linear; none is without.")] = "none",
    path_device: Annotated[
        str | None,
        typer.Option(
            help="Where the path of the weights is kept: same (as they are) or host. By default host with memory "
            "settings that free the GPU in Predict, else same."
        ),
    ] = None,
    path_dtype: Annotated[str, typer.Option(help="The number format of the path: fp32 or bf16.")] = "fp32",
    stages: Annotated[
        str, typer.Option(metavar="BLOCKS,...", help="For predicted depth: the active blocks of each stage, as 3,12.")
    ] = "",
    ranks: Annotated[
        int, typer.Option(min=0, help="GPUs that share the batch and the model, as torchrun starts them.")
    ] = 0,
    wrap: Annotated[str, typer.Option(help="With --ranks: fsdp, or ddp: each GPU holds the whole model.")] = "fsdp",
    gather: Annotated[str, typer.Option(help="With fsdp: the format of gathered weights: fp32 or bf16.")] = "fp32",
    copies: Annotated[
        int, typer.Option(min=1, help="With fsdp: copies of the model, each sharded over RANKS / COPIES GPUs.")
    ] = 1,
    blocks_per_group: Annotated[
        int, typer.Option(min=1, help="With fsdp: blocks whose weights are gathered at once.")
    ] = 1,
    keep_gathered: Annotated[
        bool, typer.Option("--keep-gathered", help="With fsdp: keep gathered weights from forward to backward.")
    ] = False,
    find: Annotated[str, typer.Option(help="batch or sequence: the largest one that fits.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print an object instead of text.")] = False,
) -> None:
    """Predict the memory that a training takes, without a GPU; if it does not fit, say what to switch on."""
    from hybridlab.base.settings import check_choice
    from hybridlab.planner.gpu_specs import find_gpu
    from hybridlab.planner.text_report import Question, read_stages, report_lines
    from hybridlab.predictors import PREDICTORS

    named = {"--task": task, "--config": config, "--model": model, "--batch": batch}
    beside = [option for option, value in named.items() if value is not None]
    if (task and len(beside) > 1) or (config and model):
        raise UserError(f"{' and '.join(beside)} name the model or the batch twice: leave all but {beside[0]} off")
    check_choice("predictor", predictor, ("none", *PREDICTORS))
    card_bytes, rates = find_gpu(card)
    if taken * 1e9 >= card_bytes:
        raise UserError(f"other programs hold {taken:g} GB, all of a GPU of {card_bytes / 1e9:g} GB: close some")
    settings = _memory_settings(memory, gather)
    spec = _task_spec(task, settings, optimizer) if task else _model_spec(model, config, batch, settings, optimizer)
    spec = _with_path(spec, predictor, path_device, path_dtype)
    if predictor == "none" and not stages and (path_device or path_dtype != "fp32"):
        raise UserError("--path-device and --path-dtype are for prediction: give --predictor, such as linear, too")
    shared: dict[str, Any] = {"ranks": ranks, "wrap": wrap, "gather": gather, "copies": copies}
    shared |= {"blocks_per_group": blocks_per_group, "keep_gathered": keep_gathered}
    spec = replace(spec, depth=read_stages(stages), compiled=compiled, cuda_graphs=compiled, **shared)
    question = Question(spec, card_bytes - round(taken * 1e9), rates, find)
    if as_json:
        print(json.dumps(question.record(), indent=2))
        return
    for line in report_lines(question):
        print(line)


def _memory_settings(preset: str, gather: str) -> MemoryConfig:
    """A preset of memory settings; where ranks gather weights in bf16, they compute in it."""
    from hybridlab.memory import MixedPrecisionConfig
    from hybridlab.planner.text_report import memory_named

    settings = memory_named(preset)
    if gather != "bf16" or settings.mixed_precision:
        return settings
    return replace(settings, mixed_precision=MixedPrecisionConfig.conservative())


def _task_spec(task: str, memory: MemoryConfig, optimizer: str) -> TrainingSpec:
    """The plain training of a task of the user's own."""
    from hybridlab.engine.config import HybridTrainerConfig
    from hybridlab.optim import OptimizerConfig
    from hybridlab.study import RunConfig, find_task
    from hybridlab.study.planning import training_spec_of

    plain = HybridTrainerConfig.plain(memory=memory)
    return training_spec_of(RunConfig("plan", find_task(task), 1, OptimizerConfig(optimizer), hybrid=plain))


def _model_spec(
    model: str | None, config: Path | None, batch: str | None, memory: MemoryConfig, optimizer: str
) -> TrainingSpec:
    """The plain training of a GPT-2 size, or of the model that a config.json describes."""
    from hybridlab.optim import OptimizerConfig
    from hybridlab.planner.architectures import causal_lm
    from hybridlab.planner.spec import TrainingSpec
    from hybridlab.planner.text_report import default_batch, read_batch

    chosen = causal_lm(config) if config else model or "small"
    size = read_batch(batch) if batch else default_batch(chosen)
    return TrainingSpec(chosen, size, memory, OptimizerConfig(optimizer))


def _with_path(spec: TrainingSpec, predictor: str, path_device: str | None, path_dtype: str) -> TrainingSpec:
    """The training with the path of the weights that a predictor remembers; without one, where a snapshot would lie."""
    from hybridlab.engine.config import HybridTrainerConfig

    jumps: dict[str, Any] = {"predictor": predictor, "memory": spec.memory} if predictor != "none" else {}
    place = path_device or ("host" if jumps and spec.memory.predict_aware else "same")
    hybrid = HybridTrainerConfig(path_device=place, path_dtype=path_dtype, **jumps)
    return replace(spec, path=hybrid.path_needs if jumps else None, path_storage=hybrid.path_storage)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; a person's mistake gives one line on standard error and exit code 2.

    A signal that ends the command, and a standard output that is full, give one line too; one whose reader has gone
    gives none. What was not printed makes the exit code 1.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = _warn
    with signals_as_interrupts(), guarded_output() as output:
        code = _ended(arguments)
    if output.error and code == 0:
        code = EXIT_FAILED
        if output.error.errno != errno.EPIPE:
            _say(f"standard output: {output.error.strerror}", code)
    return code


def _ended(arguments: list[str]) -> int:
    """Run the command line to its end, however that comes."""
    try:
        app(_joined(arguments), prog_name="hybridlab")
    except SystemExit as end:
        return _say("stopped", EXIT_INTERRUPTED) if end.code == EXIT_INTERRUPTED else int(end.code or 0)
    except KeyboardInterrupt:
        return _say("stopped", EXIT_INTERRUPTED)
    except (UserError, ValueError) as error:
        return _say(error, EXIT_REFUSED)
    except OSError as error:  # a name that is too long, a folder that is gone: whatever the system refuses
        return _say(told(error), EXIT_FAILED)
    except RunFailed as error:
        return _say(error, EXIT_INTERRUPTED if isinstance(error, RunInterrupted) else EXIT_FAILED)
    return 0


def _joined(arguments: list[str]) -> list[str]:
    """Write each `-p NAME VALUE` as `-p NAME=VALUE`, an option of one value, which may repeat."""
    joined: list[str] = []
    for argument in arguments:
        if len(joined) > 1 and joined[-2] in ("-p", "--parameter") and joined[-1].isidentifier():
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    _say(message, 0)


def _say(message: object, code: int) -> int:
    print(f"hybridlab: {in_one_line(message)}", file=sys.stderr)
    return code
