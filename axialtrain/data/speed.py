"""How fast shards are read and decoded here: a few seconds of what training does."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from statistics import median

import numpy as np

from axialtrain.data.region import Shards
from axialtrain.data.store import BLOCK, ImageRow
from axialtrain.grid import Rect

SECONDS = 3.0
MOST_REGIONS = 1000
_MAX_PIXELS_BYTES = 1 << 26  # of a region


@dataclass(frozen=True)
class Speed:
    """What was measured, by one thread.

    regions, images: how many regions were read, of how many images. bytes, tiles: read and decoded
    for them, in `seconds`. tiles_per_second, bytes_per_second: the medians over the regions.
    """

    regions: int
    images: int
    bytes: int
    tiles: int
    seconds: float
    tiles_per_second: float
    bytes_per_second: float

    def __str__(self) -> str:
        return (
            f"bench: {self.tiles_per_second:.0f} tiles/s, {self.bytes_per_second / 1e6:.1f} MB/s, "
            f"the medians of {self.regions} regions of up to {BLOCK} x {BLOCK} tiles in "
            f"{self.images} images: {self.tiles} tiles, {self.bytes / 1e6:.1f} MB in "
            f"{self.seconds:.1f} s, with one thread, from wherever the bytes are cached"
        )


def measure(
    shards: Shards,
    name: str | None = None,
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Read regions of the image `name`, None for all, until `seconds` are over; at least one.

    The regions are the same each time, and so is their order; how many are read is not. A region is
    read as training reads it, labels and instances included; heads are fetched before the clock
    starts. ValueError as `Shards.region` has it.
    """
    rows = list(shards.images) if name is None else [shards.row(name)]
    read: set[str] = set()
    total = tiles = regions = 0
    spent = 0.0
    rates: list[tuple[float, float]] = []
    for row, rect in _sample(shards, rows):
        start = clock()
        region = shards.region(row.name, rect)
        took = max(clock() - start, 1e-9)
        read.add(row.name)
        regions += 1
        total += region.bytes_read
        tiles += region.tiles_decoded
        spent += took
        rates.append((region.tiles_decoded / took, region.bytes_read / took))
        if spent >= seconds:
            break
    by_tiles, by_bytes = (median(each) for each in zip(*rates, strict=True))
    return Speed(regions, len(read), total, tiles, spent, by_tiles, by_bytes)


def _sample(shards: Shards, rows: list[ImageRow]) -> Iterator[tuple[ImageRow, Rect]]:
    """Regions of images, each pixel as likely as any other; the same ones each time."""
    rng = np.random.Generator(np.random.Philox(key=0))
    ends = list(accumulate(row.height * row.width for row in rows))
    for _ in range(MOST_REGIONS):
        row = rows[bisect_right(ends, int(rng.integers(ends[-1])))]
        most = math.isqrt(_MAX_PIXELS_BYTES // row.kind.pixel_bytes)
        head = shards.head(row.name)
        side = min(head.block * head.tile, most)
        top = int(rng.integers(max(row.height - side, 0) + 1))
        left = int(rng.integers(max(row.width - side, 0) + 1))
        yield row, Rect(top, min(top + side, row.height), left, min(left + side, row.width))
