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

from axialtrain.data.kinds import Kind
from axialtrain.data.readers.reader import (
    TILE,
    Info,
    Tile,
    Unfit,
    check_level,
    check_size,
    fits_a_tile,
    one_line,
    padded,
    window_of,
)

_PLAIN = "generic-tiff"  # of any type and number of bands, which OpenSlide turns into RGB unasked

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
        mpp = [_number(properties.get(key)) for key in _MPP]
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
        # OpenSlide takes the corner in px of level 0, and the size in those of the level.
        corner = [round(n * self.info.downsample) for n in (window.left, window.top)]
        size = (window.width, window.height)
        try:
            rgba = np.asarray(self._slide.read_region((corner[0], corner[1]), self._level, size))
        except openslide.OpenSlideError as error:
            raise ValueError(
                f"{self._path}: tile row={row} col={col} cannot be read ({one_line(error)})"
            ) from error
        present = rgba[..., 3] != 0
        return padded(self.info, np.ascontiguousarray(rgba[..., :3]), present)

    def jpeg(self, row: int, col: int) -> bytes | None:
        raise AssertionError("OpenSlide decodes")

    def close(self) -> None:
        self._slide.close()


def _number(text: str | None) -> float | None:
    """Micrometres that can be believed, of a property."""
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return number if 1e-3 < number < 1e3 else None
