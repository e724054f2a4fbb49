"""Rasters of any layout over rasterio (GDAL): strips, separate planes, nodata, other formats.

The only file that knows rasterio, and so the one that burns polygons into pixels. Only formats that
are one file with its pixels in it are opened: others (VRT, HFA, WMS...) can name further files and
addresses. What lies beside it is not read.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.features import rasterize
from rasterio.windows import Window

from axialtrain.data.georeference import checked
from axialtrain.data.readers.reader import (
    TILE,
    Info,
    Tile,
    Unfit,
    check_level,
    check_size,
    fits_a_tile,
    kind_of,
    one_line,
    padded,
    window_of,
)

# What a file must begin with for one of GDAL's drivers to be given it.
DRIVERS = {
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"\0\0\0\x0cjP  ": "JP2OpenJPEG",
}
_CACHE = 1 << 26  # bytes, of decoded blocks: a strip that many tiles share is decoded once
_MAX_BLOCK = 1 << 28  # bytes that one block of the file may take in memory
_ERRORS = (
    CPLE_BaseError,  # GDAL's own, of which rasterio turns only some into its errors
    RasterioError,
    OSError,
    ValueError,
    RuntimeError,
    MemoryError,
    LookupError,
)

_JPEG = "JPEGLib:"  # what warnings of libjpeg begin with

# What it logs, it also raises, but for warnings, which `_heard` listens to.
_LOG = logging.getLogger("rasterio")
_LOG.setLevel(logging.WARNING)
_LOG.propagate = False
_LOG.addHandler(logging.NullHandler())


class GeoSource:
    """A level of a raster."""

    def __init__(self, path: Path, level: int, *, indices: bool) -> None:
        """indices: whether a palette's indices are what is wanted, and not its colours."""
        self._path = path
        driver = _driver(path)
        with ExitStack() as opened:
            try:
                with _gdal(), warnings.catch_warnings():
                    warnings.simplefilter("ignore", NotGeoreferencedWarning)
                    with rasterio.open(path, driver=driver) as base:
                        factors = list(base.overviews(1)) if base.count else []
                        size = (base.height, base.width)
                    check_level(path, level, 1 + len(factors))
                    overview = {} if level == 0 else {"overview_level": level - 1}
                    self._file = opened.enter_context(
                        rasterio.open(path, driver=driver, **overview)
                    )
                    self.info = self._info(size, 1 + len(factors), indices)
            except _ERRORS as error:
                if isinstance(error, ValueError) and str(error).startswith(str(path)):
                    raise
                raise ValueError(
                    f"{path}: not a raster that can be read ({one_line(error)})"
                ) from error
            opened.pop_all()

    def _info(self, base: tuple[int, int], levels: int, indices: bool) -> Info:
        file, path = self._file, self._path
        check_size(path, file.height, file.width)
        if file.subdatasets or file.count == 0:
            raise ValueError(f"{path}: holds several images, allowed is one")
        self._alpha = file.count > 1 and file.colorinterp[-1] == ColorInterp.alpha
        dtypes = set(file.dtypes)
        dtype = np.dtype(next(iter(dtypes))) if len(dtypes) == 1 else None
        kind = kind_of(path, file.count - self._alpha, dtype)
        if file.colorinterp[0] == ColorInterp.palette and not indices:
            raise Unfit(path, "its colours are a palette's", "convert it with `gdal_translate`")
        whole = file.interleaving is not None and file.interleaving.value == "PIXEL"
        for height, width in file.block_shapes:
            taken = height * width * kind.pixel_bytes if whole else height * width * 4
            if taken > _MAX_BLOCK:
                raise ValueError(f"{path}: its blocks are {height} x {width} px, which is too much")
        height, width = file.block_shapes[0]
        side = height if height == width and fits_a_tile(height, kind) else TILE
        flags = {flag for band in file.mask_flag_enums for flag in band}
        self._masked = bool(flags - {MaskFlags.all_valid})
        transform = None if file.transform.is_identity else tuple(file.transform)[:6]
        crs, transform = checked(_crs(file), transform)
        return Info(
            height=file.height,
            width=file.width,
            kind=kind,
            tile=side,
            downsample=max(base) / max(file.height, file.width),
            levels=levels,
            masked=self._masked or kind.dtype == "float32",
            opacity=self._alpha,
            crs=crs,
            transform=transform,
        )

    def tile(self, row: int, col: int) -> Tile | None:
        rect = window_of(self.info, row, col)
        window = Window(rect.left, rect.top, rect.width, rect.height)
        bands = list(range(1, self.info.kind.bands + 1))
        try:
            with _gdal(), _heard(_JPEG) as warned:
                pixels = self._file.read(bands, window=window)
                mask = self._file.dataset_mask(window=window) if self._masked else None
            if warned:  # libjpeg makes up what is missing: see `codec.check_jpeg`
                raise ValueError(f"a damaged JPEG: {warned[0]}")
        except _ERRORS as error:
            raise ValueError(
                f"{self._path}: tile row={row} col={col} cannot be read ({one_line(error)})"
            ) from error
        present = None if mask is None else mask != 0
        return padded(self.info, np.ascontiguousarray(np.moveaxis(pixels, 0, -1)), present)

    def jpeg(self, row: int, col: int) -> bytes | None:
        raise AssertionError("rasterio decodes")

    def close(self) -> None:
        self._file.close()


def burned(
    polygons: Sequence[tuple[Sequence[NDArray[np.float64]], int]],
    size: tuple[int, int],
    fill: int,
) -> NDArray[np.uint8]:
    """uint8 `size` (height, width): the value of the last polygon that a pixel's centre lies in,
    `fill` where it lies in none.

    polygons: (rings, value), the outer ring first, then holes; each ring is [vertices, 2] of
    (x, y), px, with at least 3 vertices, of which the first is not repeated.
    """
    shapes = [
        (
            {
                "type": "Polygon",
                "coordinates": [[*ring.tolist(), ring[0].tolist()] for ring in rings],
            },
            value,
        )
        for rings, value in polygons
    ]
    if not shapes:
        return np.full(size, fill, np.uint8)
    with _gdal():
        found: NDArray[np.uint8] = rasterize(shapes, out_shape=size, fill=fill, dtype="uint8")
    return found


def _driver(path: Path) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(max(map(len, DRIVERS)))
    except OSError as error:
        raise ValueError(f"{path}: not a raster that can be read ({error})") from error
    for magic, driver in DRIVERS.items():
        if start.startswith(magic):
            return driver
    raise ValueError(f"{path}: no raster, allowed are {', '.join(sorted(set(DRIVERS.values())))}")


def _gdal() -> AbstractContextManager[object]:
    """GDAL as it is used here: a bounded cache, and nothing read but the file itself."""
    return rasterio.Env(
        GDAL_CACHEMAX=_CACHE,
        GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR",
        GDAL_PAM_ENABLED="NO",
    )


@contextmanager
def _heard(text: str) -> Iterator[list[str]]:
    """What GDAL warns of with `text` in it, on this thread."""
    heard: list[str] = []
    thread = threading.get_ident()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _, found, said = record.getMessage().partition(text)
            if found and record.thread == thread:
                heard.append(said)

    ear = Ear(logging.WARNING)
    _LOG.addHandler(ear)
    try:
        yield heard
    finally:
        _LOG.removeHandler(ear)


def _crs(file: rasterio.DatasetReader) -> str | None:
    """As EPSG:..., where the file's CRS is one of those, or as WKT."""
    if file.crs is None:
        return None
    code = file.crs.to_epsg()
    return f"EPSG:{code}" if code is not None else str(file.crs.to_wkt())
