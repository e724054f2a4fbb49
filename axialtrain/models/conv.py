"""Layers that look at a cell's neighbours: convolutions, pooling, upsampling, on any mesh.

Each takes (x, place) and says with `exit(place)` on which grid its result lies, so that a model
reads as if it were serial. A rank fetches the cells that its own results need from whoever has them
(`Exchange.regrid`): halos, strides and dilations of any reach are one exchange, or none. What lies
outside the image is zero.

Tensors are [B, h, w, C]; torch's kernels get them as channels-last [B, C, h, w], without a copy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axialtrain.attention.lines import nothing
from axialtrain.grid import Enlargement, Kernel, Place, Rect
from axialtrain.mesh.exchange import Exchange


class Conv(nn.Module):
    """2-D convolution, the weight packed as torch's: [out, in / groups, size, size].

    Zero padding keeps a grid of H x W at ceil(H / stride) x ceil(W / stride). size must be odd.
    Starts normal, of deviation sqrt(2 / (out * size^2 / groups)): He's, over what a value of the
    input goes into (arXiv 1502.01852).
    """

    def __init__(
        self,
        channels: int,
        out: int,
        size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        _check_odd(size)
        self.kernel = Kernel(size, stride, dilation, padding=dilation * (size // 2))
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out, channels // groups, size, size))
        nn.init.normal_(self.weight, std=math.sqrt(2 * groups / (out * size * size)))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        self.exchange = Exchange()

    def exit(self, place: Place) -> Place:
        """The grid of what comes out."""
        return place if self.kernel.stride == 1 else place.coarser(self.kernel.stride)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """x: [B, h, w, in] under `place` -> [B, h', w', out] under exit(place)."""
        goal = self.exit(place)
        x = self.exchange.regrid(x, place, goal, self.kernel)
        if goal.rect.empty:
            return _empty(x, goal.rect, len(self.weight), self.weight, self.bias)
        out = F.conv2d(
            x.permute(0, 3, 1, 2),
            self.weight,
            self.bias,
            stride=self.kernel.stride,
            dilation=self.kernel.dilation,
            groups=self.groups,
        )
        return out.permute(0, 2, 3, 1)


class MaxPool(nn.Module):
    """Largest of size x size cells around every stride-th; what lies outside the image is none.

    size must be odd.
    """

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        _check_odd(size)
        self.kernel = Kernel(size, stride, padding=size // 2)
        self.exchange = Exchange()

    def exit(self, place: Place) -> Place:
        """The grid of what comes out."""
        return place if self.kernel.stride == 1 else place.coarser(self.kernel.stride)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """x: [B, h, w, C] under `place` -> [B, h', w', C] under exit(place)."""
        goal = self.exit(place)
        x = self.exchange.regrid(x, place, goal, self.kernel)
        if goal.rect.empty:
            return _empty(x, goal.rect, x.shape[-1])
        rows, cols = _inside(self.kernel.needs(goal.rect), place, x.device)
        x = torch.where((rows[:, None] & cols)[..., None], x, -torch.inf)
        out = F.max_pool2d(x.permute(0, 3, 1, 2), self.kernel.size, self.kernel.stride)
        return out.permute(0, 2, 3, 1)


class AvgPool(nn.Module):
    """Mean of each stride x stride cells; at the border, of those that are in the image."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.kernel = Kernel(stride, stride)
        self.exchange = Exchange()

    def exit(self, place: Place) -> Place:
        """The grid of what comes out."""
        return place.coarser(self.kernel.stride)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """x: [B, h, w, C] under `place` -> [B, h', w', C] under exit(place)."""
        goal, stride = self.exit(place), self.kernel.stride
        x = self.exchange.regrid(x, place, goal, self.kernel)
        if goal.rect.empty:
            return _empty(x, goal.rect, x.shape[-1])
        out = F.avg_pool2d(x.permute(0, 3, 1, 2), stride, divisor_override=1).permute(0, 2, 3, 1)
        rows, cols = _inside(self.kernel.needs(goal.rect), place, x.device)
        counts = [side.view(-1, stride).sum(1) for side in (rows, cols)]
        return out / (counts[0][:, None] * counts[1])[..., None]


class Upsample(nn.Module):
    """Bilinear enlargement by a whole factor, as `F.interpolate(align_corners=False)`.

    Cells that are not valid count for nothing: where an image ends inside the grid, it is enlarged
    as if it ended there.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.exchange = Exchange()

    def exit(self, place: Place) -> Place:
        """The grid of what comes out."""
        return place.finer(self.factor)

    def forward(self, x: Tensor, place: Place, valid: Tensor | None = None) -> Tensor:
        """x: [B, h, w, C] under `place` -> [B, h f, w f, C] under exit(place).

        valid: bool [B, h, w], None where all cells are; x is zero elsewhere, and so is the result.
        """
        goal, factor = self.exit(place), self.factor
        if valid is not None:
            x = torch.cat((x, valid[..., None].to(x)), -1)
        reach = Enlargement(factor, place.grid)
        x = self.exchange.regrid(x, place, goal, reach)
        if goal.rect.empty:
            x = _empty(x, goal.rect, x.shape[-1])
        else:
            there = reach.needs(goal.rect).scaled(factor)
            x = F.interpolate(
                x.permute(0, 3, 1, 2), scale_factor=factor, mode="bilinear", align_corners=False
            ).permute(0, 2, 3, 1)
            x = x[:, *goal.rect.slices(there)]
        if valid is None:
            return x
        here = valid.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[..., None]
        share = torch.where(here, x[..., -1:], 1.0)
        return torch.where(here, x[..., :-1] / share, 0.0)


def cells_of(whole: Tensor | None, place: Place) -> Tensor | None:
    """Validity [B, h, w] of the cells under `place`, of a grid finer than the tokens by a factor.

    whole: bool [B, H, W] of all tokens of the image, None where all are valid.
    """
    if whole is None:
        return None
    factor = place.height // whole.shape[1]
    assert whole.shape[1:] == (place.height // factor, place.width // factor), "tokens have cells"
    rect, device = place.rect, whole.device
    rows = torch.arange(rect.top, rect.bottom, device=device) // factor
    cols = torch.arange(rect.left, rect.right, device=device) // factor
    return whole[:, rows[:, None], cols]


def _check_odd(size: int) -> None:
    if size % 2 == 0:
        raise ValueError(f"size={size}: allowed are odd sizes, which have a centre")


def _empty(x: Tensor, rect: Rect, channels: int, *others: Tensor | None) -> Tensor:
    """The result on a rank that has no part of it: still in the graph, for others' collectives."""
    return nothing(x.new_zeros(x.shape[0], rect.height, rect.width, channels), x, *others)


def _inside(rect: Rect, place: Place, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which rows, and which columns, of `rect` lie in the image: bool [h], [w]."""
    rows = torch.arange(rect.top, rect.bottom, device=device)
    cols = torch.arange(rect.left, rect.right, device=device)
    return (rows >= 0) & (rows < place.height), (cols >= 0) & (cols < place.width)
