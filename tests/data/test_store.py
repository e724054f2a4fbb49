from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from axialtrain.data.hilbert import hilbert_order
from axialtrain.data.store import (
    INSTANCES,
    LABELS,
    MAX_LEVEL,
    MAX_NAME,
    MAX_NAME_WITH_INSTANCES,
    BlockEntry,
    BlockIndex,
    Head,
    ImageRow,
    Manifest,
    Tile,
    block_key,
    count_classes,
    image_name,
    max_block_bytes,
    tile_member,
)

ROW = ImageRow("a.b", "shard-00000.tar", 4096, 500, "0" * 64, 300, 200, None)
ROW_2 = replace(ROW, name="c", head_offset=16384)
HEAD = Head(
    name="a.b",
    height=300,
    width=200,
    tile=16,
    mpp=0.5,
    level=0,
    downsample=1.0,
    encoding="png",
    classes=None,
    source_sha256="1" * 64,
    group="a.b",
    blocks=tuple(
        BlockEntry(row, col, 512 * (row * 2 + col), 512, 7) for row in range(3) for col in range(2)
    ),
)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 1), (4, 4), (3, 5), (13, 10)])
def test_hilbert_order_visits_every_block_once(grid: tuple[int, int]) -> None:
    order = hilbert_order(*grid)
    assert sorted(order) == [(r, c) for r in range(grid[0]) for c in range(grid[1])]


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_hilbert_order_steps_to_a_neighbour(side: int) -> None:
    order = hilbert_order(side, side)
    steps = [abs(a[0] - b[0]) + abs(a[1] - b[1]) for a, b in pairwise(order)]
    assert steps == [1] * (side * side - 1)


@pytest.mark.parametrize(
    ("path", "name"),
    [("x/a b.tif", "a_b"), ("TCGA.1-2.svs", "TCGA.1-2"), ("..x.tif", "x"), ("é/ü.tif", "_")],
)
def test_image_names_are_safe(path: str, name: str) -> None:
    assert image_name(path) == name


@pytest.mark.parametrize("path", ["...", "x/-.tif", "y" * 200 + ".tif"])
def test_image_without_a_name_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="no image name"):
        image_name(path)


def test_name_may_be_as_long_as_its_longest_member_allows() -> None:
    longest = "n" * MAX_NAME
    assert image_name(f"x/{longest}.tif") == longest
    assert len(f"{block_key(longest, MAX_LEVEL, 99999, 99999)}.{LABELS}") == 100
    shorter = "n" * MAX_NAME_WITH_INSTANCES
    assert len(f"{block_key(shorter, MAX_LEVEL, 99999, 99999)}.{INSTANCES}") == 100
    with pytest.raises(ValueError, match=rf"would have {MAX_NAME + 1} char.* at most {MAX_NAME} "):
        image_name(f"x/{longest}n.tif")


@pytest.mark.parametrize(
    ("labels", "classes"), [([3, 255, 0], 4), ([254], 255), ([255, 255], 0), ([0], 1)]
)
def test_classes_are_counted_without_the_unlabelled(labels: list[int], classes: int) -> None:
    assert count_classes(np.array([labels], np.uint8)) == classes


def test_records_survive_json() -> None:
    assert Manifest.from_json(Manifest((ROW,)).to_json(), "m").images == (ROW,)
    assert Head.from_json(HEAD.to_json(), ROW, 1 << 20, "h") == HEAD
    index = BlockIndex(1, 0, (Tile(8, 1, tile_member(8, 1, "png"), 5),), None)
    assert BlockIndex.from_json(index.to_json(), HEAD, 1, 0, "b") == index


@pytest.mark.parametrize("label", [0, 7, 65535])
def test_class_of_an_image_survives_json(label: int) -> None:
    row, head = replace(ROW, label=label), replace(HEAD, label=label)
    assert Manifest.from_json(Manifest((row, ROW_2)).to_json(), "m").images == (row, ROW_2)
    assert Head.from_json(head.to_json(), row, 1 << 20, "h") == head
    assert Manifest((row,)).digest != Manifest((ROW,)).digest


def test_records_without_a_class_are_those_of_before_there_were_classes() -> None:
    manifest = Manifest((ROW,))
    assert b'label"' not in manifest.to_json() + HEAD.to_json()
    # As it was when an image had no class at all: runs saved then still go on.
    assert manifest.digest == "5e21e7915173e6cec55e27af046a78b63eeb35453d7f2e8e89babc31bda1bbc8"
    data = json.loads(manifest.to_json())
    data["images"][0]["label"] = None
    assert Manifest.from_json(json.dumps(data).encode(), "m") == manifest


@pytest.mark.parametrize("instances", [0, 7, 65535])
def test_number_of_instances_survives_json(instances: int) -> None:
    row = replace(ROW, classes=3, instances=instances)
    head = replace(HEAD, classes=3, instances=instances)
    assert Manifest.from_json(Manifest((row, ROW_2)).to_json(), "m").images == (row, ROW_2)
    assert Head.from_json(head.to_json(), row, 1 << 20, "h") == head
    tiles = (Tile(8, 1, tile_member(8, 1, "png"), 5),)
    index = BlockIndex(1, 0, tiles, labels_crc32c=6, instances_crc32c=7)
    assert BlockIndex.from_json(index.to_json(), head, 1, 0, "b") == index
    without = replace(index, instances_crc32c=None).to_json()
    with pytest.raises(ValueError, match=r"^b: instances_crc32c is missing, allowed is"):
        BlockIndex.from_json(without, head, 1, 0, "b")


def test_records_without_instances_do_not_speak_of_them() -> None:
    index = BlockIndex(1, 0, (), 5)
    assert b"instances" not in Manifest((ROW,)).to_json() + HEAD.to_json() + index.to_json()


def test_instances_without_labels_are_refused() -> None:
    data = Manifest((replace(ROW, instances=3),)).to_json()
    with pytest.raises(ValueError, match=r"^m: images\[0\]: instances is 3, allowed is none where"):
        Manifest.from_json(data, "m")


@pytest.mark.parametrize(("of_row", "of_head"), [(None, 3), (3, None), (3, 4), (1, True)])
def test_head_of_other_instances_is_refused(of_row: int | None, of_head: int | None) -> None:
    data = replace(HEAD, classes=2, instances=of_head).to_json()
    with pytest.raises(ValueError, match=r"^h: instances is .*, allowed is .*"):
        Head.from_json(data, replace(ROW, classes=2, instances=of_row), 1 << 20, "h")


def test_bound_of_a_block_counts_its_instances() -> None:
    few, many = (max_block_bytes(16, instances=wanted) for wanted in (False, True))
    assert many - few == 4 * (8 * 16) ** 2  # twice the two bytes of each px
    for most, instances in ((few, None), (many, 5)):
        row = replace(ROW, classes=2, instances=instances)
        for length, allowed in ((most, True), (most + 1, False)):
            blocks = (replace(HEAD.blocks[0], offset=1 << 20, length=length), *HEAD.blocks[1:])
            data = replace(HEAD, classes=2, instances=instances, blocks=blocks).to_json()
            if allowed:
                assert Head.from_json(data, row, 1 << 30, "h").blocks == blocks
            else:
                with pytest.raises(ValueError, match=r"^h: blocks\[0\]: length is"):
                    Head.from_json(data, row, 1 << 30, "h")


@pytest.mark.parametrize(("of_row", "of_head"), [(None, 3), (3, None), (3, 4), (1, True)])
def test_head_of_another_class_is_refused(of_row: int | None, of_head: int | None) -> None:
    data = replace(HEAD, label=of_head).to_json()
    with pytest.raises(ValueError, match=r"^h: label is .*, allowed is .*"):
        Head.from_json(data, replace(ROW, label=of_row), 1 << 20, "h")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../up"),
        ("name", "a/b"),
        ("name", ".."),
        ("name", 3),
        ("shard", "/etc/passwd.tar"),
        ("shard", "../other.tar"),
        ("shard", "x.tar\n"),
        ("head_offset", -1),
        ("head_offset", 511),
        ("head_offset", 1.5),
        ("head_length", 1 << 40),
        ("head_sha256", "zz"),
        ("height", 0),
        ("height", True),
        ("width", 1 << 30),
        ("classes", 256),
        ("classes", -1),
        ("classes", False),
        ("label", -1),
        ("label", 65536),
        ("label", 1.0),
        ("label", True),
        ("label", "3"),
        ("instances", -1),
        ("instances", 65536),
        ("instances", 1.0),
        ("instances", True),
        ("instances", "3"),
    ],
)
def test_hostile_manifest_row_is_named(key: str, value: object) -> None:
    data = json.loads(Manifest((ROW,)).to_json())
    data["images"][0][key] = value
    with pytest.raises(ValueError, match=rf"m\.json: images\[0\]: {key} is .*allowed is"):
        Manifest.from_json(json.dumps(data).encode(), "m.json")


def test_row_must_say_whether_there_are_labels() -> None:
    data = json.loads(Manifest((ROW,)).to_json())
    del data["images"][0]["classes"]
    with pytest.raises(ValueError, match=r"images\[0\]: classes is missing, allowed is"):
        Manifest.from_json(json.dumps(data).encode(), "m.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Manifest((ROW,)).to_json()[:-5], "not JSON, or cut short"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "where an object"),
        (b"{}", "version is missing"),
        (b'{"version": 2, "images": []}', "version is 2, allowed is 1"),
        (b'{"version": 1, "images": []}', "at least one image"),
        (Manifest((ROW, ROW)).to_json(), "twice"),
    ],
)
def test_manifest_that_is_none_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Manifest.from_json(data, "m.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tile", 0),
        ("tile", 1 << 20),
        ("block", 3),
        ("height", 301),
        ("mpp", float("nan")),
        ("encoding", "gif"),
        ("classes", 3),
        ("label", 1 << 16),
        ("name", "other"),
        ("group", "../x"),
        ("blocks", [{}] * 7),
    ],
)
def test_hostile_head_is_named(key: str, value: object) -> None:
    data: dict[str, Any] = json.loads(HEAD.to_json())
    data[key] = value
    with pytest.raises(ValueError, match=rf"^h: {key} is "):
        Head.from_json(json.dumps(data).encode(), ROW, 1 << 20, "h")


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", 1 << 20), ("offset", -1), ("length", 1 << 40), ("row", 3), ("crc32c", -1)],
)
def test_block_outside_its_shard_is_named(key: str, value: int) -> None:
    data: dict[str, Any] = json.loads(HEAD.to_json())
    data["blocks"][2][key] = value
    with pytest.raises(ValueError, match=rf"^h: blocks\[2\]: {key} is "):
        Head.from_json(json.dumps(data).encode(), ROW, 1 << 20, "h")


@pytest.mark.parametrize("offset", [0, 1, 511, 2047, 4096 - 1023, 4096, 4096 + 511])
def test_block_over_another_or_over_the_head_is_refused(offset: int) -> None:
    data: dict[str, Any] = json.loads(HEAD.to_json())
    data["blocks"][5]["offset"] = offset
    with pytest.raises(ValueError, match=r"^h: .* starts at byte \d+, allowed is behind "):
        Head.from_json(json.dumps(data).encode(), ROW, 1 << 20, "h")


@pytest.mark.parametrize("offset", [4096 - 512, 4096, 4096 + 512])
def test_heads_over_each_other_are_refused(offset: int) -> None:
    rows = (ROW, replace(ROW_2, head_offset=offset))
    with pytest.raises(ValueError, match=r"^m: shard-00000\.tar: head of .* starts at byte"):
        Manifest.from_json(Manifest(rows).to_json(), "m")
    apart = (ROW, replace(rows[1], shard="shard-00001.tar"))
    assert Manifest.from_json(Manifest(apart).to_json(), "m").images == apart


def test_every_block_must_be_there_once() -> None:
    data: dict[str, Any] = json.loads(HEAD.to_json())
    data["blocks"][1] = data["blocks"][0]
    with pytest.raises(ValueError, match="each of the 3 x 2 blocks once"):
        Head.from_json(json.dumps(data).encode(), ROW, 1 << 20, "h")


@pytest.mark.parametrize(
    ("key", "value"), [("row", 7), ("col", 9), ("member", "../../x"), ("crc32c", "0")]
)
def test_tile_of_another_block_is_named(key: str, value: object) -> None:
    index = BlockIndex(1, 0, (Tile(8, 1, tile_member(8, 1, "png"), 5),), None)
    data = json.loads(index.to_json())
    data["tiles"][0][key] = value
    with pytest.raises(ValueError, match=rf"tiles\[0\]: {key} is "):
        BlockIndex.from_json(json.dumps(data).encode(), HEAD, 1, 0, "b")
