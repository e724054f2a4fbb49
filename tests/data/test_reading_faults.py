"""Each fault of a shard is reported with its place: by the tile stream and by the region reader.

Of what webdataset passes over in silence (design 3.7) each test also shows that it does so.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forged
import numpy as np
import pytest
import tifffile
import webdataset
from torch.utils.data import DataLoader

from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.data.tiles import tile_stream
from axialtrain.grid import Rect

if TYPE_CHECKING:
    from conftest import Source

Read = Callable[[str], object]
SHARD = r"shard-00000\.tar"


def by_region(url: str) -> object:
    shards = open_shards(url)
    return [
        shards.region(row.name, Rect(0, row.height, 0, row.width)).tiles_decoded
        for row in shards.images
    ]


def by_stream(url: str) -> object:
    return [sample["__key__"] for sample in tile_stream(url)]


READERS = pytest.mark.parametrize("read", [by_region, by_stream])


@pytest.fixture
def copy(source: Source, tmp_path: Path) -> Path:
    """The shards in a folder of the test's own, to be damaged; both readers have read them."""
    return Path(shutil.copytree(source.url, tmp_path / "copy"))


def by_webdataset(folder: Path) -> Iterator[str]:
    """Keys, as the library reads them with its defaults."""
    dataset = webdataset.WebDataset(str(folder / "shard-00000.tar"), shardshuffle=False)
    return (sample["__key__"] for sample in dataset)


def members(folder: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(folder / "shard-00000.tar") as tar:
        return tar.getmembers()


def change(folder: Path, at: int, bit: int = 0x10) -> None:
    tar = folder / "shard-00000.tar"
    data = bytearray(tar.read_bytes())
    data[at] ^= bit
    tar.write_bytes(data)


def reported(read: Read, folder: Path, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        read(str(folder))


@READERS
def test_shard_cut_at_a_member_boundary(copy: Path, read: Read) -> None:
    whole = list(by_webdataset(copy))
    third = members(copy)[-40]
    with (copy / "shard-00000.tar").open("r+b") as file:
        file.truncate(third.offset)
    assert len(list(by_webdataset(copy))) < len(whole)  # and no error
    reported(
        read, copy, rf"head_length of 'tall' is \d+, allowed is up to the {third.offset} bytes of "
        rf"{SHARD}"
    )  # fmt: skip


def test_shard_cut_at_a_member_boundary_whose_heads_are_known(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it is cut while it is read: the head, which lies behind, has been fetched."""
    shards = open_shards(str(copy))
    for row in shards.images:
        shards.head(row.name)
    first = min(shards.head("tall").blocks, key=lambda entry: entry.offset)
    inside = next(m for m in members(copy) if m.offset > first.offset)
    with (copy / "shard-00000.tar").open("r+b") as file:
        file.truncate(inside.offset)
    what = rf"{SHARD}: bytes {first.offset} to \d+ belong to it, but it ends after {inside.offset}"
    with pytest.raises(ValueError, match=what):
        shards.region("tall", Rect(0, 257, 0, 97))
    monkeypatch.setattr("axialtrain.data.tiles.open_shards", lambda *arguments: shards)
    with pytest.raises(ValueError, match=what):
        list(tile_stream(str(copy), shuffle=0))


@READERS
def test_shard_cut_inside_a_member(copy: Path, read: Read) -> None:
    inside = members(copy)[-40]
    cut = inside.offset_data + inside.size // 2
    with (copy / "shard-00000.tar").open("r+b") as file:
        file.truncate(cut)
    with pytest.raises(tarfile.ReadError):
        list(by_webdataset(copy))
    reported(read, copy, rf"allowed is up to the {cut} bytes of {SHARD}")


@READERS
def test_flipped_bit_in_a_header(copy: Path, read: Read) -> None:
    whole = list(by_webdataset(copy))
    header = members(copy)[100]
    change(copy, header.offset + 2)
    assert 0 < len(list(by_webdataset(copy))) < len(whole)  # and no error
    reported(read, copy, rf"{SHARD}: byte {header.offset}: no tar header where one belongs")


@READERS
def test_flipped_bit_in_a_payload(copy: Path, read: Read) -> None:
    whole = list(by_webdataset(copy))
    member = members(copy)[100]
    change(copy, member.offset_data + 70)
    assert list(by_webdataset(copy)) == whole  # and no error
    name = re.escape(member.name)
    reported(read, copy, rf"{SHARD}: byte {member.offset_data}: member {name}: is damaged")


@READERS
def test_checksum_in_the_directory_that_is_another(copy: Path, read: Read, source: Source) -> None:
    entry = open_shards(source.url).head("tall").blocks[1]

    def wrong(record: dict[str, Any]) -> None:
        record["blocks"][1]["crc32c"] ^= 1

    forged.forge(copy, "tall", head=wrong)
    block = f"tall/0/{entry.row:05d}_{entry.col:05d}"
    reported(read, copy, rf"{SHARD}: byte \d+: block {block}: is damaged \(its CRC-32C is not")


@READERS
def test_directory_that_points_past_the_end(copy: Path, read: Read) -> None:
    size = (copy / "shard-00000.tar").stat().st_size

    def beyond(record: dict[str, Any]) -> None:
        record["blocks"][0]["offset"] = size

    forged.forge(copy, "wide", head=beyond)
    reported(
        read, copy, rf"{SHARD}: head of 'wide' at byte \d+: blocks\[0\]: offset is {size}, allowed"
    )


@READERS
def test_manifest_that_points_past_the_end(copy: Path, read: Read) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["images"][2]["head_offset"] = 1 << 40
    (copy / "manifest.json").write_text(json.dumps(manifest))
    reported(read, copy, rf"head_offset \+ head_length of 'tall' is \d+, allowed .* of {SHARD}")


@READERS
def test_directory_that_points_at_another_block(copy: Path, read: Read) -> None:
    def swapped(record: dict[str, Any]) -> None:
        one, two = record["blocks"][:2]
        for key in ("offset", "length", "crc32c"):
            one[key], two[key] = two[key], one[key]

    forged.forge(copy, "wide", head=swapped)
    reported(read, copy, rf"{SHARD}: byte \d+: member 'wide/0/\d+_\d+\.00\.png' stands there")


@READERS
def test_missing_shard(copy: Path, read: Read) -> None:
    (copy / "shard-00000.tar").unlink()
    reported(read, copy, rf"{SHARD}: manifest\.json names this shard, but it is not there")


def test_missing_shard_of_several(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.tif" for name in "abc"]
    for path in paths:
        tifffile.imwrite(path, np.ones((40, 40, 3), np.uint8), tile=(16, 16), photometric="rgb")
    shard_images(paths, tmp_path / "out", shard_bytes=1, progress=False)
    (tmp_path / "out" / "shard-00001.tar").unlink()
    what = r"shard-00001\.tar: manifest\.json names this shard, but it is not there"
    for read in (by_region, by_stream):
        reported(read, tmp_path / "out", what)


def test_place_of_a_fault_comes_out_of_a_worker(copy: Path) -> None:
    member = members(copy)[100]
    loader = DataLoader(tile_stream(str(copy)), batch_size=None, num_workers=2)
    change(copy, member.offset_data + 70)
    with pytest.raises(ValueError, match=rf"byte {member.offset_data}: member {member.name}"):
        list(loader)


def test_manifest_that_changes_under_a_stream(copy: Path) -> None:
    stream = tile_stream(str(copy))
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["images"].pop()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="has another manifest than when the stream was made"):
        list(stream)
