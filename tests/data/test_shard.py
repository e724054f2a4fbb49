from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from axialtrain.cli import main
from axialtrain.data import encode
from axialtrain.data.hilbert import hilbert_order
from axialtrain.data.readers import open_image
from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.data.store import (
    MAX_LEVEL,
    MAX_NAME,
    MAX_NAME_WITH_INSTANCES,
    TAR_RECORD,
    Head,
    block_key,
)

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


@pytest.mark.parametrize(
    ("options", "manifest", "tar"),
    [
        (
            {},
            "2fa2855376b1686b1382da27d4a37820ae30ddfde524d687a6a1f768ef73f49a",
            "31f147a8e18b5eca62947e2c520262466db62fe6c34af69b78e8f811fdcb58d4",
        ),
        (
            {"labels": ["labels.tif"]},
            "98df12bf3f6b38063bede05854b9157c0af87ef21f19be93d237b8c22fd0670a",
            "eccf3e701846627d480b18e873c431b2f9ff592f1cf530556fd0be39a5fe8277",
        ),
        (
            {"labels": ["labels.tif"], "image_labels": [3]},
            "265658f619896abfe5bdcbc69dc6ee7559dd9627f704956b938460e3bfaad8e4",
            "869ffe83a9ed1d4063f4069f48319641f4e3430c7e8d7bd6b599d8ee59e0e3fd",
        ),
    ],
)
def test_without_instances_the_bytes_are_those_of_before_there_were_any(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    manifest: str,
    tar: str,
) -> None:
    """Nothing is encoded, and no source hashed, so that no library's version counts.

    Heads have the thumbnail's checksum and the pixels of labels since: without these they are what
    they were.
    """
    to_json = Head.to_json

    def as_before(head: Head) -> bytes:
        blocks = tuple(replace(entry, labelled=None) for entry in head.blocks)
        return to_json(replace(head, thumbnail_crc32c=None, blocks=blocks))

    monkeypatch.setattr(Head, "to_json", as_before)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encode, "encode_png", lambda pixels: pixels.tobytes())
    monkeypatch.setattr(encode, "encode_jpeg", lambda pixels, quality: pixels.tobytes())
    monkeypatch.setattr(encode, "_sha256", lambda path: "0" * 64)
    pixels = np.arange(40 * 56 * 3).reshape(40, 56, 3).astype(np.uint8)
    tifffile.imwrite("a.tif", pixels, tile=(16, 16), photometric="rgb")
    tifffile.imwrite("labels.tif", pixels[..., 0] % 7, tile=(16, 16))
    shard_images(["a.tif"], "out", progress=False, **options)
    for name, digest in (("manifest.json", manifest), ("shard-00000.tar", tar)):
        assert hashlib.sha256(Path("out", name).read_bytes()).hexdigest() == digest


def test_plain_tools_read_the_shards(tmp_path: Path) -> None:
    image, labels = write(tmp_path, compression="jpeg")
    summary = shard_images([image], tmp_path / "out", labels=[labels], progress=False)
    assert (len(summary.images), summary.shards, summary.total("blocks")) == (1, 1, 6)
    assert summary.total("tiles") == summary.total("copied") == 19 * 13
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
    assert (summary.total("copied"), summary.total("tiles")) == (0, 19 * 13)
    shards = open_shards(str(tmp_path / "out"))
    np.testing.assert_array_equal(shards.read("a.b", 0, 0, 300, 200), PIXELS)
    assert (shards.has_labels, shards.classes) == (False, None)


def test_images_stay_whole_and_shards_stay_near_their_size(tmp_path: Path) -> None:
    images = [write(tmp_path, name)[0] for name in ("a", "b", "c")]
    one = shard_images(images[:1], tmp_path / "one", progress=False).bytes
    summary = shard_images(images, tmp_path / "out", shard_bytes=one + 1000, progress=False)
    assert summary.shards == 2
    shards = open_shards(str(tmp_path / "out"))
    assert [row.shard[:11] for row in shards.images] == ["shard-00000"] * 2 + ["shard-00001"]
    for row in shards.images:
        np.testing.assert_array_equal(shards.read(row.name, 0, 0, 300, 200), PIXELS)


def test_folder_that_cannot_be_is_named_before_anything_is_opened(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for out in (file, file / "below", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(out))}: "):
            shard_images([tmp_path / "missing.tif"], out, progress=False)
    assert list(tmp_path.iterdir()) == [file]


def test_folder_that_may_not_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, _ = write(tmp_path)
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        with pytest.raises(ValueError, match=r"out: .*out cannot be written to"):
            shard_images([image], tmp_path / "out", progress=False)

    def failing(*_: object, **__: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(Path, "mkdir", failing)
    with pytest.raises(
        ValueError, match=r"other/\.shard: cannot be the folder of unfinished work .*no space"
    ):
        shard_images([image], tmp_path / "other", progress=False)


def test_classes_of_each_image_are_counted(tmp_path: Path) -> None:
    images = [write(tmp_path, name)[0] for name in ("a", "b", "c")]
    labels = []
    for number, values in enumerate(([0, 7, 255], [255], [0])):
        labels.append(tmp_path / f"{number}.tif")
        raster = np.resize(np.array(values, np.uint8), (300, 200))
        tifffile.imwrite(labels[-1], raster, tile=(16, 16))
    shard_images(images, tmp_path / "out", labels=labels, progress=False)
    shards = open_shards(str(tmp_path / "out"))
    assert [row.classes for row in shards.images] == [8, 0, 1]
    assert [shards.head(name).classes for name in "abc"] == [8, 0, 1]
    assert (shards.has_labels, shards.classes) == (True, 8)


def test_class_of_each_image_is_kept(tmp_path: Path) -> None:
    images = [write(tmp_path, name)[0] for name in ("a", "b", "c")]
    out = tmp_path / "out"
    classes: list[Any] = [3, 0, np.uint16(65535)]  # also as a table's column has them
    shard_images(images, out, image_labels=classes, progress=False)
    shards = open_shards(str(out))
    assert [row.label for row in shards.images] == [3, 0, 65535]
    assert [shards.head(name).label for name in "abc"] == [3, 0, 65535]
    assert (shards.has_image_labels, shards.image_classes) == (True, 65536)
    assert (shards.has_labels, shards.classes) == (False, None)
    # Where only some have a class, as in shards that were put together by hand.
    manifest = out / "manifest.json"
    data = json.loads(manifest.read_bytes())
    del data["images"][2]["label"]
    manifest.write_text(json.dumps(data))
    shards = open_shards(str(out))
    assert (shards.has_image_labels, shards.image_classes) == (False, 4)
    with pytest.raises(ValueError, match="label is 65535, allowed is None, as in manifest"):
        shards.head("c")


def test_without_classes_nothing_speaks_of_them(tmp_path: Path) -> None:
    image, labels = write(tmp_path)
    shard_images([image], tmp_path / "out", labels=[labels], progress=False)
    shards = open_shards(str(tmp_path / "out"))
    assert (shards.has_image_labels, shards.image_classes) == (False, None)
    assert shards.head("a.b").label is None
    assert "label" not in json.loads((tmp_path / "out" / "manifest.json").read_bytes())["images"][0]


def test_command_takes_a_class_for_each_image(tmp_path: Path) -> None:
    images = [str(write(tmp_path, name)[0]) for name in ("a", "b")]
    out = str(tmp_path / "out")
    assert main(["shard", *images, "--out", out, "--image-labels", "7", "0"]) == 0
    assert [row.label for row in open_shards(out).images] == [7, 0]


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(name=st.from_regex(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{{MAX_NAME - 1}}}", fullmatch=True))
def test_longest_names_are_read_back(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("longest")
    image, labels = write(folder, name)
    shard_images([image], folder / "out", labels=[labels], progress=False)
    shards = open_shards(str(folder / "out"))
    np.testing.assert_array_equal(shards.read(name, 0, 0, 300, 200), PIXELS)
    np.testing.assert_array_equal(shards.read_labels(name, 0, 0, 300, 200), LABELS)
    samples = webdataset.WebDataset(str(folder / "out" / "shard-00000.tar"), shardshuffle=False)
    assert next(iter(samples))["__key__"] == f"{name}/0/00000_00000"


def test_member_of_100_characters_has_a_plain_header() -> None:
    key = block_key("n" * MAX_NAME, MAX_LEVEL, 99999, 99999)
    data = encode.members(key, {"labels.png": b"x"})
    assert len(data) == 2 * TAR_RECORD
    assert data[:100] == f"{key}.labels.png".encode()


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
        ([image], [labels, labels], "labels has 2 paths"),
        ([image, tmp_path / "none.tif"], None, "none.tif: there is no such file"),
        ([image, tmp_path / "x"], None, "x: is a folder"),
        ([image], [tmp_path / "none.tif"], "none.tif: there is no such file"),
        ([image, twin], None, "would be stored as 'a.b', and so would"),
        ([], None, "images is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            shard_images(images, out, labels=rasters, progress=False)
    many = tmp_path / "many.tif"
    tifffile.imwrite(many, LABELS.astype(np.uint32), tile=(16, 16))
    lossy = tmp_path / "lossy.tif"
    tifffile.imwrite(lossy, LABELS, tile=(16, 16), compression="jpeg")
    deep = tmp_path / "deep.tif"
    tifffile.imwrite(deep, PIXELS.astype(np.uint16), tile=(16, 16), photometric="rgb")
    longest = write(tmp_path, "n" * (MAX_NAME_WITH_INSTANCES + 1))[0]
    for images, instances, message in (
        ([image], [small], "small.tif: is 100 x 200 px, allowed for instances is the size"),
        ([image], [image], "a.b.tif: has 3 bands, allowed for instances is 1"),
        ([image], [deep], "deep.tif: has 3 bands, allowed for instances is 1"),
        ([image], [many], r"many.tif: its pixels are uint32, allowed is uint8 .* or uint16"),
        ([image], [lossy], "lossy.tif: its compression is JPEG, allowed for instances"),
        ([image], [tmp_path / "none.tif"], "none.tif: there is no such file"),
        ([image, image], [labels], "instances has 1 paths, allowed is one for each of the 2"),
        ([image], [], "instances has 0 paths"),
        ([longest], [labels], rf"has {MAX_NAME_WITH_INSTANCES + 1} characters, allowed with inst"),
    ):
        rasters = [labels] * len(images)
        with pytest.raises(ValueError, match=message):
            shard_images(images, out, labels=rasters, instances=instances, progress=False)
    with pytest.raises(ValueError, match="instances has 1 paths and labels is missing, allowed"):
        shard_images([image], out, instances=[labels], progress=False)
    # What images and instances may be, labels may not.
    with pytest.raises(ValueError, match=r"deep\.tif: its pixels are uint16, allowed is uint8 "):
        shard_images([image], out, labels=[deep], progress=False)
    with pytest.raises(ValueError, match="level is 65, allowed is 0 to 64"):
        shard_images([image], out, level=65, progress=False)
    for classes, message in (
        ([], "image_labels has 0 classes, allowed is one for each of the 1 images"),
        ([1, 2], "image_labels has 2 classes"),
        ([-1], r"image_labels\[0\] is -1, allowed is a class from 0 to 65535"),
        ([65536], r"image_labels\[0\] is 65536, allowed"),
        ([True], r"image_labels\[0\] is True, allowed"),
        ([1.0], r"image_labels\[0\] is 1\.0, allowed"),
        (["1"], r"image_labels\[0\] is '1', allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            shard_images([image], out, image_labels=classes, progress=False)  # type: ignore[arg-type]
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

    monkeypatch.setattr(encode, "members", members)
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
    assert shard_images([path], tmp_path / "out", progress=False).total("tiles") == 1
    shards = open_shards(str(tmp_path / "out"))
    region = shards.region("a", shards.head("a").rect)
    assert region.present[:, :64].all()
    assert not region.present[:, 64:].any()


def test_slide_is_copied_without_decoding(sample: Callable[[str], Path], tmp_path: Path) -> None:
    path = sample("CMU-1-Small-Region.svs")
    summary = shard_images([path], tmp_path, progress=False)
    assert summary.total("copied") == summary.total("tiles") == 13 * 10
    shards = open_shards(str(tmp_path))
    head = shards.head("CMU-1-Small-Region")
    assert (head.tile, head.encoding, head.level) == (240, "jpg", 0)
    assert head.mpp == pytest.approx(0.499)
    expected = tifffile.TiffFile(path).pages[0].asarray().astype(int)
    got = shards.read("CMU-1-Small-Region", 700, 900, 600, 800)
    assert np.abs(got - expected[700:1300, 900:1700]).max() <= 3
