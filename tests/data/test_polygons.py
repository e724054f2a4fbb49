from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from axialtrain.data import geojson, polygons
from axialtrain.data.rasters import open_labels
from axialtrain.grid import Rect

pytest.importorskip("rasterio")
SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30], [10, 10]]
HOLE = [[15, 15], [20, 15], [20, 20], [15, 20], [15, 15]]
MERCATOR = (2.0, 0.0, 1000.0, 0.0, -2.0, 5000.0)


def feature(rings: Any, properties: Any, kind: str = "Polygon") -> dict[str, Any]:
    geometry = {"type": kind, "coordinates": rings}
    return {"type": "Feature", "properties": properties, "geometry": geometry}


def write(folder: Path, *features: Any, **top: Any) -> Path:
    path = folder / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **top}))
    return path


def read(path: Path, height: int = 40, width: int = 50, **options: Any) -> np.ndarray:
    with open_labels(path, height, width, **options) as labels:
        return labels.read(Rect(0, height, 0, width))


def square(inside: int = 1, hole: int | None = None, around: int = 255) -> np.ndarray:
    expected = np.full((40, 50), around, np.uint8)
    expected[10:30, 10:30] = inside
    if hole is not None:
        expected[15:20, 15:20] = hole
    return expected


def star(rng: np.random.Generator, middle: tuple[float, float], radius: float) -> np.ndarray:
    """A ring that does not cross itself."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(5, 30)))
    reach = radius * rng.uniform(0.3, 1, angles.size)
    ring = np.stack([middle[0] + reach * np.cos(angles), middle[1] + reach * np.sin(angles)], 1)
    return np.concatenate([ring, ring[:1]])


def test_holes_and_background(tmp_path: Path) -> None:
    path = write(tmp_path, feature([SQUARE, HOLE], {"class": 1}))
    np.testing.assert_array_equal(read(path), square(hole=255))
    np.testing.assert_array_equal(read(path, background=0), square(hole=0, around=0))
    with open_labels(path, 40, 50, background=0) as labels:
        assert labels.why == "1 polygons, in px of level 0"
        outside = labels.read(Rect(-5, 45, 45, 60))
    assert (outside[5:45, :5] == 0).all()
    assert (outside[:5] == 255).all()
    assert (outside[:, 5:] == 255).all()


def test_later_features_lie_over_earlier_ones(tmp_path: Path) -> None:
    over = [feature([SQUARE], {"class": 1}), feature([HOLE], {"class": 2})]
    np.testing.assert_array_equal(read(write(tmp_path, *over)), square(hole=2))
    np.testing.assert_array_equal(read(write(tmp_path, *over[::-1])), square())


def test_parts_that_overlap_are_one(tmp_path: Path) -> None:
    path = write(tmp_path, feature([[SQUARE], [HOLE]], {"class": 1}, "MultiPolygon"))
    np.testing.assert_array_equal(read(path), square())


@pytest.mark.parametrize(
    ("properties", "value"),
    [
        ({"class": 7}, 7),
        ({"class": 255}, 255),
        ({"class": "stroma"}, 4),
        ({"classification": {"name": "tumour", "color": [1, 2, 3]}, "name": "stroma"}, 3),
        ({"name": "stroma"}, 4),
        ({"class": None, "classification": None, "name": "tumour"}, 3),
    ],
)
def test_class_of_a_feature(tmp_path: Path, properties: dict[str, Any], value: int) -> None:
    path = write(tmp_path, feature([SQUARE], properties))
    got = read(path, classes={"tumour": 3, "stroma": 4})
    np.testing.assert_array_equal(got, square(value))


@pytest.mark.parametrize("form", ["feature", "list"])
def test_other_forms_of_a_file(tmp_path: Path, form: str) -> None:
    one = feature([SQUARE], {"class": 1})
    path = tmp_path / "a.json"
    path.write_text(json.dumps(one if form == "feature" else [one]))
    np.testing.assert_array_equal(read(path), square())


def test_empty_geometries_are_passed_over(tmp_path: Path) -> None:
    empty = [
        {"type": "Feature", "geometry": None},
        feature([], None),
        feature([], None, "Point"),
        feature([[], [SQUARE]], {"class": 1}, "MultiPolygon"),
        {"type": "Feature", "geometry": {"type": "GeometryCollection", "geometries": []}},
    ]
    np.testing.assert_array_equal(read(write(tmp_path, *empty)), square())
    assert (read(write(tmp_path)) == 255).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), downsample=st.sampled_from([1.0, 2.0, 3.7]))
def test_pixels_are_those_whose_centre_is_inside(
    tmp_path_factory: pytest.TempPathFactory, seed: int, downsample: float
) -> None:
    """Against matplotlib; centres within 1e-6 px of an outline may go either way."""
    rng = np.random.default_rng(seed)
    size = (60, 70)
    rings = [star(rng, tuple(rng.uniform(-10, 80, 2)), rng.uniform(5, 50)) for _ in range(5)]
    expected = np.full(size, 255, np.uint8)
    rows, cols = np.indices(size)
    centres = np.stack([cols.ravel(), rows.ravel()], 1) + 0.5
    sure = np.ones(size, np.bool_)
    for value, ring in enumerate(rings):
        counts = [
            Outline(ring + shift, closed=True).contains_points(centres).reshape(size)
            for shift in ((0, 0), (1e-6, 1e-6), (-1e-6, 1e-6), (1e-6, -1e-6), (-1e-6, -1e-6))
        ]
        sure &= np.logical_and.reduce(counts) | ~np.logical_or.reduce(counts)
        expected[counts[0]] = value
    path = write(
        tmp_path_factory.mktemp("stars"),
        feature([SQUARE], {"class": 9}),
        *(feature([(ring * downsample).tolist()], {"class": v}) for v, ring in enumerate(rings)),
    )
    got = read(path, *size, downsample=downsample)
    outline = np.array(SQUARE) / downsample
    base = Outline(outline, closed=True).contains_points(centres).reshape(size)
    expected[(expected == 255) & base] = 9
    near = np.zeros(size, np.bool_)
    for edge in set(outline.ravel()):
        near |= (np.abs(cols + 0.5 - edge) < 1e-6) | (np.abs(rows + 0.5 - edge) < 1e-6)
    sure &= ~near
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(got[sure], expected[sure])


def test_tiles_are_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares are small here, so that one has borders inside of the other's tiles."""
    rng = np.random.default_rng(5)
    shapes = [star(rng, tuple(rng.uniform(0, 130, 2)), rng.uniform(5, 130)) for _ in range(20)]
    shapes += [np.array(SQUARE) + 0.5]  # edges on the pixels' centres
    path = write(tmp_path, *(feature([s.tolist()], {"class": i}) for i, s in enumerate(shapes)))
    whole = read(path, 130, 120)
    monkeypatch.setattr(polygons, "_SQUARE", 64)
    with open_labels(path, 130, 120) as labels:
        for tile in (37, 100):
            for top, left in np.ndindex(-(-130 // tile), -(-120 // tile)):
                rect = Rect(top, top + 1, left, left + 1).scaled(tile)
                got = labels.read(rect)
                expected = whole[rect.top : rect.bottom, rect.left : rect.right]
                np.testing.assert_array_equal(
                    got[: expected.shape[0], : expected.shape[1]], expected
                )


def test_many_vertices_outside_of_a_square_change_nothing(tmp_path: Path) -> None:
    angles = np.linspace(0, 2 * np.pi, 5001)[:-1]
    reach = 300 + 40 * np.sin(40 * angles)
    ring = np.stack([350 + reach * np.cos(angles), 350 + reach * np.sin(angles)], 1)
    got = read(write(tmp_path, feature([ring.tolist()], {"class": 1})), 700, 700)
    rows, cols = np.indices((700, 700)) + 0.5 - 350
    distance, angle = np.hypot(rows, cols), np.arctan2(rows, cols)
    limit = 300 + 40 * np.sin(40 * angle)
    sure = np.abs(distance - limit) > 5
    np.testing.assert_array_equal((got == 1)[sure], (distance < limit)[sure])


def test_far_coordinates_are_cut_off_and_not_bent(tmp_path: Path) -> None:
    """A half plane below y = x / 2 + 10, by a triangle that reaches far beyond what ints hold."""
    far = 1e12
    ring = [[-far, 10 - far / 2], [far, 10 + far / 2], [-far, 1e14]]
    got = read(write(tmp_path, feature([ring], {"class": 1})))
    rows, cols = np.indices((40, 50)) + 0.5
    sure = np.abs(rows - cols / 2 - 10) > 0.3  # 1e12 has digits down to 1e-4
    np.testing.assert_array_equal((got == 1)[sure], (rows > cols / 2 + 10)[sure])


@pytest.mark.parametrize(
    ("top", "options"),
    [
        ({"crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::3857"}}}, {}),
        ({"crs": {"type": "name", "properties": {"name": "EPSG:3857"}}}, {"coordinates": "crs"}),
        ({}, {"coordinates": "crs"}),
    ],
)
def test_coordinates_of_the_images_crs(
    tmp_path: Path, top: dict[str, Any], options: dict[str, Any]
) -> None:
    ring = [[1000 + 2 * x, 5000 - 2 * y] for x, y in SQUARE]
    path = write(tmp_path, feature([ring], {"class": 1}), **top)
    where = {"transform": MERCATOR, "crs": "EPSG:3857"}
    got = read(path, downsample=4.0, **where, **options)
    np.testing.assert_array_equal(got, square())


def test_pixels_of_an_image_with_a_crs(tmp_path: Path) -> None:
    path = write(tmp_path, feature([SQUARE], {"class": 1}), crs=None)
    where = {"transform": MERCATOR, "crs": "EPSG:3857"}
    np.testing.assert_array_equal(read(path, **where), square())
    path = write(tmp_path, feature([SQUARE], {"class": 1}), crs="urn:ogc:def:crs:OGC:1.3:CRS84")
    np.testing.assert_array_equal(read(path, coordinates="px", **where), square())
    with pytest.raises(ValueError, match=r"its CRS is 'EPSG:4326', allowed is .*3857.*: reproject"):
        read(path, **where)
    with pytest.raises(ValueError, match=r"coordinates are of 'EPSG:4326', and the image has none"):
        read(path)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (
            feature([SQUARE], {"class": "x"}),
            r"features\[0\]: properties: class is 'x', allowed is 'a'",
        ),
        (feature([SQUARE], {"class": 256}), "class is 256, allowed is an integer from 0 to 255"),
        (feature([SQUARE], {"class": True}), "class is True, allowed"),
        (feature([SQUARE], None), "have no class, allowed is a class"),
        (feature([SQUARE], {"name": 3}), "have no class, allowed is a class"),
        (feature([SQUARE], [1]), "stands where an object"),
        (feature([1, 2], {}, "Point"), "type is 'Point', allowed is Polygon or MultiPolygon"),
        (feature([[[1, 2], [3, 4]]], {"class": 1}), "has the ring .*4 or more positions"),
        (
            feature([[*SQUARE[:3], [1]]], {"class": 1}),
            r"position \[1\], allowed is a list \[x, y\]",
        ),
        (feature([[*SQUARE[:3], ["1", "2"]]], {"class": 1}), "position .*of finite numbers"),
        (feature([[*SQUARE, [float("nan"), 1]]], {"class": 1}), r"position \[nan, 1\]"),
        (feature([[*SQUARE, [1, float("inf")]]], {"class": 1}), r"position \[1, inf\]"),
        (feature([[*SQUARE, [10**400, 1]]], {"class": 1}), "position .*of finite numbers"),
        (feature([SQUARE, 3], {"class": 1}), "has the ring 3"),
        (feature([3], {"class": 1}, "MultiPolygon"), "a list of polygons, each a list of rings"),
        (feature("abc", {"class": 1}), "coordinates is 'abc', allowed is a list"),
        ({"type": "Polygon", "coordinates": [SQUARE]}, "type is 'Polygon', allowed is Feature"),
        (5, "5 stands where an object"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, one: Any, message: str) -> None:
    path = write(tmp_path, one)
    with pytest.raises(ValueError, match=rf"a\.geojson: .*{message}"):
        read(path, classes={"a": 1})


def test_polygons_beside_the_image_are_refused(tmp_path: Path) -> None:
    for offset in (1000, 1e9):
        ring = (np.array(SQUARE) + offset).tolist()
        path = write(tmp_path, feature([ring], {"class": 1}))
        with pytest.raises(ValueError, match="none of its 1 polygons meets the image of 40 x 50"):
            read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 200000, "not JSON"),
        ('{"a":' * 200000, "not JSON"),
        ("3", "stands where an object"),
        ('{"type": "Topology"}', "type is 'Topology', allowed is FeatureCollection or Feature"),
        ('{"type": "FeatureCollection"}', "features is missing"),
    ],
)
def test_what_is_no_geojson_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.geojson: .*{message}"):
        read(path)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ("MAX_BYTES", "is over 20 bytes"),
        ("MAX_MARKS", "brackets and commas, allowed is up to 20"),
        ("MAX_VERTICES", "has more than 20 vertices"),
    ],
)
def test_large_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, message: str
) -> None:
    path = write(tmp_path, *[feature([SQUARE], {"class": 1})] * 6)
    monkeypatch.setattr(geojson, bound, 20)
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downsample": 0.5}, "downsample is 0.5, allowed is 1 to"),
        ({"downsample": float("nan")}, "downsample is nan"),
        ({"coordinates": "deg"}, "coordinates is 'deg', allowed is auto, px, crs"),
        ({"background": 256}, "background is 256, allowed is an integer from 0 to 255"),
        ({"classes": {"a": -1}}, r"classes\['a'\] is -1, allowed"),
        (
            {"coordinates": "crs", "crs": "EPSG:1234", "transform": (0.0,) * 6},
            "cannot be inverted",
        ),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, feature([SQUARE], {"class": 1})), **options)


def test_without_rasterio_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "axialtrain.data.readers.geo", raising=False)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(
        ValueError, match=r"polygons need rasterio, .*extra geo \(launch/install\.sh geo\)"
    ):
        read(write(tmp_path, feature([SQUARE], {"class": 1})))
