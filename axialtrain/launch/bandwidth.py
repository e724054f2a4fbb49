"""How fast tokens travel along each axis of a mesh: what `axialtrain doctor` measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from axialtrain.mesh.collectives import all_to_all, gather_objects, sum_over
from axialtrain.mesh.mesh import Group, Mesh
from axialtrain.mesh.placement import AXES, Placement

SMALL = 16  # bytes for each rank of the group: what a message costs by itself
LARGE = {"cpu": 1 << 22, "cuda": 1 << 26}  # bytes of a rank's activations, about
MANY, FEW = 15, 5  # repeats of the small ones, and of the large ones


@dataclass(frozen=True)
class Measured:
    """One collective along `along`. latency, seconds: of the slowest rank, the median of repeats,
    with a few bytes and with `bytes` sent by each rank. rank: which was slowest with the latter.
    """

    along: str
    operation: str
    size: int
    hosts: str
    latency: float
    seconds: float
    bytes: int
    rank: int

    @property
    def rate(self) -> float:
        """Bytes that the slowest rank sends in a second."""
        return self.bytes / self.seconds


def measure(mesh: Mesh, placement: Placement, device: torch.device) -> list[Measured]:
    """The all-to-all along each axis that has several ranks, and the sum along tensor. Collective.

    All groups of an axis talk at once, as in training.
    """
    groups: dict[str, Group] = {name: getattr(mesh, name) for name in AXES}
    if mesh.row.size > 1 and mesh.col.size > 1:
        groups["row x col"] = mesh.spatial
    found = [
        _measured(name, "all-to-all", group, _exchange, mesh, placement, device)
        for name, group in groups.items()
        if group.size > 1
    ]
    if mesh.tensor.size > 1:
        found.append(
            _measured("tensor", "all-reduce", mesh.tensor, sum_over, mesh, placement, device)
        )
    return found


def _exchange(flat: torch.Tensor, group: Group) -> torch.Tensor:
    parts = [flat.numel() // group.size] * group.size
    return all_to_all(flat, parts, parts, group)


def _measured(
    name: str,
    operation: str,
    group: Group,
    call: Callable[[torch.Tensor, Group], torch.Tensor],
    mesh: Mesh,
    placement: Placement,
    device: torch.device,
) -> Measured:
    small = _time(call, SMALL * group.size, MANY, group, mesh, device)
    sent = group.sent_bytes
    large = _time(call, LARGE[device.type], FEW, group, mesh, device)
    sent = (group.sent_bytes - sent) // (FEW + 1)
    every = gather_objects((small, large, sent), mesh.world)
    slowest = max(range(len(every)), key=lambda rank: every[rank][1])
    axes = [placement.axes[one] for one in name.split(" x ")]
    return Measured(
        along=name,
        operation=operation,
        size=group.size,
        hosts="crosses hosts" if any(axis.crossing for axis in axes) else "inside a host",
        latency=max(one[0] for one in every),
        seconds=every[slowest][1],
        bytes=every[slowest][2],
        rank=slowest,
    )


def _time(
    call: Callable[[torch.Tensor, Group], torch.Tensor],
    size: int,
    repeats: int,
    group: Group,
    mesh: Mesh,
    device: torch.device,
) -> float:
    """Seconds of the call on about `size` bytes: the median, after one that does not count."""
    x = torch.zeros(size // 4 // group.size * group.size, device=device)
    taken = []
    for _ in range(repeats + 1):
        sum_over(x.new_zeros(1), mesh.world)  # all begin at once
        _finish(device)
        start = time.perf_counter()
        call(x, group)
        _finish(device)
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(found: list[Measured], hosts: tuple[str, ...]) -> str:
    """For people."""
    rows = [("along", "operation", "ranks", "", "latency", "sent a rank", "in", "rate", "slowest")]
    for one in found:
        rows.append(
            (
                one.along,
                one.operation,
                str(one.size),
                one.hosts,
                f"{one.latency * 1e6:.0f} us",
                f"{one.bytes / 1e6:.1f} MB",
                f"{one.seconds * 1e3:.1f} ms",
                f"{one.rate / 1e6:.0f} MB/s",
                f"rank {one.rank} on {hosts[one.rank]}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def records(found: list[Measured]) -> list[dict[str, Any]]:
    """For the JSON: seconds, bytes, bytes a second."""
    return [asdict(one) | {"rate": one.rate} for one in found]
