"""A task of the user's own, named as `module:object`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hybridlab.base.errors import UserError, first_line
from hybridlab.base.files import project_root
from hybridlab.base.settings import check_bounds, check_types
from hybridlab.memory.config import MemoryConfig
from hybridlab.study.tasks import Task, TaskConfig

PARTS = ("model", "batch", "loss", "evaluate")
"""Of a task."""


@dataclass(frozen=True)
class OwnTaskConfig:
    """A task that a class or a function of the user's own makes: `object(seed, device)` gives a `Task`.

        class Bytes:
            batch_size, block_size = 8, 64  # windows per step, tokens per window; block_size may be left out

            def __init__(self, seed, device): ...  # sets self.model, on the device; torch's seed is set already
            def batch(self, step): ...             # what a loss is computed on; the same step gives the same batch
            def loss(self, model, batch): ...      # its mean loss, forward only
            def evaluate(self, model): ...         # {"validation_loss": ...}; in eval mode, without gradients

    name: "module:object", the module on the path, in the working folder or in the project's; or "file.py:object"

    A run's record holds the hash of the module's source: an edited task is another run.

    Raises UserError, in one line, for a name that leads nowhere, a module that cannot be imported, and an object
    without `batch_size`.
    """

    name: str
    batch_size: int = field(init=False, default=1)
    block_size: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        check_types(self)
        made_by = load_object(self.name)
        if not callable(made_by) or not hasattr(made_by, "batch_size"):
            raise UserError(f"{self.name} is not a task: give a class with batch_size, {', '.join(PARTS)}")
        object.__setattr__(self, "batch_size", made_by.batch_size)
        object.__setattr__(self, "block_size", getattr(made_by, "block_size", 1))
        check_bounds(self, "batch_size", "block_size", least=1)

    def build(self, seed: int, device: torch.device, memory: MemoryConfig | None = None) -> Task:
        """The task, with weights drawn from the seed."""
        torch.manual_seed(seed)
        task = load_object(self.name)(seed, device)
        if missing := [part for part in PARTS if not hasattr(task, part)]:
            raise UserError(f"the task {self.name} lacks {', '.join(missing)}: add them to its class")
        return task

    def data_record(self) -> dict[str, Any]:
        """The module's source, and what the object's own `data_record()` says, if it has one."""
        made_by = load_object(self.name)
        with suppress(OSError, TypeError):
            source = Path(inspect.getsourcefile(sys.modules[made_by.__module__]) or "").read_bytes()
            return {"source_sha256": hashlib.sha256(source).hexdigest()} | getattr(made_by, "data_record", dict)()
        return getattr(made_by, "data_record", dict)()


def find_task(name: str) -> TaskConfig:
    """The task that "module:object" or "file.py:object" names: settings of a task, or what makes one.

    Raises UserError as `OwnTaskConfig` does.
    """
    found = load_object(name)
    return found if isinstance(found, TaskConfig) and not isinstance(found, type) else OwnTaskConfig(name)


def load_object(name: str) -> Any:
    """What "module:object" or "file.py:object" names. Raises UserError where there is no such thing."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise UserError(
            f"{name!r} does not name a task: write module:object or file.py:object, such as my_task.py:MyTask"
        )
    module = _import(place)
    if not hasattr(module, attribute):
        raise UserError(f"{place} has no {attribute!r}: it has {', '.join(_public(module)) or 'nothing of its own'}")
    return getattr(module, attribute)


def _import(place: str) -> Any:
    path = Path(place)
    is_file = path.suffix == ".py"
    name, folders = (path.stem, [path.resolve().parent]) if is_file else (place, [Path.cwd(), project_root()])
    if is_file and not path.is_file():
        raise UserError(f"{place}: no such file")
    sys.path.extend(str(folder) for folder in folders if str(folder) not in sys.path)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"there is no module {name!r}: put {name.replace('.', '/')}.py into {folders[0]}") from None
        raise UserError(f"{place} needs the module {error.name!r}: install it") from error
    except (Exception, SystemExit) as error:  # a script that reads the command line ends the process
        said = f"{place} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ran = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"]
        if ran and not isinstance(error, SyntaxError):  # which names its own file and line
            said += f" ({Path(ran[-1].filename).name}, line {ran[-1].lineno})"
        raise UserError(said) from error
    if is_file and Path(module.__file__ or "").resolve() != path.resolve():
        raise UserError(f"{place}: another module is called {name!r} ({module.__file__}): rename the file")
    return module


def _public(module: Any) -> list[str]:
    return [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
