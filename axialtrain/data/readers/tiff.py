"""Tiled TIFF and what is one: SVS, pyramids, OME-TIFF, COG. Over tifffile and imagecodecs.

Tiles that the file holds as JPEG are given as they are, so that sharding need not decode. What is
not tiled, or tiled in a way that the store has no place for, is left to other readers.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from axialtrain.data.codec import check_jpeg, decode, jpeg_shape, looks_whole, standalone_jpeg
from axialtrain.data.georeference import of_tiff
from axialtrain.data.kinds import MAX_BANDS, Kind
from axialtrain.data.readers.reader import (
    Info,
    Mask,
    Tile,
    Unfit,
    believed_mpp,
    check_level,
    check_size,
    fits_a_tile,
    kind_of,
)
from axialtrain.data.store import MAX_TILE, MIN_TILE, max_tile_bytes

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
_MINISBLACK, _RGB, _PALETTE, _YCBCR = 1, 2, 3, 6  # TIFF's PhotometricInterpretation
_CONTIGUOUS = 1  # TIFF's PlanarConfiguration
_CENTIMETRE = 3  # TIFF's ResolutionUnit
_ALPHA = (1, 2)  # TIFF's ExtraSamples: associated, and not
_MASK = 4  # a bit of TIFF's NewSubfileType
_NODATA = 42113  # GDAL's tag
_APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.]+)")
_OME_MPP = re.compile(r'<Pixels\b[^>]{0,4096}?\bPhysicalSizeX="([0-9.eE+-]{1,32})"')
_OME_OTHER_UNIT = re.compile(r'\bPhysicalSizeXUnit="(?!µm"|um"|&#181;m"|&#xB5;m")')
_CONVERT = "convert it to a tiled TIFF, e.g. `vips tiffsave --tile --compression jpeg`"
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


class TiffSource:
    """A level of a tiled TIFF."""

    def __init__(self, path: Path, level: int, *, indices: bool) -> None:
        """indices: whether a palette's indices are what is wanted, and not its colours."""
        self._path = path
        try:
            # Names of other files, which an OME-TIFF may have, are not followed.
            self._file = tifffile.TiffFile(path, _multifile=False)
        except FileNotFoundError:
            raise ValueError(f"{path}: there is no such file") from None
        except IsADirectoryError:
            raise ValueError(f"{path}: is a folder, allowed is an image") from None
        except _BROKEN as error:
            raise ValueError(f"{path}: not an image that can be read ({error})") from error
        try:
            self._open_level(level, indices)
        except _BROKEN as error:
            self._file.close()
            if isinstance(error, ValueError) and str(error).startswith(str(path)):
                raise
            raise ValueError(f"{path}: a damaged TIFF ({error})") from error

    def _open_level(self, level: int, indices: bool) -> None:
        path = self._path
        _check_pages(path, self._file.pages)
        levels = self._file.series[0].levels
        check_level(path, level, len(levels))
        self._pages = _planes(path, levels[level])
        page = self._page = self._pages[0]
        kind = _check_page(path, page, len(self._pages), indices)
        height, width, side = page.imagelength, page.imagewidth, page.tilewidth
        # Levels are rounded sizes: the longer side gives the better quotient.
        base = levels[0].keyframe
        downsample = max(base.imagelength, base.imagewidth) / max(height, width)
        mpp = _base_mpp(base)
        self._stored = kind
        self._alpha = page.samplesperpixel > 1 and (0, *page.extrasamples)[-1] in _ALPHA
        if self._alpha:
            kind = Kind(kind.bands - 1, kind.dtype)
        self._nodata = _nodata(base, kind)
        self._mask = _mask_page(path, self._file.pages, page)
        masked = self._alpha or self._nodata is not None or self._mask is not None
        crs, transform = of_tiff(
            base.geotiff_tags, base.imagelength / height, base.imagewidth / width
        )
        self.info = Info(
            height=height,
            width=width,
            kind=kind,
            tile=side,
            mpp=None if mpp is None else mpp * downsample,
            downsample=downsample,
            levels=len(levels),
            jpeg=page.compression == _JPEG and len(self._pages) == 1,
            masked=masked or kind.dtype == "float32",
            opacity=self._alpha,
            crs=crs,
            transform=transform,
        )
        self._cols = -(-width // side)
        tiles = -(-height // side) * self._cols
        for plane in (*self._pages, *([] if self._mask is None else [self._mask])):
            if min(len(plane.dataoffsets), len(plane.databytecounts)) < tiles:
                raise ValueError(f"{path}: has fewer tiles than its size asks for ({tiles})")

    def tile(self, row: int, col: int) -> Tile | None:
        planes = [self._plane(page, row, col) for page in self._pages]
        if all(plane is None for plane in planes):
            return None
        shape = (self.info.tile, self.info.tile, self._page.samplesperpixel)
        parts = [np.zeros(shape, self._stored.numpy) if p is None else p for p in planes]
        pixels = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        present: Mask | None = None
        if self._alpha:
            pixels, present = np.ascontiguousarray(pixels[..., :-1]), pixels[..., -1] != 0
        if self._nodata is not None:
            present = _and(present, (pixels != self._nodata).any(-1))
        if self._mask is not None:
            mask = self._bits(self._mask, row, col)
            present = _and(present, np.zeros(shape[:2], np.bool_) if mask is None else mask)
        return Tile(pixels, present)

    def jpeg(self, row: int, col: int) -> bytes | None:
        data = self._jpeg(self._page, row, col)
        try:
            # The whole check takes four times as long as copying; `verify --deep` makes it.
            if data is not None and not looks_whole(data):
                check_jpeg(data)
        except ValueError as error:
            raise self._bad_tile(row, col, str(error)) from error
        return data

    def close(self) -> None:
        self._file.close()

    def _raw(self, page: tifffile.TiffPage, row: int, col: int) -> bytes | None:
        """Tile (row, col) as it lies in the file; None for a sparse file's absent tile."""
        index = row * self._cols + col
        offset, length = page.dataoffsets[index], page.databytecounts[index]
        if not isinstance(offset, int) or not isinstance(length, int):  # its tag is of another type
            raise self._bad_tile(row, col, "has no place in the file")
        if length == 0:
            return None
        if length > max_tile_bytes(self.info.tile, self._stored):
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
        return ValueError(f"{self._path}: tile row={row} col={col} {why}")

    def _jpeg(self, page: tifffile.TiffPage, row: int, col: int) -> bytes | None:
        raw = self._raw(page, row, col)
        if raw is None:
            return None
        try:
            tile = standalone_jpeg(raw, page.jpegtables, rgb=page.photometric == _RGB)
            shape = jpeg_shape(tile)
        except ValueError as error:
            raise self._bad_tile(row, col, str(error)) from error
        expected = (self.info.tile, self.info.tile, page.samplesperpixel)
        if shape != expected:
            raise self._bad_tile(row, col, f"is of shape {shape} where {expected} belongs")
        return tile

    def _plane(self, page: tifffile.TiffPage, row: int, col: int) -> NDArray[Any] | None:
        """Tile (row, col) of `page`, [tile, tile, its bands]."""
        shape = (self.info.tile, self.info.tile, page.samplesperpixel)
        if page.compression != _JPEG:
            return self._decode(page, row, col, np.zeros(shape, self._stored.numpy))
        data = self._jpeg(page, row, col)
        try:
            return None if data is None else decode(data, shape)
        except ValueError as error:
            raise self._bad_tile(row, col, str(error)) from error

    def _bits(self, page: tifffile.TiffPage, row: int, col: int) -> Mask | None:
        """Tile (row, col) of the mask `page`, bool [tile, tile]."""
        shape = (self.info.tile, self.info.tile, 1)
        found = self._decode(page, row, col, np.zeros(shape, page.dtype))
        return None if found is None else found[..., 0] != 0

    def _decode(
        self, page: tifffile.TiffPage, row: int, col: int, pixels: NDArray[Any]
    ) -> NDArray[Any] | None:
        """Tile (row, col) of `page` into the zeros `pixels`, which are returned."""
        raw = self._raw(page, row, col)
        if raw is None:
            return None
        try:
            found, _, _ = page.decode(raw, row * self._cols + col)
            if found is None:
                return None
            # tifffile cuts tiles at the border of the image; the store's are all of one size.
            _, height, width, _ = found.shape
            pixels[:height, :width] = found[0]
        except _BROKEN as error:
            raise self._bad_tile(row, col, f"cannot be decoded ({error})") from error
        return pixels


def _and(one: Mask | None, other: Mask) -> Mask:
    return other if one is None else one & other


def _check_pages(path: Path, pages: tifffile.TiffPages) -> None:
    """ValueError if the file's pages do not end: their list may bite its tail, which hangs."""
    try:
        pages[MAX_PAGES]
    except IndexError:
        return
    raise ValueError(f"{path}: has more than {MAX_PAGES} pages, or a list of them without an end")


def _planes(path: Path, level: tifffile.TiffPageSeries) -> list[tifffile.TiffPage]:
    """The pages of `level`, which together are one image: one, or one for each channel.

    Others, of depths or times, are refused for good: no reader may take the first for the whole.
    """
    sizes = dict(zip(level.axes, level.shape, strict=True))
    others = {axis: n for axis, n in sizes.items() if axis not in "YXSC" and n > 1}
    pages = list(level.pages)
    if others or len(pages) not in (1, sizes.get("C", 1)):
        raise ValueError(
            f"{path}: holds {len(pages)} planes of axes {level.axes}, allowed is one image, whose "
            "planes are channels (axes CYX) if it has several"
        )
    if len(pages) > MAX_BANDS:
        raise ValueError(f"{path}: has {len(pages)} channels, allowed is 1 to {MAX_BANDS}")
    if len(pages) == 1:
        return [level.keyframe]
    found = [page.aspage() for page in pages if page is not None]
    if len(found) != len(pages):
        raise ValueError(f"{path}: lacks {len(pages) - len(found)} of its {len(pages)} channels")
    return found


def _check_page(path: Path, page: tifffile.TiffPage, planes: int, indices: bool) -> Kind:
    """The kind of the pixels; ValueError saying what is wrong unless this reader can read it."""
    kind = kind_of(path, page.samplesperpixel * planes, page.dtype)
    for vendor, found in (("a Ventana BIF", page.is_bif), ("a Leica SCN", page.is_scn)):
        if found:
            raise Unfit(path, f"is {vendor}, whose pages or tiles are not laid out on one grid")
    if not page.is_tiled:
        raise Unfit(path, "not tiled", _CONVERT)
    if page.compression not in _COMPRESSIONS:
        allowed = ", ".join(dict.fromkeys(_COMPRESSIONS.values()))
        raise Unfit(
            path, f"its compression is {page.compression!r}, allowed is {allowed}", _CONVERT
        )
    if page.samplesperpixel > 1 and page.planarconfig != _CONTIGUOUS:
        raise Unfit(path, "its bands lie in separate planes, allowed is interleaved")
    colours = [_MINISBLACK, _RGB] if page.samplesperpixel > 1 else [page.photometric]
    if page.compression == _JPEG:
        colours = [_RGB, _YCBCR] if page.samplesperpixel == 3 else [_MINISBLACK]
        if kind.dtype != "uint8" or page.samplesperpixel not in (1, 3):
            raise Unfit(path, f"is JPEG of {kind}, allowed is 3 or 1 of 8 bits", _CONVERT)
    if page.photometric not in colours or (page.photometric == _PALETTE and not indices):
        name = tifffile.PHOTOMETRIC(page.photometric).name
        raise Unfit(path, f"its colours are {name}, allowed is RGB, YCBCR in JPEG, or MINISBLACK")
    if page.imagedepth != 1:
        raise ValueError(f"{path}: is not a plane of pixels")
    check_size(path, page.imagelength, page.imagewidth)
    if page.tilelength != page.tilewidth or not MIN_TILE <= page.tilewidth <= MAX_TILE:
        raise Unfit(
            path,
            f"its tiles are {page.tilelength} x {page.tilewidth} px, allowed are squares "
            f"of {MIN_TILE} to {MAX_TILE}",
            _CONVERT,
        )
    if not fits_a_tile(page.tilewidth, kind):
        raise Unfit(path, f"its tiles of {page.tilewidth} px and {kind} are too large", _CONVERT)
    return kind


def _mask_page(
    path: Path, pages: tifffile.TiffPages, page: tifffile.TiffPage
) -> tifffile.TiffPage | None:
    """The page that says which pixels of `page` are there, as GDAL writes them; None without."""
    size = (page.imagelength, page.imagewidth)
    for index in range(len(pages)):
        mask = pages[index].aspage()
        if not mask.subfiletype & _MASK or (mask.imagelength, mask.imagewidth) != size:
            continue
        fits = mask.is_tiled and (mask.tilelength, mask.tilewidth) == (page.tilelength,) * 2
        plain = mask.samplesperpixel == mask.imagedepth == 1 and mask.dtype in (np.uint8, np.bool_)
        if not fits or not plain or mask.compression not in _COMPRESSIONS.keys() - {_JPEG}:
            raise Unfit(path, "its mask is not tiled as the image is")
        return mask
    return None


def _nodata(page: tifffile.TiffPage, kind: Kind) -> float | None:
    """The value of pixels that are missing, where the file names one that a pixel can have."""
    tag = page.tags.get(_NODATA)
    if tag is None:
        return None
    try:
        value = float(str(tag.value).strip("\0 "))
    except ValueError:
        return None
    if kind.dtype != "float32":
        return value if value in range(np.iinfo(kind.numpy).max + 1) else None
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    return rounded if math.isfinite(rounded) else None  # what is not finite is missing anyway


def _base_mpp(page: tifffile.TiffPage) -> float | None:
    """Micrometres per px of level 0, where the file says so in a way that can be believed.

    Aperio writes it into the description, OME-TIFF into its XML. Of the resolution tags only those
    per centimetre count: per inch they are mostly a printer's 72 or 96.
    """
    aperio = _APERIO_MPP.search(page.description)
    if aperio:
        return believed_mpp(aperio[1])
    if page.is_ome:
        ome = _OME_MPP.search(page.description)
        if ome and not _OME_OTHER_UNIT.search(page.description):
            return believed_mpp(ome[1])
    resolution, unit = page.tags.get("XResolution"), page.tags.get("ResolutionUnit")
    if resolution is None or unit is None or unit.value != _CENTIMETRE:
        return None
    per_centimetre, denominator = resolution.value
    if not per_centimetre or not denominator:
        return None
    return believed_mpp(1e4 * denominator / per_centimetre)
