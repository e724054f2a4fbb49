"""Images at a resolution that their file does not hold: the mean over the area of each new pixel.

A pixel is `step` px of the level wide, a fraction p/q. Areas are counted in whole 1/q of a px, from
coordinates of the whole image, and sums of integers stay below 2^53: so a pixel of uint8 or uint16
is exact, and the same in whatever tile it is computed. Nothing is ever enlarged.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.kinds import MAX_TILE_PIXELS_BYTES, Raster
from axialtrain.data.readers.auto import open_image
from axialtrain.data.readers.reader import (
    TILE,
    Reader,
    Tile,
    fits_a_tile,
    padded,
    tiles_of,
    window_of,
)
from axialtrain.data.store import MAX_SIDE, MAX_TILE, MIN_TILE
from axialtrain.grid import Rect

NEAR = 0.02  # of the resolution asked for: a level that is so close to it is taken as it is
_MIN_MPP, _MAX_MPP = 1e-3, 1e6
_CACHE = 1 << 26  # bytes, of decoded tiles of the level
_MAX_TERM = 1 << 18  # of p in p/q: p * p * 65535, the largest sum, is below 2^53
HALF = Fraction(1, 2)


def choose_level(
    path: str | Path, reader: str, mpp: float, own_mpp: float | None = None
) -> tuple[int, float]:
    """(level, factor): what an image at `mpp` micrometres per px is made of, and how.

    level: the coarsest that is not coarser than `mpp` (to 2%). factor: px of that level per px, 1.0
    where the level is within 2% of `mpp` and is taken as it is. own_mpp: of level 0, in place of
    what the file says. A level that cannot be opened is passed over.

    ValueError for an image whose resolution is unknown, and for one finer than what it has.
    """
    level, own = _chosen(path, reader, mpp, own_mpp)
    return level, _factor(mpp, own)


def _chosen(path: str | Path, reader: str, mpp: float, own_mpp: float | None) -> tuple[int, float]:
    """(level, its micrometres per px)."""
    for key, value in (("mpp", mpp), ("own_mpp", own_mpp)):
        if value is not None and not _MIN_MPP <= value <= _MAX_MPP:
            raise ValueError(f"{key} is {value}, allowed is {_MIN_MPP} to {_MAX_MPP:.0f}")
    with open_image(path, 0, reader) as image:
        finest, levels = image.mpp if own_mpp is None else own_mpp, image.levels
    if finest is None:
        raise ValueError(
            f"{path}: does not say how many micrometres a px is, allowed for mpp={mpp:g} is an "
            "image that does, or one whose own mpp is given"
        )
    if finest > mpp * (1 + NEAR):
        raise ValueError(
            f"{path}: mpp is {mpp:g}, allowed is the image's own, {finest:g}, or more: images are "
            "not enlarged"
        )
    level, found = 0, finest
    for coarser in range(1, levels):
        try:
            with open_image(path, coarser, reader) as image:
                at = finest * image.downsample
                if own_mpp is None and image.mpp is not None:
                    at = image.mpp
        except ValueError:
            continue  # not tiled, say
        if found <= at <= mpp * (1 + NEAR):
            level, found = coarser, at
    return level, found


def _factor(mpp: float, own: float) -> float:
    return 1.0 if mpp / own <= 1 + NEAR else mpp / own


def resampled(
    path: str | Path, reader: str, mpp: float, *, own_mpp: float | None = None, tile: int = TILE
) -> Reader:
    """The image at `path` at `mpp` micrometres per px, opened.

    reader, own_mpp: as `choose_level` has them. A level within 2% of `mpp` is that level as
    `open_image` gives it, with its own tiles, JPEG where they are, and its own mpp. Another is
    averaged into tiles of `tile` px; a pixel is present if at least half of its area is, and is
    the mean over what is there, rounded half up where it is an integer.

    `info.downsample`, `mpp` and `transform` are those of the result; `levels` are the file's.
    ValueError as `choose_level` has it, before a pixel is read.
    """
    level, own = _chosen(path, reader, mpp, own_mpp)
    factor = _factor(mpp, own)
    with ExitStack() as opened:
        image = opened.enter_context(open_image(path, level, reader))
        if factor == 1.0:
            source: _AsItIs | Averaged = _AsItIs(image, own)
            why = f"level {level}, which has {own:g} um/px"
        else:
            source = Averaged(image, factor, tile, mpp=mpp)
            why = f"level {level}, averaged to {mpp:g} um/px, {factor:.4g} times smaller"
        opened.pop_all()
    return Reader(image.path, source, image.name, f"{image.why}; {why}")


class _AsItIs:
    """A level as its reader gives it, of which `mpp` is known better."""

    def __init__(self, image: Reader, mpp: float) -> None:
        self._image = image
        self.info = replace(image.info, mpp=mpp)

    def tile(self, row: int, col: int) -> Tile | None:
        return self._image.tile_at(row, col)

    def jpeg(self, row: int, col: int) -> bytes | None:
        return self._image.tile_bytes(row, col)

    def close(self) -> None:
        self._image.__exit__(None, None, None)


class Averaged:
    """A level `factor` times smaller, as a source. Closing it closes the image that it is made of.

    The last tiles of the image are kept, decoded, since those at a border have a part in several of
    ours.
    """

    def __init__(
        self,
        image: Reader,
        factor: float,
        tile: int = TILE,
        *,
        mpp: float | None = None,
        least: Fraction = HALF,
    ) -> None:
        """tile: side of our tiles, px. mpp: of the result, where it is known.

        least: the share of a pixel's area within the image that must be there for it to be
        present, of 0 to 1; any part is enough for 0.
        """
        kind = image.kind
        if not 1 <= factor <= MAX_SIDE:
            raise ValueError(f"{image.path}: factor is {factor}, allowed is 1 to {MAX_SIDE}")
        if not fits_a_tile(tile, kind):
            raise ValueError(
                f"{image.path}: tile is {tile}, allowed is {MIN_TILE} to {MAX_TILE} px that take "
                f"up to {MAX_TILE_PIXELS_BYTES} bytes of {kind}"
            )
        self._image, self._least = image, least
        self._tile_at = lru_cache(max(1, _CACHE // (image.tile**2 * kind.pixel_bytes)))(
            image.tile_at
        )
        step = Fraction(factor).limit_denominator(max(1, int(_MAX_TERM // factor)))
        self._p, self._q = step.numerator, step.denominator
        info, times = image.info, float(step)
        transform = info.transform
        if transform is not None:
            a, b, c, d, e, f = transform
            transform = (a * times, b * times, c, d * times, e * times, f)
        self.info = replace(
            info,
            height=self._side(info.height),
            width=self._side(info.width),
            tile=tile,
            mpp=mpp,
            downsample=info.downsample * times,
            jpeg=False,
            transform=transform,
        )

    def tile(self, row: int, col: int) -> Tile | None:
        rect, image, bands = window_of(self.info, row, col), self._image, self.info.kind.bands
        total = np.zeros((rect.height, rect.width, bands), np.float64)
        there = np.zeros((rect.height, rect.width), np.float64)
        for r, c, part in tiles_of(self._under(rect), image.height, image.width, image.tile):
            found = self._tile_at(r, c)
            if found is None:
                continue
            ours = self._touched(part).intersect(rect)
            down = _overlaps((ours.top, ours.bottom), (part.top, part.bottom), self._p, self._q)
            across = _overlaps((ours.left, ours.right), (part.left, part.right), self._p, self._q)
            within = part.slices(Rect(r, r + 1, c, c + 1).scaled(image.tile))
            here = ours.slices(rect)
            if found.present is None:
                there[here] += np.outer(down.sum(axis=1), across.sum(axis=1))
            else:
                there[here] += down @ found.present[within].astype(np.float64) @ across.T
            for band in range(bands):  # missing pixels are 0
                plane = found.pixels[(*within, band)].astype(np.float64)
                total[(*here, band)] += down @ plane @ across.T
        present = (there > 0) & (there >= float(self._least) * self._areas(rect))
        if not present.any():
            return None
        pixels = _mean(total, there, self.info.kind.numpy)
        if present.all():
            return padded(self.info, pixels)
        return padded(self.info, np.where(present[..., None], pixels, 0), present)

    def jpeg(self, row: int, col: int) -> bytes | None:
        raise AssertionError("what is averaged is no JPEG")

    def close(self) -> None:
        self._tile_at.cache_clear()
        self._image.__exit__(None, None, None)

    def _side(self, length: int) -> int:
        """Pixels along a side of `length` px: the last has at least half of its width in it."""
        return max(1, (2 * length * self._q + self._p) // (2 * self._p))

    def _under(self, rect: Rect) -> Rect:
        """The pixels of the level that `rect` of ours has a part of; may reach outside."""
        p, q = self._p, self._q
        return Rect(
            rect.top * p // q, -(-rect.bottom * p // q), rect.left * p // q, -(-rect.right * p // q)
        )

    def _touched(self, part: Rect) -> Rect:
        """Our pixels that `part` of the level has a part in; may reach outside."""
        p, q = self._p, self._q
        return Rect(
            part.top * q // p, -(-part.bottom * q // p), part.left * q // p, -(-part.right * q // p)
        )

    def _areas(self, rect: Rect) -> NDArray[np.float64]:
        """Of each pixel of `rect`, the part within the image, in (1/q px)^2."""
        sides = []
        for start, stop, length in (
            (rect.top, rect.bottom, self._image.height),
            (rect.left, rect.right, self._image.width),
        ):
            edges = np.minimum(
                np.arange(start, stop + 1, dtype=np.int64) * self._p, length * self._q
            )
            sides.append(np.diff(edges).astype(np.float64))
        return np.outer(*sides)


def _overlaps(
    ours: tuple[int, int], theirs: tuple[int, int], step: int, unit: int
) -> NDArray[np.float64]:
    """How much of each cell of `theirs` lies in each of `ours` (start, stop), along one side.

    Cells of ours are `step` wide, theirs `unit`, both from 0; [ours, theirs], whole numbers.
    """
    our = np.arange(*ours, dtype=np.int64)[:, None]
    their = np.arange(*theirs, dtype=np.int64)
    common = np.minimum((our + 1) * step, (their + 1) * unit) - np.maximum(our * step, their * unit)
    return np.maximum(common, 0).astype(np.float64)


def _mean(
    total: NDArray[np.float64], weight: NDArray[np.float64], dtype: np.dtype[np.generic]
) -> Raster:
    """total / weight, [h, w, bands] by [h, w], where there is a weight; rounded half up."""
    whole = np.maximum(weight, 1)[..., None]
    if dtype == np.float32:
        return (total / whole).astype(np.float32)
    doubled = 2 * total.astype(np.int64) + whole.astype(np.int64)
    return (doubled // (2 * whole.astype(np.int64))).astype(dtype)
