"""A swap in bands of lines: one is computed on while the next ones are still on their way.

Lines are independent of each other, so a pass can begin with those that are here. All bands are
sent at once and received in turn. Backward goes the same way back: the gradient of the last band,
which is there first, travels while that of the band before it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from axialtrain.grid import Messages, Rect
from axialtrain.mesh.mesh import Group
from axialtrain.mesh.moving import Moving


@dataclass
class _Flight:
    """The messages of all bands. owned: what this rank has of the tensor that they come from.

    there, back: those under way, in either direction.
    """

    owned: Rect
    bands: Sequence[Rect]
    plans: Sequence[Messages]
    group: Group
    there: dict[int, Moving] = field(default_factory=dict)
    back: dict[int, Moving] = field(default_factory=dict)

    def send(self, x: Tensor, number: int) -> None:
        plan, band = self.plans[number], self.bands[number]
        self.there[number] = Moving(
            x, self.owned, plan.send, band, plan.receive, self.group, beside=True
        )

    def send_back(self, grad: Tensor, number: int) -> None:
        plan, band = self.plans[number], self.bands[number]
        self.back[number] = Moving(
            grad, band, plan.receive, self.owned, plan.send, self.group, beside=True, part=True
        )


class _Depart(torch.autograd.Function):
    """Sends all bands. Its results are empty: they tie each band to x in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> tuple[Tensor, ...]:
        ctx.flight, ctx.like = flight, (x.shape, x.dtype, x.device)
        for number in range(len(flight.bands)):
            flight.send(x, number)
        return tuple(x.new_empty(0) for _ in flight.bands)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        flight: _Flight = ctx.flight
        shape, dtype, device = ctx.like
        # Every token of x is in one band of one rank, so nothing of it is left out.
        out = torch.empty(shape, dtype=dtype, device=device)
        for number in reversed(range(len(flight.bands))):
            if number not in flight.back:  # nobody used it; the others wait for its zeros
                band = flight.bands[number]
                flight.send_back(
                    out.new_zeros(shape[0], band.height, band.width, *shape[3:]), number
                )
            flight.back.pop(number).arrived_in(out)
        return out, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, flight: _Flight, number: int) -> Tensor:
        ctx.flight, ctx.number = flight, number
        return flight.there.pop(number).arrived()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.flight.send_back(grads[0], ctx.number)
        return grads[0].new_empty(0), None, None


class Bands:
    """The bands of one tensor under way. `receive` each of them once, in order.

    x: [B, owned.height, owned.width, ...]. bands: the rectangles of lines that this rank wants, in
    turn; plans: the messages of each.
    Adjoint: the same messages backwards, each as soon as the gradient of its band is there.
    """

    def __init__(
        self, x: Tensor, owned: Rect, bands: Sequence[Rect], plans: Sequence[Messages], group: Group
    ) -> None:
        self._flight = _Flight(owned, bands, plans, group)
        self._tickets: tuple[Tensor, ...] = _Depart.apply(x, self._flight)

    def receive(self, number: int) -> Tensor:
        """[B, h', w', ...] of band `number`, when it is here."""
        out: Tensor = _Arrive.apply(self._tickets[number], self._flight, number)
        return out
