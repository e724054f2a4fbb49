"""Mean and spread of each band, for normalisation: of valid pixels, and in parts.

Parts are combined as mean and centred squares (Chan, Golub, LeVeque 1979).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import Record
from axialtrain.data.kinds import Raster

SAMPLE = 256  # tiles of an image, spread over its grid
_MOST = 1e300


@dataclass(frozen=True)
class Statistics:
    """count: pixels. mean: of each band, in the units that are stored. squares: of each band, the
    sum of the squares of what pixels are above the mean."""

    count: int
    mean: tuple[float, ...]
    squares: tuple[float, ...]

    @staticmethod
    def of(pixels: Raster, present: NDArray[np.bool_] | None = None) -> Statistics:
        """pixels: [h, w, bands]; present: bool [h, w], None where all are."""
        values = pixels.reshape(-1, pixels.shape[-1]) if present is None else pixels[present]
        if not len(values):
            return Statistics.none(pixels.shape[-1])
        wide = values.astype(np.float64)
        mean = wide.mean(axis=0)
        squares = np.square(wide - mean).sum(axis=0)
        return Statistics(len(values), tuple(mean.tolist()), tuple(squares.tolist()))

    @staticmethod
    def joined(parts: Iterable[Statistics]) -> Statistics | None:
        """Those of all parts together; None of none."""
        whole = None
        for part in parts:
            whole = part if whole is None else whole._with(part)
        return whole

    def _with(self, other: Statistics) -> Statistics:
        count = self.count + other.count
        share = other.count / count if count else 0.0
        means, squares = [], []
        for m1, m2, s1, s2 in zip(self.mean, other.mean, self.squares, other.squares, strict=True):
            means.append(m1 + (m2 - m1) * share)
            squares.append(s1 + s2 + (m2 - m1) ** 2 * self.count * share)
        return Statistics(count, tuple(means), tuple(squares))

    @staticmethod
    def none(bands: int) -> Statistics:
        """Those of no pixels."""
        return Statistics(0, (0.0,) * bands, (0.0,) * bands)

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each band; 0 of no pixels."""
        return tuple(math.sqrt(s / self.count) if self.count else 0.0 for s in self.squares)

    @staticmethod
    def from_record(record: Record, bands: int) -> Statistics:
        means: list[float] = []
        squares: list[float] = []
        for key, low, into in (("mean", -_MOST, means), ("squares", 0.0, squares)):
            items = record.items(key, bands)
            if len(items) != bands:
                raise record.wrong(key, f"a number for each of {bands} bands")
            for index, item in enumerate(items):
                where = f"{record.where}: {key}"
                into.append(Record(where, {str(index): item}).number(str(index), low, _MOST))
        return Statistics(record.integer("count", 0, 1 << 62), tuple(means), tuple(squares))


def sampled(row: int, col: int, tiles: int) -> bool:
    """Whether tile (row, col) is one of the about SAMPLE, of `tiles` that are stored, to look at.

    All of fewer. By a checksum of its place, so that no row or column is left out.
    """
    return zlib.crc32(f"{row},{col}".encode()) % -(-tiles // SAMPLE) == 0
