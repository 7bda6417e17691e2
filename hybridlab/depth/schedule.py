"""When a training uses how many blocks."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

from hybridlab.base.settings import check_bounds, check_choice, check_types

RULES, BEST = ("interleave", "stack", "linear", "fresh"), "best"


@dataclass(frozen=True)
class DepthSchedule:
    """Train few blocks, predict the weights of the others from them, and go on with all.

    From each stage's first step on, so many blocks take part in forward and backward; the others are bypassed. At the
    next stage new blocks join, and their weights and optimizer state come from those that were trained, by the rule:

        interleave   the block before it: a b c -> a a a b b b c c c
        stack        the same sequence again: a b c -> a b c a b c a b c
        linear       weights between the blocks before and after it, in proportion to the distance
        fresh        its own first weights, with zero output projections: the loss stays what it was
        best         of these the one with the lowest loss on the next batches, which the trainer's gate tries
                     forward-only; none yet, and again later, where all raise the loss

    stages: (first step, blocks) of each; the first begins at 0, and steps and blocks rise. The last has all of the
        model's blocks, unless `shallow` is set
    rule: see above. With 0 blocks at first there is no source: "fresh" alone can be meant
    in_shares: first steps are shares of the run's length; `fitted_to` turns them into steps
    rewarm_steps: steps after each growth over which the learning rate rises to its own value again; 0 for none
    blocks: name of the `nn.ModuleList` that holds the blocks, as "model.layers"; None finds it
    outputs: names of the layers within a block that write into the residual stream, for "fresh"; empty finds them by
        their usual names
    shallow: the last stage may be shallower than the model, which then never grows: a control
    skip_share: share of the active blocks, drawn at random at each step, that are bypassed for that step (layer
        dropout); skip_until: step, or share of the run, from which on none is
    skip_seed: of what is drawn; the draw depends on this and the step's number alone

    Raises TypeError and ValueError that name the setting and its remedy.

    Source: depth expansion, https://arxiv.org/abs/2511.04981 and https://arxiv.org/abs/2405.15319.
    """

    stages: tuple[tuple[float, int], ...]
    rule: str = "interleave"
    in_shares: bool = False
    rewarm_steps: int = 0
    blocks: str | None = None
    outputs: tuple[str, ...] = ()
    shallow: bool = False
    skip_share: float = 0.0
    skip_until: float = 0.0
    skip_seed: int = 0

    @classmethod
    def shares(cls, stages: tuple[tuple[float, int], ...], **more: Any) -> Self:
        """Stages that begin at shares of the run, as ((0.0, 3), (0.7, 12))."""
        return cls(stages, in_shares=True, **more)

    @classmethod
    def constant(cls, blocks: int, **more: Any) -> Self:
        """So many blocks from start to end: the shallow control, or, with `skip_share`, layer dropout alone."""
        return cls(((0, blocks),), shallow=True, **more)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name in ("stages", "outputs"):  # YAML and JSON have lists
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                items = (tuple(item) if isinstance(item, list) else item for item in value)
                object.__setattr__(self, name, tuple(items))
        check_types(self)
        check_choice("rule", self.rule, (*RULES, BEST))
        check_bounds(self, "rewarm_steps", "skip_seed", "skip_until", least=0)
        check_bounds(self, "skip_share", least=0, below=1)
        self._check_stages()

    def _check_stages(self) -> None:
        wanted = "stages are (first step, blocks), the first at 0, as ((0, 3), (700, 12))"
        if not self.stages or self.stages[0][0] != 0:
            raise ValueError(f"stages is {self.stages}: {wanted}")
        for start, blocks in self.stages:
            whole = self.in_shares or isinstance(start, int)
            if not isinstance(blocks, int) or blocks < 0 or not whole or not 0 <= start < float("inf"):
                raise ValueError(f"the stage ({start}, {blocks}) is none: {wanted}, in whole numbers")
        if any(a >= b or m >= n for (a, m), (b, n) in pairwise(self.stages)):
            raise ValueError(f"stages is {self.stages}: first steps and blocks must rise from stage to stage")
        if self.in_shares and not all(share < 1 for share, _ in self.stages):
            raise ValueError(f"stages is {self.stages}: shares of a run are at least 0 and below 1")
        if self.in_shares and self.skip_until > 1:
            raise ValueError(f"skip_until is {self.skip_until}: with stages in shares, it is a share of the run too")
        if self.skip_share and not self.skip_until:
            raise ValueError(
                f"skip_share is {self.skip_share} and skip_until 0: no block is skipped; set skip_until to the step, "
                "or share of the run, from which on none is"
            )
        if not self.stages[0][1] and self.grows and self.rule != "fresh":
            raise ValueError(f"rule={self.rule!r} copies trained blocks, and a stage of 0 has none: set rule='fresh'")

    @property
    def grows(self) -> bool:
        """Whether there is more than one stage."""
        return len(self.stages) > 1

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return tuple(blocks for _, blocks in self.stages)

    def fitted_to(self, steps: int) -> Self:
        """The same schedule in steps of a run of this length; one that is in steps stays as it is.

        Raises ValueError where two stages would begin at the same step, or the last after the run's last step.
        """
        if not self.in_shares:
            return self._within(steps)
        stages = tuple((round(share * steps), blocks) for share, blocks in self.stages)
        if len({start for start, _ in stages}) < len(stages):
            raise ValueError(
                f"of the stages {self.stages}, in shares of a run, two begin at the same of {steps} steps: let them "
                "begin further apart, or train for longer"
            )
        until = max(int(self.skip_share > 0), round(self.skip_until * steps))
        return replace(self, stages=stages, in_shares=False, skip_until=until)._within(steps)

    def _within(self, steps: int) -> Self:
        if (last := self.stages[-1][0]) >= steps:
            raise ValueError(
                f"the last stage begins at step {last:g} and the run has {steps}: it would never grow to all of its "
                "blocks; let the stage begin earlier, or train for longer"
            )
        return self

    def stage_at(self, step: int) -> int:
        """The stage of a step, counted from 0."""
        return bisect_right([start for start, _ in self.stages], step) - 1
