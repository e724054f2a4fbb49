"""Slides as their scanners write them, over OpenSlide: NDPI, MRXS, DICOM, SCN, BIF, JPEG 2000 SVS.

The only file that knows OpenSlide. It composes what overlaps, and gives RGB of 8 bits with an
opacity: 0 is where nothing was scanned.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray

from axialtrain.data.kinds import Kind
from axialtrain.data.readers.reader import (
    TILE,
    Info,
    Tile,
    Unfit,
    believed_mpp,
    check_level,
    check_size,
    fits_a_tile,
    one_line,
    padded,
    window_of,
)

_PLAIN = "generic-tiff"  # of any type and number of bands, which OpenSlide turns into RGB unasked

# A read begins at a whole px of level 0. Where that is none of the level that is read, OpenSlide
# interpolates (cairo, linearly) between two px of that level, unless it is nearer than 1/256 px.
# That was seen of Aperio's. Of Leica's it takes the px in which the corner lies.
_MIXED, _WHOLE = "aperio", "leica"
_EXACT = 1 / 300  # px
_REACH = 64  # px before a tile, where a px that is whole on both is looked for
_MARGIN = 12  # px, beyond which the one before has no part in what `_sharp` makes

_MPP = (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)


class SlideSource:
    """A level of a slide."""

    def __init__(self, path: Path, level: int) -> None:
        self._path = path
        with ExitStack() as opened:
            try:
                vendor = openslide.OpenSlide.detect_format(path)
                if vendor is None or vendor == _PLAIN:
                    kind = "no slide of a scanner" if vendor is None else "a plain TIFF"
                    raise Unfit(path, f"is {kind}", "OpenSlide is for what it knows by its scanner")
                self._vendor = vendor
                self._slide = opened.enter_context(openslide.OpenSlide(path))
                self.info = self._info(level)
            except (openslide.OpenSlideError, OSError, ValueError) as error:
                if isinstance(error, ValueError) and str(error).startswith(str(path)):
                    raise
                raise ValueError(
                    f"{path}: not a slide that can be read ({one_line(error)})"
                ) from error
            opened.pop_all()
        self._level = level

    def _info(self, level: int) -> Info:
        slide = self._slide
        check_level(self._path, level, slide.level_count)
        width, height = slide.level_dimensions[level]
        check_size(self._path, height, width)
        downsample = float(slide.level_downsamples[level])
        if not (math.isfinite(downsample) and downsample >= 1):
            raise ValueError(f"{self._path}: its level {level} is {downsample} times smaller")
        properties = slide.properties
        across, down = (
            properties.get(f"openslide.level[{level}].tile-{name}", "")
            for name in ("width", "height")
        )
        side = int(across) if across == down and across.isdecimal() else TILE
        mpp = [believed_mpp(properties.get(key, "")) for key in _MPP]
        square = mpp[0] and mpp[1] and abs(mpp[0] - mpp[1]) <= 0.01 * mpp[0]
        return Info(
            height=height,
            width=width,
            kind=Kind(),
            tile=side if fits_a_tile(side, Kind()) else TILE,
            mpp=mpp[0] * downsample if square and mpp[0] else None,
            downsample=downsample,
            levels=slide.level_count,
            masked=True,
        )

    def tile(self, row: int, col: int) -> Tile | None:
        window = window_of(self.info, row, col)
        (x, left, right), (y, top, bottom) = (
            _start(n, self.info.downsample, self._vendor) for n in (window.left, window.top)
        )
        # OpenSlide takes the corner in px of level 0, and the size in those of the level.
        size = [
            stop - start + _MARGIN * bool(off)
            for start, stop, off in ((left, window.right, right), (top, window.bottom, bottom))
        ]
        try:
            rgba = np.asarray(self._slide.read_region((x, y), self._level, (size[0], size[1])))
        except openslide.OpenSlideError as error:
            raise ValueError(
                f"{self._path}: tile row={row} col={col} cannot be read ({one_line(error)})"
            ) from error
        rgba = _sharp(rgba, bottom, right)[
            window.top - top : window.bottom - top, window.left - left : window.right - left
        ]
        present = rgba[..., 3] != 0
        return padded(self.info, np.ascontiguousarray(rgba[..., :3]), present)

    def jpeg(self, row: int, col: int) -> bytes | None:
        raise AssertionError("OpenSlide decodes")

    def close(self) -> None:
        self._slide.close()


def _start(first: int, downsample: float, vendor: str) -> tuple[int, int, float]:
    """Where a read begins that is to have px `first` of a level along one side.

    (px of level 0; px of the level; how far the one lies behind the other, px of the level, 0.0 if
    that is nothing to OpenSlide). It begins at most _REACH px before `first`, which is little to
    read; in between, downsamples near whole numbers (4.0004) may have no px that is whole on both.
    """
    if vendor == _WHOLE:
        return math.ceil(first * downsample), first, 0.0
    before = np.arange(first, max(first - _REACH, 0) - 1, -1)
    corner = np.rint(before * downsample).astype(np.int64)
    off = corner / downsample - before
    exact = np.flatnonzero(abs(off) < _EXACT)
    if exact.size:
        at = int(exact[0])
        return int(corner[at]), int(before[at]), 0.0
    if vendor != _MIXED:
        return round(first * downsample), first, 0.0
    at = _MARGIN + int(abs(off[_MARGIN:]).argmin())
    return int(corner[at]), int(before[at]), float(off[at])


def _sharp(rgba: NDArray[np.uint8], down: float, across: float) -> NDArray[np.uint8]:
    """`rgba` [h, w, 4] as it was before each px became the mean of itself and the next one.

    down, across: the weight of the next px, of the one before where it is negative. The last
    _MARGIN px of a side with such a weight (or the first) stay wrong. Colours come out to a value
    or two, whether a px is there exactly.
    """
    if not down and not across:
        return rgba
    values = rgba.astype(np.float32)
    values[..., :3] *= values[..., 3:] / 255  # a px that is missing has no part in a mean
    for lines, off in ((values, down), (values.swapaxes(0, 1), across)):
        if not off:
            continue
        weight, step = abs(off), 1 if off > 0 else -1
        for at in range(len(lines) - 2, -1, -1) if off > 0 else range(1, len(lines)):
            lines[at] = (lines[at] - weight * lines[at + step]) / (1 - weight)
    there = values[..., 3:] >= 128
    sharp: NDArray[np.uint8] = np.where(there, np.clip(np.rint(values), 0, 255), 0).astype(np.uint8)
    return sharp
