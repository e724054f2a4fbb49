"""The learning rate of each optimizer step: a pure function, so that resuming needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass

NAMES = ("cosine", "constant")


@dataclass
class ScheduleConfig:
    """How the learning rate goes from zero to its base value and down again.

    name: "cosine" falls to `final` along half a cosine, "constant" stays at the base value.
    warmup: optimizer steps of linear rise at the start.
    final: where the cosine ends, as a fraction of the base learning rate.
    """

    name: str = "cosine"
    warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"schedule.name={self.name!r}: allowed are {', '.join(NAMES)}")
        if self.warmup < 0:
            raise ValueError(f"schedule.warmup={self.warmup}: allowed are whole numbers from 0")
        if not 0 <= self.final <= 1:
            raise ValueError(f"schedule.final={self.final}: allowed is 0 to 1")


def learning_rate(step: int, steps: int, base: float, config: ScheduleConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0, in a run of `steps` steps.

    The first step after the warm-up has `base`. The cosine reaches `final * base` where the run
    ends, at step = steps, so that no step is spent on a rate of zero; later steps stay there.
    """
    if step < config.warmup:
        return base * (step + 1) / (config.warmup + 1)
    if config.name == "constant":
        return base
    if step >= steps:
        return base * config.final
    done = (step - config.warmup) / (steps - config.warmup)
    return base * (config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2)
