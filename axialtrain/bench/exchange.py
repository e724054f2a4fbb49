"""How fast tokens change layout, beside a bare all-to-all of the same bytes.

Measured on ranks that exist already: whoever starts them calls `measure` on each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import permutations

import torch
import torch.distributed as dist
from torch import Tensor

from axialtrain.bench.timing import Way
from axialtrain.bench.together import in_turns_together
from axialtrain.grid import Layout, Place, messages
from axialtrain.mesh.collectives import gather_objects
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


def measure(
    mesh: Mesh,
    *,
    height: int,
    width: int,
    dim: int,
    dtype: torch.dtype,
    rounds: int,
    limit: float = math.inf,
    batch: int = 1,
    device_type: str = "cpu",
) -> list[Rates]:
    """Every swap between two layouts that sends something, on a grid of height x width tokens of
    `dim` channels. Collective over `mesh.world`; equal on all ranks.

    In each round the swap and a bare `all_to_all_single` of the same messages take turns, into and
    out of buffers that are there already, until there are `rounds` of them or `limit` s are over:
    see `in_turns_together`.
    """
    device = torch.device(device_type)
    found = []
    for before, after in permutations(Layout, 2):
        group = _group(mesh, before, after)
        if group.size > 1:
            size = (batch, height, width, dim)
            place = mesh.place(height, width, before)
            x = torch.ones(batch, *_shape(place), dim, dtype=dtype, device=device)
            bare = _bare(mesh, group, before, after, size, x)
            groups = (mesh.row, mesh.col, mesh.spatial)
            start = sum(one.sent_bytes for one in groups)
            swap(x, place, after, mesh)
            sent = sum(one.sent_bytes for one in groups) - start
            formula = x.nbytes * (group.size - 1) / group.size
            ways: dict[str, Way] = {"swap": partial(swap, x, place, after, mesh), "bare": bare}
            taken = in_turns_together(ways, mesh, device, rounds=rounds, limit=limit)
            every = gather_objects((sent, formula), mesh.world)
            found.append(
                Rates(
                    way=f"{before.value} -> {after.value}",
                    ranks=group.size,
                    swap_s=taken.median("swap"),
                    bare_s=taken.median("bare"),
                    ratio=taken.ratio("bare", "swap"),
                    sent_bytes=sum(one for one, _ in every),
                    formula_bytes=sum(one for _, one in every),
                )
            )
    return found


def _shape(place: Place) -> tuple[int, int]:
    return place.rect.height, place.rect.width


def _group(mesh: Mesh, before: Layout, after: Layout) -> Group:
    if Layout.TILE not in (before, after):
        return mesh.spatial
    return mesh.col if Layout.ROWS in (before, after) else mesh.row


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
