"""The answer of `hybridlab plan`, in lines of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cached_property, partial
from typing import Any

from hybridlab.base.errors import UserError
from hybridlab.base.ranks import SHARDING
from hybridlab.base.settings import check_choice
from hybridlab.depth import DepthSchedule
from hybridlab.memory.config import MemoryConfig, PredictAwareMemoryConfig
from hybridlab.planner.gpu_specs import HOST_FACTOR, OF_MEASURED, GpuSpec, host_update_ms, nearest_gpu, step_time_ms
from hybridlab.planner.plan import Plan, in_gigabytes, plan_stages
from hybridlab.planner.spec import BatchShape, Model, TrainingSpec
from hybridlab.planner.suggest import Option, best_fit, largest_batch, longest_sequence, options

MEMORY_PRESETS: dict[str, Callable[[], MemoryConfig]] = {
    "none": MemoryConfig,
    "conservative": MemoryConfig.conservative,
    "aggressive": MemoryConfig.aggressive,
    "fit_16gb": MemoryConfig.fit_16gb,
    "fit_16gb_fp32": partial(MemoryConfig.fit_16gb, weights="fp32"),
    "fit_16gb_predict": partial(MemoryConfig.fit_16gb, predict_aware=PredictAwareMemoryConfig("pinned")),
}
"""`hybridlab plan`'s; the last one is for training that predicts in time."""

FINDS = {"batch": largest_batch, "sequence": longest_sequence}

WINDOWS, TOKENS = 8, 512
"""The batch, unless one is given."""


@dataclass(frozen=True)
class Question:
    """What `hybridlab plan` is asked.

    spec: the training; gpu_bytes: of the GPU, less what others hold; gpu: its data sheet, where it is known by name
    find: "batch" or "sequence": the largest that fits is to be found; "" asks for neither
    """

    spec: TrainingSpec
    gpu_bytes: int
    gpu: GpuSpec | None = None
    find: str = ""

    def __post_init__(self) -> None:
        check_choice("find", self.find or "batch", FINDS)

    @cached_property
    def asked(self) -> Plan:
        """The training as it is, a growing one at its last stage."""
        return plan_stages(self.spec)

    @property
    def fits(self) -> bool:
        """Whether the GPU holds all stages."""
        return self.asked.fits(self.gpu_bytes)

    @cached_property
    def options(self) -> list[Option]:
        """What can be switched on, from fast to slow; nothing where it fits as it is."""
        if self.fits:
            return []
        asked = None if self.asked.stages else self.asked
        return options(self.spec, self.gpu or nearest_gpu(self.gpu_bytes), self.gpu_bytes, asked=asked)

    @cached_property
    def found(self) -> int | None:
        """The largest batch, in windows, or the longest sequence, in tokens, that fits."""
        return FINDS[self.find](self.spec, self.gpu_bytes) if self.find else None

    def record(self) -> dict[str, Any]:
        """The answer, for JSON."""
        plan, best = self.asked, best_fit(self.options, self.gpu_bytes)
        return {
            "fits": self.fits,
            **plan.record(),
            "gpu_bytes": self.gpu_bytes,
            "step_ms": step_time_ms(plan, self.gpu) if self.gpu else None,
            "settings": {
                "model": getattr(self.spec.model, "name", str(self.spec.model)),
                "batch": list(self.spec.batch),
                "optimizer": asdict(self.spec.optimizer),
                "memory": asdict(self.spec.memory),
                "compiled": self.spec.compiled,
                "cuda_graphs": self.spec.replays_graphs,
                **{name: getattr(self.spec, name) for name in ("ranks", "wrap", *SHARDING)},
            },
            "options": [self._option(option) for option in self.options],
            "fastest_fit": self._option(best) if best else None,
            **({f"largest_{self.find}": self.found} if self.find else {}),
        }

    def _option(self, option: Option) -> dict[str, Any]:
        return {
            "features": list(option.features),
            "exact": option.exact,
            "fits": option.plan.fits(self.gpu_bytes),
            "peak_allocated_bytes": option.plan.peak_allocated_bytes,
            "peak_on_gpu_bytes": option.plan.peak_on_gpu_bytes,
            "step_ms": option.step_ms if self.gpu else None,
            "memory": asdict(option.spec.memory),
        }


def report_lines(question: Question) -> Iterator[str]:
    """Memory by part and phase, whether the GPU holds it, what to switch on if not, and times per step if it is known.

    Where something must be switched on, and that is enough, the last lines are the Python that does it.
    """
    asked, best = question.asked, best_fit(question.options, question.gpu_bytes)
    windows, tokens = question.spec.batch
    yield f"A batch of {windows}{f' windows of {tokens} tokens' * (tokens > 1)}\n{asked}\n"
    yield _verdict(question, best)
    if question.found is not None:
        yield _found(question)
    if question.options:
        yield ""
        yield from _by_option(question)
    if best and best.plan.host_memory not in ({}, asked.host_memory):
        yield f"With the fastest that fits, host memory, {best.plan.in_host_memory}."
    yield from _times(question, best)
    if best and best.features:
        yield ""
        yield from _in_python(question.spec, best.spec)


def _found(question: Question) -> str:
    windows, tokens = question.spec.batch
    if not question.found:
        return f"No {question.find} fits."
    if question.find == "batch":
        return f"The largest batch that fits: {question.found} windows of {tokens} tokens."
    most = ", the most that the model takes" if question.found == question.spec.longest else ""
    return f"The longest sequence that was found to fit: {question.found} tokens, in {windows} windows{most}."


def _times(question: Question, best: Option | None) -> Iterator[str]:
    if question.gpu is None:
        yield "No times: a size alone names no GPU. Name one instead, such as rtx5080."
        return
    low, high = OF_MEASURED
    sent = " without what ranks send" if question.spec.ranks > 1 else ""
    a_step, took = "A step" if question.fits else "As it is, a step", _ms(step_time_ms(question.asked, question.gpu))
    yield (
        f"{a_step}{sent} is estimated to take {took}, from the data sheet of a {question.gpu.name}.\n"
        f"Where it was measured, on an H100 and an H200, the estimate was {low:g} to {high:g} times the measured time."
    )
    last = question.asked if question.fits or not best else best.plan
    if on_host := host_update_ms(last):
        which = "" if last is question.asked else ", with the fastest that fits"
        yield (
            f"The host's part of it{which}: {_ms(on_host)}, which depends on the host: expect "
            f"{_ms(on_host / HOST_FACTOR)} to {_ms(on_host * HOST_FACTOR)}."
        )


def _verdict(question: Question, best: Option | None) -> str:
    left, size = question.gpu_bytes - question.asked.most_on_gpu_bytes, f"{question.gpu_bytes / 1e9:g} GB"
    if question.fits:
        return f"It fits a GPU of {size}: {in_gigabytes(left)} are left."
    excess = f"It does not fit a GPU of {size}: {in_gigabytes(-left)} too much."
    if best:
        return f"{excess} What to switch on, the fastest first:"
    return f"{excess} Nor does it with everything switched on; take a shorter batch or a smaller model:"


def _by_option(question: Question) -> Iterator[str]:
    yield _columns(["allocated", "on GPU", *(["est. step"] if question.gpu else [])]) + "        with"
    for option in question.options:
        peaks = (option.plan.peak_allocated_bytes, option.plan.peak_on_gpu_bytes)
        columns = [*map(in_gigabytes, peaks), *([_ms(option.step_ms)] if question.gpu else [])]
        mark = "fits" if option.plan.fits(question.gpu_bytes) else ""
        yield f"{_columns(columns)}  {mark:6}{option.name}{'' if option.exact else ' (inexact)'}"


def _columns(texts: Iterable[str]) -> str:
    return "".join(text.rjust(12) for text in texts)


def _in_python(asked: TrainingSpec, fits: TrainingSpec) -> Iterator[str]:
    """What to paste, where the path goes if it went to the host, and how ranks gather weights if not in float32."""
    run_in_bf16 = fits.gather == "bf16"  # RanksConfig wants the format as the run's own, which is set once
    memory = code_of(replace(fits.memory, mixed_precision=None) if run_in_bf16 else fits.memory)
    yield "# prepare_model_ and optimizer_for put it to work: see README.md, A 16 GB GPU"
    yield f"from hybridlab.memory import {', '.join(sorted(set(re.findall(r'[A-Z][A-Za-z]+Config', memory))))}"
    yield f"memory = {memory}"
    if fits.path_storage.on_host and not asked.path_storage.on_host:
        yield "hybrid = HybridTrainerConfig(path_device='host', memory=memory)  # beside your other settings"
    if run_in_bf16:
        changed = {name: getattr(fits, name) for name, value in SHARDING.items() if getattr(fits, name) != value}
        yield f"ranks = RanksConfig({', '.join(f'{n}={v!r}' for n, v in changed.items())})  # of hybridlab.study.ranks"
        yield "# and RunConfig(..., precision='bf16')"


def code_of(settings: object) -> str:
    """Settings as Python makes them again: only those that are not at their default."""
    if not is_dataclass(settings):
        return repr(settings)
    values = ((field, getattr(settings, field.name)) for field in fields(settings) if field.init)
    changed = (f"{field.name}={code_of(value)}" for field, value in values if value != field.default)
    return f"{type(settings).__name__}({', '.join(changed)})"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.2g} ms"


def default_batch(model: Model) -> BatchShape:
    """Windows of 512 tokens, or of as many as the model takes. Raises ValueError for an unknown size."""
    longest = TrainingSpec(model, (1, 1)).longest
    return WINDOWS, TOKENS if longest is None else min(TOKENS, longest)


def read_stages(text: str) -> DepthSchedule | None:
    """Stages of 3 and then 12 blocks of "3,12"; None of "". Raises UserError for anything else."""
    numbers = [number.strip() for number in text.split(",")] if text else []
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise UserError(f"stages {text!r} cannot be read: give the active blocks of each, such as 3,12")
    stages = tuple((start, int(number)) for start, number in enumerate(numbers))
    return DepthSchedule(stages, shallow=True) if stages else None


def read_batch(text: str) -> BatchShape:
    """(8, 512) of "8x512". Raises UserError for anything else."""
    windows, sign, tokens = text.lower().partition("x")
    given = sign and all(side.isdecimal() and len(side) < 10 and int(side) for side in (windows, tokens))
    if not given:
        raise UserError(f"batch {text!r} cannot be read: give windows and tokens, such as 8x512")
    return int(windows), int(tokens)


def memory_named(name: str) -> MemoryConfig:
    """The preset of that name; "none" is plain training. Raises ValueError for an unknown one."""
    check_choice("memory", name, MEMORY_PRESETS)
    return MEMORY_PRESETS[name]()
