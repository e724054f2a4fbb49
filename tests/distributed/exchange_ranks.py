"""Rank functions: tokens on the move, sums over groups, and their adjoints."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from planted_time import Time
from torch import Tensor

from axialtrain.bench.exchange import Rates, measure
from axialtrain.bench.overlap import Overlap, measure_overlap
from axialtrain.bench.together import in_turns_together
from axialtrain.grid import Layout, Place, Rect, messages
from axialtrain.mesh import moving
from axialtrain.mesh.collectives import (
    Transfer,
    all_to_all,
    begin_all_to_all,
    max_over,
    sum_over,
)
from axialtrain.mesh.exchange import Exchange, deal_heads, fetch, swap
from axialtrain.mesh.mesh import Mesh
from axialtrain.mesh.moving import redistribute

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


def inner(x: Tensor, y: Tensor) -> float:
    return float((x.detach() * y).sum())


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
        inner(out, y),
        inner(x, x.grad),
        (sent_forward, grid.spatial.sent_bytes - sent_forward),
    )


def coordinates(shape: tuple[int, int]) -> list[tuple[int, int]]:
    return list(itertools.product(range(shape[0]), range(shape[1])))


def swaps(
    mesh: dict[str, int],
    size: tuple[int, int],
    rest: tuple[int, ...],
    *,
    mask: bool,
    kind: str = "auto",
) -> dict[tuple[str, str], tuple[Tensor, dict[str, int]]]:
    """From every layout to every layout: what this rank got and sent over each group."""
    grid = Mesh(**mesh, swap=kind)
    exchange = Exchange()
    exchange.mesh = grid
    tokens = whole(size, rest)
    if mask:
        tokens = tokens > 0
    found = {}
    for source, goal in itertools.product(Layout, repeat=2):
        place = grid.place(*size, source)
        before = sent_over(grid)
        x = part(tokens, place.rect)
        out = exchange(x, place, goal)
        found[source.value, goal.value] = (out, less(sent_over(grid), before))
    return found


def sent_over(grid: Mesh) -> dict[str, int]:
    """Bytes that this rank has sent over each group so far."""
    return {name: getattr(grid, name).sent_bytes for name in ("row", "col", "spatial", "tensor")}


def less(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    return {name: left[name] - right[name] for name in left}


def swap_there_and_back(
    mesh: dict[str, int], size: tuple[int, int], kind: str = "auto"
) -> list[tuple[float, float, bool]]:
    """For every pair of layouts: <A x, y> and <x, A^T y> here, and whether A^T is the way back."""
    grid = Mesh(**mesh, swap=kind)
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
        found.append((inner(out, y), inner(x, x.grad), same))
    return found


# What each rank wants, from the rectangle that it has; whether of other bands of rows, of columns.
RULES: dict[str, tuple[Callable[[Rect], Rect], bool, bool]] = {
    "around": (lambda r: Rect(r.top - 3, r.bottom + 2, r.left - 1, r.right + 6), True, True),
    "above and below": (lambda r: Rect(r.top - 4, r.bottom + 3, r.left, r.right), True, False),
    "beside": (lambda r: Rect(r.top, r.bottom, r.left - 2, r.right + 5), False, True),
    "the same": (lambda _: Rect(2, 5, 1, 4), True, True),
    "from the first corner": (lambda r: Rect(0, r.bottom, 0, r.right), True, True),
    "mirrored": (lambda r: Rect(7 - r.bottom, 7 - r.top, 5 - r.right, 5 - r.left), True, True),
    "half outside": (lambda r: Rect(r.top - 9, r.top, -4, 3), True, True),
    "outside": (lambda r: Rect(-6, -2, r.left + 20, r.right + 20), True, True),
    "nothing": (lambda _: Rect(3, 3, 0, 4), True, True),
    "its own": (lambda r: r, False, False),
    "less": (lambda r: Rect(r.top, r.bottom, r.left, (r.left + r.right) // 2), False, False),
}


@dataclass
class Fetched:
    """As `Moved`, with the bytes sent over each group, there and back."""

    output: Tensor
    forward: float
    backward: float
    there: dict[str, int]
    back: dict[str, int]


def fetches(mesh: dict[str, int], size: tuple[int, int], layout: Layout) -> dict[str, Fetched]:
    """`fetch` by each of RULES. Rows and columns lie over both axes where there are no tiles."""
    grid = Mesh(**mesh)
    place = grid.place(*size, layout)
    found = {}
    for name, (wanted, rows, cols) in RULES.items():
        if layout is not Layout.TILE:
            rows = cols = rows or cols
        x = part(whole(size, (3,)), place.rect).clone().requires_grad_()
        start = sent_over(grid)
        out = fetch(x, place, wanted, grid, across_rows=rows, across_cols=cols)
        there = sent_over(grid)
        y = numbers(tuple(out.shape), seed=1 + grid.spatial.rank)
        out.backward(y)
        assert x.grad is not None
        found[name] = Fetched(
            out.detach(),
            inner(out, y),
            inner(x, x.grad),
            less(there, start),
            less(sent_over(grid), there),
        )
    return found


def everywhere(mesh: dict[str, int], size: tuple[int, int]) -> list[tuple[Tensor, int]]:
    """From each layout: the mask of the whole grid, and the bytes that this rank sent for it."""
    grid = Mesh(**mesh)
    exchange = Exchange()
    exchange.attach(grid)
    found = []
    for layout in Layout:
        place = grid.place(*size, layout)
        before = grid.spatial.sent_bytes
        mask = exchange.everywhere(part(whole(size, ()) > 0, place.rect), place)
        found.append((mask, grid.spatial.sent_bytes - before))
    return found


@dataclass
class Dealt:
    """What `deal_heads` and `collect_heads` made of a rank's tile along one dim."""

    lines: Tensor
    returned: Tensor  # collected again
    heads: slice
    products: dict[str, tuple[float, float]]  # <A x, y> and <x, A^T y> here
    inverse: bool  # whether the adjoint of each is the other


def deals(mesh: dict[str, int], size: tuple[int, int], heads: int) -> dict[int, Dealt]:
    """Along rows (2) and columns (1). The tiles are views, as chunks of a projection are."""
    grid = Mesh(**mesh)
    place = grid.place(*size)
    exchange = Exchange()
    exchange.attach(grid)
    found = {}
    for dim in (1, 2):
        tokens = whole(size, (heads, 6))[..., :3]
        x = part(tokens, place.rect).requires_grad_()
        lines = exchange.deal_heads(x, place, dim)
        y = numbers(tuple(lines.shape[::-1]), seed=grid.spatial.rank).permute(4, 3, 2, 1, 0)
        lines.backward(y)
        z = y.detach().requires_grad_()
        tile = exchange.collect_heads(z, place, dim)
        w = numbers(tuple(tile.shape[::-1]), seed=9 + grid.spatial.rank).permute(4, 3, 2, 1, 0)
        tile.backward(w)
        assert x.grad is not None
        assert z.grad is not None
        inverse = torch.equal(x.grad, exchange.collect_heads(y, place, dim)) and torch.equal(
            z.grad, exchange.deal_heads(w, place, dim)
        )
        products = {
            "deal": (inner(lines, y), inner(x, x.grad)),
            "collect": (inner(tile, w), inner(z, z.grad)),
        }
        returned = exchange.collect_heads(lines, place, dim)
        found[dim] = Dealt(
            lines.detach(), returned.detach(), exchange.my_heads(heads, dim), products, inverse
        )
    return found


def odd_heads(mesh: dict[str, int], heads: int, dim: int) -> str:
    grid = Mesh(**mesh)
    place = grid.place(6, 6)
    try:
        deal_heads(torch.zeros(1, place.rect.height, place.rect.width, heads, 2), place, dim, grid)
    except ValueError as error:
        return str(error)
    return ""


def maxima(mesh: dict[str, int]) -> dict[str, tuple[Tensor, Tensor, int, tuple[int, ...]]]:
    """Over each group: x, its maximum, the bytes sent, and whose it is."""
    grid = Mesh(**mesh)
    found = {}
    for name in ("row", "col", "spatial"):
        group = getattr(grid, name)
        x = numbers((5, 4), seed=grid.spatial.rank).t()
        x[0] = -torch.inf
        kept = x.clone()
        before = group.sent_bytes
        out = max_over(x, group)
        assert torch.equal(x, kept), "the argument was changed in place"
        found[name] = (kept, out, group.sent_bytes - before, group.ranks)
    return found


def maximum_in_the_graph(mesh: dict[str, int]) -> tuple[bool, Tensor]:
    """Whether `Exchange.max` of what needs a gradient needs one, and the maximum."""
    exchange = Exchange()
    exchange.attach(Mesh(**mesh))
    assert exchange.mesh is not None
    out = exchange.max(torch.full((2,), float(exchange.mesh.spatial.rank), requires_grad=True))
    return out.requires_grad, out


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


def rates(mesh: dict[str, int], **options: Any) -> list[Rates]:
    """What `axialtrain.bench.exchange` measures."""
    return measure(Mesh(**mesh), **options)


def turns(rounds: int, limit: float) -> tuple[dict[str, list[float]], str]:
    """The seconds of two ways that ranks take turns with, and in which order they were called."""
    mesh, time, called = Mesh(col=dist.get_world_size()), Time(), []

    def way(name: str, seconds: float) -> None:
        called.append(name)
        time.sleep(seconds)

    rank = dist.get_rank()
    ways = {"a": partial(way, "a", 1.0 + rank), "b": partial(way, "b", 0.0 if rank else 10.0)}
    found = in_turns_together(
        ways, mesh, torch.device("cpu"), rounds=rounds, limit=limit, clock=time
    )
    return found.seconds, "".join(called)


def bands(**options: Any) -> tuple[list[Overlap], int]:
    """What `axialtrain.bench.overlap` measures by a clock that ticks when it is looked at, and how
    often messages were sent."""
    with mock.patch.object(moving, "begin_all_to_all", wraps=begin_all_to_all) as sending:
        found = measure_overlap(**options, clock=partial(next, itertools.count()))
    return found, sending.call_count


def buffers(
    mesh: dict[str, int], size: tuple[int, int], batch: int
) -> dict[str, tuple[bool, bool]]:
    """Of each swap that sends something: whether it sends from the tokens themselves, and whether
    it receives into the result itself."""
    grid, found = Mesh(**mesh), {}
    for source, goal in itertools.permutations(Layout, 2):
        x = numbers((batch, *_shape(grid.place(*size, source)), 3), seed=0)
        calls: list[tuple[Tensor, Tensor]] = []

        def seen(flat: Tensor, *args: Any, _calls: Any = calls, **options: Any) -> Transfer:
            transfer = begin_all_to_all(flat, *args, **options)
            _calls.append((flat, transfer.received()))
            return transfer

        with mock.patch.object(moving, "begin_all_to_all", seen):
            out = swap(x, grid.place(*size, source), goal, grid)
        for flat, received in calls:
            found[f"{source.value} -> {goal.value}"] = (_shares(flat, x), _shares(received, out))
    return found


def _shape(place: Place) -> tuple[int, int]:
    return place.rect.height, place.rect.width


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
