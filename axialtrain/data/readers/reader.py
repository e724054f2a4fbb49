"""What every reader gives, whatever library is behind it.

A `Source` is one level of one image over one library: the file that opens it is the only one that
knows that library. A `Reader` is what the rest of the room sees: a source and how it was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.kinds import DTYPES, MAX_BANDS, MAX_TILE_PIXELS_BYTES, Kind, Raster
from axialtrain.data.store import MAX_SIDE, MAX_TILE, MIN_TILE
from axialtrain.grid import Rect

# Micrometres per px that a head can have (`Head.from_json`), and that a file can be believed to
# have at level 0: what is beyond is a slip of its writer, and counts as unknown.
MPP = (1e-9, 1e9)
_BELIEVED = (1e-3, 1e3)
TILE = 256  # px, of sources that have no tiles of their own, or none that can be stored
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Info:
    """One level of an image.

    height, width: px. kind: of its pixels. tile: side of the square tiles, px. mpp: micrometres per
    px, None where unknown. downsample: px of level 0 per px of this one. levels: how many levels
    the image has. jpeg: whether the source holds its tiles as JPEG. masked: whether pixels may be
    missing. opacity: whether the file's last band is one, and so none of `kind`. crs, transform: as
    in `georeference`, of this level.
    """

    height: int
    width: int
    kind: Kind
    tile: int
    mpp: float | None = None
    downsample: float = 1.0
    levels: int = 1
    jpeg: bool = False
    masked: bool = False
    opacity: bool = False
    crs: str | None = None
    transform: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Tile:
    """A tile's pixels [tile, tile, bands], 0 where missing; present: bool [tile, tile], or all."""

    pixels: Raster
    present: Mask | None = None


class Source(Protocol):
    """A level of an image over one library.

    Handles belong to the thread and process that opened them, and are closed by `close`.
    """

    info: Info

    def tile(self, row: int, col: int) -> Tile | None:
        """Tile (row, col) of the grid, padded where it reaches over the border; None: absent."""

    def jpeg(self, row: int, col: int) -> bytes | None:
        """Tile (row, col) as a stand-alone JPEG; only called where `info.jpeg`."""

    def close(self) -> None: ...


class Unfit(ValueError):  # noqa: N818 (it is a ValueError to whoever does not choose readers)
    """An image that this reader does not take, though another may.

    reason: why. advice: what can be done, if no other reader takes it.
    """

    def __init__(self, path: Path, reason: str, advice: str = "") -> None:
        super().__init__(f"{path}: {reason}" + f": {advice}" * bool(advice))
        self.reason = reason


class Reader:
    """One level of one image. A context manager: leaving it closes the file.

    Opened where it is used: by each process, and each thread, for itself. name: of the reader.
    why: how it was chosen. The other attributes are those of `Info`.
    """

    def __init__(self, path: Path, source: Source, name: str, why: str) -> None:
        self.path = path
        self.name = name
        self.why = why
        self._source = source
        info = source.info
        self.info = info
        self.height, self.width = info.height, info.width
        self.kind, self.bands, self.dtype = info.kind, info.kind.bands, info.kind.dtype
        self.tile = info.tile
        self.mpp, self.downsample, self.levels = info.mpp, info.downsample, info.levels
        self.jpeg = info.jpeg
        self._rows, self._cols = -(-info.height // info.tile), -(-info.width // info.tile)

    def tile_bytes(self, row: int, col: int) -> bytes | None:
        """Tile (row, col) as a stand-alone JPEG; None where the source has no such tile.

        ValueError where `jpeg` is false.
        """
        if not self.jpeg:
            raise ValueError(f"{self.path}: its tiles are not JPEG")
        self._check(row, col)
        return self._source.jpeg(row, col)

    def tile_at(self, row: int, col: int) -> Tile | None:
        """Tile (row, col) and which of its pixels are there; None where none is.

        Pixels that are not finite are missing, too.
        """
        self._check(row, col)
        found = self._source.tile(row, col)
        if found is None:
            return None
        pixels, present = found.pixels, found.present
        if self.dtype == "float32":
            finite = np.asarray(np.isfinite(pixels).all(axis=-1))
            present = finite if present is None else present & finite
        if present is None:
            return found
        inside = present[: self.height - row * self.tile, : self.width - col * self.tile]
        if not inside.any():
            return None
        if inside.all():
            return Tile(pixels)
        return Tile(np.where(present[..., None], pixels, pixels.dtype.type(0)), present)

    def tile_pixels(self, row: int, col: int) -> Raster | None:
        """Tile (row, col), [tile, tile, bands], padded where it reaches over the border."""
        found = self.tile_at(row, col)
        return None if found is None else found.pixels

    def read(self, rect: Rect, fill: int = 0) -> Raster:
        """Pixels of `rect` (px), [h, w, bands]; `fill` outside the image and where missing."""
        pixels = np.full((rect.height, rect.width, self.bands), fill, self.kind.numpy)
        for row, col, part in tiles_of(rect, self.height, self.width, self.tile):
            found = self.tile_at(row, col)
            if found is None:
                continue
            here = part.slices(Rect(row, row + 1, col, col + 1).scaled(self.tile))
            got = found.pixels[here]
            if found.present is not None:
                got = np.where(found.present[here][..., None], got, got.dtype.type(fill))
            pixels[part.slices(rect)] = got
        return pixels

    def _check(self, row: int, col: int) -> None:
        if not (0 <= row < self._rows and 0 <= col < self._cols):
            raise ValueError(
                f"{self.path}: tile is ({row}, {col}), allowed is up to "
                f"({self._rows - 1}, {self._cols - 1})"
            )

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def tiles_of(rect: Rect, height: int, width: int, tile: int) -> Iterator[tuple[int, int, Rect]]:
    """(row, col, part) of each tile of an image of height x width px that meets `rect`.

    part: what `rect`, the tile and the image have in common, px.
    """
    inside = rect.intersect(Rect(0, height, 0, width))
    if inside.empty:
        return
    for row in range(inside.top // tile, -(-inside.bottom // tile)):
        for col in range(inside.left // tile, -(-inside.right // tile)):
            yield row, col, Rect(row, row + 1, col, col + 1).scaled(tile).intersect(inside)


def window_of(info: Info, row: int, col: int) -> Rect:
    """The pixels of tile (row, col) that lie in the image."""
    whole = Rect(row, row + 1, col, col + 1).scaled(info.tile)
    return whole.intersect(Rect(0, info.height, 0, info.width))


def padded(info: Info, pixels: Raster, present: Mask | None = None) -> Tile:
    """A tile of `pixels` [h, w, bands], and the `present` ones of them, that may be cut short."""
    side, (height, width) = info.tile, pixels.shape[:2]
    if (height, width) == (side, side):
        return Tile(pixels, present)
    whole = np.zeros((side, side, info.kind.bands), info.kind.numpy)
    whole[:height, :width] = pixels
    mask = None
    if present is not None:
        mask = np.zeros((side, side), np.bool_)
        mask[:height, :width] = present
    return Tile(whole, mask)


def kind_of(path: Path, bands: int, dtype: np.dtype | type[np.generic] | None) -> Kind:
    """The kind of pixels that can be stored; ValueError naming the file for any other."""
    name = "of no single type" if dtype is None else np.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(
            f"{path}: its pixels are {name}, allowed is uint8 (8 bits a band), float32 or uint16: "
            "convert it, e.g. `gdal_translate -ot Float32`"
        )
    if not 1 <= bands <= MAX_BANDS:
        raise ValueError(f"{path}: has {bands} bands, allowed is 1 to {MAX_BANDS}")
    return Kind(bands, name)


def check_size(path: Path, height: int, width: int) -> None:
    """ValueError naming the file if no image of height x width px can be stored."""
    if min(height, width) < 1:
        raise ValueError(f"{path}: is not a plane of pixels")
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"{path}: is {height} x {width} px, allowed is up to {MAX_SIDE}")


def fits_a_tile(side: int, kind: Kind) -> bool:
    """Whether tiles of `side` px may be stored."""
    return MIN_TILE <= side <= MAX_TILE and side * side * kind.pixel_bytes <= MAX_TILE_PIXELS_BYTES


def believed_mpp(said: str | float) -> float | None:
    """Micrometres per px of level 0, as a file says it, where that can be believed."""
    try:
        mpp = float(said)
    except (ValueError, OverflowError):
        return None
    return mpp if _BELIEVED[0] < mpp < _BELIEVED[1] else None


def one_line(error: BaseException) -> str:
    """What a library says, as part of a sentence."""
    return " ".join(str(error).split())[:200]


def check_level(path: Path, level: int, levels: int) -> None:
    if not 0 <= level < levels:
        raise ValueError(f"{path}: level is {level}, allowed is 0 to {levels - 1}")
