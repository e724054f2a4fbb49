from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
import tifffile
from fsspec.registry import known_implementations
from hypothesis import given, settings
from hypothesis import strategies as st
from watched import WAYS, watched

from axialtrain.data import encode
from axialtrain.data.block import Block
from axialtrain.data.codec import encode_png
from axialtrain.data.fetch import merge
from axialtrain.data.kinds import Raster
from axialtrain.data.readers import open_image
from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.data.store import UNLABELLED, BlockIndex
from axialtrain.grid import Rect

if TYPE_CHECKING:
    from conftest import Source


@pytest.fixture
def copy(source: Source, tmp_path: Path) -> Path:
    """The shards in a folder of the test's own, to be damaged."""
    return Path(shutil.copytree(source.url, tmp_path / "copy"))


def change(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["wide", "small", "tall"]),
    top=st.integers(-40, 280),
    left=st.integers(-40, 320),
    height=st.integers(0, 150),
    width=st.integers(0, 150),
)
def test_any_rectangle_is_the_source(
    source: Source, name: str, top: int, left: int, height: int, width: int
) -> None:
    rect = Rect(top, top + height, left, left + width)
    region = open_shards(source.url).region(name, rect)
    pixels, labels = source.pixels[name], source.labels[name]
    whole = Rect(0, pixels.shape[0], 0, pixels.shape[1])
    inside = rect.intersect(whole)
    expected = np.zeros((height, width, 3), np.uint8)
    classes = np.full((height, width), UNLABELLED, np.uint8)
    present = np.zeros((height, width), bool)
    if not inside.empty:
        expected[inside.slices(rect)] = pixels[inside.slices(whole)]
        classes[inside.slices(rect)] = labels[inside.slices(whole)]
        present[inside.slices(rect)] = True
    np.testing.assert_array_equal(region.pixels, expected)
    np.testing.assert_array_equal(region.labels, classes)
    np.testing.assert_array_equal(region.present, present)


def test_only_the_tiles_in_the_rectangle_are_decoded(source: Source) -> None:
    shards = open_shards(source.url)
    entries = {(b.row, b.col): b for b in shards.head("wide").blocks}
    inside = shards.region("wide", Rect(16, 48, 16, 64))
    assert (inside.tiles_decoded, inside.bytes_read) == (2 * 3, entries[0, 0].length)
    # One px more on each side: one tile more on each side.
    assert shards.region("wide", Rect(15, 49, 15, 65)).tiles_decoded == 4 * 5
    assert shards.region("wide", Rect(127, 129, 127, 129)).tiles_decoded == 4
    outside = shards.region("wide", Rect(200, 210, 0, 10))
    assert (outside.tiles_decoded, outside.bytes_read) == (0, 0)


def test_read_and_read_labels(source: Source) -> None:
    shards = open_shards(source.url)
    assert shards.has_labels
    assert [(row.name, row.height, row.width) for row in shards.images] == [
        ("wide", 200, 300),
        ("small", 70, 50),
        ("tall", 257, 97),
    ]
    np.testing.assert_array_equal(
        shards.read("tall", 100, 10, 150, 80), source.pixels["tall"][100:250, 10:90]
    )
    np.testing.assert_array_equal(
        shards.read_labels("tall", 100, 10, 150, 80), source.labels["tall"][100:250, 10:90]
    )
    with pytest.raises(ValueError, match="image is 'none', allowed are wide, small, tall"):
        shards.read("none", 0, 0, 1, 1)
    with pytest.raises(ValueError, match="height, width is -1, 5"):
        shards.read("tall", 0, 0, -1, 5)


def test_copied_jpeg_tiles_are_what_the_source_decodes_to(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
    tifffile.imwrite(path, pixels, tile=(16, 16), photometric="rgb", compression="jpeg")
    shard_images([path], tmp_path / "out", progress=False)
    shards = open_shards(str(tmp_path / "out"))
    with open_image(path) as image:
        expected = image.read(Rect(40, 290, 3, 170))
    np.testing.assert_array_equal(shards.read("a", 40, 3, 250, 167), expected)
    assert shards.region("a", Rect(0, 9, 0, 9)).labels is None
    with pytest.raises(ValueError, match="has no labels"):
        shards.read_labels("a", 0, 0, 9, 9)


def test_shards_are_read_through_fsspec(source: Source) -> None:
    memory = fsspec.filesystem("memory")
    for path in Path(source.url).iterdir():
        memory.pipe_file(f"/data/{path.name}", path.read_bytes())
    try:
        shards = open_shards("memory://data")
        np.testing.assert_array_equal(shards.read("wide", 0, 0, 200, 300), source.pixels["wide"])
    finally:
        memory.rm("/data", recursive=True)


def test_damaged_tile_is_reported_with_its_place(copy: Path) -> None:
    tar = copy / "shard-00000.tar"
    entry = next(b for b in open_shards(str(copy)).head("wide").blocks if (b.row, b.col) == (1, 1))
    at = entry.offset + 512 + 100  # in the data of the block's first tile
    change(tar, at)
    shards = open_shards(str(copy))
    place = rf"shard-00000\.tar: byte {entry.offset + 512}: member wide/0/00001_00001\.00\.png"
    with pytest.raises(ValueError, match=f"{place}: is damaged"):
        shards.region("wide", Rect(120, 140, 120, 140))
    # Its block fails as a whole, also where the tile itself is not asked for; others do not.
    with pytest.raises(ValueError, match=f"{place}: is damaged"):
        shards.region("wide", Rect(144, 160, 144, 160))
    assert shards.region("wide", Rect(144, 160, 100, 128)).tiles_decoded == 2


def test_damaged_labels_are_reported_with_their_place(copy: Path) -> None:
    tar = copy / "shard-00000.tar"
    at = tar.read_bytes().index(b"wide/0/00000_00001.labels.png") + 512
    change(tar, at + 60)
    place = rf"shard-00000\.tar: byte {at}: member wide/0/00000_00001\.labels\.png"
    with pytest.raises(ValueError, match=f"{place}: is damaged"):
        open_shards(str(copy)).read("wide", 0, 128, 9, 9)


def test_damage_outside_the_members_is_reported_with_its_block(copy: Path) -> None:
    """The padding behind the first member: nothing reads it, but the block has another CRC-32C."""
    tar = copy / "shard-00000.tar"
    entry = open_shards(str(copy)).head("wide").blocks[0]
    header = tar.read_bytes()[entry.offset : entry.offset + 512]
    size = int(header[124:135], 8)
    assert size % 512
    change(tar, entry.offset + 512 + size)
    block = f"wide/0/{entry.row:05d}_{entry.col:05d}"
    place = rf"shard-00000\.tar: byte {entry.offset}: block {block}"
    with pytest.raises(ValueError, match=f"{place}: is damaged"):
        open_shards(str(copy)).read("wide", 0, 0, 200, 300)


def test_label_beyond_the_classes_in_the_manifest_is_refused(
    source: Source, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_shards(str(copy))
    assert shards.classes == 6
    head = replace(shards.head("small"), classes=5)
    monkeypatch.setattr(shards, "head", lambda name: head)
    with pytest.raises(ValueError, match=r"labels\.png: has label 5, allowed is below the 5 cla"):
        shards.region("small", Rect(0, 70, 0, 50))
    np.testing.assert_array_equal(shards.read("small", 0, 0, 70, 50), source.pixels["small"])


def test_damaged_tar_header_is_reported_with_its_place(copy: Path) -> None:
    entry = open_shards(str(copy)).head("wide").blocks[2]
    change(copy / "shard-00000.tar", entry.offset + 3)
    with pytest.raises(ValueError, match=rf"tar: byte {entry.offset}: no tar header"):
        open_shards(str(copy)).read("wide", 0, 0, 200, 300)


def test_any_flipped_bit_is_noticed(copy: Path) -> None:
    tar = copy / "shard-00000.tar"
    whole = tar.read_bytes()
    entries = open_shards(str(copy)).head("small").blocks
    rng = np.random.default_rng(0)
    for at in rng.integers(entries[0].offset, entries[0].offset + entries[0].length, 300):
        data = bytearray(whole)
        data[at] ^= 1 << rng.integers(0, 8)
        tar.write_bytes(data)
        with pytest.raises(ValueError, match=r"shard-00000\.tar: byte \d+: "):
            open_shards(str(copy)).region("small", Rect(0, 70, 0, 50))


def test_damaged_head_is_reported(copy: Path) -> None:
    row = open_shards(str(copy)).row("tall")
    change(copy / "shard-00000.tar", row.head_offset + 10)
    with pytest.raises(ValueError, match=rf"head of 'tall' at byte {row.head_offset}: is damaged"):
        open_shards(str(copy)).head("tall")


def test_shard_that_was_cut_short_is_reported(copy: Path) -> None:
    tar = copy / "shard-00000.tar"
    shards = open_shards(str(copy))
    shards.head("tall")
    cut = shards.head("tall").blocks[-1].offset + 100
    tar.write_bytes(tar.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"ends after {cut}: the shard was cut short"):
        shards.read("tall", 250, 0, 7, 97)
    with pytest.raises(ValueError, match=r"head_offset \+ head_length of 'tall'"):
        open_shards(str(copy)).head("tall")
    tar.unlink()
    with pytest.raises(ValueError, match="names this shard, but it is not there"):
        open_shards(str(copy)).head("tall")


def test_tile_that_would_take_more_memory_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard whose checksums are all right, and whose tiles are not what the head says."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((16, 16, 3), np.uint8), tile=(16, 16), photometric="rgb")
    bomb = encode_png(np.zeros((4096, 4096, 3), np.uint8))
    monkeypatch.setattr(encode, "encode_png", lambda pixels: bomb)
    shard_images([path], tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"00\.png: is of shape \(4096, 4096, 3\) where \(16, 16"):
        open_shards(str(tmp_path / "out")).read("a", 0, 0, 4, 4)


def test_folder_without_shards_is_refused(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(ValueError, match=r"no shards here, allowed is a folder with a manifest"):
        open_shards(str(tmp_path))
    manifest = copy / "manifest.json"
    data = json.loads(manifest.read_bytes())
    manifest.write_bytes(manifest.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"manifest\.json: not JSON, or cut short"):
        open_shards(str(copy))
    data["version"] = 99
    manifest.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape("version is 99, allowed is 1")):
        open_shards(str(copy))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("noprotocol://x", "Protocol not known"),
        ("/" + "x" * 300, "too long"),
        ("absent://bucket/x", "Install absentfs"),
    ],
)
def test_url_that_cannot_be_opened_is_named(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = {"class": "absentfs.core.FileSystem", "err": "Install absentfs to access this"}
    monkeypatch.setitem(known_implementations, "absent", absent)
    with pytest.raises(ValueError, match=rf"^{re.escape(url)}: no shards can be .*{message}"):
        open_shards(url)


def test_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(ValueError, match=rf"^{tmp_path}: no shards can be read here .*directory"):
        open_shards(str(tmp_path))


@pytest.mark.parametrize("way", WAYS)
def test_heads_are_fetched_once(source: Source, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    fetched = watched(monkeypatch, way)
    shards = open_shards(source.url)
    assert shards.head("wide") is shards.head("wide")
    assert len(fetched) == 1


def test_ranges_are_merged_over_small_gaps() -> None:
    assert merge([(0, 10), (10, 20), (25, 30), (100, 110)], gap=5) == [(0, 30), (100, 110)]
    assert merge([], gap=5) == []


@pytest.fixture(scope="module")
def holed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Raster]:
    """Shards of one image, 'a', of 4 blocks of 128 px: one without a tile, one without two of its,
    one with a mask, one whole; and its pixels, in which 7 is nodata."""
    folder = tmp_path_factory.mktemp("holed")
    pixels = np.random.default_rng(5).integers(8, 256, (200, 250, 3), np.uint8)
    pixels[:128, :128] = 7
    pixels[32:48, 160:192] = 7
    pixels[140:150, 20:60] = 7
    tifffile.imwrite(
        folder / "a.tif", pixels, tile=(16, 16), photometric="rgb",
        extratags=[(42113, "s", 0, "7", True)],  # GDAL's nodata value
    )  # fmt: skip
    shard_images([folder / "a.tif"], folder / "shards", progress=False)
    return str(folder / "shards"), pixels


@pytest.mark.parametrize("told", [True, False], ids=["told", "older"])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), spare=st.booleans())
def test_no_memory_is_left_as_it_was(
    told: bool, data: st.DataObject, spare: bool, holed: tuple[str, Raster]
) -> None:
    """What lies between tiles is set to 0, whether or not the head says what is empty."""
    shards, whole = open_shards(holed[0]), holed[1]
    head = shards.head("a")
    if not told:
        blocks = tuple(replace(entry, empty=()) for entry in head.blocks)
        shards._heads.put(replace(head, blocks=blocks))
    top, left = data.draw(st.integers(0, 199)), data.draw(st.integers(0, 249))
    bottom, right = data.draw(st.integers(top + 1, 200)), data.draw(st.integers(left + 1, 250))
    rect = Rect(top, bottom, left, right)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", lambda shape, dtype: np.full(shape, 77, dtype))
        region = shards.region("a", rect, spare=spare)
    part = whole[rect.top : rect.bottom, rect.left : rect.right]
    there = (part != 7).any(-1)
    np.testing.assert_array_equal(region.present, there)
    np.testing.assert_array_equal(region.pixels, np.where(there[..., None], part, 0))


def test_pixels_are_painted_without_the_index(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_shards(source.url)
    monkeypatch.setattr(BlockIndex, "from_json", None)
    np.testing.assert_array_equal(shards.read("wide", 0, 0, 200, 300), source.pixels["wide"])


def test_blocks_are_read_when_it_is_their_turn(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what is decoded is still in the processor's cache."""
    shards = open_shards(source.url)
    seen: list[str] = []
    paint, pread = Block.paint_pixels, os.pread
    shards.head("wide")

    def reading(*given: Any) -> bytes:
        seen.append("read")
        return pread(*given)

    def painting(*given: Any, **more: Any) -> int:
        seen.append("paint")
        return paint(*given, **more)

    monkeypatch.setattr(os, "pread", reading)
    monkeypatch.setattr(Block, "paint_pixels", painting)
    np.testing.assert_array_equal(shards.read("wide", 0, 0, 200, 300), source.pixels["wide"])
    assert seen == ["read", "paint"] * len(shards.head("wide").blocks)


@pytest.mark.parametrize("spare", [False, True])
def test_no_file_stays_open_for_an_error_that_is_kept(source: Source, spare: bool) -> None:
    shards = open_shards(source.url)
    shards.head("wide")
    errors, before = [], len(os.listdir("/proc/self/fd"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "paint_pixels", None)
        for _ in range(5):
            with pytest.raises(TypeError) as error:
                shards.region("wide", Rect(0, 200, 0, 300), spare=spare)
            errors.append(error.value)
    assert len(os.listdir("/proc/self/fd")) == before
