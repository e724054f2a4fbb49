"""Labels from polygons in a GeoJSON file.

They become px of the stored level once, when the file is opened. They are burned square by square
of the whole image's grid, each square always as a whole, so that a pixel is the same in whatever
rectangle it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import Record, shown
from axialtrain.data.codec import Pixels
from axialtrain.data.geojson import (
    MAX_NUMBER,
    Ring,
    is_class,
    named_crs,
    polygons_of,
    read_document,
)
from axialtrain.data.readers import tiles_of
from axialtrain.data.store import MAX_SIDE, UNLABELLED
from axialtrain.grid import Rect

AUTO, PX, CRS = COORDINATES = ("auto", "px", "crs")
_SQUARE = 512  # px, of what is burned as a whole
_FAR = float(MAX_SIDE)  # px beside the image, behind which polygons are cut off

ToPixels = Callable[[Ring], Ring]


@dataclass(frozen=True)
class Polygon:
    """rings: the outer one, then its holes. value: the class."""

    rings: tuple[Ring, ...]
    value: int


@dataclass(frozen=True)
class _Polygons:
    """In the order of the file. boxes: float64 [polygons, 4], each (left, top, right, bottom)."""

    items: tuple[Polygon, ...]
    boxes: NDArray[np.float64]

    @staticmethod
    def of(items: Sequence[Polygon]) -> _Polygons:
        boxes = [(*item.rings[0].min(axis=0), *item.rings[0].max(axis=0)) for item in items]
        return _Polygons(tuple(items), np.array(boxes, np.float64).reshape(-1, 4))

    def meeting(self, rect: Rect) -> NDArray[np.intp]:
        """Indices of those whose boxes meet `rect`."""
        left, top, right, bottom = self.boxes.T
        across = (left < rect.right) & (right > rect.left)
        return np.flatnonzero(across & (top < rect.bottom) & (bottom > rect.top))

    def near(self, rect: Rect) -> _Polygons:
        """Those whose boxes meet `rect`, and of their vertices those that matter within it."""
        items, kept = [], []
        for index in self.meeting(rect):
            rings = [_without_detours(ring, rect) for ring in self.items[index].rings]
            if len(rings[0]) > 2:
                solid = tuple(ring for ring in rings if len(ring) > 2)
                items.append(Polygon(solid, self.items[index].value))
                kept.append(index)
        return _Polygons(tuple(items), self.boxes[kept])


class PolygonLabels:
    """Labels that are the class of the last polygon in the file that a pixel's centre lies in.

    path: of the file. why: in a line, how its polygons come to lie on the image.
    """

    def __init__(
        self,
        path: Path,
        height: int,
        width: int,
        *,
        downsample: float = 1.0,
        transform: tuple[float, ...] | None = None,
        crs: str | None = None,
        classes: Mapping[str, int] | None = None,
        background: int | None = None,
        coordinates: str = AUTO,
    ) -> None:
        """height, width: of the image as it is stored, px.

        downsample: px of level 0 per px as stored. transform, crs: the image's, as stored.
        classes: name -> class, of features that name theirs. background: the label of pixels in no
        polygon, 255 (no target) where it is None. coordinates: "px" are those of level 0, x to the
        right and y down; "crs" are those of the image's CRS; "auto" is "crs" where the file says
        in which CRS it is, or else "px".

        A feature's class is its `properties.class`, an integer or a name, or the name
        `properties.classification.name`, or the name `properties.name`: the first that it has.
        Classes are 0 to 254, and 255 for no target.

        ValueError naming the file and what is wrong, or what is missing to read it (rasterio).
        """
        _check_arguments(downsample, classes, background, coordinates)
        self.path = path
        self._height, self._width = height, width
        self._fill = UNLABELLED if background is None else background
        try:
            from axialtrain.data.readers.geo import burned
        except ImportError as error:
            raise ValueError(
                f"{path}: polygons need rasterio, which is not installed here ({error}): "
                "install the extra geo (launch/install.sh geo)"
            ) from error
        self._burned = burned
        document = read_document(path)
        frame, to_pixels = _frame(document, downsample, transform, crs, coordinates)
        self._polygons = _Polygons.of(_polygons(document, to_pixels, classes))
        count = len(self._polygons.items)
        if count and not self._polygons.meeting(Rect(0, height, 0, width)).size:
            left, top = self._polygons.boxes[:, :2].min(axis=0)
            right, bottom = self._polygons.boxes[:, 2:].max(axis=0)
            raise ValueError(
                f"{path}: none of its {count} polygons meets the image of {height} x {width} px: "
                f"read as {frame}, they lie at rows {top:.6g} to {bottom:.6g} and columns "
                f"{left:.6g} to {right:.6g}; allowed are coordinates of this image"
            )
        self.why = f"{count} polygons, in {frame}"

    def read(self, rect: Rect) -> Pixels:
        """Labels of `rect` (px of the image), uint8 [h, w]; 255 outside of the image."""
        found = np.full((rect.height, rect.width), UNLABELLED, np.uint8)
        squares = list(tiles_of(rect, self._height, self._width, _SQUARE))
        if not squares:
            return found
        (top, left, _), (bottom, right, _) = squares[0], squares[-1]
        around = self._polygons.near(Rect(top, bottom + 1, left, right + 1).scaled(_SQUARE))
        for row, col, part in squares:
            square = Rect(row, row + 1, col, col + 1).scaled(_SQUARE)
            origin = np.array([square.left, square.top], np.float64)
            polygons = [
                ([ring - origin for ring in polygon.rings], polygon.value)
                for polygon in around.near(square).items
            ]
            labels = self._burned(polygons, (_SQUARE, _SQUARE), self._fill)
            found[part.slices(rect)] = labels[part.slices(square)]
        return found

    def __enter__(self) -> PolygonLabels:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing: all that is read is in memory."""


def _check_arguments(
    downsample: float, classes: Mapping[str, int] | None, background: int | None, coordinates: str
) -> None:
    if not 1 <= downsample <= MAX_SIDE:
        raise ValueError(f"downsample is {downsample}, allowed is 1 to {MAX_SIDE}")
    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates is {coordinates!r}, allowed is {', '.join(COORDINATES)}")
    values = {f"classes[{shown(name)}]": value for name, value in (classes or {}).items()}
    for key, value in (values | ({} if background is None else {"background": background})).items():
        if not is_class(value):
            raise ValueError(
                f"{key} is {shown(value)}, allowed is an integer from 0 to {UNLABELLED}"
            )


def _frame(
    document: Record,
    downsample: float,
    transform: tuple[float, ...] | None,
    crs: str | None,
    coordinates: str,
) -> tuple[str, ToPixels]:
    """(what the file's coordinates are, in words; what makes px of the stored level of them)."""
    named = named_crs(document) if coordinates != PX else None
    if coordinates == PX or (coordinates == AUTO and named is None):
        return "px of level 0", lambda ring: ring / downsample
    path = document.where
    if crs is None or transform is None:
        raise ValueError(
            f"{path}: its coordinates are of {shown(named) if named else 'a CRS'}, and the image "
            'has none: allowed are coordinates in px of level 0 (coordinates="px")'
        )
    if named is not None and named.upper() != crs.upper():
        raise ValueError(
            f"{path}: its CRS is {shown(named)}, allowed is the image's, {shown(crs)}: reproject "
            "it, e.g. `ogr2ogr -t_srs`"
        )
    a, b, c, d, e, f = transform
    try:
        inverse = np.linalg.inv(np.array([[a, b], [d, e]]))
    except np.linalg.LinAlgError as error:
        raise ValueError(f"{path}: the image's transform {transform} cannot be inverted") from error
    return f"the image's CRS, {shown(crs)}", lambda ring: (ring - (c, f)) @ inverse.T


def _polygons(
    document: Record, to_pixels: ToPixels, classes: Mapping[str, int] | None
) -> list[Polygon]:
    """Those of the file, in px, cut off where they are far away from any image."""
    polygons = []
    for rings, value in polygons_of(document, classes):
        with np.errstate(all="ignore"):
            there = [to_pixels(ring) for ring in rings]
        if not all(np.abs(ring).max() < MAX_NUMBER for ring in there):
            raise ValueError(f"{document.where}: has positions that are beyond all numbers in px")
        near = [_cut(ring) for ring in there]
        if not len(near[0]):
            near = there  # of which no image has a pixel
        polygons.append(Polygon(tuple(ring for ring in near if len(ring)), value))
    return polygons


def _cut(ring: Ring) -> Ring:
    """What of `ring` is within _FAR px of any image: what GDAL's integers can hold.

    Sutherland and Hodgman's, not a clamp, which would turn edges: where one is cut, new ones follow
    the border, beside which no pixel is.
    """
    if np.abs(ring).max() <= _FAR:
        return ring
    for axis, limit, sign in ((0, -_FAR, -1), (0, 2 * _FAR, 1), (1, -_FAR, -1), (1, 2 * _FAR, 1)):
        inside = sign * (ring[:, axis] - limit) <= 0
        if inside.all():
            continue
        following = np.roll(ring, -1, axis=0)
        crosses = inside != np.roll(inside, -1)
        span = np.where(crosses, following[:, axis] - ring[:, axis], 1.0)
        share = (limit - ring[:, axis]) / span
        points = ring + np.where(crosses, share, 0.0)[:, None] * (following - ring)
        points[:, axis] = limit
        ring = np.stack([ring, points], axis=1)[np.stack([inside, crosses], axis=1)]
    return ring


def _without_detours(ring: Ring, rect: Rect) -> Ring:
    """`ring` less the vertices that cannot matter within `rect`.

    Of a run of vertices on the far side of one border, the first and last are enough: which
    pixels are inside does not change. GDAL looks at every vertex for every line of pixels.
    """
    for axis, sign, border in (
        (0, -1, rect.left),
        (0, 1, rect.right),
        (1, -1, rect.top),
        (1, 1, rect.bottom),
    ):
        out = sign * ring[:, axis] > sign * border
        if out.any():
            ring = ring[~(out & np.roll(out, 1) & np.roll(out, -1))]
    return ring
