"""Pixels as they are stored to the numbers that a model is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import shown
from axialtrain.data.config import MEASURED, DataConfig, PerBand
from axialtrain.data.kinds import Kind, Raster
from axialtrain.data.manifest import Manifest
from axialtrain.data.mixing import MixedShards
from axialtrain.data.region import Shards
from axialtrain.data.sets import sets_of

_FULL = {"uint8": 255, "uint16": 65535}  # what becomes 1; float32 is taken as it is


class Normalise:
    """Pixels of one kind to float32 of mean 0 and deviation 1, if mean and std say so.

    ValueError if there is not one number for all bands, or one for each; or if a mean is outside
    0..1, the full range of pixels of 8 and 16 bits.
    """

    def __init__(self, kind: Kind, mean: PerBand, std: PerBand) -> None:
        self.kind = kind
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
        self._mean, self._std = np.atleast_1d(mean), np.atleast_1d(std)
        if integers:  # by table, which is fast
            values = np.arange(_FULL[kind.dtype] + 1) / _FULL[kind.dtype]
            tables = (values - self._mean[:, None]) / self._std[:, None]
            self._tables = tables.astype(np.float32)

    def __call__(self, pixels: Raster, present: NDArray[np.bool_]) -> NDArray[np.float32]:
        """`pixels` [h, w, bands] to float32 of the same shape; 0 where not `present` [h, w]."""
        if self.kind.dtype not in _FULL:
            values: NDArray[np.float32] = np.empty(pixels.shape, np.float32)
            for line, out in zip(pixels, values, strict=True):  # in float64, which takes twice
                out[...] = (line - self._mean) / self._std
        elif len(self._tables) == 1:  # one for all bands, which is looked up in one go
            values = self._tables[0][pixels]
        else:
            values = np.empty(pixels.shape, np.float32)
            for band, table in enumerate(self._tables):
                values[..., band] = table[pixels[..., band]]
        values[~present] = 0
        return values


def normalisation(shards: Shards | MixedShards, config: DataConfig) -> tuple[PerBand, PerBand]:
    """(mean, std) of `config`; where it leaves them to the manifest, lists of one for each band.

    Of images of 8 and 16 bits in units of the full range 0..1. Of several sets: of the mix that
    their weights make, so a set counts by its weight, not by its pixels. ValueError, saying how to
    get them, where a manifest has none, or a band has one value alone.
    """
    if config.mean != MEASURED:
        return config.mean, config.std
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
    if not std.all():
        raise ValueError(
            f"data.std is {MEASURED}, but band {int(np.argmin(std))} has one value alone in what "
            f"{' and '.join(urls)} measured of it, allowed is data.mean and data.std in numbers"
        )
    full = _FULL.get(shards.dtype, 1)
    return (mean / full).tolist(), (std / full).tolist()
