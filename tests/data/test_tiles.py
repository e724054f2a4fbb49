"""Single tiles: their order, the stream through `webdataset`, and `data=tiles`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from range_server import serving
from torch.utils.data import DataLoader

from axialtrain.data.config import DataConfig
from axialtrain.data.loader import Loader
from axialtrain.data.passing import UnreachableError
from axialtrain.data.reading import ReadConfig
from axialtrain.data.region import Shards, open_shards
from axialtrain.data.sampling import SampleConfig
from axialtrain.data.tile_order import TileOrder, TilesConfig
from axialtrain.data.tile_reader import StoredTiles, TileReader
from axialtrain.data.tiles import tile_stream
from axialtrain.data.windows import CutConfig
from axialtrain.grid import Rect

if TYPE_CHECKING:
    from conftest import Source

TILES = 13 * 19 + 5 * 4 + 17 * 7  # of the three images of `source`
COUNTS = st.lists(st.integers(1, 64), min_size=1, max_size=20)


def keys(samples: Iterator[dict[str, Any]]) -> list[str]:
    return [sample["__key__"] for sample in samples]


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 1 << 40), mix=st.integers(0, 9), epoch=st.integers(0, 9))
def test_each_epoch_has_every_tile_once_block_by_block(
    counts: list[int], seed: int, mix: int, epoch: int
) -> None:
    size, block_of = sum(counts), np.repeat(np.arange(len(counts)), counts)
    order = TileOrder(np.array(counts), seed, mix)
    tiles = [order[epoch * size + at] for at in range(size)]
    assert sorted(tiles) == list(range(size))
    if mix == 0:
        assert tiles == list(range(size))
        return
    seen = list(dict.fromkeys(block_of[tiles].tolist()))
    left = tiles
    while left:  # the tiles of `mix` blocks come before any of another
        members = [tile for tile in left if block_of[tile] in set(seen[:mix])]
        assert set(left[: len(members)]) == set(members)
        left, seen = left[len(members) :], seen[mix:]
    # What is asked for out of order, and by another instance, is the same.
    again = TileOrder(np.array(counts), seed, mix)
    assert [again[epoch * size + at] for at in reversed(range(size))] == tiles[::-1]


def test_order_differs_by_epoch_and_seed() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = TileOrder(np.array([40, 64, 3]), seed, 2)
        return [order[number * 107 + at] for at in range(107)]

    assert len({tuple(epoch(seed, number)) for seed in (0, 1) for number in (0, 1)}) == 4


@settings(max_examples=12, deadline=None)
@given(
    data_ranks=st.integers(1, 5), shuffle=st.integers(0, 5), seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)  # fmt: skip
def test_ranks_together_are_the_serial_stream(
    source: Source, data_ranks: int, shuffle: int, seed: int, epoch: int
) -> None:
    def of(rank: int, ranks: int) -> list[str]:
        stream = tile_stream(
            source.url, data_rank=rank, data_ranks=ranks, seed=seed, shuffle=shuffle
        )
        stream.set_epoch(epoch)
        found = keys(iter(stream))
        assert len(found) == stream.tiles_each() == -(-TILES // ranks)
        return found

    serial = of(0, 1)
    assert len(set(serial)) == len(serial) == TILES
    together = [key for rank in range(data_ranks) for key in of(rank, data_ranks)]
    assert together[:TILES] == serial
    assert together[TILES:] == serial[: len(together) - TILES]  # the first ones come again


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_together_are_the_serial_stream(source: Source, persistent: bool) -> None:
    stream = tile_stream(source.url, seed=3)
    loader = DataLoader(
        stream.map(lambda sample: (sample["__key__"], sample["pixels"])),
        batch_size=None,
        num_workers=2,
        persistent_workers=persistent,
    )
    epochs = []
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        found = list(loader)
        assert len(found) == 2 * stream.tiles_each(workers=2) == TILES
        assert all(pixels.shape == (16, 16, 3) for _, pixels in found)
        # The workers take turns, one sample each.
        in_order = [key for key, _ in found[::2] + found[1::2]]
        assert in_order == keys(iter(stream))
        epochs.append(in_order)
    assert epochs[0] != epochs[1]


def test_more_ranks_and_workers_than_tiles(source: Source) -> None:
    counts = [
        len(keys(iter(tile_stream(source.url, data_rank=r, data_ranks=1000)))) for r in (0, 999)
    ]
    assert counts == [1, 1]


def test_samples_are_what_the_images_hold(numbered: Source) -> None:
    shards = open_shards(numbered.url)
    found = list(tile_stream(numbered.url, shuffle=0))
    assert keys(iter(found))[:2] == ["wide/0/00000_00000", "wide/0/00000_00001"]
    for sample in found[::7] + found[-1:]:
        name, top, left = sample["image"], 16 * sample["row"], 16 * sample["col"]
        region = shards.region(name, Rect(top, top + 16, left, left + 16))
        for key in ("pixels", "present", "labels", "instances"):
            np.testing.assert_array_equal(sample[key], getattr(region, key))
        height, width = numbered.pixels[name].shape[:2]
        assert sample["present"].sum() == min(16, height - top) * min(16, width - left)
        assert (sample["level"], sample["pixels"].dtype) == (0, np.uint8)
        assert sample["__url__"] == f"{numbered.url}/shard-00000.tar"
        assert "target" not in sample


def test_tiles_that_are_not_stored_do_not_come(masked: Source) -> None:
    shards = open_shards(masked.url)
    found = list(tile_stream(masked.url))
    stored = np.zeros((288, 304), bool)
    stored[:280, :300] = (masked.pixels["a"] != 7).any(-1)
    expected = {
        (row, col)
        for row in range(18)
        for col in range(19)
        if stored[16 * row : 16 * row + 16, 16 * col : 16 * col + 16].any()
    }
    assert {(sample["row"], sample["col"]) for sample in found} == expected
    assert len(found) == len(expected) == len(StoredTiles(shards)) < 18 * 19
    assert sum(sample["present"].sum() for sample in found) == stored.sum()


def test_a_server_that_fails_is_asked_again_as_told(source: Source, tmp_path: Path) -> None:
    here = keys(iter(tile_stream(source.url, seed=3)))
    asked = ReadConfig(retries=1, backoff=0.0, cache=str(tmp_path / "cache"))
    with serving(source.url) as server:
        stream = tile_stream(server.url, seed=3, read=asked)
        server.once = {("GET", "tar"): [503]}
        assert keys(iter(stream)) == here
        server.always = {("GET", "tar"): 503}
        assert keys(iter(stream)) == here  # out of the cache
        server.always = {}
        stream = tile_stream(server.url, seed=3, read=replace(asked, cache=None))
        server.always = {("GET", "tar"): 503}
        with pytest.raises(UnreachableError, match="not to be had in 2 tries"):
            list(stream)


def test_stages_of_webdataset_follow(source: Source) -> None:
    batches = list(tile_stream(source.url).to_tuple("pixels", "row").batched(50, partial=False))
    assert len(batches) == TILES // 50
    assert batches[0][0].shape == (50, 16, 16, 3)
    assert isinstance(tile_stream(source.url), webdataset.DataPipeline)


def test_blocks_are_kept_while_their_tiles_come(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    block = Shards.block
    monkeypatch.setattr(
        Shards, "block", lambda s, n, e: (fetched.append((n, e)), block(s, n, e))[1]
    )
    list(tile_stream(source.url, shuffle=3))
    assert len(fetched) == len(set(fetched)) == 6 + 1 + 3


def test_a_block_that_could_not_be_read_is_asked_for_again(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = TileReader(open_shards(source.url), keep=2)
    with monkeypatch.context() as broken:
        broken.setattr(Shards, "block", lambda *_: (_ for _ in ()).throw(OSError("503")))
        with pytest.raises(OSError, match="503"):
            reader.region("wide", Rect(0, 16, 0, 16))
    assert reader.region("wide", Rect(0, 16, 0, 16)).bytes_read > 0
    assert reader.region("wide", Rect(16, 32, 0, 16)).bytes_read == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_rank": 2, "data_ranks": 2}, "data_rank is 2 of data_ranks=2, allowed is 0 to"),
        ({"shuffle": -1}, "shuffle is -1, allowed is 0 to 1024 blocks"),
        ({"seed": -1}, "seed is -1, allowed is 0 to"),
    ],
)
def test_what_cannot_be_is_named(source: Source, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tile_stream(source.url, **arguments)
    with pytest.raises(ValueError, match="epoch is -1, allowed is 0 to"):
        tile_stream(source.url).set_epoch(-1)


def loader(source: Source, mix: int = 2, **changes: Any) -> Loader:
    options = {
        "patch": 16, "mesh_shape": (1, 1), "at": (0, 0), "data_rank": 0, "data_ranks": 1,
        "batch": 12, "micro_batch": 3, "seed": 7,
    }  # fmt: skip
    config = DataConfig(source.url, tiles=TilesConfig(True, mix), workers=2)
    return Loader(open_shards(source.url), config, **{**options, **changes})


def samples(one: Loader, first: int, last: int) -> list[list[tuple[int, str, int]]]:
    """(number, id, sum of its pixels) of the samples of each step."""
    return [
        [
            (int(number), name, int(pixels.mul(1000).sum()))
            for batch in step
            for number, name, pixels in zip(batch.samples, batch.ids, batch.pixels, strict=True)
        ]
        for step in one.steps(first, last)
    ]


def test_each_stored_tile_is_a_sample(source: Source) -> None:
    one = loader(source)
    assert len(one.windows) == TILES
    assert one.grids == [(1, 1), (1, 1)]
    ids = []
    for batch in one.once():
        assert batch.pixels.shape == (3, 16, 16, 3)
        assert (batch.place.height, batch.place.width) == (1, 1)
        ids += [i for i, w in zip(batch.ids, batch.weight, strict=True) if w]
    assert len(ids) == len(set(ids)) == TILES
    assert "wide@0,0" in ids
    assert one.tiles_decoded == TILES
    size = sum(e.length for name in source.pixels for e in one.shards.head(name).blocks)
    assert one.bytes_read == size  # each block once


@pytest.mark.parametrize("data_ranks", [2, 4])
def test_order_is_the_same_for_any_data_ranks_and_resumes(source: Source, data_ranks: int) -> None:
    whole = samples(loader(source), 0, 40)  # into the second epoch
    assert {len(step) for step in whole} == {12}
    assert [number for step in whole for number, *_ in step] == list(range(480))
    state = loader(source).state(17)
    ranks = [loader(source, data_rank=r, data_ranks=data_ranks) for r in range(data_ranks)]
    parts = [samples(one, one.resume(state), 40) for one in ranks]
    for step, *mine in zip(whole[17:], *parts, strict=True):
        assert sorted(chain.from_iterable(mine)) == sorted(step)


def test_what_training_on_tiles_refuses(source: Source) -> None:
    with pytest.raises(ValueError, match="mesh is row=1 col=2, allowed is 1 x 1 for data=tiles"):
        loader(source, mesh_shape=(1, 2))
    with pytest.raises(ValueError, match=r"data\.window is \[64, 64\], allowed is null with data="):
        DataConfig(source.url, window=[64, 64], tiles=TilesConfig(True))
    with pytest.raises(ValueError, match=r"data\.tiles\.mix is 0, allowed is 1 to 1024"):
        TilesConfig(True, 0)
    one = loader(source)
    assert len(one.windows) == TILES
    state = one.state(3)
    with pytest.raises(ValueError, match=r"data\.tiles\.mix is not what the saved run had"):
        loader(source, mix=3).resume(state)
    for key, value in (
        ("cut", CutConfig(tissue=0.5)),
        ("sample", SampleConfig(by="balanced")),
        ("buckets", 4),
    ):
        with pytest.raises(ValueError, match=rf"data\.{key} is set, allowed is its default"):
            DataConfig(source.url, tiles=TilesConfig(True), **{key: value})
