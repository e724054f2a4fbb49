"""Ways that take turns: which are called when, what counts, and what a ratio is made of."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from axialtrain.bench.timing import SHORT, Rounds, in_turns, ratio

CPU = torch.device("cpu")


def test_each_round_has_all_ways_in_an_order_that_turns_around():
    called = []
    ways = {name: partial(called.append, name) for name in "ab"}
    for name in ways:  # long enough to be called once a round
        ways[name] = lambda name=name: (called.append(name), time.sleep(1.2 * SHORT))
    rounds = in_turns(ways, CPU, rounds=3)
    assert "".join(called) == "aabb" + "ba" + "ab" + "ba"
    assert {name: len(seconds) for name, seconds in rounds.seconds.items()} == {"a": 3, "b": 3}
    for seconds in rounds.seconds.values():
        assert all(1.2 * SHORT <= one < 1 for one in seconds)


def test_what_warms_up_does_not_count():
    slow = [0.3, 0.1]  # from the end

    def way() -> None:
        time.sleep(slow.pop() if slow else 0.025)

    assert max(in_turns({"a": way}, CPU, rounds=3).seconds["a"]) < 0.09


def test_a_short_way_is_called_often_and_its_time_is_that_of_one_call():
    calls = []

    def way() -> None:
        calls.append(0)
        time.sleep(SHORT / 10)

    (seconds,) = in_turns({"a": way}, CPU, rounds=1).seconds["a"]
    assert 2 + 5 <= len(calls) <= 2 + 10
    assert SHORT / 10 <= seconds < SHORT


def test_no_round_begins_when_the_time_is_up_but_two_are_made():
    way = partial(time.sleep, 0.03)
    assert len(in_turns({"a": way}, CPU, rounds=50, limit=1e-9).seconds["a"]) == 2
    assert 2 < len(in_turns({"a": way}, CPU, rounds=50, limit=0.3).seconds["a"]) < 12


def test_a_ratio_is_the_median_of_those_of_each_round():
    """One busy second of the machine meets both ways of a round, or is the median's business."""
    rounds = Rounds({"mine": [1.0, 8.0, 3.0], "other": [2.0, 4.0, 6.0]})
    assert rounds.ratio("mine", "other") == 0.5
    assert rounds.ratio("other", "mine") == 2
    assert rounds.median("mine") == 3
    assert ratio([1, 2], [2, 1]) == pytest.approx(1.25)
