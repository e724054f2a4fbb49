"""Images as they come: tiled TIFF, and Aperio SVS, which is one.

8 bits a band: RGB images, and rasters of a single band; those of instances may have 16. A source
that holds JPEG tiles gives them as they are (`tile_bytes`), so that sharding need not decode; every
source gives pixels (`read`). Tiles must be square, as the store has one tile size; what is not
comes as a ValueError that says how to convert the image.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import tifffile
from numpy.typing import NDArray

from axialtrain.data.codec import Instances, Pixels, decode, jpeg_shape, standalone_jpeg
from axialtrain.data.store import MAX_SIDE, MAX_TILE, MIN_TILE, max_tile_bytes
from axialtrain.grid import Rect

MAX_PAGES = 1024  # of a file: levels, masks, thumbnail, label
# TIFF's Compression, of what is read. JPEG 2000 is not among them: its decoder takes its sizes from
# the tile, so that a few bytes can ask for gigabytes.
_JPEG = 7
_COMPRESSIONS = {
    1: "none",
    5: "LZW",
    _JPEG: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    50000: "zstd",
}
_RGB, _YCBCR = 2, 6  # TIFF's PhotometricInterpretation
_CONTIGUOUS = 1  # TIFF's PlanarConfiguration
_CENTIMETRE = 3  # TIFF's ResolutionUnit
_APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.]+)")
_CONVERT = "convert it to a tiled TIFF, e.g. `vips tiffsave --tile --compression jpeg`"


class Reader(Protocol):
    """One level of one image. A context manager: leaving it closes the file.

    height, width: px. bands: 3 (RGB) or 1. tile: side of the square tiles, px.
    mpp: micrometres per px, None where unknown. downsample: px of level 0 per px of this one.
    levels: how many levels the image has. jpeg: whether the source holds JPEG.
    """

    path: Path
    height: int
    width: int
    bands: int
    tile: int
    mpp: float | None
    downsample: float
    levels: int
    jpeg: bool

    def tile_bytes(self, row: int, col: int) -> bytes | None:
        """Tile (row, col) as a stand-alone JPEG; None where the source has no such tile.

        ValueError where `jpeg` is false.
        """

    def tile_pixels(self, row: int, col: int) -> Pixels | None:
        """Tile (row, col), uint8 [tile, tile, bands], padded where it reaches over the border."""

    def read(self, rect: Rect, fill: int = 0) -> Pixels:
        """Pixels of `rect` (px), uint8 [h, w, bands]; `fill` outside the image and its tiles."""

    def __enter__(self) -> Reader: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_image(path: str | Path, level: int = 0) -> Reader:
    """The image at `path`, at `level` of its pyramid (0 is the finest).

    ValueError, naming the file, for what is no image, or one that cannot be read by tiles.
    """
    return TiffReader(Path(path), level)


def open_instances(path: str | Path) -> TiffReader:
    """The raster of instance numbers at `path`, uint8 or uint16, for `read_instances`.

    ValueError as `open_image` has it.
    """
    return TiffReader(Path(path), 0, (np.uint8, np.uint16))


class TiffReader:
    """Reader of tiled TIFF and SVS, over tifffile (the structure) and imagecodecs (the tiles).

    dtypes: of the pixels that are let in; only `read_instances` gives others than uint8.
    """

    def __init__(
        self, path: Path, level: int, dtypes: tuple[type[np.generic], ...] = (np.uint8,)
    ) -> None:
        self.path = path
        self._dtypes = dtypes
        try:
            self._file = tifffile.TiffFile(path)
        except FileNotFoundError:
            raise ValueError(f"{path}: there is no such file") from None
        except IsADirectoryError:
            raise ValueError(f"{path}: is a folder, allowed is an image") from None
        except _BROKEN as error:
            raise ValueError(f"{path}: not an image that can be read ({error})") from error
        try:
            self._open_level(level)
        except _BROKEN as error:
            self._file.close()
            if isinstance(error, ValueError) and str(error).startswith(str(path)):
                raise
            raise ValueError(f"{path}: a damaged TIFF ({error})") from error

    def _open_level(self, level: int) -> None:
        _check_pages(self.path, self._file.pages)
        levels = [series.keyframe for series in self._file.series[0].levels]
        self.levels = len(levels)
        if not 0 <= level < self.levels:
            raise ValueError(f"{self.path}: level is {level}, allowed is 0 to {self.levels - 1}")
        page = levels[level]
        _check_page(self.path, page, self._dtypes)
        self._page = page
        self.height, self.width, self.bands = (
            page.imagelength,
            page.imagewidth,
            page.samplesperpixel,
        )
        self.tile = page.tilewidth
        # Levels are rounded sizes: the longer side gives the better quotient.
        base = levels[0]
        self.downsample = max(base.imagelength, base.imagewidth) / max(self.height, self.width)
        mpp = _base_mpp(base)
        self.mpp = None if mpp is None else mpp * self.downsample
        self.jpeg = page.compression == _JPEG
        self._cols = -(-self.width // self.tile)
        self._rows = -(-self.height // self.tile)
        tiles = self._rows * self._cols
        if min(len(page.dataoffsets), len(page.databytecounts)) < tiles:
            raise ValueError(f"{self.path}: has fewer tiles than its size asks for ({tiles})")

    def _raw(self, row: int, col: int) -> bytes | None:
        """Tile (row, col) as it lies in the file; None for a sparse file's absent tile."""
        if not (0 <= row < self._rows and 0 <= col < self._cols):
            raise ValueError(
                f"{self.path}: tile is ({row}, {col}), allowed is up to "
                f"({self._rows - 1}, {self._cols - 1})"
            )
        index = row * self._cols + col
        offset, length = self._page.dataoffsets[index], self._page.databytecounts[index]
        if length == 0:
            return None
        if length > max_tile_bytes(self.tile):
            raise self._bad_tile(row, col, f"takes {length} bytes")
        handle = self._file.filehandle
        try:
            handle.seek(offset)
            data: bytes = handle.read(length)
        except _BROKEN as error:
            raise self._bad_tile(row, col, f"cannot be read ({error})") from error
        if len(data) < length:
            raise self._bad_tile(row, col, "lies behind the end of the file")
        return data

    def _bad_tile(self, row: int, col: int, why: str) -> ValueError:
        return ValueError(f"{self.path}: tile row={row} col={col} {why}")

    def tile_bytes(self, row: int, col: int) -> bytes | None:
        if not self.jpeg:
            raise ValueError(f"{self.path}: its tiles are not JPEG")
        raw = self._raw(row, col)
        if raw is None:
            return None
        page = self._page
        try:
            tile = standalone_jpeg(raw, page.jpegtables, rgb=page.photometric == _RGB)
            shape = jpeg_shape(tile)
        except ValueError as error:
            raise self._bad_tile(row, col, str(error)) from error
        expected = (self.tile, self.tile, self.bands)
        if shape != expected:
            raise self._bad_tile(row, col, f"is of shape {shape} where {expected} belongs")
        return tile

    def tile_pixels(self, row: int, col: int) -> Pixels | None:
        return self._tile(row, col)

    def _tile(self, row: int, col: int) -> NDArray[Any] | None:
        """As `tile_pixels`, but of the file's dtype."""
        shape = (self.tile, self.tile, self.bands)
        if self.jpeg:
            data = self.tile_bytes(row, col)
            try:
                return None if data is None else decode(data, shape)
            except ValueError as error:
                raise self._bad_tile(row, col, str(error)) from error
        raw = self._raw(row, col)
        if raw is None:
            return None
        pixels = np.zeros(shape, self._page.dtype)
        try:
            found, _, _ = self._page.decode(raw, row * self._cols + col)
            if found is None:
                return None
            # tifffile cuts tiles at the border of the image; the store's are all of one size.
            _, height, width, _ = found.shape
            pixels[:height, :width] = found[0]
        except _BROKEN as error:
            raise self._bad_tile(row, col, f"cannot be decoded ({error})") from error
        return pixels

    def read(self, rect: Rect, fill: int = 0) -> Pixels:
        return self._read(rect, fill)

    def read_instances(self, rect: Rect) -> Instances:
        """The first band of `rect` (px), uint16 [h, w]; 0 outside the image and its tiles."""
        return self._read(rect, 0)[..., 0].astype(np.uint16)

    def _read(self, rect: Rect, fill: int) -> NDArray[Any]:
        pixels = np.full((rect.height, rect.width, self.bands), fill, self._page.dtype)
        for row, col, part in tiles_of(rect, self.height, self.width, self.tile):
            tile = self._tile(row, col)
            if tile is not None:
                origin = Rect(row, row + 1, col, col + 1).scaled(self.tile)
                pixels[part.slices(rect)] = tile[part.slices(origin)]
        return pixels

    def __enter__(self) -> TiffReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


# What tifffile and imagecodecs raise on bytes that are not what they claim to be, and files that
# cannot be read.
_BROKEN = (
    OSError,
    tifffile.TiffFileError,
    struct.error,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
)


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


def _check_pages(path: Path, pages: tifffile.TiffPages) -> None:
    """ValueError if the file's pages do not end: their list may bite its tail, which hangs."""
    try:
        pages[MAX_PAGES]
    except IndexError:
        return
    raise ValueError(f"{path}: has more than {MAX_PAGES} pages, or a list of them without an end")


def _check_page(path: Path, page: tifffile.TiffPage, dtypes: tuple[type[np.generic], ...]) -> None:
    """ValueError, saying what is wrong, unless `page` is something this reader can read."""
    if page.dtype not in dtypes:
        allowed = "uint8 (8 bits a band)" + " or uint16" * (np.uint16 in dtypes)
        raise ValueError(f"{path}: its pixels are {page.dtype}, allowed is {allowed}")
    if not page.is_tiled:
        raise ValueError(f"{path}: not tiled: {_CONVERT}")
    if page.compression not in _COMPRESSIONS:
        allowed = ", ".join(dict.fromkeys(_COMPRESSIONS.values()))
        raise ValueError(
            f"{path}: its compression is {page.compression!r}, allowed is {allowed}: {_CONVERT}"
        )
    if page.samplesperpixel not in (1, 3):
        raise ValueError(f"{path}: has {page.samplesperpixel} bands, allowed is 3 (RGB) or 1")
    if page.samplesperpixel == 3 and page.planarconfig != _CONTIGUOUS:
        raise ValueError(f"{path}: its bands lie in separate planes, allowed is interleaved RGB")
    if page.samplesperpixel == 3 and page.photometric not in (_RGB, _YCBCR):
        colours = tifffile.PHOTOMETRIC(page.photometric).name
        raise ValueError(f"{path}: its colours are {colours}, allowed is RGB or YCBCR")
    if page.imagedepth != 1 or min(page.imagelength, page.imagewidth) < 1:
        raise ValueError(f"{path}: is not a plane of pixels")
    if max(page.imagelength, page.imagewidth) > MAX_SIDE:
        raise ValueError(
            f"{path}: is {page.imagelength} x {page.imagewidth} px, allowed is up to {MAX_SIDE}"
        )
    if page.tilelength != page.tilewidth or not MIN_TILE <= page.tilewidth <= MAX_TILE:
        raise ValueError(
            f"{path}: its tiles are {page.tilelength} x {page.tilewidth} px, allowed are squares "
            f"of {MIN_TILE} to {MAX_TILE}: {_CONVERT}"
        )


def _base_mpp(page: tifffile.TiffPage) -> float | None:
    """Micrometres per px of level 0, where the file says so in a way that can be believed.

    Aperio writes it into the description. Of the resolution tags only those per centimetre count:
    per inch they are mostly a printer's 72 or 96.
    """
    aperio = _APERIO_MPP.search(page.description)
    if aperio:
        mpp = float(aperio[1])
        return mpp if 1e-3 < mpp < 1e3 else None
    resolution, unit = page.tags.get("XResolution"), page.tags.get("ResolutionUnit")
    if resolution is None or unit is None or unit.value != _CENTIMETRE:
        return None
    per_centimetre, denominator = resolution.value
    if not per_centimetre or not denominator:
        return None
    return float(1e4 * denominator / per_centimetre)
