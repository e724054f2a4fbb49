from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from axialtrain.data.codec import encode_png
from axialtrain.data.rasters import open_instances, open_labels, same_extent
from axialtrain.data.readers import open_image, open_raster
from axialtrain.grid import Rect


def write(path: Path, raster: np.ndarray, **options: object) -> Path:
    tifffile.imwrite(path, raster, tile=(16, 16), **options)
    return path


def labels_of(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 9, size, np.uint8)


def nearest(raster: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixel by pixel, in exact fractions."""
    half = Fraction(1, 2)
    found = np.zeros((height, width), raster.dtype)
    for row, col in np.ndindex(height, width):
        found[row, col] = raster[
            math.floor((row + half) * raster.shape[0] / height),
            math.floor((col + half) * raster.shape[1] / width),
        ]
    return found


def test_raster_of_the_images_size_is_as_it_was(tmp_path: Path) -> None:
    raster = labels_of(70, 50)
    path = write(tmp_path / "a.tif", raster)
    with open_labels(path, 70, 50) as labels, open_raster(path) as reader:
        assert labels.path == path
        assert labels.why == "a raster of the image's size"
        for rect in (
            Rect(0, 70, 0, 50),
            Rect(-5, 33, 20, 90),
            Rect(9, 9, 0, 3),
            Rect(90, 99, 0, 9),
        ):
            got = labels.read(rect)
            assert got.dtype == np.uint8
            np.testing.assert_array_equal(got, reader.read(rect, fill=255)[..., 0])
        np.testing.assert_array_equal(labels.read(Rect(0, 70, 0, 50)), raster)


@pytest.mark.parametrize(
    ("raster_size", "size"),
    [((35, 25), (70, 50)), ((140, 100), (70, 50)), ((36, 25), (71, 50)), ((70, 50), (33, 24)),
     ((7, 5), (100, 71)), ((100, 70), (9, 6))],
)  # fmt: skip
def test_raster_of_another_resolution_is_the_nearest_pixel(
    tmp_path: Path, raster_size: tuple[int, int], size: tuple[int, int]
) -> None:
    raster = labels_of(*raster_size)
    with open_labels(write(tmp_path / "a.tif", raster), *size) as labels:
        assert "by the nearest pixel" in labels.why
        got = labels.read(Rect(0, size[0], 0, size[1]))
    np.testing.assert_array_equal(got, nearest(raster, *size))


@settings(max_examples=40, deadline=None)
@given(
    top=st.integers(-20, 110),
    left=st.integers(-20, 90),
    height=st.integers(0, 60),
    width=st.integers(0, 60),
)
def test_any_rectangle_is_that_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, top: int, left: int, height: int, width: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any_rectangle.tif"
    if not path.exists():
        write(path, labels_of(61, 46, seed=3))
    with open_labels(path, 100, 75) as labels:
        whole = np.full((200, 200), 255, np.uint8)
        whole[50:150, 50:125] = labels.read(Rect(0, 100, 0, 75))
        got = labels.read(Rect(top, top + height, left, left + width))
    expected = whole[50 + top : 50 + top + height, 50 + left : 50 + left + width]
    np.testing.assert_array_equal(got[: expected.shape[0], : expected.shape[1]], expected)
    assert (got[expected.shape[0] :] == 255).all()
    assert (got[:, expected.shape[1] :] == 255).all()


def test_only_tiles_that_are_needed_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.tif", labels_of(320, 320))
    seen = []
    with open_labels(path, 640, 640) as labels:
        raster = labels._raster  # type: ignore[attr-defined]
        tile_at = raster.tile_at
        monkeypatch.setattr(raster, "tile_at", lambda *at: seen.append(at) or tile_at(*at))
        labels.read(Rect(64, 96, 100, 132))
    assert sorted(seen) == [(2, 3), (2, 4)]


def test_what_a_sparse_raster_leaves_out_is_no_target(tmp_path: Path) -> None:
    tiles = iter([np.full((16, 16), 3, np.uint8), None])
    tifffile.imwrite(tmp_path / "a.tif", tiles, shape=(16, 32), dtype=np.uint8, tile=(16, 16))
    with open_labels(tmp_path / "a.tif", 32, 64) as labels:
        got = labels.read(Rect(0, 32, 0, 64))
    assert (got[:, :32] == 3).all()
    assert (got[:, 32:] == 255).all()


def test_instances_are_16_bits(tmp_path: Path) -> None:
    raster = np.random.default_rng(1).integers(0, 1 << 16, (35, 25), np.uint16)
    with open_instances(write(tmp_path / "a.tif", raster), 70, 50) as instances:
        got = instances.read(Rect(0, 70, 0, 60))
        assert got.dtype == np.uint16
        np.testing.assert_array_equal(got[:, :50], nearest(raster, 70, 50))
        assert not got[:, 50:].any()
    with open_instances(write(tmp_path / "b.tif", labels_of(35, 25)), 35, 25) as instances:
        assert instances.read(Rect(0, 9, 0, 9)).dtype == np.uint16


@pytest.mark.parametrize(
    ("raster", "image", "same"),
    [
        ((10, 20), (10, 20), True),
        ((101, 11), (10049, 1004), True),  # both rounded up
        ((100, 10), (10049, 1004), True),  # both rounded down
        ((100, 12), (10000, 1000), False),
        ((1000, 998), (2000, 2000), True),  # each side one px off
        ((1000, 997), (2000, 2000), False),
        ((20, 10), (10, 20), False),
    ],
)
def test_extents_may_differ_by_what_rounding_does(
    raster: tuple[int, int], image: tuple[int, int], same: bool
) -> None:
    assert same_extent(raster, image) is same
    assert same_extent(raster[::-1], image[::-1]) is same
    assert same_extent(image, raster) is same


@pytest.mark.parametrize(
    ("raster", "message"),
    [
        (labels_of(70, 40), "is 70 x 40 px, allowed for labels is the size of the image, 70 x 50"),
        (labels_of(70, 50).astype(np.uint16), "its pixels are uint16, allowed is uint8 for labels"),
        (np.zeros((70, 50, 3), np.uint8), "has 3 bands, allowed for labels is 1"),
    ],
)
def test_what_cannot_be_labels_is_named(tmp_path: Path, raster: np.ndarray, message: str) -> None:
    path = write(tmp_path / "a.tif", raster)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        open_labels(path, 70, 50)


@pytest.mark.parametrize("colours", [2, 4, 16, 200])  # stored in 1, 2, 4 and 8 bits
def test_a_png_of_a_palette_has_its_indices(tmp_path: Path, colours: int) -> None:
    path = tmp_path / "a.png"
    rng = np.random.default_rng(1)
    labels = rng.integers(0, colours, (70, 51), np.uint8)
    image = Image.fromarray(labels)
    image.putpalette(rng.integers(0, 256, 3 * colours, np.uint8).tobytes())
    image.save(path, transparency=0)
    with open_labels(path, 70, 51) as raster:
        np.testing.assert_array_equal(raster.read(Rect(0, 70, 0, 51)), labels)
    with open_instances(path, 140, 102) as numbers:
        twice = labels.repeat(2, 0).repeat(2, 1)
        np.testing.assert_array_equal(numbers.read(Rect(0, 140, 0, 102)), twice)
    with pytest.raises(ValueError, match="colour type 3, not 8-bit grey or RGB"):
        open_image(path)
    data = bytearray(path.read_bytes())
    for at, message in ((23, "checksum of its header"), (-30, "cannot be decoded")):
        data[at] ^= 1
        path.write_bytes(data)
        with open_raster(path) as raster, pytest.raises(ValueError, match=f"{path}.*({message})"):
            raster.read(Rect(0, 70, 0, 51))
        data[at] ^= 1


def test_instances_that_lost_something_are_refused(tmp_path: Path) -> None:
    raster = labels_of(64, 64)
    write(tmp_path / "a.tif", raster, compression="jpeg")
    (tmp_path / "b.jpg").write_bytes(imagecodecs.jpeg8_encode(raster, 90))
    (tmp_path / "c.png").write_bytes(encode_png(raster))
    for name in ("a.tif", "b.jpg"):
        with pytest.raises(ValueError, match="its compression is JPEG, allowed for instances is"):
            open_instances(tmp_path / name, 64, 64)
    with open_instances(tmp_path / "c.png", 64, 64) as instances:
        np.testing.assert_array_equal(instances.read(Rect(0, 64, 0, 64)), raster)
    with pytest.raises(ValueError, match="float32, allowed is uint8 or uint16 for instances"):
        open_instances(write(tmp_path / "d.tif", raster.astype(np.float32)), 64, 64)
