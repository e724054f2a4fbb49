from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tifffile

from axialtrain.data.readers import open_image
from axialtrain.data.readers.resampled import Averaged, choose_level, resampled
from axialtrain.grid import Rect

CENTIMETRE = {"resolutionunit": "CENTIMETER", "metadata": None, "tile": (16, 16)}


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.normal(0, 100, shape).astype(np.float32)
    return rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def write(path: Path, *levels: np.ndarray, mpp: float = 0.5, **options: object) -> Path:
    """A pyramid, whose level 0 has `mpp` micrometres per px."""
    kinds = CENTIMETRE | {"photometric": "minisblack"} | options
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(levels[0], subifds=len(levels) - 1, resolution=(1e4 / mpp, 1e4 / mpp), **kinds)
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, **kinds)
    return path


def whole(image: object) -> Rect:
    return Rect(0, image.height, 0, image.width)  # type: ignore[attr-defined]


def averaged(pixels: np.ndarray, step: Fraction) -> np.ndarray:
    """[h, w], pixel by pixel in exact fractions; rounded half up where they are integers."""
    sides = [max(1, math.floor(n / step + Fraction(1, 2))) for n in pixels.shape]
    found = np.zeros(sides, pixels.dtype)
    for at in np.ndindex(*sides):
        cells = []
        for i, length in zip(at, pixels.shape, strict=True):
            low, high = i * step, min((i + 1) * step, Fraction(length))
            cells.append(
                [
                    (j, min(high, j + 1) - max(low, j))
                    for j in range(math.floor(low), math.ceil(high))
                ]
            )
        total = sum(
            (a * b * Fraction(pixels[j, k].item()) for j, a in cells[0] for k, b in cells[1]),
            Fraction(0),
        )
        mean = total / (sum(a for _, a in cells[0]) * sum(b for _, b in cells[1]))
        found[at] = float(mean) if pixels.dtype == np.float32 else math.floor(mean + Fraction(1, 2))
    return found


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("factor", [2, 3, 16])
def test_whole_factors_are_means_of_squares(tmp_path: Path, dtype: str, factor: int) -> None:
    pixels = noise(96, 144, 2, dtype=dtype)
    path = write(tmp_path / "a.tif", pixels, planarconfig="contig")
    squares = pixels.reshape(96 // factor, factor, 144 // factor, factor, 2)
    means = squares.astype(np.float64).mean(axis=(1, 3))
    expected = means.astype(dtype) if dtype == "float32" else np.floor(means + 0.5).astype(dtype)
    with resampled(path, "auto", 0.5 * factor) as image:
        assert (image.height, image.width, image.tile) == (96 // factor, 144 // factor, 256)
        assert (image.kind.bands, image.dtype, image.jpeg) == (2, dtype, False)
        np.testing.assert_array_equal(image.read(whole(image)), expected)


@pytest.mark.parametrize(
    ("size", "step"),
    [
        ((50, 41), Fraction(5, 4)),
        ((50, 41), Fraction(7, 3)),
        ((33, 47), Fraction(51, 50)),
        ((29, 31), Fraction(13, 2)),
        ((20, 3), Fraction(10)),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_other_factors_weigh_by_area(
    tmp_path: Path, size: tuple[int, int], step: Fraction, dtype: str
) -> None:
    pixels = noise(*size, dtype=dtype)
    path = write(tmp_path / "a.tif", pixels)
    expected = averaged(pixels, step)
    for tile in (16, 48):
        with open_image(path) as image:
            source = Averaged(image, float(step), tile)
            assert (source.info.height, source.info.width) == expected.shape
            rows, cols = (-(-n // tile) for n in expected.shape)
            got = np.zeros((rows * tile, cols * tile), dtype)
            for row, col in np.ndindex(rows, cols):
                found = source.tile(row, col)
                assert found is not None
                assert found.present is None
                at = Rect(row, row + 1, col, col + 1).scaled(tile)
                got[at.top : at.bottom, at.left : at.right] = found.pixels[..., 0]
        got = got[: expected.shape[0], : expected.shape[1]]
        if dtype == "float32":
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-4)
        else:
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("mpp", [0.73, 1.17, 4.9])
def test_tiles_have_no_seams(tmp_path: Path, mpp: float) -> None:
    """Factors that are no small fractions, tiles of sources and results that do not divide."""
    path = write(tmp_path / "a.tif", noise(301, 257, 3), photometric="rgb")
    with resampled(path, "auto", mpp, tile=512) as image:
        once = image.read(whole(image))
        assert image.downsample == pytest.approx(mpp / 0.5, rel=1e-6)
    for tile in (16, 64):
        with resampled(path, "auto", mpp, tile=tile) as image:
            np.testing.assert_array_equal(image.read(whole(image)), once)


def test_missing_pixels_leave_the_mean(tmp_path: Path) -> None:
    pixels = noise(32, 48, dtype="float32")
    pixels[:8, :8] = np.nan  # whole squares of 4 x 4
    pixels[8:10, :4] = np.nan  # half of one
    pixels[8:10, 4:8], pixels[10, 4] = np.inf, np.nan  # more than half of one
    pixels[16:, 16:] = np.nan  # a tile of the result
    path = write(tmp_path / "a.tif", pixels)
    with resampled(path, "auto", 2.0, tile=16) as image:
        assert image.info.masked
        assert (image.height, image.width) == (8, 12)
        tile = image.tile_at(0, 0)
        assert tile is not None
        assert tile.present is not None
        expected = np.zeros((16, 16), np.bool_)
        expected[:8, :12] = True
        expected[:2, :2] = expected[4:, 4:] = expected[2, 1] = False
        np.testing.assert_array_equal(tile.present, expected)
        assert tile.pixels[2, 0, 0] == pytest.approx(pixels[10:12, :4].mean(dtype=np.float64))
        assert not tile.pixels[~expected].any()


def test_tile_without_a_pixel_is_absent(tmp_path: Path) -> None:
    pixels = np.full((64, 128), np.nan, np.float32)
    pixels[:, 64:] = 1
    with resampled(write(tmp_path / "a.tif", pixels), "auto", 1.0, tile=32) as image:
        assert image.tile_at(0, 0) is None
        tile = image.tile_at(0, 1)
        assert tile is not None
        assert tile.present is None
        assert (tile.pixels == 1).all()


def test_border_of_a_whole_image_is_present(tmp_path: Path) -> None:
    for size in ((35, 35), (34, 37)):
        path = write(tmp_path / "a.tif", np.full(size, 7, np.uint16))
        with resampled(path, "auto", 5.0, tile=16) as image:
            tile = image.tile_at(0, 0)
            assert tile is not None
            assert tile.present is None
            assert (image.read(whole(image)) == 7).all()


def test_the_coarsest_level_that_is_fine_enough(tmp_path: Path) -> None:
    """Levels of 0.25, 0.5 and 1.0 um/px."""
    levels = [noise(200 // n, 120 // n, 3) for n in (1, 2, 4)]
    path = write(tmp_path / "a.tif", *levels, mpp=0.25, photometric="rgb")
    for mpp, expected in [
        (0.25, (0, 1.0)),
        (0.246, (0, 1.0)),
        (0.3, (0, 1.2)),
        (0.495, (1, 1.0)),
        (0.509, (1, 1.0)),
        (0.6, (1, 1.2)),
        (1.0, (2, 1.0)),
        (8.0, (2, 8.0)),
    ]:
        level, factor = choose_level(path, "auto", mpp)
        assert (level, factor) == (expected[0], pytest.approx(expected[1]))
    assert choose_level(path, "auto", 2.0, own_mpp=1.0) == (1, 1.0)
    with resampled(path, "auto", 1.5) as image:
        expected_info = (1.5, 6.0, 3)
        assert (image.mpp, image.downsample, image.levels) == expected_info
        assert image.why == "a TIFF; level 2, averaged to 1.5 um/px, 1.5 times smaller"


def test_near_level_is_taken_as_it_is(tmp_path: Path) -> None:
    levels = [noise(128, 128, 3, seed=1), noise(64, 64, 3, seed=2)]
    path = write(tmp_path / "a.tif", *levels, photometric="rgb", compression="jpeg")
    with resampled(path, "auto", 1.01) as image, open_image(path, 1) as level:
        assert (image.jpeg, image.tile, image.mpp, image.downsample) == (True, 16, 1.0, 2.0)
        assert image.tile_bytes(1, 2) == level.tile_bytes(1, 2)
        np.testing.assert_array_equal(image.read(whole(image)), level.read(whole(level)))
    with resampled(path, "auto", 8.0, own_mpp=4.0) as image:
        assert (image.jpeg, image.mpp) == (True, 8.0)


def test_transform_is_that_of_the_result(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "a.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=60,
        width=80,
        count=1,
        dtype="uint8",
        crs="EPSG:32618",
        transform=rasterio.Affine(10, 0, 500000, 0, -10, 4000000),
    ) as file:
        file.write(noise(1, 60, 80))
    with resampled(path, "auto", 25.0, own_mpp=10.0) as image:
        assert image.info.crs == "EPSG:32618"
        assert image.info.transform == (25.0, 0.0, 500000.0, 0.0, -25.0, 4000000.0)
        assert (image.height, image.width) == (24, 32)


def test_slide_is_made_coarser(sample: Callable[[str], Path]) -> None:
    path = sample("CMU-1-Small-Region.svs")
    with resampled(path, "auto", 1.0) as image, open_image(path) as own:
        assert (image.height, image.width) == (1481, 1108)
        got = image.read(Rect(700, 740, 500, 560)).astype(int)
        near = own.read(Rect(1403, 1483, 1002, 1122)).reshape(40, 2, 60, 2, 3).mean((1, 3))
        assert np.abs(got - near).mean() < 12


@pytest.mark.parametrize(
    ("mpp", "options", "message"),
    [
        (0.48, {}, "a.tif: mpp is 0.48, allowed is the image's own, 0.5, or more: images are not"),
        (0.0, {}, "mpp is 0.0, allowed is 0.001 to 1000000"),
        (float("nan"), {}, "mpp is nan, allowed"),
        (1.0, {"own_mpp": -1.0}, "own_mpp is -1.0, allowed"),
        (1.0, {"own_mpp": 2.0}, "mpp is 1, allowed is the image's own, 2, or more"),
        (1.0, {"tile": 8}, "a.tif: tile is 8, allowed is 16 to"),
    ],
)
def test_what_cannot_be_done_is_named(
    tmp_path: Path, mpp: float, options: dict[str, float], message: str
) -> None:
    path = write(tmp_path / "a.tif", noise(32, 32))
    with pytest.raises(ValueError, match=re.escape(message)):
        resampled(path, "auto", mpp, **options)  # type: ignore[arg-type]


def test_image_of_unknown_resolution_is_refused_unless_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(32, 32), tile=(16, 16))
    with pytest.raises(ValueError, match=r"a\.tif: does not say how many micrometres .* is given"):
        choose_level(path, "auto", 1.0)
    assert choose_level(path, "auto", 1.0, own_mpp=0.5) == (0, 2.0)
