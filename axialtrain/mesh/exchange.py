"""How tokens move: from owned rectangles of the grid to wanted, possibly overlapping, ones.

One primitive (`redistribute`) serves swaps between layouts, windows, gathered keys and values,
halos, strides and resampling. What each rank sends and receives is intersections of
rectangles, known from arithmetic on every rank; it costs one uneven all-to-all in the smallest
group that holds all of it. Beside it, `deal_heads` exchanges parts of lines against heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from axialtrain.grid import Layout, Messages, Place, Rect, messages
from axialtrain.mesh.bands import Bands
from axialtrain.mesh.collectives import all_to_all, max_over, sum_over
from axialtrain.mesh.mesh import Group, Mesh
from axialtrain.mesh.moving import packed, redistribute


def _peers(
    place: Place, mesh: Mesh, *, across_rows: bool, across_cols: bool
) -> tuple[Group | None, tuple[tuple[int, int], ...]]:
    """The smallest group of ranks among which tokens move, and their coordinates, in its order.

    across_rows: whether they move between bands of rows (along mesh axis row); across_cols alike.
    None where each rank keeps to itself.
    """
    if place.shape != mesh.shape:
        raise ValueError(
            f"tokens are placed on row x col = {place.shape}, the mesh is {mesh.shape}: "
            "make places with mesh.place(height, width)"
        )
    (rows, cols), (row, col) = place.shape, place.at
    if across_rows and across_cols:
        group, members = mesh.spatial, tuple((r, c) for r in range(rows) for c in range(cols))
    elif across_rows:
        group, members = mesh.row, tuple((r, col) for r in range(rows))
    elif across_cols:
        group, members = mesh.col, tuple((row, c) for c in range(cols))
    else:
        return None, (place.at,)
    return (None if group.size == 1 else group), members


@lru_cache(maxsize=256)
def _plan(place: Place, goal: Place, members: tuple[tuple[int, int], ...]) -> Messages:
    return messages(
        [place.rect_of(at) for at in members],
        [goal.rect_of(at) for at in members],
        members.index(place.at),
    )


def swap(x: Tensor, place: Place, layout: Layout, mesh: Mesh) -> Tensor:
    """x: [B, h, w, ...] under place.layout. Returns the same tokens under `layout`.

    TILE <-> ROWS talks along mesh axis col, TILE <-> COLS along row. ROWS <-> COLS is one
    all-to-all among all spatial ranks of the image, or, where mesh.swap is "hierarchical", two:
    through TILE. Adjoint: the swap back.
    """
    pair = {place.layout, layout}
    direct = Layout.TILE not in pair
    if direct and layout is not place.layout and mesh.config.swap == "hierarchical":
        x = swap(x, place, Layout.TILE, mesh)
        return swap(x, place.under(Layout.TILE), layout, mesh)
    group, members = _peers(
        place,
        mesh,
        across_rows=direct or Layout.COLS in pair,
        across_cols=direct or Layout.ROWS in pair,
    )
    if group is None or layout is place.layout:
        return x
    plan = _plan(place, place.under(layout), members)
    return redistribute(x, place.rect, place.under(layout).rect, plan, group)


def swap_in_bands(
    x: Tensor, place: Place, layout: Layout, mesh: Mesh
) -> Iterator[tuple[Tensor, Place]]:
    """As `swap`, in mesh.overlap bands of whole lines, and where each of them is.

    x: [B, h, w, ...] under place.layout. A band is waited for when it is asked for, while those
    after it are on their way. layout: ROWS or COLS. Adjoint: the swap back, in the same bands.
    """
    goal = place.under(layout)
    if Layout.TILE not in (place.layout, layout) and mesh.config.swap == "hierarchical":
        x, place = swap(x, place, Layout.TILE, mesh), place.under(Layout.TILE)
    direct = place.layout is not Layout.TILE
    group, members = _peers(
        place,
        mesh,
        across_rows=direct or layout is Layout.COLS,
        across_cols=direct or layout is Layout.ROWS,
    )
    if group is None:
        yield x, goal
        return
    parts = goal.bands(mesh.config.overlap)
    plans = [_plan(place, part, members) for part in parts]
    bands = Bands(x, place.rect, [part.rect for part in parts], plans, group)
    for number, part in enumerate(parts):
        yield bands.receive(number), part


def fetch(
    x: Tensor,
    place: Place,
    wanted: Callable[[Rect], Rect],
    mesh: Mesh,
    *,
    across_rows: bool,
    across_cols: bool,
) -> Tensor:
    """x: [B, h, w, ...] under `place` -> [B, h', w', ...], the tokens of wanted(place.rect).

    wanted: which rectangle a rank wants, from the one that it holds; the same rule on all ranks.
        It may overlap others' and reach outside the image, where it gets zeros.
    across_rows, across_cols: whether any rank wants tokens of another band of rows, of columns.
    Adjoint: what was received goes back, and is added up where it came from.
    """
    group, members = _peers(place, mesh, across_rows=across_rows, across_cols=across_cols)
    if group is None:
        return crop(x, place.rect, wanted(place.rect))
    owned = [place.rect_of(at) for at in members]
    goals = [wanted(rect) for rect in owned]
    me = members.index(place.at)
    return redistribute(x, owned[me], goals[me], messages(owned, goals, me), group)


class Reach(Protocol):
    """Which cells of a grid some cells of another one are computed from; compares by value."""

    def needs(self, out: Rect) -> Rect:
        """It may reach outside the grid. An empty rectangle needs an empty one."""

    def __hash__(self) -> int: ...


@lru_cache(maxsize=1024)
def _regrid_plan(
    place: Place, goal: Place, reach: Reach, members: tuple[tuple[int, int], ...]
) -> tuple[Messages, Rect]:
    wanted = [reach.needs(goal.rect_of(at)) for at in members]
    owned = [place.rect_of(at) for at in members]
    me = members.index(place.at)
    return messages(owned, wanted, me), wanted[me]


@lru_cache(maxsize=1024)
def _crosses(place: Place, goal: Place, reach: Reach) -> tuple[bool, bool]:
    """Whether any rank needs cells of another band of rows, and of another band of columns."""
    rows = cols = False
    for row in range(place.shape[0]):
        for col in range(place.shape[1]):
            owned = place.rect_of((row, col))
            wanted = reach.needs(goal.rect_of((row, col))).intersect(place.grid)
            if not wanted.empty:
                rows |= wanted.top < owned.top or wanted.bottom > owned.bottom
                cols |= wanted.left < owned.left or wanted.right > owned.right
    return rows, cols


def regrid(x: Tensor, place: Place, goal: Place, reach: Reach, mesh: Mesh) -> Tensor:
    """x: [B, h, w, ...] under `place` -> the cells that this rank's part of `goal` comes from.

    Returns [B, h', w', ...], the cells of reach.needs(goal.rect), with zeros outside the image.
    goal: another grid of the same image. It talks among the ranks of one band of rows, or of
    columns, where that is enough, and not at all where each rank has what it needs.
    Adjoint: what was received goes back, and is added up where it came from.
    """
    rows, cols = _crosses(replace(place, at=(0, 0)), replace(goal, at=(0, 0)), reach)
    group, members = _peers(place, mesh, across_rows=rows, across_cols=cols)
    if group is None:
        return crop(x, place.rect, reach.needs(goal.rect))
    plan, wanted = _regrid_plan(place, goal, reach, members)
    return redistribute(x, place.rect, wanted, plan, group)


def crop(x: Tensor, owned: Rect, wanted: Rect) -> Tensor:
    """x: [B, owned.height, owned.width, ...] -> the tokens of `wanted`, zeros outside `owned`.

    x itself where the two are the same.
    """
    if owned == wanted:
        return x
    inside = owned.intersect(wanted)
    if inside.empty:  # nothing of x, but in its graph: zeros right of and below its first corner
        x, sides = x[:, :0, :0], (0, wanted.width, 0, wanted.height)
    else:
        x = x[:, *inside.slices(owned)]
        sides = (
            inside.left - wanted.left,
            wanted.right - inside.right,
            inside.top - wanted.top,
            wanted.bottom - inside.bottom,
        )
    return F.pad(x, (0, 0) * (x.ndim - 3) + sides) if any(sides) else x


def deal_heads(x: Tensor, place: Place, dim: int, mesh: Mesh) -> Tensor:
    """x: [B, h, w, N, C] of this rank's tile -> [B, h', w', N / P, C]: whole lines, some heads.

    dim: that along which lines become whole, 2 (rows, among the P ranks of mesh axis col) or 1
        (columns, along mesh axis row). Rank p of them gets the p-th part of the heads.
    Adjoint: `collect_heads`. Raises ValueError where P does not divide N.
    """
    return _deal(x, place, dim, mesh, back=False)


def collect_heads(x: Tensor, place: Place, dim: int, mesh: Mesh) -> Tensor:
    """The inverse of `deal_heads`, and its adjoint. place: that of the tile."""
    return _deal(x, place, dim, mesh, back=True)


def _deal(x: Tensor, place: Place, dim: int, mesh: Mesh, *, back: bool) -> Tensor:
    assert place.layout is Layout.TILE, "heads are dealt out from tiles"
    group, members = _peers(place, mesh, across_rows=dim == 1, across_cols=dim == 2)
    if group is None:
        return x
    if not back and x.shape[3] % group.size:
        raise ValueError(
            f"mesh.exchange=heads: {x.shape[3]} heads of a rank cannot be dealt out over "
            f"{group.size} ranks: allowed are multiples, mesh.exchange=swap, mesh.exchange=gather"
        )
    rects = tuple(place.rect_of(at) for at in members)
    return _DealHeads.apply(x, rects, group, back)


class _DealHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rects: tuple[Rect, ...], group: Group, back: bool) -> Tensor:
        ctx.rects, ctx.group, ctx.back = rects, group, back
        return (_to_tile if back else _to_lines)(x, rects, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        move = _to_lines if ctx.back else _to_tile
        return move(grads[0], ctx.rects, ctx.group), None, None, None


def _joined(rects: Sequence[Rect]) -> Rect:
    first, last = rects[0], rects[-1]
    return Rect(first.top, last.bottom, first.left, last.right)


def _to_lines(x: Tensor, rects: tuple[Rect, ...], group: Group) -> Tensor:
    batch, _, _, heads, width = x.shape
    part = heads // group.size
    flat = packed(x.chunk(group.size, 3))
    sizes = [batch * rect.area * part * width for rect in rects]
    received = all_to_all(flat, [sizes[group.rank]] * group.size, sizes, group)
    lines = _joined(rects)
    out = x.new_empty(batch, lines.height, lines.width, part, width)
    for rect, piece in zip(rects, received.split(sizes), strict=True):
        out[:, *rect.slices(lines)] = piece.view(batch, rect.height, rect.width, part, width)
    return out


def _to_tile(x: Tensor, rects: tuple[Rect, ...], group: Group) -> Tensor:
    batch, _, _, part, width = x.shape
    lines, mine = _joined(rects), rects[group.rank]
    flat = packed([x[:, *rect.slices(lines)] for rect in rects])
    sizes = [batch * rect.area * part * width for rect in rects]
    received = all_to_all(flat, sizes, [sizes[group.rank]] * group.size, group)
    chunks = received.view(group.size, batch, mine.height, mine.width, part, width)
    return rearrange(chunks, "P B h w N C -> B h w (P N) C")


class Exchange(nn.Module):
    """The point in a model where tokens meet those of other ranks. Serial until `parallelize`.

    heads, rows, cols: of the attention that deals out its heads here, so that a mesh which cannot
        do that is refused at once: how many there are, and whether along rows and columns.
    """

    def __init__(self, heads: int = 0, *, rows: bool = False, cols: bool = False) -> None:
        super().__init__()
        self.heads, self.rows, self.cols = heads, rows, cols
        self.mesh: Mesh | None = None

    @property
    def kind(self) -> str:
        """How row and column passes see whole lines: swap, heads or gather (`MeshConfig`)."""
        return "swap" if self.mesh is None else self.mesh.config.exchange

    def attach(self, mesh: Mesh) -> None:
        """Exchange over `mesh` from now on. ValueError where it cannot deal out the heads."""
        if self.heads:
            mesh.config.check_heads(self.heads, rows=self.rows, cols=self.cols)
        self.mesh = mesh

    def forward(self, x: Tensor, place: Place, layout: Layout) -> Tensor:
        """x: [B, h, w, ...] under place.layout -> the same tokens under `layout`."""
        if self._alone(place):
            return x
        assert self.mesh is not None
        return swap(x, place, layout, self.mesh)

    def in_bands(self, place: Place, layout: Layout) -> bool:
        """Whether a pass of lines can begin before all of its tokens are here (`bands`)."""
        lines = layout is not Layout.TILE and layout is not place.layout
        return self.mesh is not None and self.mesh.config.overlap > 1 and lines

    def bands(self, x: Tensor, place: Place, layout: Layout) -> Iterator[tuple[Tensor, Place]]:
        """Bands of lines of x under `layout`, and where they are, in turn: see `swap_in_bands`."""
        assert self.mesh is not None, "a serial model has all lines"
        return swap_in_bands(x, place, layout, self.mesh)

    def fetch(
        self,
        x: Tensor,
        place: Place,
        wanted: Callable[[Rect], Rect],
        *,
        across_rows: bool,
        across_cols: bool,
    ) -> Tensor:
        """The tokens of wanted(place.rect): see `fetch`."""
        if self._alone(place):
            return crop(x, place.rect, wanted(place.rect))
        assert self.mesh is not None
        return fetch(x, place, wanted, self.mesh, across_rows=across_rows, across_cols=across_cols)

    def regrid(self, x: Tensor, place: Place, goal: Place, reach: Reach) -> Tensor:
        """The cells that this rank's part of the grid `goal` is computed from: see `regrid`."""
        if self._alone(place):
            return crop(x, place.rect, reach.needs(goal.rect))
        assert self.mesh is not None
        return regrid(x, place, goal, reach, self.mesh)

    def everywhere(self, mask: Tensor, place: Place) -> Tensor:
        """mask: bool [B, h, w] under `place` -> that of the whole grid [B, H, W], on every rank."""
        return self.fetch(mask, place, lambda _: place.grid, across_rows=True, across_cols=True)

    def deal_heads(self, x: Tensor, place: Place, dim: int) -> Tensor:
        """Parts of lines and all heads -> whole lines and a part of the heads: see `deal_heads`."""
        assert self.mesh is not None, "a serial model has whole lines"
        return deal_heads(x, place, dim, self.mesh)

    def collect_heads(self, x: Tensor, place: Place, dim: int) -> Tensor:
        """The way back."""
        assert self.mesh is not None, "a serial model has whole lines"
        return collect_heads(x, place, dim, self.mesh)

    def my_heads(self, heads: int, dim: int) -> slice:
        """Which of the `heads` heads that went into `deal_heads` this rank got."""
        assert self.mesh is not None, "a serial model has all heads"
        group = self.mesh.col if dim == 2 else self.mesh.row
        part = heads // group.size
        return slice(part * group.rank, part * (group.rank + 1))

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks that share an image. Adjoint: itself."""
        return x if self.mesh is None else sum_over(x, self.mesh.spatial)

    def total(self, x: Tensor) -> Tensor:
        """Sum over all ranks that have a part of any image of the batch. Adjoint: itself."""
        return x if self.mesh is None else sum_over(x, self.mesh.replicas)

    def max(self, x: Tensor) -> Tensor:
        """Maximum over the ranks that share an image, without gradient."""
        return x.detach() if self.mesh is None else max_over(x.detach(), self.mesh.spatial)

    def _alone(self, place: Place) -> bool:
        assert self.mesh is not None or place.shape == (1, 1), (
            "a model on several ranks goes through parallelize()"
        )
        return self.mesh is None
