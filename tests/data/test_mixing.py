from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import loader_of, serial, small_shards, stream

from axialtrain.data.config import DataConfig
from axialtrain.data.mixing import (
    PERIOD,
    MixedOrder,
    MixedShards,
    dealt_out,
    lacking,
    open_sets,
    shares_of,
)
from axialtrain.data.normalise import normalisation
from axialtrain.data.order import Order
from axialtrain.data.region import open_shards
from axialtrain.data.sets import ShardSet, sets_of
from axialtrain.data.windows import CutConfig
from axialtrain.grid import Rect

MEASURED = {"mean": "manifest", "std": "manifest"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two sets, of 2 and 1 images, one name in both; the first has classes and labels."""
    folder = tmp_path_factory.mktemp("pair")
    labels = folder / "labels.tif"
    tifffile.imwrite(labels, np.zeros((70, 40), np.uint8), tile=(16, 16))
    first = small_shards(folder / "one", {"a": (70, 40), "b": (70, 40)}, image_labels=[3, 4],
                         labels=[labels, labels], statistics=True)  # fmt: skip
    return first, small_shards(folder / "two", {"a": (100, 64)}, seed=1, statistics=True)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_a_mix_keeps_its_shares_at_every_moment(shares: list[int]) -> None:
    dealt, total = dealt_out(shares), sum(shares)
    counts = np.cumsum(dealt[:, None] == np.arange(len(shares)), axis=0)
    wanted = np.arange(1, total + 1)[:, None] * np.array(shares) / total
    assert (np.abs(counts - wanted) < 1).all()
    assert counts[-1].tolist() == shares


@given(st.lists(st.floats(1e-6, 1e12) | st.integers(1, 500), min_size=1, max_size=8))
def test_weights_become_whole_numbers_in_their_ratio(weights: list[float]) -> None:
    shares = shares_of(weights)
    total = sum(weights)
    assert min(shares) >= 1
    assert sum(shares) <= PERIOD + len(weights)
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share / sum(shares) - weight / total) <= (len(weights) + 1) / PERIOD


def test_simple_weights_are_exact() -> None:
    assert shares_of([0.7, 0.3]) == [7, 3]
    assert shares_of([1, 1.0, 2]) == [1, 1, 2]
    assert shares_of([5]) == [1]
    assert shares_of([1037, 2300]) == [1037, 2300]
    assert sum(shares_of([1 / 3, 2 / 7, 0.123456789])) == PERIOD
    assert dealt_out([2, 1]).tolist() == [0, 1, 0]
    assert dealt_out([1]).tolist() == [0]


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=5),
    st.integers(0, 1 << 62),
)
def test_each_set_goes_on_in_its_own_order(sets: list[tuple[int, int]], seed: int) -> None:
    sizes = [size for size, _ in sets]

    def make() -> MixedOrder:
        orders = [Order(size, seed, part) for part, size in enumerate(sizes)]
        return MixedOrder(orders, sizes, [share for _, share in sets])

    order, count = make(), 80
    forward = [order[i] for i in range(count)]
    starts = np.cumsum([0, *sizes])
    for part, size in enumerate(sizes):
        mine = [i - starts[part] for i in forward if starts[part] <= i < starts[part + 1]]
        own = Order(size, seed, part)
        assert mine == [own[i] for i in range(len(mine))]
    order = make()
    assert [order[i] for i in reversed(range(count))] == forward[::-1]


def test_sets_are_read_as_one(pair: tuple[str, str]) -> None:
    both = open_sets({pair[0]: 3, pair[1]: 1})
    assert isinstance(both, MixedShards)
    assert isinstance(open_sets({pair[0]: 3}), type(open_shards(pair[0])))
    one, two = open_shards(pair[0]), open_shards(pair[1])
    assert [row.name for row in both.images] == ["0/a", "0/b", "1/a"]
    assert (both.kind, both.bands, both.dtype) == (one.kind, 3, "uint8")
    assert both.row("1/a").height == 100
    assert both.head("1/a") == two.head("a")
    rect = Rect(3, 30, 5, 20)
    for name, shards in (("0/a", one), ("1/a", two)):
        got, want = both.region(name, rect), shards.region("a", rect)
        np.testing.assert_array_equal(got.pixels, want.pixels)
    assert both.shares == [3, 1]
    assert both.digest not in (one.digest, two.digest)
    assert open_sets({pair[1]: 1, pair[0]: 3}).digest != both.digest
    assert (one.has_labels, two.has_labels, both.has_labels) == (True, False, False)
    assert (one.has_image_labels, both.has_image_labels) == (True, False)
    assert (both.classes, both.image_classes) == (1, 5)
    for what in ("has_labels", "has_image_labels"):
        assert f"({pair[0]} has " in lacking(both, what)
        assert f", {pair[1]} has none" in lacking(both, what)
    assert lacking(both, "has_instances") == lacking(one, "has_labels") == ""
    for name in ("a", "2/a", "x/a"):
        with pytest.raises(ValueError, match="allowed is the number of its set, from 0 to 1"):
            both.region(name, rect)


@settings(max_examples=10)
@given(
    mesh_shape=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    data_ranks=st.integers(1, 3),
    micro_batch=st.integers(1, 3),
    workers=st.integers(1, 3),
    prefetch=st.integers(0, 3),
    first=st.integers(0, 20),
)
def test_all_meshes_read_the_same_mix(
    pair: tuple[str, str],
    mesh_shape: tuple[int, int],
    data_ranks: int,
    micro_batch: int,
    workers: int,
    prefetch: int,
    first: int,
) -> None:
    config = DataConfig({pair[0]: 3, pair[1]: 1}, window=[32, 40], cut=CutConfig(stride=20))
    expected = serial(config, first, first + 2)
    sets = [window.split("/")[0] for _, window, _ in expected]
    assert sets.count("1") == 2  # of 8
    config.workers, config.prefetch = workers, prefetch
    options: dict[str, Any] = {"mesh_shape": mesh_shape, "micro_batch": micro_batch}
    got = stream(config, first, first + 2, data_ranks=data_ranks, **options)
    assert [sample for step in got for sample in step] == expected


def test_labels_of_some_sets_are_those_of_none(pair: tuple[str, str]) -> None:
    one = loader_of(DataConfig({pair[0]: 1, pair[1]: 1}, window=[32, 32]))
    batch = next(one.once())
    assert batch.labels is None
    assert batch.targets is None


def test_a_run_goes_on_with_the_same_mix_alone(pair: tuple[str, str]) -> None:
    state = loader_of(DataConfig({pair[0]: 3, pair[1]: 1}, window=[32, 32])).state(5)
    listed = [{"url": pair[0], "weight": 6}, {"url": pair[1], "weight": 2}]
    again = loader_of(DataConfig(listed, window=[32, 32]), data_ranks=2)
    assert again.resume(state) == 5
    for shards, message in (
        ({pair[0]: 2, pair[1]: 1}, r"^data\.shards is not what the saved run had"),
        (pair[0], r"^data\.shards is not what the saved run read \(another manifest\)"),
    ):
        with pytest.raises(ValueError, match=message):
            loader_of(DataConfig(shards, window=[32, 32])).resume(state)


def test_sets_must_be_of_one_kind_and_not_of_the_same_images(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    grey = small_shards(tmp_path / "grey", {"a": (40, 40)}, bands=1)
    message = re.escape(f"{grey} has images of 1 band of uint8 and {pair[0]} of 3 bands")
    with pytest.raises(ValueError, match=message):
        loader_of(DataConfig({pair[0]: 1, grey: 1}))
    (tmp_path / "link").symlink_to(pair[0])
    with pytest.raises(ValueError, match="hold the same images, allowed is each set once"):
        open_sets({pair[0]: 1, str(tmp_path / "link"): 1})


@pytest.mark.parametrize(
    "value",
    [
        "", None, [], {}, True, ["a"], {"a": 0}, {"a": -1, "b": 1}, {"a": "1"}, {"": 1},
        {"a": float("inf")}, {"a": float("nan")}, [{"url": "a"}, {"url": "a"}],
        [{"url": "a", "wieght": 2}], {str(k): 1 for k in range(65)},
    ],
)  # fmt: skip
def test_wrong_sets_are_named(value: object) -> None:
    with pytest.raises(ValueError, match=r"^data\.shards (is|has|names) .*allowed (is|are)"):
        DataConfig(value)


def test_sets_may_be_given_in_several_ways() -> None:
    two = (ShardSet("a", 2.0), ShardSet("b", 1.0))
    assert sets_of("a") == (ShardSet("a"),)
    assert sets_of(12) == (ShardSet("12"),)
    assert sets_of({"a": 2, "b": 1}) == two
    assert sets_of([{"url": "a", "weight": 2}, {"url": "b"}]) == two


def test_normalisation_is_of_the_mix(pair: tuple[str, str]) -> None:
    """By weight: a pixel of one in three samples of the second set, however large the sets."""
    one, two = (open_shards(url).images for url in pair)
    first = np.concatenate([pixels_of(pair[0], row.name) for row in one])
    second = pixels_of(pair[1], two[0].name)
    alone = normalisation(open_shards(pair[0]), DataConfig(pair[0], **MEASURED))
    np.testing.assert_allclose(alone, [first.mean(0), first.std(0)], rtol=1e-9)
    mix = {pair[0]: 2, pair[1]: 1}
    mean, std = normalisation(open_sets(mix), DataConfig(mix, **MEASURED))
    expected = (2 * first.mean(0) + second.mean(0)) / 3
    np.testing.assert_allclose(mean, expected, rtol=1e-9)
    squares = (2 * (first**2).mean(0) + (second**2).mean(0)) / 3
    np.testing.assert_allclose(std, np.sqrt(squares - expected**2), rtol=1e-9)
    batch = next(loader_of(DataConfig(pair[1], window=[64, 64], **MEASURED)).once())
    np.testing.assert_allclose(
        batch.pixels[0].reshape(-1, 3).numpy(),
        ((second - second.mean(0)) / second.std(0)).reshape(100, 64, 3)[:64].reshape(-1, 3),
        atol=1e-5,
    )


def pixels_of(url: str, name: str) -> np.ndarray:
    shards = open_shards(url)
    row = shards.row(name)
    return shards.read(name, 0, 0, row.height, row.width).reshape(-1, 3) / 255


def test_missing_statistics_say_how_to_get_them(pair: tuple[str, str], tmp_path: Path) -> None:
    bare = small_shards(tmp_path / "bare", {"c": (40, 40)})
    for shards in (bare, {pair[0]: 1, bare: 2}):
        with pytest.raises(ValueError, match=r"^data\.mean is manifest, but .*--statistics") as e:
            loader_of(DataConfig(shards, **MEASURED))
        assert bare in str(e.value)
    flat = small_shards(tmp_path / "flat", {"d": (40, 40)}, levels=1, statistics=True)
    with pytest.raises(ValueError, match=r"^data\.std is manifest, but band 0 has one value alone"):
        loader_of(DataConfig(flat, **MEASURED))
    for one in ({"mean": "manifest"}, {"std": "manifest"}):
        with pytest.raises(ValueError, match=r"^data\.mean is .*allowed is manifest for both"):
            DataConfig("x", **one)  # type: ignore[arg-type]


def test_damage_is_named_with_the_number_of_its_set(pair: tuple[str, str], tmp_path: Path) -> None:
    shutil.copytree(pair[1], tmp_path / "damaged")
    two = open_shards(pair[1])
    shard, entry = tmp_path / "damaged" / two.row("a").shard, two.head("a").blocks[0]
    data = bytearray(shard.read_bytes())
    data[entry.offset + entry.length // 2] ^= 1
    shard.write_bytes(data)
    both = open_sets({pair[0]: 1, str(tmp_path / "damaged"): 1})
    rect = Rect(0, 64, 0, 64)
    damaged = both.region("1/a", rect, spare=True).damaged
    assert {one.image for one in damaged} == {"1/a"}
    assert both.region("0/a", rect, spare=True).damaged == ()
    with pytest.raises(ValueError, match="damaged"):
        both.region("1/a", rect)
