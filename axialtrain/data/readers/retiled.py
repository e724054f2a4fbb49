"""An image in tiles of another size than its own, none of which is copied."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from axialtrain.data.kinds import Raster
from axialtrain.data.readers.reader import (
    Mask,
    Reader,
    Tile,
    fits_a_tile,
    padded,
    tiles_of,
    window_of,
)
from axialtrain.grid import Rect

_CACHE = 1 << 26  # bytes, of decoded tiles of the image


def retiled(image: Reader, tile: int) -> Reader:
    """`image` in tiles of `tile` px; closing it closes `image`.

    ValueError for a size that cannot be stored.
    """
    if not fits_a_tile(tile, image.kind):
        raise ValueError(f"{image.path}: tile is {tile}, of {image.kind} that cannot be stored")
    return Reader(image.path, _Retiled(image, tile), image.name, image.why)


class _Retiled:
    def __init__(self, image: Reader, tile: int) -> None:
        self._image = image
        one = image.tile**2 * image.kind.pixel_bytes
        # Neighbours of ours are cut from the same of the image's.
        self._at = lru_cache(max(4, _CACHE // one))(image.tile_at)
        self.info = replace(image.info, tile=tile, jpeg=False)

    def tile(self, row: int, col: int) -> Tile | None:
        rect = window_of(self.info, row, col)
        image = self._image
        pixels: Raster = np.zeros((rect.height, rect.width, image.bands), image.kind.numpy)
        present: Mask = np.zeros((rect.height, rect.width), np.bool_)
        for r, c, part in tiles_of(rect, image.height, image.width, image.tile):
            found = self._at(r, c)
            if found is None:
                continue
            here = part.slices(rect)
            there = part.slices(Rect(r, r + 1, c, c + 1).scaled(image.tile))
            pixels[here] = found.pixels[there]
            present[here] = True if found.present is None else found.present[there]
        if not present.any():
            return None
        return padded(self.info, pixels, None if present.all() else present)

    def jpeg(self, row: int, col: int) -> bytes | None:
        raise AssertionError("none of its tiles is copied")

    def close(self) -> None:
        self._image.close()
