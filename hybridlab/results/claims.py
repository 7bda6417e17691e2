"""A claim is one sentence that can be wrong, with its verdict and the quantities that decide it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self, get_args

from hybridlab.study.statistics import Base, Interval

GPU_BYTES = 16 * 10**9
"""Memory of the plan's GPU."""

SAFE_PEAK_BYTES = 14 * 10**9
"""A run whose peak stays below it fits that GPU with room to spare."""

QUALITY_TOLERANCE_NATS = math.log1p(0.02)
"""The perplexity that a faster run may lose, 2 %, as a change of the loss."""

Verdict = Literal["holds", "fails", "open", "predicted nothing"]
Unit = Literal[
    "count", "steps", "nats", "share", "bytes", "ms", "s", "percent", "ratio", "time ratio", "probability", "rate"
]
VOLATILE_UNITS = ("bytes", "ms", "s", "percent", "time ratio")
"""Of what differs between two equal runs: times and memory. All other quantities repeat to four decimals."""

TOO_LITTLE = "too little to tell"
AS_READ = {"strict": True, "extra": "forbid"}
"""How a results file is held against these classes (`reading.py`)."""


@dataclass(frozen=True)
class Quantity:
    """One number of a claim.

    name: as "loss_to_control"
    value: a mean where there are several seeds; None where it was not finite
    low, high: ends of its 95 % interval; None where there is none, and one alone where that end is open; an infinite
        end becomes None
    unit: "share" is a part of 1, "percent" of 100; a "time ratio" is one time over another
    per_seed: the values behind value and interval, in the order of the seeds; in a results file None where a run
        diverged or the value is open. Of a benchmark, which has a median and its interval, those of its rounds or jumps
    bound: what the value is held against, where this quantity decides its claim
    over: `Interval.over`

    Raises ValueError for an unknown unit.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: Unit = "count"
    per_seed: tuple[float | None, ...] = ()
    bound: float | None = None
    over: Literal["logarithms"] | None = None
    __pydantic_config__: ClassVar[dict[str, Any]] = AS_READ

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"quantity '{self.name}': unit is {self.unit!r}: take one of {', '.join(get_args(Unit))}")
        for end in ("low", "high"):
            if math.isinf(getattr(self, end) or 0):
                object.__setattr__(self, end, None)

    @classmethod
    def over_seeds(cls, name: str, interval: Interval, unit: Unit, bound: float | None = None) -> Self:
        """A mean over seeds; low and high of one seed are its value."""
        return cls(name, interval.mean, *interval.ends, unit, interval.values, bound, interval.over)

    @property
    def ends(self) -> tuple[float, float]:
        """(low, high), an open one infinite; of a value without an interval, itself twice."""
        if self.low is None and self.high is None and self.value is not None:
            return self.value, self.value
        return -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high


@dataclass(frozen=True)
class Claim:
    """One sentence that can be wrong.

    kind: what is claimed, as "pays" or "quality"; documents select claims by it
    text: the sentence, which begins with "<arm>: " where there is an arm
    verdict: "holds", "fails", "open" (these numbers cannot tell), or "predicted nothing" (a hybrid took gradient steps
        only, so that nothing is shown about predicting)
    quantities: what decides it
    arm: what the claim is about, where a notebook claims the same of several
    id: a short name, unique in a notebook; by default "<arm>-<kind>"

    Raises ValueError for another verdict, and for an id with spaces.
    """

    kind: str
    text: str
    verdict: Verdict
    quantities: tuple[Quantity, ...] = ()
    arm: str = ""
    id: str = ""
    __pydantic_config__: ClassVar[dict[str, Any]] = AS_READ

    def __post_init__(self) -> None:
        if not self.id:
            arm = self.arm.replace(",", "").replace(" ", "-")
            object.__setattr__(self, "id", f"{arm}-{self.kind}" if arm else self.kind)
        if self.verdict not in get_args(Verdict):
            raise ValueError(
                f"claim '{self.id}': verdict is {self.verdict!r}: take one of {', '.join(get_args(Verdict))}"
            )
        if not self.id.isprintable() or " " in self.id:
            raise ValueError(f"claim id is {self.id!r}: give a short kind without spaces")

    @classmethod
    def from_record(cls, record: Mapping[str, Any], **more: Any) -> Self:
        """A claim as `record` wrote it. more: further fields of a subclass."""
        quantities = [Quantity(**q | {"per_seed": tuple(q.get("per_seed", ()))}) for q in record["quantities"]]
        return cls(**{**record, "quantities": tuple(quantities)}, **more)

    def record(self) -> dict[str, Any]:
        """As results.json has it: `from_record` gives it back. Ends and seeds that are not there are left out."""
        quantities = [
            {k: part for k, part in asdict(q).items() if k in ("name", "value", "unit") or part not in (None, ())}
            for q in self.quantities
        ]
        return asdict(self) | {"quantities": quantities}

    def quantity(self, name: str) -> Quantity | None:
        """The quantity of this name, if it has one."""
        return next((q for q in self.quantities if q.name == name), None)

    @property
    def rests_on_too_little(self) -> bool:
        """Whether it has no verdict for its base, as its sentence says."""
        return TOO_LITTLE in self.text

    @property
    def deciding(self) -> Quantity | None:
        """The quantity that is held against a bound, else the first; None where there is none."""
        return next((q for q in self.quantities if q.bound is not None), next(iter(self.quantities), None))

    def value(self, name: str) -> float | None:
        """The value of the quantity of this name; None where there is none, or it was not finite."""
        found = self.quantity(name)
        return found.value if found else None


def holds_if(condition: bool) -> Verdict:
    """A decided claim's verdict."""
    return "holds" if condition else "fails"


def holds_below(low: float | None, high: float | None, bound: float) -> Verdict:
    """Whether an interval lies wholly below a bound, above it, or on both sides; an open end is infinite or None."""
    if high is not None and high < bound:
        return "holds"
    return "fails" if low is not None and low > bound else "open"


def worst(*verdicts: Verdict) -> Verdict:
    """That all of them hold."""
    return next((verdict for verdict in ("fails", "open") if verdict in verdicts), "holds")


def on_losses(kind: str, arm: str, text: str, verdict: Verdict, quantities: Iterable[Quantity], base: Base) -> Claim:
    """A claim that rests on losses: open whatever they are, and said why, where too little was trained."""
    return Claim(kind, text + too_little(base), "open" if base.lacks else verdict, tuple(quantities), arm)


def too_little(base: Base) -> str:
    """What a sentence without a verdict ends with; nothing where there may be one."""
    return f" ({TOO_LITTLE}: {', '.join(base.lacks)})" if base.lacks else ""


def rounded(value: Any) -> Any:
    """A number at six significant digits, as results.json keeps it; what is no float stays as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
