"""What is chosen for all images: how tiles are stored, which of them, in blocks of which size."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile

from axialtrain.cli import main
from axialtrain.data.listing import Entry
from axialtrain.data.readers import open_image
from axialtrain.data.region import Shards, open_shards
from axialtrain.data.shard import make_shards, prepare
from axialtrain.data.sharding import Sharding
from axialtrain.data.statistics import SAMPLE, Statistics, sampled
from axialtrain.data.store import Head, ImageRow
from axialtrain.data.verify import verify
from axialtrain.grid import Rect

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """JPEG tiles of 16 px."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PIXELS, tile=(16, 16), photometric="rgb", compression="jpeg")
    return path


def made(entries: list[Entry] | Path, out: Path, **options: object) -> Shards:
    given = [Entry(entries)] if isinstance(entries, Path) else entries
    how = Sharding(**options)  # type: ignore[arg-type]
    make_shards(prepare(given, how), out, how, progress=False)
    assert verify([str(out)], mode="deep").count == 0
    return open_shards(str(out))


def whole(shards: Shards, name: str = "a") -> np.ndarray:
    head = shards.head(name)
    return shards.region(name, head.rect).pixels


@pytest.mark.parametrize("block", [1, 2, 4, 8])
@pytest.mark.parametrize("tile", [16, 48, 64])
def test_tiles_and_blocks_of_any_size_hold_the_same(image: Path, tmp_path: Path, tile, block):  # type: ignore[no-untyped-def]
    shards = made(image, tmp_path / "out", passthrough="never", tile=tile, block=block)
    head = shards.head("a")
    assert (head.tile, head.block, head.encoding) == (tile, block, "png")
    side = tile * block
    assert head.block_grid == (-(-300 // side), -(-200 // side))
    with open_image(image) as reader:
        np.testing.assert_array_equal(whole(shards), reader.read(head.rect))
    part = shards.read("a", 37, 51, 120, 90)
    np.testing.assert_array_equal(part, whole(shards)[37:157, 51:141])


def test_tiles_are_encoded_anew_as_jpeg_where_that_is_asked_for(image: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    shards = made(image, tmp_path / "out", passthrough="never", tile=64, encode="jpeg", quality=95)
    assert shards.head("a").encoding == "jpg"
    with open_image(image) as reader:
        pixels = reader.read(Rect(0, 300, 0, 200))
    tile = imagecodecs.jpeg8_decode(imagecodecs.jpeg8_encode(pixels[64:128, :64].copy(), 95))
    np.testing.assert_array_equal(whole(shards)[64:128, :64], tile)
    # Where pixels have no JPEG, they are stored without loss all the same.
    deep = tmp_path / "deep.tif"
    values = np.random.default_rng(1).integers(0, 65536, (50, 40), np.uint16)
    tifffile.imwrite(deep, values, tile=(16, 16))
    shards = made(deep, tmp_path / "deep", encode="jpeg")
    np.testing.assert_array_equal(whole(shards, "deep")[..., 0], values)


def test_passthrough_that_must_be_and_cannot(tmp_path: Path) -> None:
    plain = tmp_path / "b.tif"
    tifffile.imwrite(plain, PIXELS, tile=(16, 16), photometric="rgb")
    with pytest.raises(ValueError, match=r"b\.tif: its tiles cannot be copied: passthrough is alw"):
        prepare([Entry(plain)], Sharding(passthrough="always"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passthrough": "perhaps"}, "passthrough is 'perhaps', allowed are auto, never, always"),
        ({"encode": "gif"}, "encode is 'gif', allowed are lossless, jpeg"),
        ({"keep": "some"}, "keep is 'some', allowed are all, nodata, tissue"),
        ({"block": 3}, "block is 3, allowed are 1, 2, 4, 8"),
        ({"reader": "x"}, "reader is 'x', allowed are auto"),
        ({"quality": 0}, "quality is 0, allowed is 1 to 100"),
        ({"tile": 15}, "tile is 15, allowed is 16 to 2048 px"),
        ({"share": 1.5}, "share is 1.5, allowed is 0 to 1"),
        ({"mpp": 0.0}, "mpp is 0.0, allowed are micrometres per px above 0"),
        ({"mpp": float("nan")}, "mpp is nan, allowed"),
        ({"mpp": 0.5, "level": 1}, "level is 1 and mpp 0.5, allowed is one of them"),
        ({"passthrough": "always", "tile": 64}, "tile is 64, allowed is none where passthrough"),
        ({"background": 255}, "background is 255, allowed is a class from 0 to 254"),
        ({"shard_bytes": 0}, "shard_bytes is 0, allowed is at least 1"),
    ],
)
def test_what_may_not_be_chosen_is_named(options, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        Sharding(**options)


def test_statistics_are_those_of_the_pixels(image: Path, tmp_path: Path) -> None:
    """All tiles of a small image are looked at, and what a tile has beyond the border is not."""
    other = tmp_path / "b.tif"
    tifffile.imwrite(other, PIXELS[:90, :70] // 3, tile=(16, 16), photometric="rgb")
    shards = made([Entry(image), Entry(other)], tmp_path / "out", statistics=True)
    parts = []
    for row in shards.images:
        values = whole(shards, row.name).reshape(-1, 3).astype(np.float64)
        assert row.statistics is not None
        assert row.statistics.count == len(values)
        assert row.statistics.mean == pytest.approx(values.mean(0), rel=1e-12)
        assert row.statistics.std == pytest.approx(values.std(0), rel=1e-12)
        parts.append(values)
    both = np.concatenate(parts)
    statistics = Statistics.joined(row.statistics for row in shards.images if row.statistics)
    assert statistics is not None
    assert statistics.mean == pytest.approx(both.mean(0), rel=1e-12)
    assert statistics.std == pytest.approx(both.std(0), rel=1e-12)


def test_statistics_leave_out_what_is_missing(tmp_path: Path) -> None:
    values = np.random.default_rng(2).normal(5, 2, (60, 70)).astype(np.float32)
    values[::3] = np.nan
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values, tile=(16, 16))
    row = made(path, tmp_path / "out", statistics=True).images[0]
    assert row.statistics is not None
    assert row.statistics.count == np.isfinite(values).sum()
    assert row.statistics.mean[0] == pytest.approx(np.nanmean(values.astype(np.float64)), rel=1e-12)


def test_of_a_large_image_some_tiles_are_looked_at() -> None:
    for rows, cols in ((1, 1), (16, 16), (17, 16), (100, 96), (256, 256), (3000, 1), (1, 3000)):
        tiles = [(row, col) for row in range(rows) for col in range(cols)]
        chosen = [each for each in tiles if sampled(*each, len(tiles))]
        assert min(len(tiles), SAMPLE) * 0.4 <= len(chosen) <= 1.3 * SAMPLE
        if min(rows, cols) > 90:  # neither few rows nor few columns
            assert all(len({each[axis] for each in chosen}) > 60 for axis in (0, 1))


def test_tiles_that_are_not_kept_are_recorded_and_not_stored(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    """A stained disc on glass, in tiles of 32 px, JPEG in the source."""
    y, x = np.mgrid[:640, :800]
    disc = (y - 250) ** 2 + (x - 300) ** 2 < 150**2
    pixels = np.full((640, 800, 3), 240, np.uint8)
    pixels[disc] = (180, 60, 140)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        for number, step in enumerate((1, 4)):
            tiff.write(
                pixels[::step, ::step],
                tile=(32, 32),
                photometric="rgb",
                compression="jpeg",
                subifds=1 if number == 0 else None,
                subfiletype=number,
            )
    out = tmp_path / "out"
    command = ["shard", str(path), "--out", str(out), "--keep", "tissue", "--block", "4"]
    assert main(command) == 0
    assert main(["verify", "--deep", str(out)]) == 0
    shards = open_shards(str(out))
    head = shards.head("a")
    region = shards.region("a", head.rect)
    assert region.present[disc].all(), "no tissue is lost"
    empty = {
        (entry.row * 4 + number // 4, entry.col * 4 + number % 4)
        for entry in head.blocks
        for number in entry.empty
    }
    for row in range(20):
        for col in range(25):
            here = np.s_[row * 32 : row * 32 + 32, col * 32 : col * 32 + 32]
            assert region.present[here].all() != ((row, col) in empty)
            assert region.present[here].any() != ((row, col) in empty)
    covered = 1 - len(empty) / 500
    assert disc.mean() < covered < disc.mean() + 0.2
    record = json.loads((out / "shard.json").read_bytes())["images"][0]
    assert (record["tiles"], record["empty"]) == (500 - len(empty), len(empty))
    assert record["copied"] == record["tiles"]
    # Blocks without a tile are not even fetched.
    corner = shards.region("a", Rect(512, 640, 640, 768))
    assert (corner.bytes_read, corner.tiles_decoded) == (0, 0)
    # The picture: what is not kept is paler than what is.
    picture = imagecodecs.jpeg8_decode((out / "pictures" / "a.jpg").read_bytes())
    assert picture.shape[:2] == (640, 800)
    assert picture[250, 300, 1] < 90


def test_a_head_that_lies_about_empty_tiles_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tiles = [np.full((64, 64, 3), 9, np.uint8), None]
    tifffile.imwrite(
        path, iter(tiles), shape=(64, 128, 3), dtype=np.uint8, tile=(64, 64), photometric="rgb"
    )
    shards = made(path, tmp_path / "out")
    assert shards.head("a").blocks[0].empty == (1,)
    data = (tmp_path / "out" / "shard-00000.tar").read_bytes()
    lie = data.replace(b'"empty":[1]', b'"empty":[0]')
    assert lie != data
    (tmp_path / "out" / "shard-00000.tar").write_bytes(lie)
    report = verify([str(tmp_path / "out")], mode="full")
    assert "SHA-256" in str(report), "the head is not the one in the manifest"
    manifest = tmp_path / "out" / "manifest.json"
    row = json.loads(manifest.read_bytes())["images"][0]
    start = row["head_offset"]
    digest = hashlib.sha256(lie[start : start + row["head_length"]]).hexdigest()
    manifest.write_text(manifest.read_text().replace(row["head_sha256"], digest))
    report = verify([str(tmp_path / "out")], mode="full")
    assert "is stored, and empty in the head of its image" in str(report)
    assert "is neither stored nor empty" in str(report)
    for wrong in ("[1,1]", "[5,4]", "[-1]", "[64]", "[true]", '["1"]', "[1,2]"):
        forged = data.replace(b'"empty":[1]', f'"empty":{wrong}'.encode())
        length = row["head_length"] + len(forged) - len(data)
        head = ImageRow(**{**row, "head_length": length})
        body = forged[start : start + length]
        with pytest.raises(
            ValueError,
            match=r"empty (is|names) .*allowed (is numbers from 0 to 63, each|are tiles of)",
        ):
            Head.from_json(body, head, len(forged), "here")


def test_resolution_in_micrometres(tmp_path: Path) -> None:
    """Levels of 0.5 and 1 um/px: 1.01 is the second as it is, 2 the mean of 2 x 2 of its px."""
    pixels = np.random.default_rng(3).integers(0, 256, (256, 320, 3), np.uint8)
    half = pixels.reshape(128, 2, 160, 2, 3).mean((1, 3)).round().astype(np.uint8)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate((pixels, half)):
            tiff.write(
                level,
                tile=(32, 32),
                photometric="rgb",
                compression="jpeg",
                subifds=1 if number == 0 else None,
                subfiletype=number,
            )
    entry = Entry(path, mpp=0.5)
    shards = made([entry], tmp_path / "near", mpp=1.01)
    head = shards.head("a")
    assert (head.height, head.width, head.level, head.encoding) == (128, 160, 1, "jpg")
    assert head.mpp == pytest.approx(1.0)
    shards = made([entry], tmp_path / "far", mpp=2.0, tile=64)
    head = shards.head("a")
    assert (head.height, head.width, head.tile, head.encoding) == (64, 80, 64, "png")
    assert head.mpp == pytest.approx(2.0)
    with open_image(path, 1) as reader:
        level = reader.read(Rect(0, 128, 0, 160)).astype(int)
    expected = (level.reshape(64, 2, 80, 2, 3).sum((1, 3)) + 2) // 4
    np.testing.assert_array_equal(whole(shards), expected)
    with pytest.raises(ValueError, match=r"mpp is 0\.25, allowed is the image's own, 0\.5"):
        prepare([entry], Sharding(mpp=0.25))
    with pytest.raises(ValueError, match="does not say how many micrometres a px is"):
        prepare([Entry(path)], Sharding(mpp=1.0))
    # A table's mpp is that of level 0.
    assert made([entry], tmp_path / "level", level=1).head("a").mpp == pytest.approx(1.0)


def test_labels_of_another_resolution_and_polygons(image: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    labels = np.random.default_rng(4).integers(0, 5, (75, 50), np.uint8)
    raster = tmp_path / "labels.tif"
    tifffile.imwrite(raster, labels, tile=(16, 16))
    shapes = tmp_path / "shapes.geojson"
    square = [[[20, 30], [120, 30], [120, 230], [20, 230], [20, 30]]]
    shapes.write_text(
        json.dumps(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": square},
                "properties": {"classification": {"name": "tumour"}},
            }
        )
    )
    out = tmp_path / "raster"
    assert main(["shard", str(image), "--out", str(out), "--labels", str(raster)]) == 0
    expected = labels.repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(open_shards(str(out)).read_labels("a", 0, 0, 300, 200), expected)
    out = tmp_path / "shapes"
    command = ["shard", str(image), "--labels", str(shapes), "--classes", "tumour=2", "other=0"]
    assert main([*command, "--out", str(out)]) == 0
    read = open_shards(str(out)).read_labels("a", 0, 0, 300, 200)
    expected = np.full((300, 200), 255, np.uint8)
    expected[30:230, 20:120] = 2
    np.testing.assert_array_equal(read, expected)
    out = tmp_path / "background"
    assert main([*command, "--out", str(out), "--background", "4"]) == 0
    read = open_shards(str(out)).read_labels("a", 0, 0, 300, 200)
    np.testing.assert_array_equal(read, np.where(expected == 255, 4, expected))
    capsys.readouterr()
    assert main([*command[:-2], "stroma=1", "--out", str(tmp_path / "x")]) == 2
    assert "tumour" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
