"""Time of several ways to do the same, in turns, so that what else the machine does meets them
alike: what counts are medians of ratios within a round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

Way = Callable[[], object]
Clock = Callable[[], float]

SHORT = 0.02  # s: a shorter way is called several times, for clocks and schedulers are coarse
MOST = 50  # times
FEWEST = 2  # rounds, however long they take


@dataclass(frozen=True)
class Rounds:
    """seconds: of one call in each way, round by round."""

    seconds: dict[str, list[float]]

    def median(self, way: str) -> float:
        """Seconds."""
        return median(self.seconds[way])

    def ratio(self, way: str, other: str) -> float:
        """How many times as long as the other it takes."""
        return ratio(self.seconds[way], self.seconds[other])


def ratio(these: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of what was measured in the same round."""
    return median(a / b for a, b in zip(these, others, strict=True))


def in_turns(
    ways: Mapping[str, Way],
    device: torch.device,
    *,
    rounds: int,
    limit: float = math.inf,
    clock: Clock = time.perf_counter,
) -> Rounds:
    """All ways in each round, in an order that turns around from one round to the next.

    A first round, in which libraries and caches warm up, does not count, and says how often a short
    way is called in each. limit: s after which no further round begins, once there are FEWEST.
    clock: says the time, in s, where no GPU does.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    begin = clock()
    calls = {}
    for name, way in ways.items():
        taken = _seconds(way, 1, device, clock)  # with what is compiled or allocated once
        if taken < 1:
            taken = _seconds(way, 1, device, clock)
        calls[name] = max(1, min(MOST, math.ceil(SHORT / taken)))
    for number in range(rounds):
        if number >= FEWEST and clock() - begin > limit:
            break
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            seconds[name].append(_seconds(ways[name], calls[name], device, clock))
    return Rounds(seconds)


def _seconds(way: Way, calls: int, device: torch.device, clock: Clock) -> float:
    """Of one call, on average."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            way()
        last.record()
        torch.cuda.synchronize(device)
        return float(first.elapsed_time(last)) / 1e3 / calls
    begin = clock()
    for _ in range(calls):
        way()
    return (clock() - begin) / calls
