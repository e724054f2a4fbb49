"""Ways that take turns: which are called when, what counts, and what a ratio is made of."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from planted_time import Time

from axialtrain.bench.timing import SHORT, Rounds, in_turns, ratio

CPU = torch.device("cpu")


@pytest.fixture
def clock() -> Time:
    return Time()


def test_each_round_has_all_ways_in_an_order_that_turns_around(clock):
    called = []

    def way(name: str) -> None:  # long enough to be called once a round
        called.append(name)
        clock.sleep(1.2 * SHORT)

    rounds = in_turns({name: partial(way, name) for name in "ab"}, CPU, rounds=3, clock=clock)
    assert "".join(called) == "aabb" + "ba" + "ab" + "ba"
    assert rounds.seconds == {name: [pytest.approx(1.2 * SHORT)] * 3 for name in "ab"}


def test_what_warms_up_does_not_count(clock):
    slow = [0.3, 0.1]  # from the end

    def way() -> None:
        clock.sleep(slow.pop() if slow else 0.025)

    rounds = in_turns({"a": way}, CPU, rounds=3, clock=clock)
    assert rounds.seconds["a"] == [pytest.approx(0.025)] * 3


def test_a_short_way_is_called_often_and_its_time_is_that_of_one_call(clock):
    calls = []

    def way() -> None:
        calls.append(0)
        clock.sleep(SHORT / 8)

    (seconds,) = in_turns({"a": way}, CPU, rounds=1, clock=clock).seconds["a"]
    assert len(calls) == 2 + 8
    assert seconds == pytest.approx(SHORT / 8)


def test_no_round_begins_when_the_time_is_up_but_two_are_made(clock):
    way = partial(clock.sleep, 0.03)
    few = in_turns({"a": way}, CPU, rounds=50, limit=1e-9, clock=clock)
    assert len(few.seconds["a"]) == 2
    # Two to warm up, and rounds as long as 0.3 s are not over.
    some = in_turns({"a": way}, CPU, rounds=50, limit=0.295, clock=clock)
    assert len(some.seconds["a"]) == 8


def test_the_clock_of_the_machine_is_the_usual_one():
    (seconds,) = in_turns({"a": partial(time.sleep, SHORT)}, CPU, rounds=1).seconds["a"]
    assert seconds >= SHORT


def test_a_ratio_is_the_median_of_those_of_each_round():
    """One busy second of the machine meets both ways of a round, or is the median's business."""
    rounds = Rounds({"mine": [1.0, 8.0, 3.0], "other": [2.0, 4.0, 6.0]})
    assert rounds.ratio("mine", "other") == 0.5
    assert rounds.ratio("other", "mine") == 2
    assert rounds.median("mine") == 3
    assert ratio([1, 2], [2, 1]) == pytest.approx(1.25)
