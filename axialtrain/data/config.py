"""What is read, and how: the `data` group of a run's configuration."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from axialtrain.data.checked import shown
from axialtrain.data.damage import DamageConfig
from axialtrain.data.kinds import MAX_FEATURES
from axialtrain.data.reading import ReadConfig

PerBand = float | Sequence[float]  # one number for all bands, or one for each


@dataclass
class DataConfig:
    """The `data` group of a run's configuration.

    shards, validation: folders of shards; validation is None where there is none.
    window: [height, width] in px of what is one sample, None for whole images.
    mean, std: of the normalisation, in units of the full range 0..1, of float32 images in their
    own: one number, or a list of one for each band (Any, as OmegaConf knows no such union; floats
    after construction). `Loader`, which knows the shards, holds them to their bands and range.
    prefetch: micro-batches that are read ahead. workers: threads that read and decode them.
    damage: what is done where stored bytes are damaged.
    read: how shards are read over a network.
    """

    shards: str
    validation: str | None = None
    window: list[int] | None = None
    mean: Any = 0.5
    std: Any = 0.25
    prefetch: int = 2
    workers: int = 1
    damage: DamageConfig = field(default_factory=DamageConfig)
    read: ReadConfig = field(default_factory=ReadConfig)

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("data.shards is empty, allowed is a folder of shards")
        if self.window is not None and (len(self.window) != 2 or min(self.window) < 1):
            raise ValueError(
                f"data.window is {list(self.window)}, allowed is [height, width] in px, each at "
                f"least 1, or null for whole images"
            )
        most = sys.float_info.max
        allowed = "from 0 to 1 (of float32 images, any)"
        self.mean = _per_band("mean", self.mean, -most, most, allowed)
        self.std = _per_band("std", self.std, math.ulp(0), most, "of more than 0")
        if self.prefetch < 0:
            raise ValueError(f"data.prefetch is {self.prefetch}, allowed is 0 or more")
        if self.workers < 1:
            raise ValueError(f"data.workers is {self.workers}, allowed is at least 1")


def _per_band(key: str, value: Any, low: float, high: float, allowed: str) -> PerBand:
    """`value` of data.`key` in floats, each within low..high, which `allowed` puts into words."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    numbers = list(value) if several else [value]
    if not 1 <= len(numbers) <= MAX_FEATURES or not all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and low <= number <= high
        for number in numbers
    ):
        raise ValueError(
            f"data.{key} is {shown(numbers if several else value)}, allowed is a number {allowed}, "
            "or a list of them, one for each band"
        )
    floats = [float(number) for number in numbers]
    return floats if several else floats[0]
