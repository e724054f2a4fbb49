"""Rank functions: tokens on the move, sums over groups, and their adjoints."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from axialtrain.grid import Layout, Place, Rect, messages
from axialtrain.mesh.collectives import all_to_all, sum_over
from axialtrain.mesh.exchange import Exchange, redistribute, swap
from axialtrain.mesh.mesh import Mesh

BATCH = 2


@dataclass
class Moved:
    """What one rank got, the two sides of <A x, y> = <x, A^T y> here, and the bytes it sent."""

    output: Tensor
    forward: float
    backward: float
    sent: tuple[int, int]


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def whole(size: tuple[int, int], rest: tuple[int, ...]) -> Tensor:
    """The tokens of the whole grid, alike on every rank and in the test."""
    return numbers((BATCH, *size, *rest), seed=0)


def part(tokens: Tensor, rect: Rect) -> Tensor:
    _, height, width = tokens.shape[:3]
    return tokens[:, *rect.slices(Rect(0, height, 0, width))]


def move(
    mesh: dict[str, int], size: tuple[int, int], rest: tuple[int, ...], wanted: list[Rect]
) -> Moved:
    """Each rank's tile to its wanted rectangle, and gradients back."""
    grid = Mesh(**mesh)
    owned = [Place(*size, shape=grid.shape, at=at).rect for at in coordinates(grid.shape)]
    me = grid.spatial.rank
    plan = messages(owned, wanted, me)
    x = part(whole(size, rest), owned[me]).requires_grad_()
    out = redistribute(x, owned[me], wanted[me], plan, grid.spatial)
    sent_forward = grid.spatial.sent_bytes
    # A gradient that is no contiguous tensor, as autograd may well give.
    y = numbers((*rest[::-1], *out.shape[:3][::-1]), seed=1 + me).permute(*range(out.ndim)[::-1])
    out.backward(y)
    assert x.grad is not None
    return Moved(
        out.detach(),
        float((out * y).sum()),
        float((x * x.grad).sum()),
        (sent_forward, grid.spatial.sent_bytes - sent_forward),
    )


def coordinates(shape: tuple[int, int]) -> list[tuple[int, int]]:
    return list(itertools.product(range(shape[0]), range(shape[1])))


def swaps(
    mesh: dict[str, int], size: tuple[int, int], rest: tuple[int, ...], *, mask: bool
) -> dict[tuple[str, str], tuple[Tensor, dict[str, int]]]:
    """From every layout to every layout: what this rank got and sent over each group."""
    grid = Mesh(**mesh)
    exchange = Exchange()
    exchange.mesh = grid
    tokens = whole(size, rest)
    if mask:
        tokens = tokens > 0
    groups = {"row": grid.row, "col": grid.col, "spatial": grid.spatial}
    found = {}
    for source, goal in itertools.product(Layout, repeat=2):
        place = grid.place(*size, source)
        before = {name: group.sent_bytes for name, group in groups.items()}
        x = part(tokens, place.rect)
        out = exchange(x, place, goal)
        sent = {name: group.sent_bytes - before[name] for name, group in groups.items()}
        found[source.value, goal.value] = (out, sent)
    return found


def swap_there_and_back(
    mesh: dict[str, int], size: tuple[int, int]
) -> list[tuple[float, float, bool]]:
    """For every pair of layouts: <A x, y> and <x, A^T y> here, and whether A^T is the way back."""
    grid = Mesh(**mesh)
    found = []
    for number, (source, goal) in enumerate(itertools.permutations(Layout, 2)):
        place = grid.place(*size, source)
        x = part(whole(size, (3,)), place.rect).clone().requires_grad_()
        out = swap(x, place, goal, grid)
        y = numbers(tuple(out.shape), seed=100 * grid.spatial.rank + number)
        out.backward(y)
        assert x.grad is not None
        returned = swap(y, place.under(goal), source, grid)
        same = torch.equal(returned, x.grad)
        found.append((float((out * y).sum()), float((x * x.grad).sum()), same))
    return found


def sums(mesh: dict[str, int], shape: tuple[int, ...]) -> dict[str, dict[str, Tensor]]:
    """`sum_over` along each group: x, the result, its gradient y, and the gradient of x."""
    grid = Mesh(**mesh)
    found = {}
    for name in ("row", "col", "spatial"):
        group = getattr(grid, name)
        # x and y as transposed views: the sum must not depend on how they lie in memory.
        x = numbers(shape[::-1], seed=grid.spatial.rank).permute(*range(len(shape))[::-1])
        y = numbers(shape[::-1], seed=50 + grid.spatial.rank).permute(*range(len(shape))[::-1])
        kept = x.clone()
        leaf = x.detach().requires_grad_()
        out = sum_over(leaf, group)
        out.backward(y)
        assert torch.equal(x, kept), "the argument was changed in place"
        assert leaf.grad is not None
        found[name] = {
            "x": kept,
            "y": y,
            "out": out.detach(),
            "grad": leaf.grad,
            "ranks": torch.tensor(group.ranks),
            "sent": torch.tensor(group.sent_bytes),
        }
    return found


def uneven(mesh: dict[str, int]) -> tuple[list[float], int]:
    """Rank r sends s + r numbers 10 r + s to rank s: what came, and the bytes that were sent."""
    group = Mesh(**mesh).col
    me, ranks = group.rank, range(group.size)
    send = [other + me for other in ranks]
    flat = torch.cat([torch.full((n,), 10.0 * me + other) for other, n in enumerate(send)])
    got = all_to_all(flat, send, [me + other for other in ranks], group)
    return got.tolist(), group.sent_bytes
