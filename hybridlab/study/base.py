"""The least that a verdict on losses stands on."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Base:
    """How much was trained and how often, to compare with the least that a verdict needs.

    steps: gradient steps of the baseline; seeds: runs per arm
    tokens: that the baseline has seen; of image tasks, the number of images
    fall_nats: from the baseline's first training loss to its final validation loss
    unbracketed: of each arm that is compared and whose best learning rate is at an edge of those tried: what to do
    """

    steps: int
    seeds: int
    tokens: int
    fall_nats: float
    unbracketed: tuple[str, ...] = ()

    @property
    def lacks(self) -> list[str]:
        """What is missing, in words, as "2 of 3 seeds"; nothing where a verdict can be given."""
        least, here = asdict(LEAST), asdict(self)
        words = {name: name.removesuffix("_nats") for name in least if name != "unbracketed"}
        short = [
            f"{round(here[name], 2):.6g} of {least[name]:.6g} {'nats of ' if name != word else ''}{word}"
            for name, word in words.items()
            if not here[name] >= least[name]
        ]
        return [*short, *filter(None, ["; ".join(self.unbracketed)])]


LEAST = Base(steps=200, seeds=3, tokens=100_000, fall_nats=1.0)
"""Below it, a claim on losses is open whatever its numbers: what barely trained shows nothing about training.

Of two seeds, Student's t is 12.7. A fall of one nat leaves 37 % of the first perplexity. Tokens count images alike.
"""
