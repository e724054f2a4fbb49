"""Learned positions for a model of another image size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from axialtrain.attention.positions import resampled
from axialtrain.grid import Place

TABLES = (".bias_h", ".bias_w")  # relative, of a layer
LARGEST_GRID = 2**12  # tokens a side: the weights of resampling are [new, old]


def resized(name: str, table: Tensor, shape: Sequence[int]) -> Tensor:
    """A table of learned positions, resampled to `shape`; anything else, or what has another width
    or number of heads, as it is.

    - `grid_embed.table` [H, W, D]: bicubic and antialiased, as timm does it.
    - `pos_embed.rows`, `pos_embed.cols` [L, D]: linear, outer edges on outer edges, which is what
      the model itself does for an image of that extent.
    - relative tables [N, 2 S - 1]: linear in the distance, d of the new span S' taking what d S/S'
      had, so that the same fraction of an image has the same bias; no distance stays none, and
      what lies beyond the last entry takes it.
    - `relative` [C, 2 S - 1] of an Axial-ResNet: cut, or extended by its outermost entries, on both
      sides alike, so that each distance in cells, of which none is in the middle, keeps its own.
    """
    if tuple(table.shape) == tuple(shape) or table.ndim != len(shape) or 0 in table.shape:
        return table
    if name.endswith("grid_embed.table") and table.shape[2] == shape[2]:
        if max(*table.shape[:2], *shape[:2]) > LARGEST_GRID:
            return table
        size = (torch.tensor([shape[0]]), torch.tensor([shape[1]]))
        return resampled(table, Place(shape[0], shape[1]), size)[0]
    if name.endswith(("pos_embed.rows", "pos_embed.cols")) and table.shape[1] == shape[1]:
        return F.interpolate(table.T[None], size=shape[0], mode="linear")[0].T
    if name.endswith(TABLES) and table.shape[0] == shape[0] and table.shape[1] % 2:
        old, new = (table.shape[1] + 1) // 2, (shape[1] + 1) // 2
        distance = torch.arange(1 - new, new, dtype=torch.float64) * (old / new)
        at = distance.clamp(1 - old, old - 1) + old - 1
        low = at.floor().long()
        high = (low + 1).clamp_max(2 * old - 2)
        return torch.lerp(table[:, low], table[:, high], (at - low).to(table.dtype))
    if name.endswith(".relative") and table.shape[0] == shape[0] and table.shape[1] % 2:
        more = (shape[1] - table.shape[1]) // 2
        return table[:, (torch.arange(shape[1]) - more).clamp(0, table.shape[1] - 1)]
    return table
