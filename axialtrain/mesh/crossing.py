"""Where values enter or leave what is spread over the tensor axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

Kind = Literal["copied", "summed", "heads"]


class Crossing(nn.Module):
    """A point in a model that `parallelize` gives something to do. Serial until then.

    kind: "copied": tokens enter, the same on each rank of the axis. Adjoint: the sum over it.
        "summed": they leave, as a sum over the axis. Adjoint: the same gradient to each rank.
        "heads": a table with one line per head, [N, ...], which stays whole on every rank, is
        narrowed to the heads of this one, [N', ...]. Adjoint: their gradients, put together by a
        sum over the axis.
    """

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.local: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.local is None else self.local(x)
