"""Time of what several ranks do at once, in turns: what counts is the slowest of them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch

from axialtrain.bench.timing import FEWEST, Clock, Rounds, Way
from axialtrain.mesh.collectives import gather_objects, max_over
from axialtrain.mesh.mesh import Mesh


def in_turns_together(
    ways: Mapping[str, Way],
    mesh: Mesh,
    device: torch.device,
    *,
    rounds: int,
    limit: float = math.inf,
    clock: Clock = time.perf_counter,
) -> Rounds:
    """All ways in each round, in an order that turns around, each begun by all ranks at once.

    Collective over `mesh.world`; equal on all ranks. A first round warms up and does not count.
    limit: s after which no further round begins, once there are FEWEST, by the clock of the rank
    that is the furthest. clock: says the time, in s; a GPU is waited for.
    """
    begin = clock()
    for way in ways.values():
        way()
    mine: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        if _furthest(clock() - begin, mesh, device) > limit and number >= FEWEST:
            break
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            mine[name].append(_seconds(ways[name], mesh, device, clock))
    every = gather_objects(mine, mesh.world)
    return Rounds(
        {
            name: [max(ranks) for ranks in zip(*(one[name] for one in every), strict=True)]
            for name in ways
        }
    )


def _seconds(way: Way, mesh: Mesh, device: torch.device, clock: Clock) -> float:
    _furthest(0.0, mesh, device)  # all begin at once
    _finish(device)
    start = clock()
    way()
    _finish(device)
    return clock() - start


def _furthest(seconds: float, mesh: Mesh, device: torch.device) -> float:
    return float(max_over(torch.tensor(seconds, device=device), mesh.world))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
