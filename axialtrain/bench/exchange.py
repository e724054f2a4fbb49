"""How fast tokens change layout, beside a bare all-to-all of the same bytes.

Measured on ranks that exist already: whoever starts them calls `measure` on each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from axialtrain.grid import Layout, messages
from axialtrain.mesh.collectives import gather_objects, sum_over
from axialtrain.mesh.exchange import swap
from axialtrain.mesh.mesh import Group, Mesh


@dataclass(frozen=True)
class Rates:
    """One swap. way: "tile -> rows". ranks: among which each group of ranks exchanges.

    swap_s, bare_s: seconds on the slowest rank, medians of the rounds. ratio: of the rate of the
    swap to that of the bare all-to-all, the median of the rounds' own ratios.
    sent_bytes: what the swap sent from all ranks, as counted. formula_bytes: M (P - 1) / P of all
    ranks, which is exact where the mesh divides the grid.
    """

    way: str
    ranks: int
    swap_s: float
    bare_s: float
    ratio: float
    sent_bytes: int
    formula_bytes: float

    @property
    def swap_rate(self) -> float:
        """Bytes that all ranks together send in a second."""
        return self.sent_bytes / self.swap_s

    @property
    def bare_rate(self) -> float:
        return self.sent_bytes / self.bare_s


def measure(
    mesh: Mesh,
    *,
    height: int,
    width: int,
    dim: int,
    dtype: torch.dtype,
    rounds: int,
    batch: int = 1,
    device_type: str = "cpu",
) -> list[Rates]:
    """Every swap between two layouts that sends something, on a grid of height x width tokens of
    `dim` channels. Collective over `mesh.world`; equal on all ranks.

    In each round the swap and a bare `all_to_all_single` of the same messages take turns, into and
    out of buffers that are there already. All ranks begin each at once.
    """
    device = torch.device(device_type)
    found = []
    for before, after in permutations(Layout, 2):
        group = _group(mesh, before, after)
        if group.size > 1:
            found.append(
                _measured(
                    mesh, group, before, after, (batch, height, width, dim), dtype, device, rounds
                )
            )
    return found


def _group(mesh: Mesh, before: Layout, after: Layout) -> Group:
    if Layout.TILE not in (before, after):
        return mesh.spatial
    return mesh.col if Layout.ROWS in (before, after) else mesh.row


def _measured(
    mesh: Mesh,
    group: Group,
    before: Layout,
    after: Layout,
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> Rates:
    batch, height, width, dim = size
    place = mesh.place(height, width, before)
    x = torch.ones(batch, place.rect.height, place.rect.width, dim, dtype=dtype, device=device)
    bare = _bare(mesh, group, before, after, size, x)
    groups = (mesh.row, mesh.col, mesh.spatial)
    start = sum(one.sent_bytes for one in groups)
    swap(x, place, after, mesh)
    sent = sum(one.sent_bytes for one in groups) - start
    bare()
    ways = {"swap": lambda: swap(x, place, after, mesh), "bare": bare}
    taken = []
    for number in range(rounds):
        order = list(ways) if number % 2 else list(ways)[::-1]
        found = {name: _seconds(ways[name], mesh, device) for name in order}
        taken.append((found["swap"], found["bare"]))
    every = gather_objects((taken, sent, x.nbytes * (group.size - 1) / group.size), mesh.world)
    slowest = [
        [max(rank[0][number][which] for rank in every) for number in range(rounds)]
        for which in (0, 1)
    ]
    return Rates(
        way=f"{before.value} -> {after.value}",
        ranks=group.size,
        swap_s=median(slowest[0]),
        bare_s=median(slowest[1]),
        ratio=median(b / s for s, b in zip(*slowest, strict=True)),
        sent_bytes=sum(rank[1] for rank in every),
        formula_bytes=sum(rank[2] for rank in every),
    )


def _bare(
    mesh: Mesh,
    group: Group,
    before: Layout,
    after: Layout,
    size: tuple[int, int, int, int],
    x: Tensor,
) -> Callable[[], object]:
    """The same messages to other ranks, and nothing else."""
    batch, height, width, dim = size
    members = list(_coordinates(mesh, group))
    owned = [mesh.place(height, width, before).rect_of(at) for at in members]
    wanted = [mesh.place(height, width, after).rect_of(at) for at in members]
    plan = messages(owned, wanted, group.rank)
    send, receive = (
        [0 if rank == group.rank else batch * rect.area * dim for rank, rect in enumerate(rects)]
        for rects in (plan.send, plan.receive)
    )
    outgoing, incoming = x.new_ones(sum(send)), x.new_empty(sum(receive))
    return lambda: dist.all_to_all_single(incoming, outgoing, receive, send, group=group.handle)


def _coordinates(mesh: Mesh, group: Group) -> Iterator[tuple[int, int]]:
    """(row, col) of the ranks of `group`, in its order."""
    row, col = mesh.at
    for rank in range(group.size):
        if group is mesh.row:
            yield rank, col
        elif group is mesh.col:
            yield row, rank
        else:
            yield divmod(rank, mesh.shape[1])


def _seconds(call: Callable[[], object], mesh: Mesh, device: torch.device) -> float:
    sum_over(torch.zeros(1, device=device), mesh.world)  # all begin at once
    _finish(device)
    start = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
