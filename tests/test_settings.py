"""Every settings class refuses what cannot be meant, field by field."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hybridlab
from hybridlab import DepthSchedule, HybridTrainerConfig
from hybridlab.batch.train_file import TrainConfig
from hybridlab.memory import (
    CheckpointingConfig,
    GradientAccumulationConfig,
    MemoryConfig,
    MixedPrecisionConfig,
    PredictAwareMemoryConfig,
)
from hybridlab.models import GPT2Config
from hybridlab.optim import OptimizerConfig, Schedule
from hybridlab.planner import GpuOverhead
from hybridlab.study import HuggingFaceTaskConfig, ImageTaskConfig, OwnTaskConfig, RunConfig, Study, TextTaskConfig
from hybridlab.study.ranks import RanksConfig
from hybridlab.weights.gram import PathNeeds
from hybridlab.weights.path import PathStorage

RUN = RunConfig("run", TextTaskConfig("nano"), steps=10)
SETTINGS: list[Any] = [
    GpuOverhead(),
    CheckpointingConfig(),
    DepthSchedule(((0, 2), (5, 4))),
    GPT2Config.nano(),
    GradientAccumulationConfig(),
    HybridTrainerConfig(),
    HuggingFaceTaskConfig('{"model_type": "gpt2"}'),
    ImageTaskConfig(),
    MemoryConfig(step_in_backward=True),
    MixedPrecisionConfig(),
    OptimizerConfig("muon"),
    OwnTaskConfig("tests.own_bytes:Bytes"),
    PathNeeds(4, 5),
    PathStorage(),
    PredictAwareMemoryConfig(),
    RanksConfig(),
    RUN,
    Schedule(),
    Study(RUN, {"hybrid": HybridTrainerConfig()}),
    TextTaskConfig(),
    TrainConfig(RUN),
]
FIELDS = [(settings, field.name, str(field.type)) for settings in SETTINGS for field in fields(settings) if field.init]
IDS = [f"{type(settings).__name__}.{name}" for settings, name, _ in FIELDS]
NUMBERS = [field for field in FIELDS if re.search(r"\b(int|float)\b", field[2]) and field[1] not in ("stages", "rates")]

ACCEPTED: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
ABOVE_ZERO = (
    "batch_size block_size blocks_per_group clip_in_backward clip_norm control_fractions copies correction_interval "
    "decay_fraction divergence_threshold embedding_multiple eps evaluate_every every full_steps gate_batches lr "
    "micro_batches n_embd n_head n_layer rows seeds steps timeout_s total_steps validation_batches "
    "vector_multiple vocab_size"
)
BELOW_ONE = {"betas", "dropout", "momentum", "skip_share", "velocity"}
UP_TO_ONE = {"confidence_threshold", "decay_fraction", "final_fraction", "gate_budget"}


def refusal(build: Callable[[], object], error: type[Exception]) -> str:
    """The one line in which something is refused."""
    with pytest.raises(error) as refused:
        build()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_no_settings_are_forgotten() -> None:
    sources = "\n".join(path.read_text() for path in Path(hybridlab.__file__).parent.rglob("*.py"))
    names = {type(settings).__name__ for settings in SETTINGS}
    assert set(re.findall(r"\nclass (\w+Config)\b[^(]", sources)) <= names
    assert sources.count("check_types(self)") == len(names)


@pytest.mark.parametrize(("settings", "name", "kind"), FIELDS, ids=IDS)
def test_a_value_of_another_type_is_refused(settings: Any, name: str, kind: str) -> None:
    fine = ACCEPTED.get(kind.removesuffix(" | None"), ()) + ((type(None),) if "None" in kind else ())
    for value in (None, True, 7, 7.5, "no", b"no", [1], {"a": 1}):
        if type(value) not in fine:
            says = refusal(lambda value=value: replace(settings, **{name: value}), TypeError)  # type: ignore[misc]
            assert says.startswith(f"{name} is ")
            assert f"{kind} is wanted" in says


@pytest.mark.parametrize(
    ("settings", "name", "kind"),
    NUMBERS,
    ids=[name for name, field in zip(IDS, FIELDS, strict=True) if field in NUMBERS],
)
def test_a_number_out_of_place_is_refused(settings: Any, name: str, kind: str) -> None:
    refused = [-1, 10**19, *([0] if name in ABOVE_ZERO.split() else []), *([1] if name in BELOW_ONE else [])]
    refused += [1.5] if name in UP_TO_ONE else []
    refused += [math.nan, math.inf, -math.inf] if "float" in kind else []
    for number in refused:
        value = (number, number) if "tuple" in kind else number
        says = refusal(lambda value=value: replace(settings, **{name: value}), ValueError)  # type: ignore[misc]
        assert says.startswith(f"{name} is {number}: it must be ")


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: type(settings).__name__)
def test_bounds_themselves_are_accepted(settings: Any) -> None:
    for field in fields(settings):
        if str(field.type) in ("int", "float", "float | None") and field.name not in ABOVE_ZERO.split():
            replace(settings, **{field.name: 0})
        if field.name in UP_TO_ONE:
            replace(settings, **{field.name: 1})


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda: OptimizerConfig(lr="1e-4"), TypeError, "YAML reads 1e-4 as text: write 1.0e-4"),
        (lambda: RunConfig("run", "tiny", steps=1), TypeError, "task is 'tiny': TaskConfig is wanted"),
        (lambda: Study(RUN, {"hybrid": "linear"}), TypeError, "hybrids is {'hybrid': 'linear'}: Mapping"),
        (lambda: MemoryConfig(clip_in_backward=0), ValueError, "it must be above 0, or None"),
        (lambda: TextTaskConfig(model="smal"), ValueError, "GPT-2 size 'smal' is unknown: did you mean 'small'?"),
        (lambda: RunConfig("run", RUN.task, steps=1, clock="nominl"), ValueError, "did you mean 'nominal'?"),
        (lambda: PathStorage(dtype=hybridlab.weights.path.torch.int8), ValueError, "take torch.bfloat16"),
    ],
)
def test_a_message_says_the_fix(build: Callable[[], object], error: type[Exception], says: str) -> None:
    assert says in refusal(build, error)


def test_a_run_without_a_schedule_has_one_of_its_own_length() -> None:
    assert RUN.lr_schedule == Schedule().fitted_to(10)
    longer = replace(RUN, steps=3000)
    assert longer.lr_schedule == Schedule(total_steps=3000)
    given = Schedule("constant", warmup_steps=0, total_steps=5)
    assert replace(RUN, schedule=given).lr_schedule is given


def test_a_record_says_what_was_meant_where_nothing_is_given() -> None:
    record = RunConfig("run", ImageTaskConfig(), 10, OptimizerConfig("adam"), device="cpu").record()
    assert Schedule(**record["schedule"]) == Schedule().fitted_to(10)
    assert record["optimizer"]["weight_decay"] == 0


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: type(settings).__name__)
def test_numpy_scalars_become_plain_numbers(settings: Any) -> None:
    for field in fields(settings):
        value = getattr(settings, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if field.init and numbers and all(isinstance(number, int | float | str) for number in numbers):
            given = tuple(np.asarray(number)[()] for number in numbers)
            assert all(isinstance(number, np.generic) for number in given)
            changed = replace(settings, **{field.name: given if isinstance(value, tuple) else given[0]})
            kept = getattr(changed, field.name)
            assert kept == value
            assert not any(isinstance(number, np.generic) for number in (kept if isinstance(kept, tuple) else (kept,)))


def test_a_numpy_nan_is_refused() -> None:
    said = refusal(lambda: OptimizerConfig(lr=np.float64("nan")), ValueError)
    assert said == "lr is nan: it must be finite and above 0 and at most 1000"


@pytest.mark.parametrize("lr", [1e38, 1e39, 1001])
def test_a_learning_rate_that_overflows_is_refused(lr: float) -> None:
    assert f"lr is {lr}: it must be above 0 and at most 1000" in refusal(lambda: OptimizerConfig(lr=lr), ValueError)
