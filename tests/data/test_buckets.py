from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaded import loader_of, serial, small_shards, stream

from axialtrain.data.buckets import BucketedOrder, buckets_of
from axialtrain.data.config import DataConfig
from axialtrain.data.order import Order
from axialtrain.data.sampling import WeightedOrder
from axialtrain.data.store import ImageRow
from axialtrain.data.windows import cut_windows

BUCKETS = st.lists(st.integers(0, 5), min_size=1, max_size=60)


@pytest.fixture(scope="module")
def mixed_sizes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """22 images of 1 x 1 to 7 x 9 tokens of 16 px."""
    rng = np.random.default_rng(4)
    sizes = {f"i{k:02d}": (int(rng.integers(5, 110)), int(rng.integers(5, 140))) for k in range(22)}
    return small_shards(tmp_path_factory.mktemp("sizes"), sizes)


@given(BUCKETS, st.integers(1, 9), st.integers(0, 1 << 62), st.integers(0, 50))
def test_an_epoch_is_rearranged_and_no_more(
    buckets: list[int], batch: int, seed: int, epoch: int
) -> None:
    size = len(buckets)
    order = BucketedOrder(Order(size, seed), np.array(buckets), batch)
    taken = [order[i] for i in range(epoch * size, (epoch + 1) * size)]
    assert sorted(taken) == list(range(size))
    again = BucketedOrder(Order(size, seed), np.array(buckets), batch)
    assert [again[i] for i in reversed(range(epoch * size, (epoch + 1) * size))] == taken[::-1]
    drawn = WeightedOrder(np.ones(size), seed, drawn=True)
    some = BucketedOrder(WeightedOrder(np.ones(size), seed, drawn=True), np.array(buckets), batch)
    places = range(epoch * size, (epoch + 1) * size)
    assert Counter(some[i] for i in places) == Counter(drawn[i] for i in places)


@given(BUCKETS, st.integers(1, 9), st.integers(0, 1 << 62), st.integers(0, 50))
def test_steps_are_of_one_bucket_but_for_a_few(
    buckets: list[int], batch: int, seed: int, epoch: int
) -> None:
    """Of the steps that lie in an epoch, at most as many are mixed as there are buckets, and 1."""
    size = len(buckets)
    order = BucketedOrder(Order(size, seed), np.array(buckets), batch)
    first, last = -(-epoch * size // batch), (epoch + 1) * size // batch
    mixed = 0
    for step in range(first, last):
        found = {buckets[order[i]] for i in range(step * batch, (step + 1) * batch)}
        mixed += len(found) > 1
    assert mixed <= len(set(buckets)) + 1


def test_steps_of_two_epochs_are_of_one_end() -> None:
    """17 images a size, 4 a step: 1 is left of each size, and 3 sizes go to the step of both."""
    buckets = np.repeat(np.arange(5), 17)
    order = BucketedOrder(Order(len(buckets), 3), buckets, 4)
    for epoch in range(1, 4):
        step = epoch * len(buckets) // 4
        assert epoch * len(buckets) % 4
        found = {int(buckets[order[i]]) for i in range(step * 4, step * 4 + 4)}
        assert found <= ({2, 3, 4} if epoch % 2 else {0, 1, 2})


def test_orders_in_buckets_stay_what_they_were() -> None:
    """If this fails, saved runs would go on with other samples: raise ORDER_VERSION."""
    order = BucketedOrder(Order(9, 5), np.array([0, 0, 0, 1, 1, 1, 1, 2, 2]), 2)
    assert [order[i] for i in range(18)] == STAYS


STAYS = [2, 1, 4, 3, 5, 6, 7, 8, 0, 2, 7, 8, 6, 3, 4, 5, 1, 0]


def test_buckets_are_sizes_in_tokens() -> None:
    images = [
        ImageRow(f"i{k}", "s.tar", 0, 2, "0" * 64, *size, None)
        for k, size in enumerate([(16, 16), (32, 17), (33, 16), (64, 64), (65, 1), (1, 65)])
    ]
    windows = cut_windows(images, None)
    assert buckets_of(windows, 16, 2).tolist() == [0, 0, 2, 3, 4, 1]
    assert buckets_of(windows, 16, 100).tolist() == [0] * 6


def test_buckets_leave_less_padding(mixed_sizes: str) -> None:
    """Tokens that pad, of all that a model is given, over three epochs."""
    shares = {}
    for buckets in (None, 2):
        one = loader_of(DataConfig(mixed_sizes, buckets=buckets), batch=4, micro_batch=4)
        padding = tokens = 0
        seen: Counter[str] = Counter()
        for step in one.steps(0, 3 * 22 // 4):
            for batch in step:
                padding += int((~batch.valid).sum())
                tokens += batch.valid.numel()
                seen.update(batch.ids)
        assert max(seen.values()) <= 3
        assert len(seen) == 22
        shares[buckets] = padding / tokens
    assert shares[2] < 0.75 * shares[None]  # type: ignore[index]


@settings(max_examples=10)
@given(
    granularity=st.integers(1, 4),
    data_ranks=st.integers(1, 3),
    micro_batch=st.integers(1, 4),
    workers=st.integers(1, 3),
    prefetch=st.integers(0, 3),
    first=st.integers(0, 12),
)
def test_all_data_ranks_read_the_same_stream(
    mixed_sizes: str,
    granularity: int,
    data_ranks: int,
    micro_batch: int,
    workers: int,
    prefetch: int,
    first: int,
) -> None:
    config = DataConfig(mixed_sizes, buckets=granularity)
    expected = serial(config, first, first + 2)
    config.workers, config.prefetch = workers, prefetch
    options: dict[str, Any] = {"data_ranks": data_ranks, "micro_batch": micro_batch}
    got = stream(config, first, first + 2, **options)
    assert [sample for step in got for sample in step] == expected


def test_all_meshes_read_the_same_buckets(mixed_sizes: str) -> None:
    config = DataConfig(mixed_sizes, buckets=2)
    for mesh_shape in ((1, 2), (2, 2), (3, 1)):
        got = stream(config, 4, 7, mesh_shape=mesh_shape, micro_batch=2, patch=1)
        want = serial(config, 4, 7, patch=1)
        assert [sample for step in got for sample in step] == want


def test_buckets_are_of_whole_images_and_of_one_batch(mixed_sizes: str) -> None:
    for wrong in ({"buckets": 0}, {"buckets": 2, "window": [32, 32]}):
        with pytest.raises(ValueError, match=r"^data\.buckets is .*allowed is null, or for whole"):
            DataConfig("x", **wrong)  # type: ignore[arg-type]
    config = DataConfig(mixed_sizes, buckets=2)
    state = loader_of(config).state(4)
    assert loader_of(config, micro_batch=2, data_ranks=2).resume(state) == 4
    for other, key in (
        (loader_of(config, batch=2), r"train\.batch"),
        (loader_of(config, patch=8), r"model\.patch"),
        (loader_of(DataConfig(mixed_sizes, buckets=3)), r"data\.buckets"),
        (loader_of(DataConfig(mixed_sizes)), r"data\.buckets"),
    ):
        with pytest.raises(ValueError, match=rf"^{key} is not what the saved run had"):
            other.resume(state)
