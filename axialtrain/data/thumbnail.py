"""A small picture of an image, for people."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.codec import Pixels
from axialtrain.data.kinds import Raster
from axialtrain.data.readers import open_image, tiles_of
from axialtrain.grid import Rect

THUMBNAIL = 512  # px, at least so many along the longer side where the image has them
_RANGE = (2, 98)  # percentiles that become black and white, of what is not RGB of 8 bits


def thumbnail(path: Path, level: int, reader: str) -> Pixels:
    """Every n-th pixel of the coarsest level that is large enough, uint8 RGB [h, w, 3].

    Tile by tile, so that an image without a pyramid needs no more memory than another. Of more
    than 3 bands it shows the first three, of fewer the first.
    """
    with ExitStack() as files:
        image = files.enter_context(open_image(path, level, reader))
        for coarser in range(level + 1, image.levels):
            try:
                other = files.enter_context(open_image(path, coarser, reader))
            except ValueError:
                break  # not tiled, say: a thumbnail does not need it
            if max(other.height, other.width) < THUMBNAIL:
                break
            image = other
        step = -(-max(image.height, image.width) // (2 * THUMBNAIL))
        size = (-(-image.height // step), -(-image.width // step))
        bands = shown_bands(image.bands)
        small = np.zeros((*size, bands), image.kind.numpy)
        there = np.zeros(size, np.bool_)
        whole = Rect(0, image.height, 0, image.width)
        for row, col, part in tiles_of(whole, image.height, image.width, image.tile):
            tile = image.tile_at(row, col)
            if tile is None:
                continue
            top, left = -(-part.top // step), -(-part.left // step)
            picked = (
                slice(top * step - part.top, part.height, step),
                slice(left * step - part.left, part.width, step),
            )
            pixels = tile.pixels[picked][..., :bands]
            here = np.s_[top : top + pixels.shape[0], left : left + pixels.shape[1]]
            small[here] = pixels
            there[here] = True if tile.present is None else tile.present[picked]
    return rgb_of(small, there)


def shown_bands(bands: int) -> int:
    """How many of `bands` a picture shows, from the first: as RGB, or one as grey."""
    return 3 if bands >= 3 else 1


def rgb_of(pixels: Raster, there: NDArray[np.bool_]) -> Pixels:
    """[h, w, bands] as RGB of 8 bits: uint8 as they are, others by the range of those `there`.

    Of more than 3 bands the first three, of fewer the first.
    """
    pixels = pixels[..., : shown_bands(pixels.shape[2])]
    if pixels.dtype != np.uint8:
        stretched = np.zeros(pixels.shape, np.uint8)
        for band in range(pixels.shape[2] if there.any() else 0):
            values = pixels[..., band].astype(np.float64)
            low, high = np.percentile(values[there], _RANGE)
            with np.errstate(over="ignore"):  # of a range of nothing, whose upper side is white
                scaled = (values - low) / max(high - low, np.finfo(np.float64).tiny) * 255
            stretched[..., band] = np.where(there, np.clip(scaled, 0, 255), 0)
        pixels = stretched
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
