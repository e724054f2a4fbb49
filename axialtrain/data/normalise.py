"""Pixels as they are stored to the numbers that a model is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import shown
from axialtrain.data.config import MEASURED, DataConfig, PerBand
from axialtrain.data.kinds import Kind, Raster, chosen
from axialtrain.data.manifest import Manifest
from axialtrain.data.mixing import MixedShards
from axialtrain.data.region import Shards
from axialtrain.data.sets import sets_of

_FULL = {"uint8": 255, "uint16": 65535}  # what becomes 1; float32 is taken as it is


class Normalise:
    """Pixels of one kind to float32 of mean 0 and deviation 1, if mean and std say so.

    kind: as stored. bands: those of it that the model is given, in this order; None for all.
    ValueError if there is not one number for all of these, or one for each; if a mean is outside
    0..1, the full range of pixels of 8 and 16 bits; or if there is no such band.

    Its `kind` is that of what the model is given. bounded: whether the full range is all that its
    numbers can be. mean: float64 [bands] or [1].
    """

    def __init__(
        self, kind: Kind, mean: PerBand, std: PerBand, bands: Sequence[int] | None = None
    ) -> None:
        kind = chosen(kind, bands)
        self.kind = kind
        self.bounded = kind.dtype in _FULL
        self._bands = range(kind.bands) if bands is None else list(bands)
        self._all = bands is None
        integers = kind.dtype in _FULL
        for key, value in (("mean", mean), ("std", std)):
            several = isinstance(value, Sequence)
            numbers = list(value) if isinstance(value, Sequence) else [value]
            outside = key == "mean" and integers and not all(0 <= n <= 1 for n in numbers)
            if len(numbers) != (kind.bands if several else 1) or outside:
                allowed = "number from 0 to 1" if key == "mean" and integers else "number"
                raise ValueError(
                    f"data.{key} is {shown(value)}, allowed is a {allowed}, or a list of "
                    f"{kind.bands} of them, one for each band of images that have {kind}"
                )
        self.mean, self._std = np.atleast_1d(mean), np.atleast_1d(std)
        self._mean32, self._std32 = self.mean.astype(np.float32), self._std.astype(np.float32)
        if integers:  # by table, which is fast
            values = np.arange(_FULL[kind.dtype] + 1) / _FULL[kind.dtype]
            tables = (values - self.mean[:, None]) / self._std[:, None]
            self._tables = tables.astype(np.float32)
            self._values = values.astype(np.float32)

    def __call__(self, pixels: Raster, present: NDArray[np.bool_]) -> NDArray[np.float32]:
        """`pixels` [h, w, bands as stored] to float32 [h, w, bands of the model].

        0 where not `present` [h, w].
        """
        size = (*pixels.shape[:2], self.kind.bands)
        if not self.bounded:
            values: NDArray[np.float32] = np.empty(size, np.float32)
            for line, out in zip(pixels, values, strict=True):  # in float64, which takes twice
                out[...] = self.standard(self.select(line))
        elif len(self._tables) == 1:  # one for all bands, which is looked up in one go
            values = self._tables[0][self.select(pixels)]
        else:
            values = np.empty(size, np.float32)
            for i, (band, table) in enumerate(zip(self._bands, self._tables, strict=True)):
                values[..., i] = table[pixels[..., band]]
        values[~present] = 0
        return values

    def select(self, pixels: Raster) -> Raster:
        """Of `pixels` [..., bands as stored] the bands that the model is given."""
        return pixels if self._all else pixels[..., self._bands]

    def full(self, pixels: Raster, out: NDArray[np.float32]) -> None:
        """`pixels` [h, w, bands as stored] in units of the full range, of float32 their own, into
        `out` [h, w, bands of the model]."""
        for i, band in enumerate(self._bands):
            values = pixels[..., band]
            out[..., i] = self._values[values] if self.bounded else values

    def standard(self, values: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
        """Of `values` [..., bands of the model], in units of the full range."""
        if self.bounded:  # what 16 bits hold is told apart by float32, at half the time
            return (values - self._mean32) / self._std32
        return (values - self.mean) / self._std


def normalisation(shards: Shards | MixedShards, config: DataConfig) -> tuple[PerBand, PerBand]:
    """(mean, std) of `config`; where it leaves them to the manifest, lists of one for each band.

    Of images of 8 and 16 bits in units of the full range 0..1. Of several sets: of the mix that
    their weights make, so a set counts by its weight, not by its pixels. ValueError, saying how to
    get them, where a manifest has none, or a band has one value alone.
    """
    if config.mean != MEASURED:
        return config.mean, config.std
    chosen(shards.kind, config.bands)  # or it says what is not of one kind, or not there
    sets = list(shards.sets) if isinstance(shards, MixedShards) else [shards]
    shares = shards.shares if isinstance(shards, MixedShards) else [1]
    urls = [one.url for one in sets_of(config.shards)]
    means, variances = [], []
    for url, one in zip(urls, sets, strict=True):
        found = Manifest(one.images).statistics
        if found is None or not found.count:
            raise ValueError(
                f"data.mean is {MEASURED}, but the manifest of {url} has no statistics of its "
                "images: `axialtrain shard --statistics` takes them, which is its default; "
                "otherwise give data.mean and data.std in numbers"
            )
        means.append(found.mean)
        variances.append(np.square(found.std))
    mean = np.average(means, axis=0, weights=shares)
    spread = np.array(variances) + np.square(means - mean)  # within the sets, and between them
    std = np.sqrt(np.average(spread, axis=0, weights=shares))
    full, bands = _FULL.get(shards.dtype, 1), range(len(mean))
    which = list(bands if config.bands is None else config.bands)
    if not std[which].all():
        raise ValueError(
            f"data.std is {MEASURED}, but band {which[int(np.argmin(std[which]))]} has one value "
            f"alone in what {' and '.join(urls)} measured of it, allowed is data.mean and data.std "
            "in numbers"
        )
    return (mean[which] / full).tolist(), (std[which] / full).tolist()
