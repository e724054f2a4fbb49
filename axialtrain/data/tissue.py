"""Which tiles of an image hold something: tissue, or any pixel at all.

Decided on a coarse picture, with cells of several px. Where the image has a level that is coarse
enough, a few percent of its pixels are read. Where it has none, all tiles are decoded once, one at
a time, and averaged: the picture is never larger than MAX_SIDE x MAX_SIDE.

Tissue is what is coloured. Glass is grey or white whatever the lamp's brightness, so the saturation
of HSV tells them apart, at the threshold of Otsu (A Threshold Selection Method from Gray-Level
Histograms, IEEE Trans. Systems, Man, and Cybernetics 9(1), 1979, pages 62-66), within bounds.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.codec import Pixels
from axialtrain.data.kinds import Kind
from axialtrain.data.readers import Info, Reader, open_image, tiles_of
from axialtrain.data.readers.resampled import HALF, Averaged
from axialtrain.grid import Rect

ALL, NODATA, TISSUE = HOW = ("all", "nodata", "tissue")
MAX_SIDE = 4096  # cells, of the coarse picture
CELLS = 4  # along a tile's side, at least, where the image has such a level
_COARSE = 4  # times smaller along a side is what saves reading: 1/16 of the pixels
# Saturation, of 255. Glass is mostly below 10. An image of glass alone has shades too, which Otsu
# parts, and ink hides pale tissue: below the one no pixel is tissue, from the other on every one.
_LEAST, _MOST = 15, 40
_DARK = 20  # of 255: the hue of what is darker is noise
_PALE, _GROUND = 0.45, 220  # contrast of what is left out, and what white becomes there
_BLUE, _WHITE = (0, 114, 178), (255, 255, 255)  # blue of Okabe and Ito

Mask = NDArray[np.bool_]


def kept_tiles(
    path: str | Path,
    level: int,
    reader: str,
    *,
    how: str,
    share: float = 0.0,
    stored: Info | None = None,
) -> Mask:
    """bool [rows, cols]: which tiles of the image, as it is stored, hold something.

    path, level, reader: as `open_image` has them. how: "all" keeps all tiles; "nodata" those with
    a pixel that is present; "tissue" those with tissue, of stained slides (RGB of 8 bits) alone.
    share: a tile is kept if at least this share of its area within the image holds something, and
    some of it does. stored: of the image as it is stored, where that is not the level itself but
    one made of it (`resampled`).

    What holds something is grown by one cell of the coarse picture, so that borders are not lost.
    On a coarse level of the file, what is smaller than one of its px may be lost.

    The same image gives the same tiles. ValueError naming what is wrong.
    """
    path = Path(path)
    if how not in HOW:
        raise ValueError(f"how is {how!r}, allowed is {', '.join(HOW)}")
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, allowed is 0 to 1")
    with open_image(path, level, reader) as image:
        info, levels = image.info if stored is None else stored, image.levels
    check_kept(path, info.kind, how)
    rows, cols = -(-info.height // info.tile), -(-info.width // info.tile)
    if how == ALL:
        return np.ones((rows, cols), np.bool_)
    coarse, cell = _coarse(path, level, reader, levels, info)
    with open_image(path, coarse, reader) as image:
        pixels, there = _picture(image, cell, how)
    return _tiles_with(_grown(there if pixels is None else tissue(pixels, there)), info, share)


def check_kept(path: Path, kind: Kind, how: str) -> None:
    """ValueError naming the image if its pixels, of `kind`, cannot be kept by `how`."""
    if how == TISSUE and kind != Kind():
        raise ValueError(
            f"{path}: its pixels are {kind}, allowed for how={TISSUE!r} is {Kind()} (RGB): "
            f"how={NODATA!r} is for all"
        )


def tissue(pixels: Pixels, present: Mask) -> Mask:
    """bool [h, w]: which pixels of an RGB picture of a stained slide, uint8 [h, w, 3], are tissue.

    present: bool [h, w], which pixels are there; others are none, and count for no threshold.
    """
    brightest = pixels.max(axis=-1).astype(np.int64)
    spread = brightest - pixels.min(axis=-1)
    saturation = np.where(brightest < _DARK, 0, 255 * spread // np.maximum(brightest, 1))
    counts = np.bincount(saturation[present], minlength=256)
    threshold = otsu(counts)
    pale = saturation[present & (saturation <= threshold)]
    # What Otsu parts from tissue may be no glass, but tissue of a paler shade.
    glass = pale.size == 0 or pale.mean() < _LEAST
    return present & (saturation >= (np.clip(threshold + 1, _LEAST, _MOST) if glass else _LEAST))


def otsu(counts: NDArray[np.int64]) -> int:
    """The value t for which the classes <= t and > t of a histogram differ most; 0 without two.

    counts: how often each of the values 0, 1, ... occurs.
    """
    values = np.arange(len(counts))
    below, sums = np.cumsum(counts), np.cumsum(counts * values)
    above = below[-1] - below
    parted = (below > 0) & (above > 0)
    if not parted.any():
        return 0
    means = sums / np.maximum(below, 1), (sums[-1] - sums) / np.maximum(above, 1)
    between = np.where(parted, below * 1.0 * above * (means[0] - means[1]) ** 2, -1.0)
    return int(between.argmax())


def overview(picture: Pixels, kept: Mask, *, height: int, width: int, tile: int) -> Pixels:
    """`picture`, uint8 RGB [h, w, 3] of a whole image, in which one sees what is kept of it.

    kept: bool [rows, cols] of the image's tiles, or of its blocks. height, width: of the image, px.
    tile: side of a tile, or of a block, px. What is left out is pale grey; around what is kept runs
    a line of blue beside white, which differ for every eye and on every ground.
    """
    rows, cols = -(-height // tile), -(-width // tile)
    if kept.shape != (rows, cols):
        raise ValueError(f"kept is of shape {kept.shape}, allowed is {(rows, cols)}")
    h, w = picture.shape[:2]
    down, across = (
        ((2 * np.arange(n) + 1) * side) // (2 * n * tile) for n, side in ((h, height), (w, width))
    )
    inside = kept[np.ix_(down, across)]
    grey = picture.mean(axis=-1, keepdims=True)
    drawn = np.where(inside[..., None], picture, _GROUND - (255 - grey) * _PALE).astype(np.uint8)
    thick = max(1, max(h, w) // 400)
    rim = _shrunk(inside, thick)
    drawn[inside & ~rim] = _BLUE
    drawn[rim & ~_shrunk(rim, max(1, thick // 2))] = _WHITE
    return drawn


def _coarse(path: Path, level: int, reader: str, levels: int, stored: Info) -> tuple[int, float]:
    """(level to look at, px of it per cell).

    The coarsest whose tiles have CELLS px along a side; or, where all coarse ones have fewer, the
    finest of these; or, where there is no coarse one, the level itself.
    """
    coarse = []
    for each in range(level, levels):
        try:
            with open_image(path, each, reader) as image:
                info = image.info
        except ValueError:
            if each == level:
                raise
            continue  # not tiled, say
        across = stored.tile * stored.downsample / info.downsample  # px along a tile
        least = max(1.0, max(info.height, info.width) / MAX_SIDE)
        if each == level:
            own = max(least, across / (2 * CELLS))
        if info.downsample >= _COARSE * stored.downsample:
            coarse.append((each, least, across))
    fine = [(each, least) for each, least, across in coarse if across >= CELLS]
    if fine:
        return fine[-1]
    return coarse[0][:2] if coarse else (level, own)


def _picture(image: Reader, cell: float, how: str) -> tuple[Pixels | None, Mask]:
    """(the mean colour of each cell, uint8 [h, w, 3], for tissue; which of them are there)."""
    cells = Averaged(image, cell, least=HALF if how == TISSUE else Fraction(0))
    height, width, tile = cells.info.height, cells.info.width, cells.info.tile
    pixels = np.zeros((height, width, 3), np.uint8) if how == TISSUE else None
    there = np.zeros((height, width), np.bool_)
    for row, col, part in tiles_of(Rect(0, height, 0, width), height, width, tile):
        found = cells.tile(row, col)
        if found is None:
            continue
        here = part.slices(Rect(0, height, 0, width))
        within = part.slices(Rect(row, row + 1, col, col + 1).scaled(tile))
        there[here] = True if found.present is None else found.present[within]
        if pixels is not None:
            pixels[here] = found.pixels[within]
    return pixels, there


def _grown(mask: Mask) -> Mask:
    """`mask` and the 8 neighbours of each of its cells."""
    return ~_shrunk(~mask, 1, beyond=True)


def _shrunk(mask: Mask, cells: int, *, beyond: bool = False) -> Mask:
    """Where all cells up to `cells` away, diagonally too, are in `mask`. beyond: its border."""
    for _ in range(cells):
        for axis in (0, 1):
            wider = np.pad(
                mask, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], constant_values=beyond
            )
            before, after = (np.delete(wider, at, axis) for at in (np.s_[-2:], np.s_[:2]))
            mask = before & mask & after
    return mask


def _tiles_with(found: Mask, stored: Info, share: float) -> Mask:
    """Which tiles have `share` of their area in the cells `found`, [rows, cols]; in whole numbers,
    in units of 1/height and 1/width of a cell."""
    held, sides = found.astype(np.int64), []
    for length in (stored.height, stored.width):
        cells, tiles = held.shape[0], -(-length // stored.tile)
        edges = np.minimum(np.arange(tiles + 1) * stored.tile, length) * cells
        whole, part = np.divmod(edges, length)
        sums = np.pad(np.cumsum(held, axis=0), [(1, 0), (0, 0)])
        next_cell = np.pad(held, [(0, 1), (0, 0)])[whole]
        # Summed up to each edge, then from edge to edge; then along the other side.
        held = np.diff(sums[whole] * length + next_cell * part[:, None], axis=0).T
        sides.append(np.diff(edges))
    area = np.outer(*sides).astype(np.float64)
    kept: Mask = (held > 0) & (held >= share * area)
    return kept
