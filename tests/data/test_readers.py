from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image

from axialtrain.data.codec import (
    decode,
    decode_instances,
    encode_png,
    jpeg_shape,
    standalone_jpeg,
)
from axialtrain.data.readers import open_image, open_raster, tiles_of
from axialtrain.grid import Rect

SMOOTH = np.add.outer(np.arange(150), np.arange(200))[..., None] // np.array([2, 3, 4])
PIXELS = SMOOTH.astype(np.uint8)


def test_lossless_tiff_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PIXELS, tile=(64, 64), photometric="rgb", compression="zlib")
    with open_image(path) as image:
        assert (image.height, image.width, image.bands, image.tile) == (150, 200, 3, 64)
        assert (image.mpp, image.levels, image.downsample, image.jpeg) == (None, 1, 1.0, False)
        np.testing.assert_array_equal(image.read(Rect(0, 150, 0, 200)), PIXELS)
        outside = image.read(Rect(-5, 10, 190, 210))
        np.testing.assert_array_equal(outside[5:, :10], PIXELS[:10, 190:])
        assert not outside[:5].any()
        assert not outside[:, 10:].any()
        with pytest.raises(ValueError, match="not JPEG"):
            image.tile_bytes(0, 0)
        with pytest.raises(ValueError, match=r"tile is \(3, 0\), allowed"):
            image.tile_pixels(3, 0)


def test_jpeg_tiles_are_given_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PIXELS, tile=(64, 64), photometric="rgb", compression="jpeg")
    with open_image(path) as image, tifffile.TiffFile(path) as tiff:
        assert image.jpeg
        tile = image.tile_bytes(1, 2)
        assert tile is not None
        assert jpeg_shape(tile) == (64, 64, 3)
        np.testing.assert_array_equal(imagecodecs.jpeg8_decode(tile), image.tile_pixels(1, 2))
        np.testing.assert_array_equal(image.read(Rect(0, 150, 0, 200)), tiff.asarray())


def test_levels_and_resolution(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        kinds = {"tile": (16, 16), "photometric": "rgb", "metadata": None}
        tiff.write(
            PIXELS, subifds=1, resolution=(20000, 20000), resolutionunit="CENTIMETER", **kinds
        )
        tiff.write(PIXELS[::2, ::2], subfiletype=1, **kinds)
    with open_image(path, 1) as image:
        assert (image.height, image.width, image.levels) == (75, 100, 2)
        assert image.downsample == 2.0
        assert image.mpp == pytest.approx(1.0)
        np.testing.assert_array_equal(image.read(Rect(0, 75, 0, 100)), PIXELS[::2, ::2])
    with pytest.raises(ValueError, match="level is 2, allowed is 0 to 1"):
        open_image(path, 2)


@pytest.mark.parametrize(
    "resolution", [((1, 4294967295),) * 2, ((4294967295, 1),) * 2, ((0, 1),) * 2]
)
def test_a_resolution_that_cannot_be_is_unknown(
    tmp_path: Path, resolution: tuple[tuple[int, int], ...]
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        PIXELS,
        tile=(16, 16),
        photometric="rgb",
        resolution=resolution,
        resolutionunit="CENTIMETER",
    )
    with open_image(path) as image:
        assert image.mpp is None


@pytest.mark.parametrize("size", [(1003, 333), (333, 1003)])
def test_a_level_lies_where_rasterio_says(tmp_path: Path, size: tuple[int, int]) -> None:
    """Its sides are rounded, each by a share of its own."""
    path = tmp_path / "a.tif"
    height, width = size
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=1, dtype="uint8",
        crs="EPSG:32618", transform=rasterio.Affine(10, 0, 1000, 0, -20, 5000),
        tiled=True, blockxsize=128, blockysize=128,
    ) as raster:  # fmt: skip
        raster.build_overviews([2, 4, 8])
    for level in (0, 1, 2, 3):
        overview = {"overview_level": level - 1} if level else {}
        with rasterio.open(path, **overview) as raster, open_image(path, level) as image:
            assert image.name == "tifffile"
            assert image.info.transform == pytest.approx(tuple(raster.transform)[:6], rel=1e-12)


def test_grey_jpeg_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PIXELS[..., 0], tile=(64, 64), compression="jpeg")
    with open_image(path) as image, tifffile.TiffFile(path) as tiff:
        assert image.bands == 1
        np.testing.assert_array_equal(image.read(Rect(0, 150, 0, 200))[..., 0], tiff.asarray())


def test_absent_tiles_are_told_from_black_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tiles = [np.full((64, 64, 3), 9, np.uint8), None]
    tifffile.imwrite(
        path, iter(tiles), shape=(64, 128, 3), dtype=np.uint8, tile=(64, 64), photometric="rgb"
    )
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].databytecounts[1] == 0
    with open_image(path) as image:
        assert image.tile_pixels(0, 1) is None
        assert (image.read(Rect(0, 64, 0, 128), fill=3)[:, 64:] == 3).all()


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (PIXELS, {"photometric": "rgb"}, "not tiled"),
        (PIXELS.astype(np.uint32), {"photometric": "rgb", "tile": (64, 64)}, "8 bits a band"),
        (PIXELS, {"photometric": "rgb", "tile": (64, 32)}, "allowed are squares"),
        (
            PIXELS,
            {"photometric": "rgb", "tile": (64, 64), "compression": "jpeg2000"},
            "its compression is .*JPEG2000.*, allowed is none, LZW, JPEG",
        ),
        (
            np.zeros((64, 64, 65), np.uint8),
            {"photometric": "minisblack", "planarconfig": "contig", "tile": (32, 32)},
            "65 bands, allowed is 1 to 64",
        ),
        (
            np.zeros((3, 64, 64), np.uint8),
            {"photometric": "rgb", "planarconfig": "separate", "tile": (32, 32)},
            "separate planes",
        ),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, pixels: np.ndarray, options: dict[str, object], message: str
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, **options)
    with pytest.raises(ValueError, match=rf"a\.tif: .*{message}"):
        open_image(path, reader="tifffile")


@pytest.mark.parametrize("data", [b"", b"hello, world", b"II*\0", b"II*\0\xff\xff\xff\x7f"])
def test_what_is_no_image_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.svs: "):
        open_image(path)


def test_path_that_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "missing.tif", "there is no such file"),
        (tmp_path / "folder", "is a folder, allowed is an image"),
        (tmp_path / ("x" * 300), "not an image that can be read .*too long"),
    ):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: {message}"):
            open_image(path)


@pytest.mark.parametrize("error", [PermissionError(13, "not yours"), OSError(5, "broken disk")])
def test_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PIXELS, tile=(64, 64), photometric="rgb")

    def failing(*_: object) -> None:
        raise error

    with open_image(path) as image:
        monkeypatch.setattr(tifffile.FileHandle, "read", failing)
        with pytest.raises(ValueError, match=rf"a\.tif: tile row=0 col=0 .*{error.strerror}"):
            image.tile_pixels(0, 0)
    monkeypatch.setattr(tifffile.FileHandle, "open", failing)
    with pytest.raises(ValueError, match=rf"a\.tif: not an image that .*{error.strerror}"):
        open_image(path)


def test_pages_in_a_circle_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PIXELS, tile=(64, 64), photometric="rgb")
    data = bytearray(path.read_bytes())
    first = int.from_bytes(data[4:8], "little")
    following = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")
    data[following : following + 4] = data[4:8]  # after the first page comes the first page
    path.write_bytes(data)
    with pytest.raises(ValueError, match="more than 1024 pages"):
        open_image(path)


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
def test_damaged_tiff_is_a_value_error(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PIXELS, tile=(64, 64), photometric="rgb", compression=compression)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(200):
        data = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole)
        for at in rng.integers(0, min(len(data), 1000), 4):
            data[at] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            with open_image(path) as image:
                image.read(Rect(0, 150, 0, 200))
        except ValueError as error:
            assert str(path) in str(error)


def test_adobe_marker_gives_rgb_tiles_their_colours() -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    as_rgb = imagecodecs.jpeg8_encode(red, 95, colorspace="rgb", outcolorspace="rgb")
    as_ycbcr = imagecodecs.jpeg8_encode(red, 95)
    for data, rgb in ((as_rgb, True), (as_ycbcr, False)):
        tile = standalone_jpeg(data, None, rgb=rgb)
        assert np.abs(decode(tile, (16, 16, 3)).astype(int) - red).max() <= 3
        assert np.abs(np.asarray(Image.open(io.BytesIO(tile))).astype(int) - red).max() <= 3


def test_header_is_compared_before_decoding() -> None:
    bomb = encode_png(np.zeros((4096, 4096, 3), np.uint8))
    with pytest.raises(ValueError, match=r"shape \(4096, 4096, 3\) where \(16, 16, 3\)"):
        decode(bomb, (16, 16, 3))
    with pytest.raises(ValueError, match="no JPEG"):
        decode(b"nothing", (16, 16, 3))
    small = encode_png(np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(small[:40], (16, 16, 3))


def test_png_of_instances_is_what_it_claims_to_be() -> None:
    numbers = np.arange(12 * 20, dtype=np.uint16).reshape(12, 20) * 270
    data = encode_png(numbers)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), numbers)
    np.testing.assert_array_equal(decode_instances(data, (12, 20)), numbers)
    with pytest.raises(ValueError, match=r"shape \(12, 20\) where \(20, 12\)"):
        decode_instances(data, (20, 12))
    for other in (numbers.astype(np.uint8), np.zeros((12, 20, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"is a PNG of 8 bits .*, not 16-bit grey"):
            decode_instances(encode_png(other), (12, 20))
    for wrong in (np.zeros((12, 20, 3), np.uint16), np.zeros((12, 20, 2), np.uint16)):
        with pytest.raises(ValueError, match=r"is a PNG of 16 bits .*, not 16-bit grey"):
            decode_instances(bytes(imagecodecs.png_encode(wrong)), (12, 20))
    with pytest.raises(ValueError, match=r"is a PNG of 16 bits .*, not 8-bit grey or RGB"):
        decode(data, (12, 20, 1))
    with pytest.raises(ValueError, match="no PNG"):
        decode_instances(b"nothing", (12, 20))
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_instances(data[:60], (12, 20))


def test_png_with_a_transparent_value_is_decoded_to_what_was_promised_or_refused() -> None:
    """A chunk behind the header that decoders may turn into a band of its own."""
    chunk = b"tRNS\0\0"
    chunk = b"\0\0\0\2" + chunk + zlib.crc32(chunk).to_bytes(4)
    for values in (np.eye(16, dtype=np.uint8), np.eye(16, dtype=np.uint16)):
        data = encode_png(values)
        at = data.index(b"IDAT") - 4
        data = data[:at] + chunk + data[at:]
        try:
            if values.dtype == np.uint8:
                got = decode(data, (16, 16, 1))[..., 0]
            else:
                got = decode_instances(data, (16, 16))
            np.testing.assert_array_equal(got, values)
        except ValueError as error:
            assert "decodes to " in str(error)


def test_absent_tiles_of_instances_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tiles = [np.full((64, 64), 700, np.uint16), None]
    tifffile.imwrite(path, iter(tiles), shape=(64, 128), dtype=np.uint16, tile=(64, 64))
    with open_raster(path) as raster:
        numbers = raster.read(Rect(-2, 64, 0, 128))[..., 0]
    assert numbers.dtype == np.uint16
    assert not numbers[:2].any()
    assert (numbers[2:, :64] == 700).all()
    assert not numbers[:, 64:].any()


def test_tiles_of_a_rectangle() -> None:
    found = list(tiles_of(Rect(-3, 17, 30, 99), 40, 50, 16))
    assert [(r, c) for r, c, _ in found] == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert sum(part.area for _, _, part in found) == 17 * 20
    assert list(tiles_of(Rect(40, 50, 0, 10), 40, 50, 16)) == []


@pytest.mark.slow
def test_slide_reads_as_tifffile_reads_it(sample: Callable[[str], Path]) -> None:
    path = sample("CMU-1-Small-Region.svs")
    with open_image(path) as image, tifffile.TiffFile(path) as tiff:
        assert (image.height, image.width, image.tile) == (2967, 2220, 240)
        assert image.mpp == pytest.approx(0.499)
        expected = tiff.pages[0].asarray().astype(int)
        got = image.read(Rect(0, 2967, 0, 2220)).astype(int)
        assert np.abs(got - expected).max() <= 3
        tile = image.tile_bytes(3, 4)
        assert tile is not None
        # Any standard decoder, not only ours, shows the right colours.
        shown = np.asarray(Image.open(io.BytesIO(tile))).astype(int)
        assert np.abs(shown - expected[720:960, 960:1200]).max() <= 3


def test_cloud_optimised_geotiff(sample: Callable[[str], Path]) -> None:
    path = sample("cogeo.tif")
    with open_image(path) as image, tifffile.TiffFile(path) as tiff:
        assert (image.height, image.tile, image.levels, image.jpeg) == (1024, 512, 7, True)
        got = image.read(Rect(0, 1024, 0, 1024)).astype(int)
        assert np.abs(got - tiff.pages[0].asarray()).max() <= 3


def test_strips_are_refused(sample: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="not tiled"):
        open_image(sample("landsat_RGB.byte.tif"), reader="tifffile")
