from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import loader_of
from watched import WAYS, watched

from axialtrain.data.config import DataConfig
from axialtrain.data.region import open_shards
from axialtrain.data.store import ImageRow
from axialtrain.data.streams import windows_of
from axialtrain.data.windows import MAX_WINDOWS, CutConfig, Windows, cut_windows, tissue_shares
from axialtrain.grid import Rect

if TYPE_CHECKING:
    from conftest import Source

SIDE = st.integers(1, 60)


def row(name: str, height: int, width: int) -> ImageRow:
    return ImageRow(name, "s.tar", 0, 2, "0" * 64, height, width, None)


def rects(windows: Windows) -> list[Rect]:
    return [window.rect for window in windows]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Written anew, one by one: where windows start along a side."""
    found = [0]
    while found[-1] + window < length:
        found.append(min(found[-1] + stride, length - window))
    return found


@given(
    sizes=st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=4),
    window=st.tuples(SIDE, SIDE),
    stride=st.tuples(st.integers(1, 70), st.integers(1, 70)),
)
def test_windows_lie_a_stride_apart_and_cover(
    sizes: list[tuple[int, int]], window: tuple[int, int], stride: tuple[int, int]
) -> None:
    images = [row(f"i{k}", *size) for k, size in enumerate(sizes)]
    windows = cut_windows(images, window, stride)
    expected = [
        (image.name, Rect(top, top + window[0], left, left + window[1]))
        for image in images
        for top in starts(image.height, window[0], stride[0])
        for left in starts(image.width, window[1], stride[1])
    ]
    assert [(w.name, w.rect) for w in windows] == expected
    assert len({window.id for window in windows}) == len(windows) == len(expected)
    for image, part in zip(images, windows.of_images(), strict=True):
        covered = np.zeros((image.height, image.width), np.bool_)
        for rect in rects(windows.only(part)):
            if image.height >= window[0] and image.width >= window[1]:
                assert rect.intersect(Rect(0, image.height, 0, image.width)) == rect
            covered[rect.top : rect.bottom, rect.left : rect.right] = True
        if stride[0] <= window[0] and stride[1] <= window[1]:
            assert covered.all()
        assert covered[0, 0]
        assert covered[-1, -1]


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=6), st.none() | st.tuples(SIDE, SIDE))
def test_one_window_of_each_size_is_found(
    sizes: list[tuple[int, int]], window: tuple[int, int] | None
) -> None:
    windows = cut_windows([row(f"i{k}", *size) for k, size in enumerate(sizes)], window)
    found = [(w.rect.height, w.rect.width) for w in windows.of_each_size()]
    assert sorted(found) == sorted({(r.height, r.width) for r in rects(windows)})


def test_an_index_of_windows_is_small() -> None:
    """10 million of them as objects took some 3 GB."""
    images = [row("a", 1 << 20, 1 << 20)]
    tracemalloc.start()
    try:
        windows = cut_windows(images, [512, 1024], [512, 1024])
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(windows) == 1 << 21
    assert held < 13 * len(windows)
    assert peak < 80 * len(windows)
    assert windows[-1].id == f"a@{(1 << 20) - 512},{(1 << 20) - 1024}"


def test_what_is_larger_than_any_number_of_the_index_is_one_window() -> None:
    assert rects(cut_windows([row("a", 7, 9)], [10**30, 4], [10**40, 4])) == [
        Rect(0, 10**30, left, left + 4) for left in (0, 4, 5)
    ]


@pytest.mark.parametrize(
    ("window", "cut", "stride"),
    [
        ([40, 30], CutConfig(), [40, 30]),
        ([40, 30], CutConfig(stride=7), [7, 7]),
        ([40, 30], CutConfig(stride=[50, 60]), [50, 60]),
        ([40, 30], CutConfig(overlap=8), [32, 22]),
        ([40, 30], CutConfig(overlap=[0, 29]), [40, 1]),
        (None, CutConfig(), None),
    ],
)
def test_overlap_is_what_is_left_of_the_stride(
    window: list[int] | None, cut: CutConfig, stride: list[int] | None
) -> None:
    assert cut.stride_of(window) == stride


@pytest.mark.parametrize(
    ("cut", "key"),
    [
        ({"stride": 0}, "stride"),
        ({"stride": [4, 4, 4]}, "stride"),
        ({"stride": "wide"}, "stride"),
        ({"stride": True}, "stride"),
        ({"stride": []}, "stride"),
        ({"overlap": -1}, "overlap"),
        ({"overlap": 1.5}, "overlap"),
        ({"overlap": 40}, "overlap"),
        ({"overlap": [0, 30]}, "overlap"),
        ({"stride": 4, "overlap": 4}, "overlap"),
        ({"tissue": 1.5}, "tissue"),
        ({"tissue": float("nan")}, "tissue"),
    ],
)
def test_wrong_cuts_are_named(cut: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.cut\.{key} is .*allowed is"):
        DataConfig("x", window=[40, 30], cut=CutConfig(**cut))  # type: ignore[arg-type]


def test_whole_images_have_no_stride() -> None:
    for cut in (CutConfig(stride=4), CutConfig(overlap=0)):
        with pytest.raises(ValueError, match=r"^data\.cut\.(stride|overlap) .* without data\.win"):
            DataConfig("x", cut=cut)


def stored(source: Source) -> np.ndarray:
    """Which pixels of the image of `masked` are in stored tiles, by the blocks' own indexes."""
    shards = open_shards(source.url)
    head = shards.head("a")
    found = np.zeros((head.height, head.width), np.bool_)
    entries = [entry for entry in head.blocks if not head.is_empty(entry)]
    for index in shards.indexes("a", entries):
        for tile in index.tiles:
            here = Rect(tile.row, tile.row + 1, tile.col, tile.col + 1).scaled(head.tile)
            found[here.top : here.bottom, here.left : here.right] = True
    assert 0 < found.sum() < found.size
    return found


@settings(max_examples=40)
@given(
    window=st.none() | st.tuples(st.integers(1, 320), st.integers(1, 320)),
    stride=st.integers(40, 100),
    least=st.floats(0, 1),
)
def test_tissue_is_the_share_of_stored_tiles(
    masked: Source, window: tuple[int, int] | None, stride: int, least: float
) -> None:
    shards, there = open_shards(masked.url), stored(masked)
    windows = cut_windows(shards.images, window, (stride, stride))
    expected = [there[w.rect.top : w.rect.bottom, w.rect.left : w.rect.right] for w in windows]
    shares = np.array([part.mean() for part in expected])
    np.testing.assert_allclose(tissue_shares(windows, shards.head), shares, rtol=1e-12)
    size = None if window is None else list(window)
    cut = CutConfig(stride=None if size is None else stride, tissue=least)
    config = DataConfig(masked.url, window=size, cut=cut)
    kept = [w for w, share in zip(windows, shares, strict=True) if share >= least]
    if kept:
        assert list(windows_of(shards, config)) == kept
    else:
        with pytest.raises(ValueError, match=r"^data\.cut\.tissue is .*, which none of the"):
            windows_of(shards, config)


@pytest.mark.parametrize("way", WAYS)
def test_tissue_fetches_no_pixel(masked: Source, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Nor does any rank fetch or decode what is background: its tokens are invalid."""
    fetched = watched(monkeypatch, way)
    shards, there = open_shards(masked.url), stored(masked)
    head = shards.head("a")
    fetched.clear()
    config = DataConfig(masked.url, window=[48, 48], mean=[0.5] * 2, std=0.25)
    config = replace(config, cut=CutConfig(stride=48, tissue=0.5))
    one = loader_of(config)
    first = shards.images[0]
    the_head = (first.head_offset, first.head_offset + first.head_length)
    assert fetched == [[the_head]]
    every = loader_of(replace(config, cut=CutConfig()))
    assert 0 < len(one.windows) < len(every.windows)

    for rank in (one, every):
        fetched.clear()
        tiles = needed = 0
        for batch, window in zip(rank.once(), rank.windows, strict=True):
            rect = window.rect
            part = there[rect.top : rect.bottom, rect.left : rect.right]
            cells = [
                part[r : r + 16, c : c + 16].any()
                for r in range(0, 48, 16)
                for c in range(0, 48, 16)
            ]
            # Tokens of 16 px, anywhere: those without a pixel in a stored tile are invalid.
            assert not batch.valid[0].numpy().reshape(-1)[~np.array(cells)].any()
            assert (batch.pixels[0].numpy()[: part.shape[0], : part.shape[1]][~part] == 0).all()
            needed += shards.fetch_for(head, rect).bytes
            r, c = (
                slice(rect.top // 16 * 16, rect.bottom, 16),
                slice(rect.left // 16 * 16, rect.right, 16),
            )
            tiles += int(there[r, c].sum())
        assert rank.tiles_decoded == tiles
        ranges = [one for some in fetched for one in some if one != the_head]
        assert rank.bytes_read == needed == sum(stop - start for start, stop in ranges)


def test_a_rank_of_background_reads_nothing(masked: Source) -> None:
    config = DataConfig(masked.url, mean=[0.5] * 2, std=0.25)
    rank = loader_of(config, mesh_shape=(3, 3), at=(0, 2))
    (batch,) = rank.once()
    assert not batch.valid.any()
    assert not batch.pixels.any()
    assert batch.weight.tolist() == [1.0]
    assert (rank.bytes_read, rank.tiles_decoded) == (0, 0)
    other = loader_of(config, mesh_shape=(3, 3), at=(2, 2))
    (batch,) = other.once()
    assert batch.valid.all()
    assert other.bytes_read > 0


def test_slices_and_masks_of_an_index_are_indexes() -> None:
    windows = cut_windows([row("a", 90, 40), row("b", 40, 40)], [40, 40])
    assert isinstance(windows[1:], Windows)
    assert [w.id for w in windows[1:]] == ["a@40,0", "a@50,0", "b@0,0"]
    assert [w.id for w in windows.only(np.array([True, False, False, True]))] == ["a@0,0", "b@0,0"]
    assert windows[1:].of_images() == [slice(0, 2), slice(2, 3)]


def test_windows_cover_the_image_edge_to_edge() -> None:
    rects = [w.rect for w in cut_windows([row("a", 100, 64)], [40, 32])]
    assert [(r.top, r.left) for r in rects] == [
        (0, 0), (0, 32), (40, 0), (40, 32), (60, 0), (60, 32)
    ]  # fmt: skip
    assert {(r.height, r.width) for r in rects} == {(40, 32)}
    (small,) = cut_windows([row("a", 10, 32)], [40, 32])
    assert small.rect == Rect(0, 40, 0, 32)
    (whole,) = cut_windows([row("a", 10, 30)], None)
    assert whole.rect == Rect(0, 10, 0, 30)


def test_too_many_windows_are_refused_at_once() -> None:
    images = [row("a", 1 << 20, 1 << 20), row("b", 5, 7)]
    count = (1 << 40) + 35
    message = rf"data\.window is \[1, 1\], which makes {count} windows.* at most {MAX_WINDOWS}"
    with pytest.raises(ValueError, match=message):
        cut_windows(images, [1, 1])


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 30), st.integers(1, 30))
def test_windows_are_counted_before_they_are_cut(
    height: int, width: int, window_height: int, window_width: int
) -> None:
    images = [row("a", height, width), row("b", width, 1)]
    count = len(cut_windows(images, [window_height, window_width]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("axialtrain.data.windows.MAX_WINDOWS", count)
        assert len(cut_windows(images, [window_height, window_width])) == count
        patch.setattr("axialtrain.data.windows.MAX_WINDOWS", count - 1)
        with pytest.raises(ValueError, match=rf"which makes {count} windows"):
            cut_windows(images, [window_height, window_width])
