"""Every collective on activations. Nothing else in the package calls torch.distributed on them.

Over data, row and col the objective is the mean over ranks of each rank's loss, so what stands in
the graph has its true adjoint for a backward; each docstring names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from axialtrain.mesh.mesh import Group

T = TypeVar("T")


def all_to_all(flat: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Exchange of uneven 1-D messages; not differentiable by itself.

    flat: [sum(send)], the messages to the ranks of `group` in order.
    Returns [sum(receive)], the messages from them in order.
    Adjoint: the same with `send` and `receive` exchanged (`exchange.redistribute` does that).
    """
    return begin_all_to_all(flat, send, receive, group).received()


class Transfer:
    """Messages under way. What they are sent from must not change before `received`."""

    def __init__(self, flat: Tensor, out: Tensor, work: dist.Work | None) -> None:
        self._flat: Tensor | None = flat  # kept until it is sent
        self._out, self._work = out, work

    def received(self) -> Tensor:
        """Wait for them: on a GPU only what is computed next does, not the host."""
        if self._work is not None:
            self._work.wait()
        self._flat = self._work = None
        return self._out


def begin_all_to_all(
    flat: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: Group,
    *,
    into: Tensor | None = None,
    beside: bool = False,
) -> Transfer:
    """`all_to_all`, under way. into: [sum(receive)], where the messages go; None makes room.

    beside: return while they travel (on NCCL's own stream, in gloo's own threads). All ranks of
    `group` then begin and receive their transfers in the same order.
    """
    group.sent_bytes += (sum(send) - send[group.rank]) * flat.element_size()
    out = flat.new_empty(sum(receive)) if into is None else into
    work = dist.all_to_all_single(
        out, flat, list(receive), list(send), group=group.handle, async_op=beside
    )
    return Transfer(flat, out, work)


def max_over(x: Tensor, group: Group) -> Tensor:
    """Maximum of x over the ranks of `group`, on each of them. Not differentiable."""
    if group.size == 1:
        return x
    return _all_reduce(x, group, dist.ReduceOp.MAX)


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every rank's result depends on every rank's x: the adjoint of a sum that all of them
        # receive is the sum of all their gradients.
        return _all_reduce(grads[0], ctx.group), None


def _all_reduce(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    # A ring all-reduce sends each element twice, less one part of the group.
    group.sent_bytes += 2 * out.numel() * out.element_size() * (group.size - 1) // group.size
    dist.all_reduce(out, op, group=group.handle)
    return out


def sum_over(x: Tensor, group: Group) -> Tensor:
    """Sum of x over the ranks of `group`, on each of them. Adjoint: itself."""
    if group.size == 1:
        return x
    return _SumOver.apply(x, group)


def gather_objects(value: T, group: Group) -> list[T]:
    """What every rank of `group` has (pictures, counters), in rank order. Not differentiable."""
    if group.size == 1:
        return [value]
    parts: list[Any] = [None] * group.size
    dist.all_gather_object(parts, value, group=group.handle)
    return parts
