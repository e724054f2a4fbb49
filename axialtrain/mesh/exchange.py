"""How tokens move: from owned rectangles of the grid to wanted, possibly overlapping, ones.

One primitive (`redistribute`) serves swaps between layouts, and later halos, strides and
resampling. What each rank sends and receives is intersections of rectangles, known from arithmetic
on every rank; it costs one uneven all-to-all in the smallest group that holds all of it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from axialtrain.grid import Layout, Messages, Place, Rect, messages
from axialtrain.mesh.collectives import all_to_all
from axialtrain.mesh.mesh import Group, Mesh


def redistribute(x: Tensor, owned: Rect, wanted: Rect, plan: Messages, group: Group) -> Tensor:
    """Move tokens from the rectangle that each rank owns to the one that it wants.

    x: [B, owned.height, owned.width, ...]. Returns [B, wanted.height, wanted.width, ...], with
    zeros where a wanted rectangle reaches outside what anybody owns.
    Adjoint: the same messages backwards, gradients of what several ranks wanted being added.
    """
    return _Redistribute.apply(x, owned, wanted, plan, group)


class _Redistribute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, owned: Rect, wanted: Rect, plan: Messages, group: Group
    ) -> Tensor:
        ctx.owned, ctx.wanted, ctx.plan, ctx.group = owned, wanted, plan, group
        return _move(x, owned, plan.send, wanted, plan.receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        x = _move(grads[0], ctx.wanted, ctx.plan.receive, ctx.owned, ctx.plan.send, ctx.group)
        return x, None, None, None, None


def _move(
    x: Tensor,
    source: Rect,
    outgoing: tuple[Rect, ...],
    target: Rect,
    incoming: tuple[Rect, ...],
    group: Group,
) -> Tensor:
    """Send the rectangles `outgoing` of x, add the received `incoming` ones into zeros."""
    batch, rest = x.shape[0], x.shape[3:]
    per_token = batch * rest.numel()
    packed = torch.cat([x[:, *rect.slices(source)].reshape(-1) for rect in outgoing])
    sizes = [rect.area * per_token for rect in incoming]
    received = all_to_all(packed, [rect.area * per_token for rect in outgoing], sizes, group)
    out = x.new_zeros(batch, target.height, target.width, *rest)
    for rect, chunk in zip(incoming, received.split(sizes), strict=True):
        if not rect.empty:
            out[:, *rect.slices(target)] += chunk.view(batch, rect.height, rect.width, *rest)
    return out


@lru_cache(maxsize=256)
def _swap_plan(place: Place, layout: Layout, members: tuple[tuple[int, int], ...]) -> Messages:
    goal = place.under(layout)
    return messages(
        [place.rect_of(at) for at in members],
        [goal.rect_of(at) for at in members],
        members.index(place.at),
    )


def swap(x: Tensor, place: Place, layout: Layout, mesh: Mesh) -> Tensor:
    """x: [B, h, w, ...] under place.layout. Returns the same tokens under `layout`.

    TILE <-> ROWS talks along mesh axis col, TILE <-> COLS along row, ROWS <-> COLS among all
    spatial ranks of the image. Adjoint: the swap back.
    """
    if place.shape != mesh.shape:
        raise ValueError(
            f"tokens are placed on row x col = {place.shape}, the mesh is {mesh.shape}: "
            "make places with mesh.place(height, width)"
        )
    if layout is place.layout:
        return x
    (rows, cols), (row, col) = place.shape, place.at
    pair = {place.layout, layout}
    if pair == {Layout.TILE, Layout.ROWS}:
        group, members = mesh.col, tuple((row, c) for c in range(cols))
    elif pair == {Layout.TILE, Layout.COLS}:
        group, members = mesh.row, tuple((r, col) for r in range(rows))
    else:
        group, members = mesh.spatial, tuple((r, c) for r in range(rows) for c in range(cols))
    if group.size == 1:
        return x
    plan = _swap_plan(place, layout, members)
    if x.dtype is torch.bool:  # a mask: not every backend sends booleans
        return redistribute(
            x.to(torch.uint8), place.rect, place.under(layout).rect, plan, group
        ).bool()
    return redistribute(x, place.rect, place.under(layout).rect, plan, group)


class Exchange(nn.Module):
    """The point in a model where tokens change layout. Serial until `parallelize` sets its mesh."""

    def __init__(self) -> None:
        super().__init__()
        self.mesh: Mesh | None = None

    def forward(self, x: Tensor, place: Place, layout: Layout) -> Tensor:
        """x: [B, h, w, ...] under place.layout -> the same tokens under `layout`."""
        if self.mesh is None:
            assert place.shape == (1, 1), "a model on several ranks goes through parallelize()"
            return x
        return swap(x, place, layout, self.mesh)
