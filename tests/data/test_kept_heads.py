"""Heads are fetched once, for as many images as fit into a stated memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from range_server import RangeServer, serving

from axialtrain.data import kept_heads
from axialtrain.data.kept_heads import KeptHeads, _Packed
from axialtrain.data.region import open_shards
from axialtrain.data.store import BlockEntry, Head

if TYPE_CHECKING:
    from conftest import Source


def head_of(number: int, side: int = 4, *, labelled: bool = False) -> Head:
    blocks = tuple(
        BlockEntry(
            row, col, 512 * (row * side + col), 512, number,
            tuple(range(row)), f"{number}{row}{col}" if labelled and col else None,
        )
        for row in range(side) for col in range(side)
    )  # fmt: skip
    size = side * 128
    classes = 3 if labelled else None
    return Head(
        f"image{number}", size, size, 16, 0.5, 0, 1.0, "png", classes, "0" * 64, "group", blocks,
        crs="EPSG:4326", transform=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    )  # fmt: skip


@pytest.fixture
def server(source: Source) -> Iterator[RangeServer]:
    with serving(source.url) as server:
        yield server


@pytest.mark.parametrize("whole", [1 << 28, 1])
def test_each_head_is_fetched_once(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr(kept_heads, "WHOLE", whole)  # 1: all but the last are packed
    shards = open_shards(server.url)
    first = {row.name: shards.head(row.name) for row in shards.images}
    count = len(server.ranges())
    for _ in range(2):
        assert {row.name: shards.head(row.name) for row in shards.images} == first
    assert len(server.ranges()) == count == len(first)
    assert shards.head_bytes_read == sum(row.head_length for row in shards.images)


def test_more_images_than_before_are_kept() -> None:
    kept = KeptHeads()
    heads = [head_of(number) for number in range(600)]
    for head in heads:
        kept.put(head)
    assert [kept.get(head.name) for head in heads] == heads


@pytest.mark.parametrize("labelled", [False, True])
def test_packed_heads_are_the_same(labelled: bool, source: Source, masked: Source) -> None:
    stored = [
        open_shards(url).head(name) for url, name in ((source.url, "wide"), (masked.url, "a"))
    ]
    assert any(entry.empty for entry in stored[1].blocks)
    assert any(entry.labelled for entry in stored[0].blocks)
    for head in (head_of(1, labelled=labelled), *stored):
        again = _Packed.of(head).unpacked()
        assert again == head
        assert {type(number) for entry in again.blocks for number in entry.empty} <= {int}


def test_those_asked_for_longest_ago_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    size = _Packed.of(head_of(0)).size
    monkeypatch.setattr(kept_heads, "WHOLE", 1)
    monkeypatch.setattr(kept_heads, "PACKED", 3 * size)
    kept = KeptHeads()
    for number in range(4):  # the last one is kept as it is
        kept.put(head_of(number))
    assert kept.get("image0") == head_of(0)
    kept.put(head_of(4))
    kept.put(head_of(5))
    assert list(kept._packed) == ["image0", "image3", "image4"]
    assert list(kept._whole) == ["image5"]
    assert kept.get("image1") is None
    assert kept._packed_bytes == sum(size for _, size in kept._packed.values()) <= 3 * size


def test_head_that_is_put_again_takes_the_place_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept_heads, "WHOLE", 1)
    kept = KeptHeads()
    for head in (head_of(0), head_of(1), other := replace(head_of(0), mpp=2.0), head_of(2)):
        kept.put(head)
    assert kept.get("image0") == other


def test_several_threads(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_heads, "WHOLE", 1)
    shards = open_shards(source.url)
    expected = {row.name: shards.head(row.name) for row in shards.images}
    wrong: list[str] = []

    def ask() -> None:
        for _ in range(50):
            wrong.extend(name for name, head in expected.items() if shards.head(name) != head)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
