"""The command line: `hybridlab run`, `plan`, `data`, `report` and `runs`."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hybridlab import __version__
from hybridlab.base.errors import UserError, printable

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="Measure whether predicting weights and saving memory pay, on your model and your GPU.",
    epilog="Interactively: `make lab`. Everything at once: `make milestones PROFILE=cpu`.",
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
    notebook: Annotated[Path, typer.Argument(metavar="NOTEBOOK", help="As notebooks/03_gpt2_small_hybrid.ipynb.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Where the executed copy goes.")],
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
) -> None:
    """Run a notebook whole, and keep a clean executed copy.

    Parameters are checked before anything runs. A copy is written only when every cell has run;
    what is left of a run that stopped goes to OUT with the ending .failed.ipynb.

    The results, results.json, go where the copy goes; -p results FOLDER puts them elsewhere.

    Exit codes: 0 done, 1 a cell failed or OUT could not be written, 2 refused before the start, 130 stopped.
    """
    from hybridlab.batch.run import run_notebook

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings, console = [_pair(text) for text in parameter or []], Console()
    for sentence in run_notebook(notebook, output, file or [], settings, console, resume=resume):
        console.print(printable(sentence), markup=False, highlight=False, soft_wrap=True)
    console.print(f"Notebook: {output}", markup=False, highlight=False, soft_wrap=True)
    console.print("Open it:  make lab", highlight=False)


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
    """Write what the documents say of results, from the results files in executed/ alone."""
    from hybridlab.base.files import project_root
    from hybridlab.report import stale_files, write_report

    root = project_root()
    changed = stale_files(root) if check else write_report(root)
    word = "stale" if check else "written"
    print("\n".join(f"{word}: {path.relative_to(root)}" for path in changed) or "everything is up to date")
    if check and changed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def runs(
    sort: Annotated[str, typer.Option(metavar="COLUMN", help="Sort by it; -COLUMN from the greatest down.")] = "run",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=PATTERN", help="Only these, as name=*unguarded; may repeat, all must hold."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where to look for runs, from the project's root.")] = Path("runs"),
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write their scalars there, for TensorBoard.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write their memory there, in nvidia-smi's columns.")
    ] = None,
) -> None:
    """List recorded runs with their key figures."""
    from hybridlab.base.files import project_root
    from hybridlab.notebook.compare_runs import find_runs, runs_table

    root = project_root() / folder
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: name another after --folder, or train a run with `make run`")
    shown = runs_table(folder, sort=sort, where=where or [])
    if not shown.table:
        raise UserError(shown.empty)
    print(shown)
    for found in find_runs(folder, where=where or []) if tensorboard or csv else []:
        place = found.folder.relative_to(root)
        if tensorboard:
            from hybridlab.study.tensorboard import export_tensorboard

            export_tensorboard(found, tensorboard / place)
        if csv:
            from hybridlab.study.memory_log import export_csv

            export_csv(found, csv / place.with_suffix(".csv"))
    if tensorboard:
        print(f"written: {tensorboard}; look at it with: tensorboard --logdir {tensorboard}")
    if csv:
        print(f"written: {csv}")


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="A GPT-2 size: nano, tiny, small, medium, large or xl.")] = "small",
    task: Annotated[
        str | None, typer.Option(metavar="MODULE:OBJECT", help="A task of your own, in place of model and batch.")
    ] = None,
    card: Annotated[str, typer.Option(help="Its memory, as 16GB, or its name, as rtx5080.")] = "16GB",
    taken: Annotated[float, typer.Option(min=0, help="GB of it that other programs hold, such as a desktop.")] = 0.0,
    batch: Annotated[
        str | None, typer.Option(metavar="WINDOWSxTOKENS", help="By default 8x512, or what the model takes.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, muon or sgd.")] = "adamw",
    memory: Annotated[str, typer.Option(help="none, conservative, aggressive or fit_16gb.")] = "none",
    predictor: Annotated[str, typer.Option(help="Whose path is remembered; none trains without jumps.")] = "none",
    path_device: Annotated[str, typer.Option(help="Where the path is kept: same or host.")] = "same",
    path_dtype: Annotated[str, typer.Option(help="Of the path's rows: fp32 or bf16.")] = "fp32",
) -> None:
    """Say what a training takes of a GPU, without one, and if it does not fit the least to switch on."""
    from hybridlab.engine.config import HybridTrainerConfig
    from hybridlab.optim import OptimizerConfig
    from hybridlab.planner.gpu_specs import find_gpu
    from hybridlab.planner.spec import TrainingSpec
    from hybridlab.planner.text_report import default_batch, memory_named, read_batch, report_lines

    card_bytes, rates = find_gpu(card)
    if taken * 1e9 >= card_bytes:
        raise UserError(f"other programs hold {taken:g} GB, all of a GPU of {card_bytes / 1e9:g} GB: close some")
    card_bytes -= round(taken * 1e9)
    settings, size = memory_named(memory), read_batch(batch) if batch else default_batch(model)
    spec = TrainingSpec(model, size, settings, OptimizerConfig(optimizer))
    if task:
        from hybridlab.study import RunConfig, find_task
        from hybridlab.study.planning import training_spec_of

        plain = HybridTrainerConfig.plain(memory=settings)
        spec = training_spec_of(RunConfig("plan", find_task(task), 1, spec.optimizer, hybrid=plain))
    if predictor != "none":
        hybrid = HybridTrainerConfig(
            predictor=predictor, path_device=path_device, path_dtype=path_dtype, memory=settings
        )
        spec = replace(spec, path=hybrid.path_needs, path_storage=hybrid.path_storage)
    for line in report_lines(spec, card_bytes, rates):
        print(line)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; a person's mistake gives one line on standard error and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = _warn
    try:
        app(_joined(arguments), prog_name="hybridlab")
    except (UserError, ValueError) as error:
        return _say(error, EXIT_REFUSED)
    except KeyboardInterrupt:
        return _say("stopped", EXIT_INTERRUPTED)
    except Exception as error:
        return _say(error, _exit_code(error))
    return 0


def _exit_code(error: Exception) -> int:
    """Tell a run that failed or was stopped from a bug, which keeps its traceback."""
    from hybridlab.batch.run import RunFailed, RunInterrupted

    if not isinstance(error, RunFailed):
        raise error
    return EXIT_INTERRUPTED if isinstance(error, RunInterrupted) else EXIT_FAILED


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
    print(f"hybridlab: {printable(' '.join(str(message).split()))}", file=sys.stderr)
    return code
