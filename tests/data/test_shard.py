from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import webdataset
from PIL import Image

from axialtrain.data import shard
from axialtrain.data.readers import open_image
from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.data.store import hilbert_order

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
LABELS = np.random.default_rng(1).integers(0, 6, (300, 200), np.uint8)


def write(folder: Path, name: str = "a.b", **options: object) -> tuple[Path, Path]:
    image, labels = folder / f"{name}.tif", folder / f"{name}_labels.tif"
    kinds = {"tile": (16, 16), "photometric": "rgb", **options}
    tifffile.imwrite(image, PIXELS, **kinds)
    tifffile.imwrite(labels, LABELS, tile=(16, 16), compression="zlib")
    return image, labels


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    image, labels = write(tmp_path, compression="jpeg")
    for out in ("one", "two"):
        shard_images([image], tmp_path / out, labels=[labels], progress=False)
    one, two = (sorted((tmp_path / out).iterdir()) for out in ("one", "two"))
    assert [p.name for p in one] == ["manifest.json", "shard-00000.tar"] == [p.name for p in two]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_plain_tools_read_the_shards(tmp_path: Path) -> None:
    image, labels = write(tmp_path, compression="jpeg")
    summary = shard_images([image], tmp_path / "out", labels=[labels], progress=False)
    assert (summary.images, summary.shards, summary.blocks) == (1, 1, 6)
    assert summary.tiles == summary.copied == 19 * 13
    path = tmp_path / "out" / "shard-00000.tar"
    assert summary.bytes == path.stat().st_size
    listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
    assert len(listed.stdout.split()) == 19 * 13 + 6 * 2 + 2
    assert listed.stdout.split()[0] == "a.b/0/00000_00000.00.jpg"

    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    keys = [f"a.b/0/{row:05d}_{col:05d}" for row, col in hilbert_order(3, 2)]
    assert [s["__key__"] for s in samples] == [*keys, "a.b/head"]
    block = samples[0]
    with open_image(image) as reader:
        assert block["00.jpg"] == reader.tile_bytes(0, 0)
        assert block["63.jpg"] == reader.tile_bytes(7, 7)
    np.testing.assert_array_equal(imagecodecs.png_decode(block["labels.png"]), LABELS[:128, :128])
    thumbnail = Image.open(io.BytesIO(samples[-1]["thumbnail.jpg"]))
    assert thumbnail.size == (200, 300)


def test_tiles_without_jpeg_are_stored_without_loss(tmp_path: Path) -> None:
    image, _ = write(tmp_path)
    summary = shard_images([image], tmp_path / "out", progress=False)
    assert (summary.copied, summary.tiles) == (0, 19 * 13)
    shards = open_shards(str(tmp_path / "out"))
    np.testing.assert_array_equal(shards.read("a.b", 0, 0, 300, 200), PIXELS)
    assert not shards.has_labels


def test_images_stay_whole_and_shards_stay_near_their_size(tmp_path: Path) -> None:
    images = [write(tmp_path, name)[0] for name in ("a", "b", "c")]
    one = shard_images(images[:1], tmp_path / "one", progress=False).bytes
    summary = shard_images(images, tmp_path / "out", shard_bytes=one + 1000, progress=False)
    assert summary.shards == 2
    shards = open_shards(str(tmp_path / "out"))
    assert [row.shard[:11] for row in shards.images] == ["shard-00000"] * 2 + ["shard-00001"]
    for row in shards.images:
        np.testing.assert_array_equal(shards.read(row.name, 0, 0, 300, 200), PIXELS)


def test_folder_with_a_manifest_is_left_alone(tmp_path: Path) -> None:
    image, _ = write(tmp_path)
    shard_images([image], tmp_path / "out", progress=False)
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match=r"has a manifest\.json already"):
        shard_images([image], tmp_path / "out", progress=False)
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_all_inputs_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    image, labels = write(tmp_path)
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"no image")
    small = tmp_path / "small.tif"
    tifffile.imwrite(small, LABELS[:100], tile=(16, 16))
    (tmp_path / "x").mkdir()
    twin, _ = write(tmp_path / "x")
    out = tmp_path / "out"
    for images, rasters, message in (
        ([image, broken], None, "broken.tif: not an image"),
        ([image], [small], "small.tif: is 100 x 200 px, allowed for labels is the size"),
        ([image], [image], "a.b.tif: has 3 bands, allowed for labels is 1"),
        ([labels], None, "a.b_labels.tif: has 1 band, allowed is 3"),
        ([image], [labels, labels], "labels has 2 paths"),
        ([image, twin], None, "would be stored as 'a.b', and so would"),
        ([], None, "images is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            shard_images(images, out, labels=rasters, progress=False)
    assert not out.exists()


def test_failure_midway_leaves_no_final_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, _ = write(tmp_path)
    written = []

    def members(key: str, sample: dict[str, bytes]) -> bytes:
        written.append(key)
        if len(written) == 3:
            raise KeyboardInterrupt
        return b"x" * 512

    monkeypatch.setattr(shard, "_members", members)
    with pytest.raises(KeyboardInterrupt):
        shard_images([image], tmp_path / "out", progress=False)
    assert len(written) == 3
    assert list((tmp_path / "out").iterdir()) == []


def test_absent_tiles_stay_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tiles = [np.full((64, 64, 3), 9, np.uint8), None]
    tifffile.imwrite(
        path, iter(tiles), shape=(64, 128, 3), dtype=np.uint8, tile=(64, 64), photometric="rgb"
    )
    assert shard_images([path], tmp_path / "out", progress=False).tiles == 1
    shards = open_shards(str(tmp_path / "out"))
    region = shards.region("a", shards.head("a").rect)
    assert region.present[:, :64].all()
    assert not region.present[:, 64:].any()


def test_slide_is_copied_without_decoding(sample: Callable[[str], Path], tmp_path: Path) -> None:
    path = sample("CMU-1-Small-Region.svs")
    summary = shard_images([path], tmp_path, progress=False)
    assert summary.copied == summary.tiles == 13 * 10
    shards = open_shards(str(tmp_path))
    head = shards.head("CMU-1-Small-Region")
    assert (head.tile, head.encoding, head.level) == (240, "jpg", 0)
    assert head.mpp == pytest.approx(0.499)
    expected = tifffile.TiffFile(path).pages[0].asarray().astype(int)
    got = shards.read("CMU-1-Small-Region", 700, 900, 600, 800)
    assert np.abs(got - expected[700:1300, 900:1700]).max() <= 3
