"""Polygons with classes from GeoJSON, as QuPath, QGIS and GDAL write it.

A file may come from a stranger: it is bounded before it is parsed, and every field is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import Record, parsed, shown
from axialtrain.data.store import UNLABELLED

MAX_BYTES = 1 << 28  # of a file
# Brackets and commas in a file: what its numbers, lists and objects take as Python's, some 140
# bytes for each, is bounded before it is parsed. A vertex has three.
MAX_MARKS = 1 << 24
MAX_VERTICES = 1 << 22
MAX_POLYGONS = 1 << 20
MAX_NUMBER = 1e300  # of which sums are still finite
_MAX_NAMES = 400  # characters of the names of classes that an error message lists
_EPSG = re.compile(
    r"(?:EPSG:|urn:ogc:def:crs:EPSG:[0-9.]{0,8}:|https?://www\.opengis\.net/def/crs/EPSG/[0-9.]+/)"
    r"([0-9]{4,6})",
    re.IGNORECASE,
)
_CRS84 = re.compile(r"(?:urn:ogc:def:crs:)?OGC:(?:1\.3)?:?CRS84", re.IGNORECASE)
_LON_LAT = "EPSG:4326"  # which is CRS84 where x comes first, as in GeoJSON it does

Ring = NDArray[np.float64]  # [vertices, 2] of (x, y); the last is not the first again


def read_document(path: Path) -> Record:
    """The file as a FeatureCollection, which a feature alone or a list of them is made into.

    ValueError naming it if it is none, or larger than what is allowed.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: is over {MAX_BYTES} bytes, allowed for polygons is up to that")
    marks = sum(data.count(mark) for mark in (b"[", b"{", b","))
    if marks > MAX_MARKS:
        raise ValueError(
            f"{path}: has {marks} brackets and commas, allowed is up to {MAX_MARKS}: simplify its "
            "polygons, or burn them into a raster (`gdal_rasterize`)"
        )
    value = parsed(data, str(path))
    if isinstance(value, list):
        return Record(str(path), {"type": "FeatureCollection", "features": value})
    record = Record.of(value, str(path))
    if record.values.get("type") == "Feature":
        return Record(str(path), {**record.values, "features": [value]})
    if record.values.get("type") != "FeatureCollection":
        raise record.wrong("type", "FeatureCollection or Feature, or a list of features")
    return record


def named_crs(document: Record) -> str | None:
    """The CRS that the file says it is in, as EPSG:... where it is one of those."""
    crs = document.values.get("crs")
    if crs is None:
        return None
    if isinstance(crs, dict):
        properties = crs.get("properties")
        crs = properties.get("name") if isinstance(properties, dict) else None
    if not isinstance(crs, str):
        raise document.wrong("crs", "one with a name, e.g. urn:ogc:def:crs:EPSG::32618")
    if _CRS84.fullmatch(crs):
        return _LON_LAT
    code = _EPSG.fullmatch(crs)
    return crs if code is None else f"EPSG:{int(code[1])}"


def polygons_of(
    document: Record, classes: Mapping[str, int] | None
) -> Iterator[tuple[list[Ring], int]]:
    """(rings, class) of each polygon in the order of the file, the outer ring first, then holes.

    Each part of a MultiPolygon comes by itself; features without a polygon are passed over.
    classes: name -> number. ValueError naming the feature and what is wrong with it.
    """
    polygons = vertices = 0
    for feature in document.records("features", MAX_POLYGONS):
        if feature.values.get("type") != "Feature":
            raise feature.wrong("type", "Feature")
        parts = _parts(feature)
        if not parts:
            continue
        value = _class_of(feature, classes)
        for part in parts:
            rings = [_ring(feature, ring) for ring in part]
            polygons += 1
            vertices += sum(map(len, rings))
            if vertices > MAX_VERTICES or polygons > MAX_POLYGONS:
                raise ValueError(
                    f"{document.where}: has more than {MAX_VERTICES} vertices or {MAX_POLYGONS} "
                    "polygons, which is all that is allowed"
                )
            yield rings, value


def _parts(feature: Record) -> list[list[object]]:
    """The polygons of a feature, as lists of rings; none where its geometry is empty."""
    if feature.values.get("geometry") is None:
        return []
    geometry = Record.of(feature.values["geometry"], f"{feature.where}: geometry")
    kind = geometry.values.get("type")
    key = "geometries" if kind == "GeometryCollection" else "coordinates"
    items = geometry.items(key, MAX_VERTICES)
    if not items:
        return []
    if kind not in ("Polygon", "MultiPolygon"):
        raise geometry.wrong("type", "Polygon or MultiPolygon")
    parts: list[list[object]] = []
    for part in [items] if kind == "Polygon" else items:
        if not isinstance(part, list):
            raise geometry.wrong("coordinates", "a list of polygons, each a list of rings")
        if part:
            parts.append(part)
    return parts


def _ring(feature: Record, positions: object) -> Ring:
    """The vertices of a ring, the last of which is not the first again."""
    where = f"{feature.where}: geometry"
    if not isinstance(positions, list) or len(positions) < 3:
        raise ValueError(
            f"{where}: has the ring {shown(positions)}, allowed is a list of 4 or more positions"
        )
    try:
        found = np.array(positions)
    except ValueError:  # of several lengths
        found = np.array(None)
    if found.ndim != 2 or found.dtype not in (np.float64, np.int64) or found.shape[1] < 2:
        _check_positions(where, positions)
        found = np.array([position[:2] for position in positions])
    ring = found[:, :2].astype(np.float64)
    if not np.abs(ring).max() < MAX_NUMBER:  # true for NaN, too
        _check_positions(where, positions)
    return ring[:-1] if (ring[0] == ring[-1]).all() else ring


def _check_positions(where: str, positions: list[object]) -> None:
    """ValueError naming the first that is none."""
    for position in positions:
        numbers = position[:2] if isinstance(position, list) else []
        if len(numbers) < 2 or not all(
            isinstance(n, (int, float)) and not isinstance(n, bool) and abs(n) < MAX_NUMBER
            for n in numbers
        ):
            raise ValueError(
                f"{where}: has the position {shown(position)}, allowed is a list [x, y] of finite "
                "numbers"
            )


def _class_of(feature: Record, classes: Mapping[str, int] | None) -> int:
    properties = feature.values.get("properties")
    record = Record.of({} if properties is None else properties, f"{feature.where}: properties")
    found, key = record.values.get("class"), "class"
    classification = record.values.get("classification")
    if found is None and isinstance(classification, dict):
        found, key = classification.get("name"), "classification.name"
    if found is None:
        found, key = record.values.get("name"), "name"
    if isinstance(found, int) and key == "class":
        if is_class(found):
            return found
        raise record.wrong("class", f"an integer from 0 to {UNLABELLED}")
    if not isinstance(found, str):
        raise ValueError(
            f"{record.where}: have no class, allowed is a class (a number or a name), a "
            "classification with a name, or a name"
        )
    if classes is None or found not in classes:
        names = ", ".join(sorted(map(shown, classes or ())))[:_MAX_NAMES]
        allowed = names or "none, since no classes (name -> number) are given"
        raise ValueError(f"{record.where}: {key} is {shown(found)}, allowed is {allowed}")
    return int(classes[found])


def is_class(value: object) -> bool:
    """Whether it is the number of a class, or 255 for no target."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        return False
    return 0 <= int(value) <= UNLABELLED
