"""Tokens under way: from the rectangles that ranks own to those that they want.

A message goes from a part of one tensor into a part of another. `all_to_all_single` wants them in
one flat buffer on each side, so a side on which messages lie in memory as they are in the tensor,
one after the other, is its own buffer; on the other sides each value is copied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from axialtrain.grid import Messages, Rect
from axialtrain.mesh.collectives import begin_all_to_all
from axialtrain.mesh.mesh import Group

_NOWHERE = Rect(0, 0, 0, 0)


def redistribute(x: Tensor, owned: Rect, wanted: Rect, plan: Messages, group: Group) -> Tensor:
    """Move tokens from the rectangle that each rank owns to the one that it wants.

    x: [B, owned.height, owned.width, ...]. Returns [B, wanted.height, wanted.width, ...], with
    zeros where a wanted rectangle reaches outside what anybody owns.
    Adjoint: the same messages backwards, gradients of what several ranks wanted being added.
    """
    if x.dtype is torch.bool:  # a mask: not every backend sends booleans
        bytes_of = x.view(torch.uint8)
        return _Redistribute.apply(bytes_of, owned, wanted, plan, group).view(torch.bool)
    return _Redistribute.apply(x, owned, wanted, plan, group)


class _Redistribute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, owned: Rect, wanted: Rect, plan: Messages, group: Group
    ) -> Tensor:
        ctx.owned, ctx.wanted, ctx.plan, ctx.group = owned, wanted, plan, group
        moving = Moving(x, owned, plan.send, wanted, plan.receive, group, beside=True)
        return moving.arrived()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        plan = ctx.plan
        moving = Moving(
            grads[0], ctx.wanted, plan.receive, ctx.owned, plan.send, ctx.group, beside=True
        )
        return moving.arrived(), None, None, None, None


class Moving:
    """The rectangles `outgoing` of x on their way; `arrived` is the tensor of `target` that the
    `incoming` ones make up, with zeros elsewhere. Not differentiable by itself.

    x: [B, source.height, source.width, ...], not to be changed before it has arrived elsewhere.
    outgoing, incoming: one for each rank of `group`. Where incoming ones overlap (gradients of what
    several ranks wanted) they are added, in fp32 at least.
    beside: return while the messages travel, so that something else can be computed.
    part: whether it will be put into a tensor that is there (`arrived_in`).
    """

    def __init__(
        self,
        x: Tensor,
        source: Rect,
        outgoing: tuple[Rect, ...],
        target: Rect,
        incoming: tuple[Rect, ...],
        group: Group,
        *,
        beside: bool = False,
        part: bool = False,
    ) -> None:
        me, batch, rest = group.rank, x.shape[0], x.shape[3:]
        self._x, self._source, self._target = x, source, target
        self._shape = (batch, target.height, target.width, *rest)
        self._added = _overlap(incoming)
        self._full = not self._added and sum(rect.area for rect in incoming) == target.area
        lies = batch == 1 and x.is_contiguous() and _stacked(outgoing, source)
        lands = batch == 1 and self._full and not part and _stacked(incoming, target)
        # What stays here goes through no buffer, but where it stands in the middle of one.
        through = (lies and _inside(outgoing, me)) or (lands and _inside(incoming, me))
        self._kept = None if through or outgoing[me].empty else (outgoing[me], incoming[me])
        if not through:
            outgoing, incoming = _without(outgoing, me), _without(incoming, me)
        self._incoming, per_token = incoming, batch * rest.numel()
        send, receive = ([r.area * per_token for r in rects] for rects in (outgoing, incoming))
        parts = [x[:, *rect.slices(source)] for rect in outgoing]
        flat = _beside_kept(x, send, me) if lies else packed(parts)
        into = None
        self._out: Tensor | None = None
        if lands:
            self._out = x.new_empty(self._shape)
            into = _beside_kept(self._out, receive, me)
        self._sizes = receive
        self._transfer = begin_all_to_all(flat, send, receive, group, into=into, beside=beside)

    def arrived_in(self, out: Tensor) -> None:
        """Put what arrives into out, the tensor of `target`, and leave the rest of it alone."""
        assert self._out is None, "made as a part"
        assert not self._added, "parts do not overlap"
        self._keep(out)
        self._unpack(self._transfer.received(), out)

    def arrived(self) -> Tensor:
        """[B, target.height, target.width, ...] of the dtype of x. To be asked for once.

        Room is made, and what stays here put into it, before messages are waited for.
        """
        x, out = self._x, self._out
        lands = out is not None
        if out is None:
            dtype = torch.promote_types(x.dtype, torch.float32) if self._added else x.dtype
            new = x.new_empty if self._full else x.new_zeros
            out = new(self._shape, dtype=dtype)
        self._keep(out)
        received = self._transfer.received()
        if not lands:
            self._unpack(received, out)
        return out.to(x.dtype)

    def _unpack(self, received: Tensor, out: Tensor) -> None:
        for rect, piece in zip(self._incoming, received.split(self._sizes), strict=True):
            if not rect.empty:
                here = out[:, *rect.slices(self._target)]
                arrived = piece.view(here.shape)
                here.add_(arrived) if self._added else here.copy_(arrived)

    def _keep(self, out: Tensor) -> None:
        """What goes through no message."""
        if self._kept is not None:
            left, kept = self._kept
            here = out[:, *kept.slices(self._target)]
            stays = self._x[:, *left.slices(self._source)]
            here.add_(stays) if self._added else here.copy_(stays)


def packed(parts: Sequence[Tensor]) -> Tensor:
    """The values of `parts`, one after the other in one flat tensor. Each is copied once."""
    flat = parts[0].new_empty(sum(part.numel() for part in parts))
    for part, piece in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        piece.view(part.shape).copy_(part)
    return flat


def _without(rects: tuple[Rect, ...], me: int) -> tuple[Rect, ...]:
    return (*rects[:me], _NOWHERE, *rects[me + 1 :])


def _inside(rects: tuple[Rect, ...], me: int) -> bool:
    """Whether other ranks' rectangles stand on both sides of that of rank `me`."""
    before, after = rects[:me], rects[me + 1 :]
    return any(not rect.empty for rect in before) and any(not rect.empty for rect in after)


def _beside_kept(x: Tensor, sizes: Sequence[int], me: int) -> Tensor:
    """Of contiguous x, the part of `sizes`: all of it, or all but what rank `me` keeps, which is at
    its beginning or at its end."""
    count = sum(sizes)
    return x.view(-1).narrow(0, 0 if any(sizes[:me]) else x.numel() - count, count)


@lru_cache(maxsize=1024)
def _stacked(rects: tuple[Rect, ...], whole: Rect) -> bool:
    """Whether `rects`, in order, are bands of whole rows that make up `whole`."""
    top = whole.top
    for rect in rects:
        if not rect.empty:
            if (rect.top, rect.left, rect.right) != (top, whole.left, whole.right):
                return False
            top = rect.bottom
    return top == whole.bottom


@lru_cache(maxsize=1024)
def _overlap(rects: tuple[Rect, ...]) -> bool:
    some = [rect for rect in rects if not rect.empty]
    return any(not one.intersect(other).empty for one, other in combinations(some, 2))
