"""What is damaged is left out as missing, where that is asked for: on every mesh the same."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from forged import forge
from hypothesis import given, settings
from hypothesis import strategies as st

from axialtrain.data.batch import Batch
from axialtrain.data.checked import Record
from axialtrain.data.config import DataConfig
from axialtrain.data.damage import Damage, DamageConfig
from axialtrain.data.loader import Loader
from axialtrain.data.painting import Region
from axialtrain.data.region import open_shards
from axialtrain.data.store import UNLABELLED
from axialtrain.data.tile_reader import TileReader
from axialtrain.grid import Rect

if TYPE_CHECKING:
    from conftest import Source

WIDE = Rect(0, 200, 0, 300)
TAR = "shard-00000.tar"


@pytest.fixture
def copy(numbered: Source, tmp_path: Path) -> Path:
    """The shards in a folder of the test's own, to be damaged."""
    return Path(shutil.copytree(numbered.url, tmp_path / "copy"))


def flip(folder: Path, at: int) -> None:
    data = bytearray((folder / TAR).read_bytes())
    data[at] ^= 0x10
    (folder / TAR).write_bytes(data)


def junk(which: str) -> Callable[[str, bytes], bytes]:
    """Members whose name holds `which` are no images, with every checksum right."""
    return lambda name, data: b"junk" if which in name else data


def spared(folder: Path, name: str, rect: Rect) -> Region:
    return open_shards(str(folder)).region(name, rect, spare=True)


def assert_missing(region: Region, numbered: Source, name: str, lost: Rect) -> None:
    """All of `region`, which is the whole image, is there and right, but `lost`."""
    gone = np.zeros(region.present.shape, np.bool_)
    gone[lost.slices(Rect(0, *gone.shape[:1], 0, gone.shape[1]))] = True
    np.testing.assert_array_equal(region.present, ~gone)
    for got, expected, empty in (
        (region.pixels, numbered.pixels[name], 0),
        (region.labels, numbered.labels[name], UNLABELLED),
        (region.instances, numbered.instances[name], 0),
    ):
        assert got is not None
        np.testing.assert_array_equal(got[~gone], expected[~gone])
        assert (got[gone] == empty).all()


def test_nothing_is_left_out_of_what_is_whole(copy: Path, numbered: Source) -> None:
    region = spared(copy, "wide", WIDE)
    assert region.damaged == ()
    assert_missing(region, numbered, "wide", Rect(0, 0, 0, 0))


def test_a_damaged_block_is_left_out_and_told(copy: Path, numbered: Source) -> None:
    entry = next(b for b in open_shards(str(copy)).head("wide").blocks if (b.row, b.col) == (1, 1))
    flip(copy, entry.offset + 612)
    region = spared(copy, "wide", WIDE)
    (damage,) = region.damaged
    assert damage.key == ("wide", "block", 1, 1)
    assert damage.tiles == 5 * 8  # 72 x 128 px of it lie in the image, in tiles of 16
    place = rf"{TAR}: byte {entry.offset + 512}: member wide/0/00001_00001\.00\.png: is damaged"
    assert re.search(place, damage.what)
    assert_missing(region, numbered, "wide", Rect(128, 200, 128, 256))
    # Only who reads of it meets it; it is told alike from every side.
    assert spared(copy, "wide", Rect(0, 128, 0, 300)).damaged == ()
    assert spared(copy, "wide", Rect(190, 200, 100, 130)).damaged == (damage,)
    with pytest.raises(ValueError, match=place):
        open_shards(str(copy)).region("wide", WIDE)


def test_tiles_that_cannot_be_decoded_are_left_out(copy: Path, numbered: Source) -> None:
    forge(copy, "small", member=junk("09.png"))  # of its only block
    region = spared(copy, "small", Rect(0, 70, 0, 50))
    (damage,) = region.damaged
    assert damage.key == ("small", "tile", 1, 1)
    assert damage.tiles == 1
    assert "member small/0/00000_00000.09.png: " in damage.what
    assert_missing(region, numbered, "small", Rect(16, 32, 16, 32))


@pytest.mark.parametrize("part", ["labels", "instances"])
def test_rasters_that_cannot_be_decoded_are_left_out(
    copy: Path, numbered: Source, part: str
) -> None:
    forge(copy, "wide", member=junk(f"{part}.png"))
    region = spared(copy, "wide", Rect(0, 128, 0, 128))
    (damage,) = region.damaged
    assert (damage.key, damage.tiles) == (("wide", part, 0, 0), 0)
    assert f"member wide/0/00000_00000.{part}.png: " in damage.what
    assert region.present.all()
    np.testing.assert_array_equal(region.pixels, numbered.pixels["wide"][:128, :128])
    lost, kept = (region.labels, region.instances)[:: 1 if part == "labels" else -1]
    expected = (numbered.instances if part == "labels" else numbered.labels)["wide"]
    assert lost is not None
    assert kept is not None
    assert (lost == (UNLABELLED if part == "labels" else 0)).all()
    np.testing.assert_array_equal(kept, expected[:128, :128])


def test_an_image_without_its_head_or_shard_is_left_out(copy: Path) -> None:
    row = open_shards(str(copy)).row("tall")
    flip(copy, row.head_offset + 10)
    region = spared(copy, "tall", Rect(0, 257, 0, 97))
    (damage,) = region.damaged
    assert damage.key == ("tall", "image", 0, 0)
    assert f"head of 'tall' at byte {row.head_offset}: is damaged" in damage.what
    assert not region.present.any()
    assert not region.pixels.any()
    assert region.labels is not None
    assert (region.labels == UNLABELLED).all()
    (copy / TAR).unlink()
    (damage,) = spared(copy, "small", Rect(0, 70, 0, 50)).damaged
    assert damage.part == "image"
    assert "names this shard, but it is not there" in damage.what


def test_what_lies_past_the_end_of_a_shard_is_left_out(copy: Path) -> None:
    shards = open_shards(str(copy))
    last = shards.head("tall").blocks[-1]
    data = (copy / TAR).read_bytes()
    (copy / TAR).write_bytes(data[: last.offset + 100])
    region = shards.region("tall", Rect(0, 257, 0, 97), spare=True)
    (damage,) = region.damaged
    assert damage.key == ("tall", "block", last.row, last.col)
    assert "the shard was cut short" in damage.what
    (copy / TAR).unlink()  # while it is read
    assert len(shards.region("tall", Rect(0, 257, 0, 97), spare=True).damaged) == 3


def test_a_name_that_is_not_there_is_no_damage(copy: Path) -> None:
    with pytest.raises(ValueError, match="image is 'no', allowed are"):
        spared(copy, "no", WIDE)


def batches(folder: Path, policy: str, mesh: tuple[int, int], window: list[int]) -> list[Batch]:
    """One of the whole set, for each rank of the mesh."""
    found = []
    for at in np.ndindex(mesh):
        config = DataConfig(str(folder), window=window, damage=DamageConfig(policy))
        count = len(Loader(open_shards(str(folder)), config, **options(mesh, (0, 0), 1)).windows)
        loader = Loader(open_shards(str(folder)), config, **options(mesh, at, count))
        (batch,) = loader.once()
        found.append(batch)
    return found


def options(mesh: tuple[int, int], at: tuple[int, ...], count: int) -> dict[str, object]:
    return {
        "patch": 8, "mesh_shape": mesh, "at": (at[0], at[1]), "data_rank": 0, "data_ranks": 1,
        "batch": count, "micro_batch": count, "seed": 3,
    }  # fmt: skip


@settings(max_examples=10)
@given(
    mesh=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    window=st.tuples(st.integers(90, 210), st.integers(90, 210)),
)
def test_every_mesh_leaves_out_the_same(
    damaged: Path, mesh: tuple[int, int], window: tuple[int, int]
) -> None:
    (serial,) = batches(damaged, "mask", (1, 1), list(window))
    whole = serial.place.grid
    parts = batches(damaged, "mask", mesh, list(window))
    for batch in parts:
        tokens = batch.place.rect.slices(whole)
        pixels = batch.place.rect.scaled(8).slices(whole.scaled(8))
        assert torch.equal(batch.pixels, serial.pixels[:, *pixels])
        assert torch.equal(batch.present, serial.present[:, *pixels])
        assert torch.equal(batch.valid, serial.valid[:, *tokens])
        assert batch.labels is not None
        assert serial.labels is not None
        assert torch.equal(batch.labels, serial.labels[:, *pixels])
    for sample, expected in enumerate(serial.faults):
        assert {d for batch in parts for d in batch.faults[sample]} == set(expected)
    assert {d.part for sample in serial.faults for d in sample} == {"image", "block", "tile"}
    assert not serial.valid.all()


@pytest.fixture(scope="module")
def damaged(numbered: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set with a damaged tile and block, and an image whose head is."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(numbered.url, folder)
    forge(folder, "wide", member=junk("27.png"))
    shards = open_shards(str(folder))
    block = next(b for b in shards.head("wide").blocks if (b.row, b.col) == (1, 1))
    head = shards.row("tall").head_offset
    flip(folder, block.offset + 612)
    flip(folder, head + 10)
    return folder


def test_by_default_damage_is_raised(damaged: Path) -> None:
    with pytest.raises(ValueError, match=r"member wide/0/\d+_\d+\.\d+\.png: is "):
        batches(damaged, "raise", (1, 1), [200, 200])


@pytest.mark.parametrize(
    ("key", "value"), [("policy", "ignore"), ("policy", ""), ("tiles", -1), ("images", -1)]
)
def test_what_is_not_allowed_is_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"data\.damage\.{key} is .*allowed"):
        DamageConfig(**{key: value})  # type: ignore[arg-type]


def test_a_line_is_read_as_it_was_written() -> None:
    damage = Damage("a", "tile", 3, 4, 1, "s.tar: byte 5: member a: is damaged")
    line = json.dumps({"step": 2, **damage.__dict__})
    assert Damage.from_record(Record.parse(line, "x")) == damage
    for key, value in (("part", "half"), ("row", -1), ("what", 3), ("image", None)):
        with pytest.raises(ValueError, match=f"x: {key} is "):
            Damage.from_record(Record("x", {**damage.__dict__, key: value}))


@pytest.mark.parametrize("older", [False, True])
def test_an_index_that_cannot_be_read(numbered: Source, copy: Path, older: bool) -> None:
    """With every checksum right. It is asked where a head does not tell what is empty, and a tile
    is no member: here, in older shards, the block's first."""

    def without_empty(head: dict[str, Any]) -> None:
        for entry in head["blocks"]:
            entry.pop("empty", None)

    def first_dropped(block: bytes) -> bytes:
        size = int(block[124:135], 8)
        return block[512 + -(-size // 512) * 512 :] if older else block

    def broken(index: dict[str, Any]) -> None:
        index["tiles"] = "x"

    forge(copy, "wide", head=without_empty, block=first_dropped, index=broken)
    whole = {"pixels": numbered.pixels["wide"], "labels": numbered.labels["wide"]}
    region = spared(copy, "wide", WIDE)
    if not older:
        np.testing.assert_array_equal(region.pixels, whole["pixels"])
        assert not region.damaged
        return
    assert {one.part for one in region.damaged} == {"block"}
    assert len(region.damaged) == len(open_shards(str(copy)).head("wide").blocks)
    assert not region.present.any()
    assert not region.pixels.any()
    assert (region.labels == UNLABELLED).all()
    with pytest.raises(
        ValueError, match=r"shard-00000\.tar: byte \d+: member wide.*json: tiles is"
    ):
        open_shards(str(copy)).region("wide", WIDE)
    # All of the block, also for stored tiles alone: else it would depend on the mesh.
    reader = TileReader(open_shards(str(copy)), 2)
    for rect in (Rect(16, 64, 16, 64), Rect(0, 16, 0, 16)):
        assert [one.part for one in spared(copy, "wide", rect).damaged] == ["block"]
        assert [one.part for one in reader.region("wide", rect, spare=True).damaged] == ["block"]


def test_a_mask_that_cannot_be_decoded_is_damage_of_its_block(
    masked: Source, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(masked.url, tmp_path / "copy"))
    forge(folder, "a", member=junk("mask.png"))
    region = spared(folder, "a", Rect(0, 128, 0, 128))
    (one,) = region.damaged
    assert (one.part, one.row, one.col) == ("block", 0, 0)
    assert "mask.png" in one.what
    assert not region.present.any()
