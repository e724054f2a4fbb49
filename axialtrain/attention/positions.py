"""Positions: rotary along one axis or both, relative biases, and factorised embeddings.

All of them come from global coordinates of tokens, so they are the same on every mesh.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from axialtrain.grid import Place, Rect

Device = torch.device | str | None


def rotary_angles(
    start: int, stop: int, head_dim: int, *, base: float = 10_000.0, device: Device = None
) -> Tensor:
    """Angles [stop - start, K / 2] of the tokens with global coordinates start..stop.

    Channel pair i turns by coordinate * base^(-2 i / K) (RoFormer, arXiv 2104.09864, eq. 15 and
    34). In fp64, so that far coordinates of a gigapixel image keep their phase.
    """
    if head_dim % 2:
        raise ValueError(f"rope needs an even head width, got K={head_dim}")
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    coordinates = torch.arange(start, stop, dtype=torch.float64, device=device)
    return coordinates[:, None] * base ** (-pairs / head_dim)


Turns = tuple[Tensor | None, Tensor | None]  # of the rows and of the columns of a part


def turns_of(rect: Rect, dims: tuple[int, ...], head_dim: int, like: Tensor) -> Turns:
    """Rotary positions of the tokens of `rect`, for attention along `dims`.

    Along one dim all K channels turn with its coordinate; along both, the first half turns with the
    row's and the second with the column's, as in timm. Returns the cosines and sines of their
    angles, ([h, K'/2, 2], [w, K'/2, 2]), None where a coordinate turns nothing; K' is K, or half of
    it for both. Of fp32 at least, on the device of `like`.
    """
    spans = {1: (rect.top, rect.bottom), 2: (rect.left, rect.right)}
    rows, cols = (
        _unit(rotary_angles(*spans[dim], head_dim // len(dims), device=like.device), like)
        if dim in dims
        else None
        for dim in (1, 2)
    )
    return rows, cols


def turned(
    x: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    *,
    back: bool = False,
    in_place: bool = False,
) -> Tensor:
    """The channel pairs (2 i, 2 i + 1) of x turned by its rows and columns; without a graph.

    x: [..., h, w, N, K]; rows: [h, K'/2, 2], cols: [w, K'/2, 2], see `turns_of`. Computed in fp32
        at least, and rounded to x's dtype once.
    back: by the negative angles. in_place: x, of fp32 at least, is written to.
    """
    if rows is None and cols is None:
        return x
    if torch.compiler.is_compiling():
        return _turned_in_reals(x, rows, cols, back)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.to(wide)
    if out is x and not in_place:
        out = x.clone(memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(out.unflatten(-1, (-1, 2)))
    down, across = (None if y is None else torch.view_as_complex(y) for y in (rows, cols))
    if down is not None:
        first = pairs if across is None else pairs[..., : down.shape[-1]]
        first.mul_((down.conj() if back else down)[:, None, None])
    if across is not None:
        pairs[..., -across.shape[-1] :].mul_((across.conj() if back else across)[:, None])
    return out.to(x.dtype)


def _turned_in_reals(x: Tensor, rows: Tensor | None, cols: Tensor | None, back: bool) -> Tensor:
    """The same for a graph: torch's compiler has no kernels of complex numbers, and makes one of
    all of this."""
    turns = []
    if rows is not None:
        turns.append(rows[:, None].expand(-1, x.shape[-3], -1, -1))
    if cols is not None:
        turns.append(cols.expand(x.shape[-4], -1, -1, -1))
    cos, sin = (part[..., None, :] for part in torch.cat(turns, -2).unbind(-1))
    if back:
        sin = -sin
    wide = torch.promote_types(x.dtype, torch.float32)
    real, imaginary = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    both = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(both, -1).flatten(-2).to(x.dtype)


class _Turn(torch.autograd.Function):
    """Keeps the turns for backward, and nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, cols)
        return turned(x, rows, cols)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return turned(grad, *ctx.saved_tensors, back=True), None, None


def rotate(x: Tensor, angles: Tensor, dim: int) -> Tensor:
    """Turn the channel pairs (2 i, 2 i + 1) of x by the angles of the tokens along `dim`.

    x: [B, H, W, N, K]; angles: [L, K / 2] with L the size of `dim` (1 or 2). Computed in fp32 at
    least, and rounded to x's dtype once.
    """
    unit = _unit(angles, x)
    return _Turn.apply(x, unit, None) if dim == 1 else _Turn.apply(x, None, unit)


def rotate_tokens(
    tensors: tuple[Tensor, ...], rect: Rect, dims: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Rotary positions of the tokens of `rect`, for attention along `dims`: see `turns_of`.

    tensors: [B, h, w, N, K] each. `AxialAttention` turns what it projects by itself.
    """
    turns = turns_of(rect, dims, tensors[0].shape[-1], tensors[0])
    return tuple(_Turn.apply(x, *turns) for x in tensors)


def _unit(angles: Tensor, like: Tensor) -> Tensor:
    """[..., 2], cosines and sines of like's precision, fp32 at least, on its device."""
    unit = torch.stack((angles.cos(), angles.sin()), -1)
    return unit.to(like.device, torch.promote_types(like.dtype, torch.float32))


def relative_bias(table: Tensor, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """[N, Lq, Lk] from a table of learned biases, for tokens at the given global coordinates.

    table: [N, 2 S - 1]; the bias of a query at i and a key at j stands at j - i + S - 1, farther
    distances than S - 1 taking the outermost entry (arXiv 1803.02155, section 3.2).
    queries, keys: half-open intervals of coordinates.
    """
    # All distances in a row, smallest first; then each query has a window of it, and the next
    # query's lies one to the left. No gather over Lq * Lk, and none in backward.
    return by_distance(table, queries, keys).unfold(1, keys[1] - keys[0], 1).flip(1)


def by_distance(table: Tensor, queries: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """[N, Lq + Lk - 1]: the biases of all distances of a key from a query, smallest first.

    See `relative_bias`.
    """
    span = (table.shape[1] + 1) // 2
    distances = torch.arange(
        keys[0] - (queries[1] - 1), keys[1] - queries[0], device=table.device
    ).clamp(1 - span, span - 1)
    return table[:, distances + span - 1]


def widened(table: Tensor) -> Tensor:
    """A table of learned biases in fp32 at least.

    The gradient of an entry is a sum over all pairs of tokens at its distance: added up in bf16, it
    would no longer grow once it is some hundred times what is added.
    """
    return table.to(torch.promote_types(table.dtype, torch.float32))


class AxialEmbedding(nn.Module):
    """Learned E_rows[i] + E_cols[j], added once to the token at (i, j) (arXiv 1912.12180, 3.3).

    Made for a grid of height x width tokens; for an image of other extent each of the two is
    interpolated linearly, the outer edges of first and last token falling on those of the image.
    """

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(height, dim))
        self.cols = nn.Parameter(torch.empty(width, dim))
        for table in (self.rows, self.cols):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor, place: Place, valid: Tensor | None) -> Tensor:
        """x: [B, h, w, D] under `place`, valid: [B, H, W] of the whole grid -> [B, h, w, D].

        An image extends from the first row and column to the last that has a valid token.
        """
        rect = place.rect
        heights, widths = extents(place, valid, x)
        rows = _interpolated(self.rows, heights, rect.top, rect.bottom)
        cols = _interpolated(self.cols, widths, rect.left, rect.right)
        return x + rows[:, :, None] + cols[:, None]


class GridEmbedding(nn.Module):
    """A learned embedding for each place of a grid, added once to the token there: ViT's.

    Made for a grid of height x width tokens; for an image of other extent it is resampled as timm
    does (bicubic, antialiased). Each rank resamples its own part.
    """

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(height, width, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor, place: Place, valid: Tensor | None) -> Tensor:
        """x: [B, h, w, D] under `place`, valid: [B, H, W] of the whole grid -> [B, h, w, D]."""
        return x + resampled(self.table, place, extents(place, valid, x))


def extents(place: Place, valid: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """(heights, widths) of the images of a batch, [B] each, in tokens, 1 at least.

    valid: bool [B, H, W] of the whole grid; None where every image fills it. x: [B, ...].
    """
    if valid is None:
        heights = torch.full((x.shape[0],), place.height, device=x.device)
        return heights, torch.full_like(heights, place.width)
    return _extent(valid.any(2)), _extent(valid.any(1))


def resampled(table: Tensor, place: Place, sizes: tuple[Tensor, Tensor]) -> Tensor:
    """[B, h, w, D]: the table [H0, W0, D] resampled to each image's size, at this rank's tokens.

    In the table's dtype, under autocast too: it is added to the residual stream.
    """
    rect, wide = place.rect, torch.promote_types(table.dtype, torch.float32)
    done: dict[tuple[int, int], Tensor] = {}
    pairs = list(zip(*(one.tolist() for one in sizes), strict=True))
    with torch.autocast(table.device.type, enabled=False):
        for size in pairs:
            if size not in done:
                rows = _bicubic(table.shape[0], size[0], rect.top, rect.bottom, table.device)
                cols = _bicubic(table.shape[1], size[1], rect.left, rect.right, table.device)
                done[size] = torch.einsum(
                    "hi,ijd,wj->hwd", rows.to(wide), table.to(wide), cols.to(wide)
                ).to(table.dtype)
    if len(done) == 1:  # one table for all images, not a copy for each
        return done[pairs[0]].expand(len(pairs), -1, -1, -1)
    return torch.stack([done[size] for size in pairs])


def _bicubic(old: int, new: int, start: int, stop: int, device: torch.device) -> Tensor:
    """[stop - start, old], fp64: the weights with which torch resamples a line of `old` to `new`.

    Resampling is linear and separable, so its matrix is what it makes of the unit vectors.
    Coordinates from `new` on (padding) get zeros.
    """
    unit = torch.eye(old, dtype=torch.float64, device=device)[None, None]
    weights = (
        unit[0, 0]
        if old == new
        else F.interpolate(
            unit, size=(new, old), mode="bicubic", align_corners=False, antialias=True
        )[0, 0]
    )
    stop_here = max(start, min(stop, new))
    return F.pad(weights[start:stop_here], (0, 0, 0, stop - stop_here))


def _extent(used: Tensor) -> Tensor:
    """used: bool [B, L] -> how many lines there are up to the last used one, [B], 1 at least."""
    return (used * torch.arange(1, used.shape[1] + 1, device=used.device)).amax(1).clamp_min(1)


def _interpolated(table: Tensor, extents: Tensor, start: int, stop: int) -> Tensor:
    """[B, stop - start, D]: the table [L, D] stretched to each extent, at start..stop.

    In the table's dtype, from shares in fp32 at least, in which its gradient is added up too.
    """
    dtype, table = table.dtype, table.to(torch.promote_types(table.dtype, torch.float32))
    at = torch.arange(start, stop, dtype=torch.float64, device=table.device) + 0.5
    at = (at * (table.shape[0] / extents[:, None].double()) - 0.5).clamp(0, table.shape[0] - 1)
    low = at.floor().long()
    high = (low + 1).clamp_max(table.shape[0] - 1)
    share = (at - low).to(table.dtype)[..., None]
    return torch.lerp(table[low], table[high], share).to(dtype)
