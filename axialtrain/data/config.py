"""What is read, and how: the `data` group of a run's configuration."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from axialtrain.data.augment import AugmentConfig
from axialtrain.data.checked import shown
from axialtrain.data.damage import DamageConfig
from axialtrain.data.kinds import MAX_FEATURES
from axialtrain.data.reading import ReadConfig
from axialtrain.data.sampling import SampleConfig
from axialtrain.data.sets import sets_of
from axialtrain.data.tile_order import TilesConfig
from axialtrain.data.windows import CutConfig

PerBand = float | Sequence[float]  # one number for all bands, or one for each
MEASURED = "manifest"  # in their place: what `axialtrain shard` has measured


@dataclass
class DataConfig:
    """The `data` group of a run's configuration.

    shards, validation: folders of shards; validation is None where there is none. shards may be
    several, mixed by weight: {folder: weight} or [{url: folder, weight: number}].
    window: [height, width] in px of what is one sample, None for whole images.
    mean, std: of the normalisation, in units of the full range 0..1, of float32 images in their
    own: one number, or a list of one for each band (Any, as OmegaConf knows no such union; floats
    after construction). `Loader`, which knows the shards, holds them to their bands and range. Both
    "manifest": those of the bands of `shards`, as its manifest has them.
    bands: of the stored ones those that the model is given, counted from 0, in this order and as
    often as they are named; None for all. augment: what differs each time a sample is seen.
    prefetch: micro-batches that are read ahead. workers: threads that read and decode them, of
    which prefetch + 1 at most have something to do; None chooses by the cores.
    damage: what is done where stored bytes are damaged. read: how shards are read over a network.
    cut: how windows lie. sample: how often each is taken. buckets: tokens by which the sizes of
    whole images may differ in a step, None for any. tiles: whether each stored tile is one sample
    instead.
    """

    shards: Any
    validation: str | None = None
    window: list[int] | None = None
    mean: Any = 0.5
    std: Any = 0.25
    prefetch: int = 2
    workers: int | None = None
    damage: DamageConfig = field(default_factory=DamageConfig)
    read: ReadConfig = field(default_factory=ReadConfig)
    cut: CutConfig = field(default_factory=CutConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    buckets: int | None = None
    tiles: TilesConfig = field(default_factory=TilesConfig)
    bands: list[int] | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        sets_of(self.shards)
        if self.window is not None and (len(self.window) != 2 or min(self.window) < 1):
            raise ValueError(
                f"data.window is {list(self.window)}, allowed is [height, width] in px, each at "
                f"least 1, or null for whole images"
            )
        if (self.mean == MEASURED) != (self.std == MEASURED):
            raise ValueError(
                f"data.mean is {shown(self.mean)} and data.std is {shown(self.std)}, allowed is "
                f"{MEASURED} for both or for none"
            )
        if self.mean != MEASURED:
            most = sys.float_info.max
            allowed = "from 0 to 1 (of float32 images, any)"
            self.mean = _per_band("mean", self.mean, -most, most, allowed)
            self.std = _per_band("std", self.std, math.ulp(0), most, "of more than 0")
        if self.tiles.each and self.window is not None:
            raise ValueError(
                f"data.window is {list(self.window)}, allowed is null with data=tiles, of which "
                "each stored tile is a sample"
            )
        if self.bands is not None and not (
            1 <= len(self.bands) <= MAX_FEATURES and min(self.bands) >= 0
        ):
            raise ValueError(
                f"data.bands is {shown(list(self.bands))}, allowed are 1 to {MAX_FEATURES} numbers "
                "of bands, from 0, or null for all"
            )
        if self.augment.shift and self.window is None:
            raise ValueError(
                f"data.augment.shift is {self.augment.shift}, allowed is 0 where data.window is "
                "null: whole images do not move"
            )
        if self.prefetch < 0:
            raise ValueError(f"data.prefetch is {self.prefetch}, allowed is 0 or more")
        if self.workers is not None and self.workers < 1:
            raise ValueError(
                f"data.workers is {self.workers}, allowed is at least 1, or null, which chooses"
            )
        self.cut.stride_of(self.window)
        for key, plain in (
            ("cut", self.cut == CutConfig()),
            ("sample", self.sample.plain),
            ("buckets", self.buckets is None),
        ):
            if self.tiles.each and not plain:
                raise ValueError(
                    f"data.{key} is set, allowed is its default with data=tiles, of which each "
                    "stored tile is a sample, as often as any other"
                )
        if self.buckets is not None and self.augment.quarter_turns:
            raise ValueError(
                f"data.buckets is {self.buckets} with data.augment.quarter_turns, allowed is one "
                "of them: an image that is turned has another size"
            )
        if self.buckets is not None and (self.buckets < 1 or self.window is not None):
            beside = "" if self.window is None else f" with data.window={list(self.window)}"
            raise ValueError(
                f"data.buckets is {self.buckets}{beside}, allowed is null, or for whole images "
                "(data.window=null) a number of tokens from 1"
            )

    @property
    def held_out(self) -> DataConfig:
        """How the images of `validation` are read: each window once, edge to edge, as it is."""
        cut = replace(self.cut, stride=None, overlap=None)
        return replace(self, cut=cut, sample=SampleConfig(), buckets=None, augment=AugmentConfig())


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
            f"or a list of them, one for each band, or {MEASURED} for both mean and std"
        )
    floats = [float(number) for number in numbers]
    return floats if several else floats[0]
