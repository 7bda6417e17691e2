"""results.json read, and held against a schema once: what is no file of ours is refused in one line."""

from __future__ import annotations

import json
import reprlib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from hybridlab.base.errors import UserError
from hybridlab.base.settings import LARGEST
from hybridlab.results.claims import Claim

Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Slug = Annotated[str, Field(pattern=r"^\w[\w .+-]*$")]
"""A notebook's name, which becomes part of file names."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _OfEqualLength(_Part):
    @model_validator(mode="after")
    def _check(self) -> Self:
        lengths = {name: len(value) for name, value in self if isinstance(value, list)}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise ValueError(f"its lists must be of one length and not empty, they have {lengths}")
        return self


class _MemoryRow(_Part):
    arm: str
    model: str
    parts: dict[str, Number]
    peak_memory_bytes: Number
    measured_allocated_bytes: Number | None
    loss_change: Number | None
    __pydantic_extra__: dict[str, Number | None]


class _PredictRow(_Part):
    arm: str
    measured_allocated_bytes: Number | None


class _VramRow(_OfEqualLength):
    run: str
    seconds: list[Number]
    used_gb: list[Number | None]
    phase: list[str]


class _LossesRow(_OfEqualLength):
    arm: str
    control: bool
    gradient_steps: list[Number]
    loss: list[Number]
    low: list[Number] | None
    high: list[Number] | None


class _Bin(_Part):
    accepted_share: Number
    proposals: Number
    __pydantic_extra__: dict[str, Number]


class _RunsRow(_Part):
    reliability: list[_Bin] = []
    acceptance_reliability: list[_Bin] = []


class _Tables(_Part):
    memory: list[_MemoryRow] = []
    predict: list[_PredictRow] = []
    vram: list[_VramRow] = []
    losses: list[_LossesRow] = []
    runs: list[_RunsRow] = []
    __pydantic_extra__: dict[str, list[dict[str, Any]]]


class _Parameters(_Part):
    steps: Number | None = None
    reference_steps: Number | None = None
    seeds: Number | None = None
    batch_size: Number | None = None
    block_size: Number | None = None


def _in_range(claim: Claim) -> Claim:
    for q in claim.quantities:
        for number in (q.value, q.low, q.high, q.bound, *q.per_seed):
            if number is not None and not abs(number) <= LARGEST:
                raise ValueError(f"its {q.name} must be a number of at most {LARGEST:g}")
    return claim


class _Figure(_Part):
    value: Number | None
    low: Number | None
    high: Number | None


class _Repeat(_Part):
    device: str
    git_commit: str = ""
    figures: dict[str, _Figure]


class _Entry(_Part):
    device: str
    parameters: _Parameters
    claims: list[Annotated[Claim, AfterValidator(_in_range)]]
    summary: list[str]
    versions: dict[str, str] = {}
    git_commit: str = ""
    code: dict[str, str] = {}
    repeats: list[_Repeat] = []
    tables: _Tables = _Tables.model_construct()


@cache
def _schema() -> TypeAdapter[Any]:
    return TypeAdapter(dict[Slug, _Entry])


def load_results(path: Path) -> dict[str, Any]:
    """Read a `results.json`: notebook slug -> entry; empty when there is no file.

    Raises UserError where it cannot be read, and where it is no results file: with the first place that is wrong.
    """
    try:
        content = path.read_bytes()
        _schema().validate_json(content)
        return json.loads(content)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise UserError(f"{path}: {_first(error)}; restore the file with git checkout, or delete it") from None


def _first(error: ValidationError) -> str:
    """The first place that is wrong, and how many others are."""
    first, others = error.errors()[0], error.error_count() - 1
    if first["type"] == "json_invalid":
        return f"not valid JSON ({first['ctx']['error']})"
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    said = "" if isinstance(first["input"], dict | list) else f", not {reprlib.repr(first['input'])}"
    wrong = first["msg"].removeprefix("Value error, ")
    more = f" (and {others} more)" if others else ""
    return f"no results file: {where or 'the whole'}: {wrong}{said}{more}"
