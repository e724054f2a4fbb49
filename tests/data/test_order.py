from __future__ import annotations

import json

import numpy as np
import pytest

from axialtrain.data.order import ORDER_VERSION, Order, OrderState, permutation

STATE = OrderState(next_index=12, seed=3, manifest="0" * 64)


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_each_epoch_is_a_permutation(size: int) -> None:
    order = Order(size, seed=5)
    for epoch in range(3):
        taken = [order[epoch * size + i] for i in range(size)]
        assert sorted(taken) == list(range(size))


def test_order_depends_on_nothing_but_seed_and_index() -> None:
    forward = [Order(10, 5)[i] for i in range(40)]
    order = Order(10, 5)
    assert [order[i] for i in reversed(range(40))] == forward[::-1]
    assert forward[:10] != forward[10:20]
    assert [Order(10, 6)[i] for i in range(40)] != forward


def test_order_stays_what_it_was() -> None:
    """If this fails, saved runs would go on with other samples: raise ORDER_VERSION."""
    assert ORDER_VERSION == 1
    assert permutation(8, 5, 0).tolist() == [2, 4, 3, 1, 5, 0, 6, 7]
    assert permutation(8, 5, 1).tolist() == [7, 4, 5, 1, 6, 0, 2, 3]


def test_places_are_uniform() -> None:
    first = [int(permutation(4, seed, 0)[0]) for seed in range(2000)]
    counts = np.bincount(first, minlength=4)
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@pytest.mark.parametrize(("size", "seed"), [(0, 0), (3, -1), (3, 1 << 63)])
def test_wrong_arguments_are_named(size: int, seed: int) -> None:
    with pytest.raises(ValueError, match="allowed is"):
        Order(size, seed)


def test_state_survives_json() -> None:
    assert OrderState.from_json(STATE.to_json()) == STATE


@pytest.mark.parametrize(
    ("key", "value"),
    [("next_index", -1), ("seed", 1.5), ("manifest", "x"), ("version", 2), ("version", None)],
)
def test_wrong_state_is_named(key: str, value: object) -> None:
    data = json.loads(STATE.to_json())
    data[key] = value
    with pytest.raises(ValueError, match=rf"^order state: {key} is "):
        OrderState.from_json(json.dumps(data))
