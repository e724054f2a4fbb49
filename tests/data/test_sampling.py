from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import loader_of, serial, small_shards, stream

from axialtrain.data.config import DataConfig
from axialtrain.data.order import Order, OrderState, permutation
from axialtrain.data.sampling import SampleConfig, WeightedOrder, table_of

if TYPE_CHECKING:
    from conftest import Source

WEIGHTS = st.lists(
    st.one_of(st.just(0.0), st.floats(0.01, 100), st.integers(1, 5).map(float)),
    min_size=1,
    max_size=40,
).filter(any)
CLASSES = {"a": 0, "b": 7, "c": 0}
SIZES = {"a": (150, 90), "b": (40, 50), "c": (33, 100)}  # 15, 4 and 8 windows of 32 px


@pytest.fixture(scope="module")
def classed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("classes")
    return small_shards(folder, SIZES, image_labels=list(CLASSES.values()))


def config_of(url: str, **sample: Any) -> DataConfig:
    return DataConfig(url, window=[32, 32], sample=SampleConfig(**sample))


def epoch(order: Any, number: int) -> list[int]:
    return [order[i] for i in range(number * order.size, (number + 1) * order.size)]


@given(WEIGHTS, st.integers(0, 1 << 62), st.integers(0, 1000), st.data())
def test_an_epoch_deals_out_each_window_by_its_weight(
    weights: list[float], seed: int, number: int, data: st.DataObject
) -> None:
    size = len(weights)
    classes = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    order = WeightedOrder(np.array(weights), seed, drawn=False, classes=np.array(classes, np.int64))
    taken = epoch(order, number)
    expected = np.array(weights) * size / sum(weights)
    counts = np.bincount(taken, minlength=size)
    assert (np.abs(counts - expected) < 1 + 1e-9).all()
    assert not counts[np.array(weights) == 0].any()
    for one in range(4):
        mine = np.array(classes) == one
        assert abs(counts[mine].sum() - expected[mine].sum()) < 1 + 1e-9


@given(WEIGHTS, st.integers(0, 1 << 62), st.booleans(), st.integers(0, 3))
def test_an_index_depends_on_nothing_but_itself(
    weights: list[float], seed: int, drawn: bool, part: int
) -> None:
    def make() -> WeightedOrder:
        return WeightedOrder(np.array(weights), seed, part, drawn=drawn)

    count = 3 * len(weights)
    forward = [make()[i] for i in range(count)]
    order = make()
    assert [order[i] for i in reversed(range(count))] == forward[::-1]
    assert all(weights[window] > 0 for window in forward)


@pytest.mark.parametrize("drawn", [True, False])
def test_windows_come_as_often_as_their_weights_say(drawn: bool) -> None:
    weights = np.array([0, 1, 2, 3, 0.5, 0, 10, 0])
    order = WeightedOrder(weights, 11, drawn=drawn)
    count = 2000 * order.size
    counts = np.bincount([order[i] for i in range(count)], minlength=8)
    share = weights / weights.sum()
    assert (np.abs(counts - count * share) <= 5 * np.sqrt(count * share * (1 - share))).all()


def test_drawn_indices_are_independent_of_each_other() -> None:
    order = WeightedOrder(np.ones(4), 3, drawn=True)
    pairs = Counter((order[i], order[i + 1]) for i in range(0, 16000, 2))
    assert len(pairs) == 16
    assert all(abs(count - 500) < 5 * np.sqrt(500) for count in pairs.values())


def test_weighted_orders_stay_what_they_were() -> None:
    """If this fails, saved runs would go on with other samples: raise ORDER_VERSION."""
    weights = np.array([1.0, 2, 0, 3])
    assert epoch(WeightedOrder(weights, 5, drawn=True), 1) == DRAWN
    assert epoch(WeightedOrder(weights, 5, drawn=False), 1) == DEALT
    assert permutation(8, 5, 0, part=2).tolist() == PART


DRAWN, DEALT, PART = [1, 3, 1, 1], [1, 1, 3, 3], [4, 2, 7, 5, 3, 6, 1, 0]


@given(st.integers(1, 60), st.integers(0, 1 << 62), st.integers(0, 500))
def test_sets_have_orders_of_their_own(size: int, seed: int, index: int) -> None:
    """And that of the first is the one that a single set has."""
    assert Order(size, seed, 0)[index] == Order(size, seed)[index]
    several = [[Order(size, seed, part)[i] for i in range(size)] for part in range(3)]
    assert all(sorted(one) == list(range(size)) for one in several)
    if size > 30:
        assert several[0] != several[1] != several[2]


def test_plain_runs_have_the_order_and_the_state_that_they_had(source: Source) -> None:
    one = loader_of(DataConfig(source.url, window=[64, 64]))
    size = len(one.windows)
    expected = np.concatenate([permutation(size, 7, epoch) for epoch in range(3)])
    assert [one.order[i] for i in range(3 * size)] == expected.tolist()
    values = json.loads(one.state(3).to_json())
    assert values == {
        "next_index": 12, "seed": 7, "version": 1, "manifest": one.shards.digest
    }  # fmt: skip


def counts_of(url: str, epochs: int = 1, **sample: Any) -> Counter[str]:
    one = loader_of(config_of(url, **sample))
    taken = (one.windows[one.order[i]] for i in range(epochs * len(one.windows)))
    return Counter(window.name for window in taken)


def test_balanced_takes_each_class_as_often(classed: str) -> None:
    """27 windows an epoch, of class 0 (a and c: 23) and of class 7 (b: 4)."""
    dealt = counts_of(classed, by="balanced", replacement=False)
    assert dealt["a"] + dealt["c"] in (13, 14)
    assert dealt["b"] == 27 - dealt["a"] - dealt["c"]
    drawn = counts_of(classed, 100, by="balanced")
    assert abs(drawn["b"] - 1350) < 5 * np.sqrt(2700 * 0.25)
    assert abs(drawn["c"] - 1350 * 8 / 23) < 5 * np.sqrt(2700 * 0.2)
    images = counts_of(classed, 100, by="balanced", per="image", replacement=False)
    assert abs(images["a"] - 675) <= 100
    assert abs(images["b"] - 1350) <= 100


def test_weights_are_of_windows_or_of_images(classed: str, tmp_path: Path) -> None:
    table = tmp_path / "weights.csv"
    table.write_text("image,note,weight\nb,x,2\na,,1\n\nc,,0\nelsewhere,,5\n")
    for weights in ({"a": 1, "b": 2, "c": 0}, str(table)):
        options = {"by": "weighted", "weights": weights, "replacement": False}
        assert abs(counts_of(classed, 19, **options)["a"] - 19 * 27 * 15 / 23) <= 19
        windows = counts_of(classed, 30, **options)
        images = counts_of(classed, 30, **options, per="image")
        assert windows["c"] == images["c"] == 0
        assert abs(windows["b"] - 810 * 8 / 23) <= 30
        assert abs(images["b"] - 810 * 2 / 3) <= 30
    assert counts_of(classed, per="image") == {"a": 9, "b": 9, "c": 9}
    assert sum(counts_of(classed, replacement=True).values()) == 27


def test_tissue_can_be_the_weight(masked: Source) -> None:
    from axialtrain.data.windows import tissue_shares

    config = DataConfig(
        masked.url, window=[40, 40], mean=[0.5] * 2,
        sample=SampleConfig(by="weighted", weights="tissue", replacement=False),
    )  # fmt: skip
    one = loader_of(config)
    shares = tissue_shares(one.windows, one.shards.head)
    counts = np.bincount(epoch(one.order, 2), minlength=len(shares))
    assert (counts[shares == 0] == 0).all()
    assert (np.abs(counts - shares * len(shares) / shares.sum()) < 1 + 1e-9).all()


@settings(max_examples=12)
@given(
    by=st.sampled_from(["balanced", "weighted", "uniform"]),
    replacement=st.booleans(),
    mesh_shape=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    data_ranks=st.integers(1, 3),
    micro_batch=st.integers(1, 3),
    workers=st.integers(1, 3),
    prefetch=st.integers(0, 3),
    first=st.integers(0, 9),
)
def test_all_meshes_read_the_same_stream(
    classed: str,
    by: str,
    replacement: bool,
    mesh_shape: tuple[int, int],
    data_ranks: int,
    micro_batch: int,
    workers: int,
    prefetch: int,
    first: int,
) -> None:
    weights = {"a": 1, "b": 3, "c": 0.5} if by == "weighted" else None
    config = config_of(classed, by=by, weights=weights, replacement=replacement)
    expected = serial(config, first, first + 2)
    config.workers, config.prefetch = workers, prefetch
    options: dict[str, Any] = {"mesh_shape": mesh_shape, "micro_batch": micro_batch}
    got = stream(config, first, first + 2, data_ranks=data_ranks, **options)
    assert [sample for step in got for sample in step] == expected


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"by": "class"}, r"^data\.sample\.by is 'class', allowed is uniform, balanced, weighted"),
        ({"per": "tile"}, r"^data\.sample\.per is 'tile', allowed is window, image"),
        ({"by": "weighted"}, r"^data\.sample\.weights is None .*allowed is a table"),
        ({"weights": {"a": 1}}, r"^data\.sample\.weights is .* with data\.sample\.by=uniform"),
        ({"by": "weighted", "weights": 3}, r"^data\.sample\.weights is 3, allowed is the path"),
    ],
)
def test_wrong_sampling_is_named(sample: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleConfig(**sample)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "c": 1}, r"^data\.sample\.weights has no image 'b', allowed is a weight for"),
        ({"a": 1, "b": -1, "c": 1}, r"^data\.sample\.weights: b is -1, allowed is a number from 0"),
        ({"a": 1, "b": float("nan"), "c": 1}, r"^data\.sample\.weights: b is nan, allowed"),
        ({"a": 1, "b": True, "c": 1}, r"^data\.sample\.weights: b is True, allowed"),
        ({"a": 0, "b": 0, "c": 0}, r"^data\.sample\.weights are 0 for all windows"),
        ("nowhere.csv", r"^data\.sample\.weights: nowhere\.csv: cannot be read"),
    ],
)
def test_wrong_weights_are_named(classed: str, weights: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader_of(config_of(classed, by="weighted", weights=weights))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"columns are \[\], allowed are image and weight once"),
        ("image\na\n", r"columns are \['image'\]"),
        ("image,weight,image\n", "columns are"),
        ("image,weight\na,1,2\n", "line 2 has 3 cells, allowed are 2"),
        ("image,weight\na,1\na,2\n", "line 3: image 'a' stands there twice"),
    ],
)
def test_wrong_tables_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        table_of(path)


def test_without_classes_nothing_is_balanced(source: Source) -> None:
    with pytest.raises(ValueError, match=r"^data\.sample\.by is balanced, but image 'wide' has no"):
        loader_of(DataConfig(source.url, sample=SampleConfig(by="balanced")))


def test_a_run_goes_on_by_the_same_sampling_alone(classed: str) -> None:
    from axialtrain.data.windows import CutConfig

    weights = {"a": 1, "b": 2, "c": 0}
    plain = loader_of(DataConfig(classed, window=[32, 32]))
    weighted = loader_of(config_of(classed, by="weighted", weights=weights))
    state = OrderState.from_json(weighted.state(2).to_json())
    assert len(weighted.state(2).to_json()) < 250
    assert len(plain.state(2).to_json()) < 150
    assert state == weighted.state(2)
    again = {"data_ranks": 3, "micro_batch": 2, "mesh_shape": (2, 1)}
    assert loader_of(config_of(classed, by="weighted", weights=weights), **again).resume(state) == 2
    cut = DataConfig(classed, window=[32, 32], cut=CutConfig(overlap=8))
    others = {
        "data.sample": (plain, config_of(classed, by="balanced")),
        "data.sample.weights": (config_of(classed, by="weighted", weights=weights | {"c": 1}),),
        "data.cut.stride": (cut,),
    }
    for key, configs in others.items():
        for other in configs:
            one = other if other is plain else loader_of(other)
            refused = state if key != "data.cut.stride" else plain.state(2)
            with pytest.raises(ValueError, match=rf"^{key} is not what the saved run had, .*same$"):
                one.resume(refused)
    assert plain.resume(plain.state(3)) == 3
    with pytest.raises(ValueError, match=r"^data\.sample is not what the saved run had"):
        weighted.resume(plain.state(3))


def test_a_damaged_plan_is_named(classed: str) -> None:
    text = loader_of(config_of(classed, by="balanced")).state(1).to_json()
    for wrong in ({"data.sample": "x"}, {"data.sample": 3}, ["data.sample"]):
        with pytest.raises(ValueError, match=r"^order state: plan"):
            OrderState.from_json(json.dumps(json.loads(text) | {"plan": wrong}))
