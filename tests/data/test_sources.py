"""Images of every kind: file -> shards -> region -> array, against the libraries' own pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import rasterio
import tifffile
import zarr
from PIL import Image
from slides import write_dicom, write_ndpi
from zarrs import write_zarr

from axialtrain.cli import main
from axialtrain.data.kinds import Kind
from axialtrain.data.painting import Region
from axialtrain.data.readers import open_image, open_raster
from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.data.store import Head
from axialtrain.grid import Rect

RNG = np.random.default_rng(3)
NOISE = RNG.integers(0, 65536, (150, 200, 5), np.uint16)
SMOOTH = (np.add.outer(np.arange(150), np.arange(200))[..., None] // np.array([2, 3, 4])).astype(
    np.uint8
)
FLOATS = RNG.normal(0, 1000, (150, 200, 2)).astype(np.float32)


def through(path: Path, out: Path, **options: Any) -> tuple[Region, Head]:
    """The whole of the image at `path`, by way of shards in `out`; and its head."""
    summary = shard_images([path], out, progress=False, **options)
    shards = open_shards(str(out))
    (row,) = shards.images
    assert (row.bands, row.dtype) == (shards.bands, shards.dtype)
    head = shards.head(row.name)
    region = shards.region(row.name, head.rect)
    np.testing.assert_array_equal(
        shards.read(row.name, 3, -5, 40, 70)[:, 5:], region.pixels[3:43, :65]
    )
    assert summary.total("tiles") == region.tiles_decoded
    return region, head


def rgba(path: Path) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions))


def test_slide_is_that_of_openslide(sample: Callable[[str], Path], tmp_path: Path) -> None:
    path = sample("CMU-1-Small-Region.svs")
    copied, head = through(path, tmp_path / "copied")
    assert (head.encoding, head.mpp, head.masked) == ("jpg", pytest.approx(0.499), False)
    part = Rect(1000, 1300, 900, 1200)
    got = copied.pixels[part.slices(head.rect)]
    with openslide.OpenSlide(path) as slide:
        expected = np.asarray(slide.read_region((part.left, part.top), 0, (300, 300)))[..., :3]
    assert np.abs(got.astype(int) - expected).max() <= 3  # another JPEG decoder
    with open_image(path) as image:  # the same one
        np.testing.assert_array_equal(got, image.read(part))


@pytest.mark.slow
def test_slide_by_openslide_is_that_of_openslide(
    sample: Callable[[str], Path], tmp_path: Path
) -> None:
    path = sample("CMU-1-Small-Region.svs")
    region, head = through(path, tmp_path / "out", reader="openslide")
    assert (head.encoding, head.tile, head.mpp) == ("png", 240, pytest.approx(0.499))
    np.testing.assert_array_equal(region.pixels, rgba(path)[..., :3])


@pytest.mark.parametrize("reader", ["auto", "rasterio"])
def test_cloud_optimised_geotiff_is_that_of_rasterio(
    sample: Callable[[str], Path], tmp_path: Path, reader: str
) -> None:
    path = sample("cogeo.tif")
    region, head = through(path, tmp_path / "out", reader=reader)
    with rasterio.open(path) as raster:
        expected = np.moveaxis(raster.read(), 0, -1).astype(int)
        np.testing.assert_array_equal(region.present, raster.dataset_mask() != 0)
        assert head.crs == raster.crs.to_string() == "EPSG:3857"
        assert head.transform == pytest.approx(tuple(raster.transform)[:6])
    assert head.encoding == ("jpg" if reader == "auto" else "png")
    if reader == "rasterio":
        np.testing.assert_array_equal(region.pixels, expected)
    else:  # GDAL enlarges the halved colours otherwise than libjpeg and tifffile do
        error = np.abs(region.pixels - expected)
        assert ((error <= 3).mean() > 0.995, error.max() <= 13) == (True, True)
        np.testing.assert_array_equal(region.pixels, tifffile.imread(path, key=0))


def test_landsat_of_strips_is_that_of_rasterio(
    sample: Callable[[str], Path], tmp_path: Path
) -> None:
    path = sample("landsat_RGB.byte.tif")
    region, head = through(path, tmp_path / "out")
    with rasterio.open(path) as raster:
        np.testing.assert_array_equal(region.pixels, np.moveaxis(raster.read(), 0, -1))
        np.testing.assert_array_equal(region.present, raster.dataset_mask() != 0)
        assert (head.crs, head.transform) == ("EPSG:32618", tuple(raster.transform)[:6])
    assert (head.masked, head.tile, Kind(head.bands, head.dtype)) == (True, 256, Kind())
    assert 0 < region.present.mean() < 1
    with open_image(path) as image:
        assert (image.name, image.why) == (
            "rasterio",
            "a TIFF; not tifffile: not tiled; not openslide: is no slide of a scanner",
        )


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("reader", ["tifffile", "rasterio"])
def test_rasters_of_16_bits(tmp_path: Path, bands: int, reader: str) -> None:
    path = tmp_path / "a.tif"
    pixels = NOISE[..., :bands]
    options = {"planarconfig": "contig"} if bands > 1 else {}
    tifffile.imwrite(
        path,
        pixels if bands > 1 else pixels[..., 0],
        tile=(64, 64),
        photometric="minisblack",
        compression="zlib",
        predictor=True,
        byteorder=">",
        **options,
    )
    region, head = through(path, tmp_path / "out", reader=reader)
    assert (head.bands, head.dtype, head.tile) == (bands, "uint16", 64)
    assert head.encoding == ("png" if bands < 5 else "tif")
    np.testing.assert_array_equal(region.pixels, pixels)
    assert region.present.all()


@pytest.mark.parametrize("reader", ["auto", "rasterio"])
def test_what_is_not_finite_is_missing(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "a.tif"
    pixels = FLOATS.copy()
    pixels[:70, 64:130, 0] = np.nan  # a whole tile, and more
    pixels[100, 7], pixels[101, 8, 1] = np.inf, -np.inf
    expected = np.isfinite(pixels).all(-1)
    options = {"photometric": "minisblack", "planarconfig": "contig", "tile": (64, 64)}
    tifffile.imwrite(path, pixels, **options)
    region, head = through(path, tmp_path / "out", reader=reader)
    assert (head.bands, head.dtype, head.encoding, head.masked) == (2, "float32", "tif", True)
    assert region.tiles_decoded == 3 * 4 - 1
    np.testing.assert_array_equal(region.present, expected)
    np.testing.assert_array_equal(region.pixels, np.where(expected[..., None], pixels, 0))


@pytest.mark.parametrize("tiled", [True, False])
def test_nodata_is_missing(tmp_path: Path, tiled: bool) -> None:
    path = tmp_path / "a.tif"
    pixels = np.maximum(NOISE[..., :4], 1)
    pixels[20:90, :80] = 7
    pixels[120, 120] = 7
    pixels[121, 121, 0] = 7  # one band alone is a value like any other
    layout: dict[str, Any] = {"tiled": True, "blockxsize": 64, "blockysize": 64} if tiled else {}
    transform = rasterio.Affine(10, 0, 500000, 0, -10, 6000000)
    profile = {"height": 150, "width": 200, "count": 4, "dtype": "uint16", "nodata": 7}
    with rasterio.open(
        path, "w", driver="GTiff", interleave="pixel", photometric="minisblack", crs="EPSG:32632",
        transform=transform, **profile, **layout,
    ) as raster:  # fmt: skip
        raster.write(np.moveaxis(pixels, -1, 0))
    region, head = through(path, tmp_path / "out")
    with open_image(path) as image, rasterio.open(path) as raster:
        assert image.name == ("tifffile" if tiled else "rasterio")
        expected = raster.dataset_mask() != 0
    assert (head.crs, head.transform) == ("EPSG:32632", tuple(transform)[:6])
    np.testing.assert_array_equal(region.present, expected)
    np.testing.assert_array_equal(region.present, (pixels != 7).any(-1))
    np.testing.assert_array_equal(region.pixels, np.where(expected[..., None], pixels, 0))


@pytest.mark.parametrize("reader", ["tifffile", "rasterio"])
def test_opacity_says_what_is_missing(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "a.tif"
    opacity = np.full((150, 200, 1), 255, np.uint8)
    opacity[10:40, 20:99] = 0
    pixels = np.concatenate([SMOOTH, opacity], axis=2)
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", extrasamples=["unassalpha"])
    region, head = through(path, tmp_path / "out", reader=reader)
    assert (head.bands, head.encoding, head.masked) == (3, "png", True)
    with open_image(path, reader=reader) as image:
        assert image.why == "asked for; its last band is an opacity, which says what is missing"
    np.testing.assert_array_equal(region.present, opacity[..., 0] != 0)
    np.testing.assert_array_equal(region.pixels, np.where(opacity != 0, SMOOTH, 0))


def test_missing_pixels_of_label_rasters_have_no_label(tmp_path: Path) -> None:
    path = tmp_path / "labels.tif"
    labels = RNG.integers(0, 5, (150, 200), np.uint8)
    profile = {"height": 150, "width": 200, "count": 1, "dtype": "uint8", "nodata": 0}
    transform = rasterio.Affine(10, 0, 500000, 0, -10, 6000000)
    with rasterio.open(path, "w", driver="GTiff", transform=transform, **profile) as raster:
        raster.write(labels, 1)
    image = tmp_path / "a.tif"
    tifffile.imwrite(image, SMOOTH, tile=(64, 64), photometric="rgb")
    region, _ = through(image, tmp_path / "out", labels=[path])
    np.testing.assert_array_equal(region.labels, np.where(labels == 0, 255, labels))
    assert region.present.all()


def test_ome_tiff_of_channels_and_levels(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    planes = np.moveaxis(NOISE, -1, 0)
    with tifffile.TiffWriter(path, ome=True) as tiff:
        options: dict[str, Any] = {"tile": (64, 64), "photometric": "minisblack"}
        size = {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm"}
        tiff.write(planes, subifds=1, metadata={"axes": "CYX", **size}, **options)
        tiff.write(planes[:, ::2, ::2], subfiletype=1, **options)
    for level, expected in ((0, NOISE), (1, NOISE[::2, ::2])):
        region, head = through(path, tmp_path / str(level), level=level)
        assert (head.bands, head.dtype, head.mpp) == (5, "uint16", 0.25 * 2**level)
        np.testing.assert_array_equal(region.pixels, expected)


@pytest.mark.parametrize("axes", ["ZYX", "TYX", "QYX"])
def test_stacks_are_refused_by_all(tmp_path: Path, axes: str) -> None:
    path = tmp_path / "a.tif"
    metadata = {"axes": axes}
    planes = np.moveaxis(NOISE, -1, 0)
    tifffile.imwrite(path, planes, photometric="minisblack", metadata=metadata)
    with pytest.raises(ValueError, match=rf"a\.tif: holds .*{axes}, allowed is one image"):
        open_image(path)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_ome_zarr_is_that_of_zarr(tmp_path: Path, zarr_format: int) -> None:
    path = tmp_path / "a.zarr"
    write_zarr(path, NOISE, zarr_format)
    for level in (0, 1):
        region, head = through(path, tmp_path / str(level), level=level)
        expected = np.asarray(zarr.open_array(str(path / str(level)), mode="r"))
        np.testing.assert_array_equal(region.pixels, np.moveaxis(expected, 0, -1))
        assert (head.bands, head.dtype, head.mpp, head.tile) == (5, "uint16", 0.5 * 2**level, 64)
        assert head.downsample == 2**level
    with pytest.raises(ValueError, match="level is 2, allowed is 0 to 1"):
        open_image(path, 2)


def test_ome_zarr_of_floats_in_shards(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    write_zarr(path, FLOATS, 3, chunks=(2, 32, 32), shards=(2, 128, 128))
    region, head = through(path, tmp_path / "out")
    assert (head.tile, head.encoding) == (32, "tif")
    np.testing.assert_array_equal(region.pixels, FLOATS)


@pytest.mark.parametrize("jpeg", [False, True])
def test_dicom_is_that_of_openslide(tmp_path: Path, jpeg: bool) -> None:
    path = tmp_path / "slide" / "a.dcm"
    path.parent.mkdir()
    write_dicom(path, SMOOTH, tile=64, jpeg=jpeg)
    region, head = through(path, tmp_path / "out")
    assert (head.mpp, head.tile, head.encoding) == (0.5, 64, "png")
    np.testing.assert_array_equal(region.pixels, rgba(path)[..., :3])
    if not jpeg:
        np.testing.assert_array_equal(region.pixels, SMOOTH)


def test_slide_in_jpeg_2000_is_that_of_openslide(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    whole = np.zeros((192, 256, 3), np.uint8)
    whole[:150, :200] = SMOOTH
    tiles = [
        imagecodecs.jpeg2k_encode(
            np.ascontiguousarray(whole[r : r + 64, c : c + 64]),
            level=0,
            codecformat="J2K",
            mct=False,
        )
        for r in range(0, 192, 64)
        for c in range(0, 256, 64)
    ]
    aperio_j2k = 33005
    tifffile.imwrite(
        path,
        iter(tiles),
        shape=(150, 200, 3),
        dtype=np.uint8,
        tile=(64, 64),
        photometric="rgb",
        compression=aperio_j2k,
        description="Aperio Image Library v1\n200x150 (64x64) J2K|MPP = 0.5",
        metadata=None,
    )
    region, head = through(path, tmp_path / "out")
    assert (head.mpp, head.tile) == (0.5, 64)
    np.testing.assert_array_equal(region.pixels, SMOOTH)
    with open_image(path) as image:
        assert image.name == "openslide"
        assert "not tifffile: its compression is" in image.why


@pytest.mark.parametrize("name", ["a.ndpi", "a.tif"])
def test_ndpi_is_that_of_openslide(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_ndpi(path, SMOOTH[:144, :192])
    region, head = through(path, tmp_path / "out")
    assert head.mpp == 0.5
    np.testing.assert_array_equal(region.pixels, rgba(path)[..., :3])


@pytest.mark.parametrize(
    "pixels", [SMOOTH, SMOOTH[..., 0], NOISE[..., 0]], ids=["rgb", "grey", "grey16"]
)
def test_png_is_kept_as_it_is(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    region, head = through(path, tmp_path / "out")
    assert head.dtype == pixels.dtype.name
    np.testing.assert_array_equal(region.pixels, pixels.reshape(region.pixels.shape))


def test_png_with_an_opacity_and_a_jpeg(tmp_path: Path) -> None:
    opacity = np.where(SMOOTH[..., :1] > 50, 200, 0).astype(np.uint8)
    Image.fromarray(np.concatenate([SMOOTH, opacity], axis=2)).save(tmp_path / "a.png")
    region, _ = through(tmp_path / "a.png", tmp_path / "png")
    np.testing.assert_array_equal(region.present, opacity[..., 0] != 0)
    np.testing.assert_array_equal(region.pixels, np.where(opacity != 0, SMOOTH, 0))
    Image.fromarray(SMOOTH).save(tmp_path / "b.jpg", quality=90)
    region, _ = through(tmp_path / "b.jpg", tmp_path / "jpg")
    expected = np.asarray(Image.open(tmp_path / "b.jpg")).astype(int)
    assert np.abs(region.pixels - expected).max() <= 3


def test_labels_of_missing_pixels_are_none(tmp_path: Path) -> None:
    pixels = FLOATS.copy()
    pixels[:80, :30] = np.nan
    options = {"photometric": "minisblack", "planarconfig": "contig", "tile": (64, 64)}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    labels = RNG.integers(0, 5, (150, 200), np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")  # and a raster may be of any reader
    numbers = RNG.integers(1, 900, (150, 200), np.uint16)
    tifffile.imwrite(tmp_path / "numbers.tif", numbers)  # of strips
    rasters = {"labels": [tmp_path / "labels.png"], "instances": [tmp_path / "numbers.tif"]}
    region, head = through(tmp_path / "a.tif", tmp_path / "out", **rasters)
    there = np.isfinite(pixels).all(-1)
    np.testing.assert_array_equal(region.labels, np.where(there, labels, 255))
    np.testing.assert_array_equal(region.instances, np.where(there, numbers, 0))
    shards = open_shards(str(tmp_path / "out"))
    whole = (0, 0, head.height, head.width)
    np.testing.assert_array_equal(shards.read_labels("a", *whole), region.labels)
    np.testing.assert_array_equal(shards.read_instances("a", *whole), region.instances)


def test_a_palette_has_indices_but_no_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    indices = RNG.integers(0, 5, (150, 200), np.uint8)
    colours = RNG.integers(0, 65536, (3, 256), np.uint16)
    for options in ({"tile": (64, 64)}, {}):
        tifffile.imwrite(path, indices, photometric="palette", colormap=colours, **options)
        with open_raster(path) as raster:
            np.testing.assert_array_equal(raster.read(Rect(0, 150, 0, 200))[..., 0], indices)
        with pytest.raises(ValueError, match=r"a\.tif: no reader takes it .*palette"):
            open_image(path)


def test_thumbnails_show_any_kind(tmp_path: Path) -> None:
    for number, pixels in enumerate((NOISE, FLOATS, SMOOTH[..., :1])):
        path = tmp_path / f"{number}.tif"
        many = {"planarconfig": "contig"} if pixels.shape[2] > 1 else {}
        shown = pixels if pixels.shape[2] > 1 else pixels[..., 0]
        tifffile.imwrite(path, shown, tile=(64, 64), photometric="minisblack", **many)
        shard_images([path], tmp_path / f"out{number}", progress=False)
        data = (tmp_path / f"out{number}" / "shard-00000.tar").read_bytes()
        at = data.index(b"thumbnail.jpg")
        start = data.index(b"\xff\xd8\xff", at)
        (tmp_path / "t.jpg").write_bytes(data[start:])
        picture = np.asarray(Image.open(tmp_path / "t.jpg"))
        assert picture.shape == (150, 200, 3)
        assert np.ptp(picture) > 50


def test_command_takes_a_reader_and_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, SMOOTH, photometric="rgb")
    out = tmp_path / "out"
    assert main(["shard", str(path), "--out", str(out), "--reader", "tifffile"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"axialtrain: {path}: not tiled: convert it")
    assert len(error.splitlines()) == 1
    assert main(["shard", str(path), "--out", str(out)]) == 0
    assert "1 read with rasterio: a TIFF; not tifffile: not tiled" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^reader is 'gdal', allowed are auto, tifffile"):
        open_image(path, reader="gdal")
