"""What the pixels of an image are: its labels and its instances, read by rectangles of the image.

A raster has the image's own size, or another of the same extent; then each pixel of the image takes
the one of the raster that its centre lies in. Which one that is follows from coordinates of the
whole image in whole numbers, so that a pixel is the same in whatever rectangle it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.codec import Instances, Pixels
from axialtrain.data.kinds import Raster
from axialtrain.data.polygons import AUTO, PolygonLabels
from axialtrain.data.readers import Reader, open_raster, tiles_of
from axialtrain.data.store import UNLABELLED
from axialtrain.grid import Rect

POLYGONS = (".geojson", ".json")  # names of files that end so hold polygons; others are rasters
_JPEG = b"\xff\xd8\xff"


class LabelSource(Protocol):
    """Labels of an image. A context manager: leaving it closes the file.

    path: of the file. why: in a line, how its labels come to lie on the image.
    """

    path: Path
    why: str

    def read(self, rect: Rect) -> Pixels:
        """Labels of `rect` (px of the image), uint8 [h, w]; 255 where there is no target, and
        outside of the image."""

    def __enter__(self) -> LabelSource: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_labels(
    path: str | Path,
    height: int,
    width: int,
    *,
    downsample: float = 1.0,
    transform: tuple[float, ...] | None = None,
    crs: str | None = None,
    classes: Mapping[str, int] | None = None,
    background: int | None = None,
    coordinates: str = AUTO,
) -> LabelSource:
    """The labels at `path` of an image of height x width px, as it is stored.

    A raster has one band of uint8, in any format that a reader takes, and the image's size or
    another of the same extent. A file called .geojson or .json holds polygons, for which the
    other arguments are; `PolygonLabels` says what they mean.

    ValueError naming the file, what is wrong with it, and what is allowed.
    """
    path = Path(path)
    if path.suffix.lower() in POLYGONS:
        return PolygonLabels(
            path,
            height,
            width,
            downsample=downsample,
            transform=transform,
            crs=crs,
            classes=classes,
            background=background,
            coordinates=coordinates,
        )
    return RasterLabels(path, height, width)


def open_instances(path: str | Path, height: int, width: int) -> RasterInstances:
    """The instance numbers at `path`, of an image of height x width px as it is stored.

    A raster of one band of uint8 or uint16, coded without loss, of the image's size or another of
    the same extent. ValueError as `open_labels` has it.
    """
    return RasterInstances(Path(path), height, width)


class _OnImage:
    """A raster of one band, on the grid of an image that it has the extent of."""

    def __init__(
        self, path: Path, height: int, width: int, *, kind: str, dtypes: tuple[str, ...], fill: int
    ) -> None:
        """kind: what it holds, for errors. fill: where the raster has nothing."""
        self.path = path
        self._height, self._width, self._fill = height, width, fill
        self._raster = open_raster(path)
        try:
            self._check(kind, dtypes)
        except ValueError:
            self._raster.close()
            raise
        size = (self._raster.height, self._raster.width)
        self.why = (
            "a raster of the image's size"
            if size == (height, width)
            else f"a raster of {size[0]} x {size[1]} px on the image's {height} x {width}, by the "
            "nearest pixel"
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._raster.__exit__(kind, error, trace)

    def _check(self, kind: str, dtypes: tuple[str, ...]) -> None:
        raster, path = self._raster, self.path
        if raster.dtype not in dtypes:
            raise ValueError(
                f"{path}: its pixels are {raster.dtype}, allowed is {' or '.join(dtypes)} for "
                f"{kind}"
            )
        if raster.bands != 1:
            raise ValueError(f"{path}: has {raster.bands} bands, allowed for {kind} is 1")
        if not same_extent((raster.height, raster.width), (self._height, self._width)):
            raise ValueError(
                f"{path}: is {raster.height} x {raster.width} px, allowed for {kind} is the size "
                f"of the image, {self._height} x {self._width}, or another of the same shape: "
                "each side may be one px of the coarser of them off"
            )

    def _read(self, rect: Rect) -> Raster:
        """Of `rect`, [h, w], tile by tile of the raster: of those alone that it takes a pixel of.

        So a raster that is much finer than the image needs no more memory than another.
        """
        raster = self._raster
        found = np.full((rect.height, rect.width), self._fill, raster.kind.numpy)
        inside = rect.intersect(Rect(0, self._height, 0, self._width))
        if inside.empty:
            return found
        rows = _nearest(inside.top, inside.bottom, raster.height, self._height)
        cols = _nearest(inside.left, inside.right, raster.width, self._width)
        needed = Rect(int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1)
        for row, col, part in tiles_of(needed, raster.height, raster.width, raster.tile):
            first, last = np.searchsorted(rows, (part.top, part.bottom))
            left, right = np.searchsorted(cols, (part.left, part.right))
            if first == last or left == right:
                continue  # a raster so fine that no centre lies in this tile
            tile = raster.tile_at(row, col)
            if tile is None:
                continue
            at = np.ix_(rows[first:last] - row * raster.tile, cols[left:right] - col * raster.tile)
            got = tile.pixels[..., 0][at]
            if tile.present is not None:
                got = np.where(tile.present[at], got, got.dtype.type(self._fill))
            here = Rect(int(first), int(last), int(left), int(right))
            here = here.shifted(inside.top, inside.left)
            found[here.slices(rect)] = got
        return found


class RasterLabels(_OnImage):
    """Labels from a raster of one uint8 band. What a sparse or masked one leaves out is 255."""

    def __init__(self, path: Path, height: int, width: int) -> None:
        super().__init__(path, height, width, kind="labels", dtypes=("uint8",), fill=UNLABELLED)

    def read(self, rect: Rect) -> Pixels:
        return self._read(rect)

    def __enter__(self) -> RasterLabels:
        return self


class RasterInstances(_OnImage):
    """Instance numbers from a raster of one uint8 or uint16 band; 0 where there is none."""

    def __init__(self, path: Path, height: int, width: int) -> None:
        dtypes = ("uint8", "uint16")
        super().__init__(path, height, width, kind="instances", dtypes=dtypes, fill=0)

    def read(self, rect: Rect) -> Instances:
        """Numbers of `rect` (px of the image), uint16 [h, w]; 0 outside of the image."""
        return self._read(rect).astype(np.uint16)

    def __enter__(self) -> RasterInstances:
        return self

    def _check(self, kind: str, dtypes: tuple[str, ...]) -> None:
        super()._check(kind, dtypes)
        if self._raster.jpeg or _is_jpeg(self._raster):
            raise ValueError(
                f"{self.path}: its compression is JPEG, allowed for instances is one without loss"
            )


def same_extent(raster: tuple[int, int], image: tuple[int, int]) -> bool:
    """Whether sizes (height, width) may be of one extent.

    There is a scale at which each side of the coarser is that of the finer to one px of the
    coarser, as rounding up or down leaves it.
    """
    (height, width), (h, w) = sorted((raster, image), reverse=True)
    return (h - 1) * width <= (w + 1) * height and (w - 1) * height <= (h + 1) * width


def _nearest(start: int, stop: int, source: int, target: int) -> NDArray[np.int64]:
    """Along one side, the pixel of `source` in which the centre of each of start..stop lies.

    floor((i + 0.5) * source / target), in whole numbers of at most 42 bits.
    """
    return (2 * np.arange(start, stop, dtype=np.int64) + 1) * source // (2 * target)


def _is_jpeg(raster: Reader) -> bool:
    """Whether the file as a whole is a JPEG, whose pixels no reader gives as tiles of one."""
    if not raster.path.is_file():
        return False
    with raster.path.open("rb") as file:
        return file.read(len(_JPEG)) == _JPEG
