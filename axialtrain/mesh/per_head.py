"""Parameters with one line per head, inside the region where heads are spread over tensor ranks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class PerHead(nn.Module):
    """[N, ...] of all heads -> [N', ...] of the heads of this rank. Serial until `parallelize`.

    Such a table stays whole on every tensor rank, which has the gradient of its own heads only:
    what `parallelize` sets in `local` sums the gradients over the tensor axis.
    """

    def __init__(self) -> None:
        super().__init__()
        self.local: Callable[[Tensor], Tensor] | None = None

    def forward(self, table: Tensor) -> Tensor:
        return table if self.local is None else self.local(table)
