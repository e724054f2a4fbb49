"""Multi-head attention that runs any pass of a layer, on whatever part of the image is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from axialtrain.attention.area import attend_all, attend_windows
from axialtrain.attention.axis import attend
from axialtrain.attention.config import AxialConfig, Pass
from axialtrain.attention.lines import Prefix
from axialtrain.attention.masks import GridMask
from axialtrain.attention.merge import attend_everywhere
from axialtrain.attention.positions import Turns, turns_of
from axialtrain.attention.qkv import HeadProjection
from axialtrain.grid import Place, Rect, cuts_windows, windows_of
from axialtrain.mesh.crossing import Crossing
from axialtrain.mesh.exchange import Exchange
from axialtrain.mesh.projection import Projection


class AxialAttention(nn.Module):
    """Attention with timm's parameter names (`qkv`, `proj`), for the passes that share it.

    The fused QKV weight is packed head by head, [N][q, k, v][K]: a contiguous slice of it is a set
    of whole heads. N is read off the width of the projection, so that a module that holds a slice
    of the heads computes just those.

    passes: those that it will be asked for. grid: (H, W) that relative tables are made for, where
    config.span is None. qkv_bias: whether Q, K and V have a bias.

    Raises ValueError where `heads` does not divide `dim`, or positions do not fit the head width.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        passes: Sequence[Pass],
        config: AxialConfig,
        *,
        grid: tuple[int, int] | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        config.check_heads(dim, heads, passes)
        self.head_dim = dim // heads
        self.passes = tuple(passes)
        self.positions = config.positions
        self.window = config.window
        self.kernel = config.kernel
        self.qkv = HeadProjection(dim, self.head_dim, bias=qkv_bias)
        self.proj = Projection(dim, dim)
        self.exchange = Exchange(heads, rows=Pass.ROW in passes, cols=Pass.COL in passes)
        self.per_head = Crossing("heads")
        self.bias_h = self.bias_w = None  # of vertical and of horizontal distances
        if config.positions == "relative":
            self.bias_h = _table(1, heads, passes, config, grid)
            self.bias_w = _table(2, heads, passes, config, grid)

    def forward(
        self,
        x: Tensor,
        prefix: Tensor,
        place: Place,
        which: Pass,
        valid: GridMask | Tensor | None = None,
        *,
        skip: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """x: [B, h, w, D] at which.enters(place), prefix: [B, n, D] -> the same, attended.

        valid: bool [B, H, W] of the whole grid; other tokens are no keys, and get zeros. A
            `GridMask` of it, given to all layers, saves what they would find out one by one.
        skip: leave out the work: two scalar zeros, to be added like any other result, through which
            every parameter gets a gradient of zero.
        """
        assert which in self.passes, f"made for {self.passes}, asked for {which}"
        if skip:
            return self._nothing(x)
        turns: Turns = (None, None)
        if self.positions == "rope":
            turns = turns_of(place.rect, which.dims, self.head_dim, x)
        q, k, v = self.qkv(x, *turns)
        valid = GridMask.of(valid)
        mine = None if valid is None else valid.within(place.rect)
        own: Prefix | None = None
        if prefix.shape[1]:
            of_prefix, *own_kv = self.qkv(prefix)
            own = (own_kv[0], own_kv[1])
            merged = attend_everywhere(of_prefix, k, v, self.exchange, key_mask=mine, prefix=own)
            prefix = self.proj(merged.flatten(2))
        if len(which.dims) == 1:
            out = self._line(q, k, v, place, which.dims[0], valid, own)
        elif which.windowed:
            shift = self.window // 2 if which is Pass.SHIFTED else 0
            out = self._windows(q, k, v, place, shift, valid, own)
        else:
            out = self._all(q, k, v, place, valid, own)
        out = self.proj(out.flatten(3))
        if mine is not None:
            out = out.masked_fill(~mine[..., None], 0.0)
        return out, prefix

    def _line(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        place: Place,
        dim: int,
        valid: GridMask | None,
        prefix: Prefix | None,
    ) -> Tensor:
        """Rows (dim 2) or columns (1), made whole by swap (before), heads or gather (here)."""
        table = self.bias_w if dim == 2 else self.bias_h
        bias = None if table is None else self.per_head(table)
        kind, offset = self.exchange.kind, 0
        rect = place.rect if kind == "swap" else _stretched(place.rect, place, dim)
        if kind == "heads":
            some = self.exchange.my_heads(q.shape[3], dim)
            q, k, v = self.exchange.deal_heads(torch.cat((q, k, v), -1), place, dim).chunk(3, -1)
            bias = None if bias is None else bias[some]
            if prefix is not None:
                prefix = (prefix[0][:, :, some], prefix[1][:, :, some])
        elif kind == "gather":
            offset = place.rect.left if dim == 2 else place.rect.top
            k, v = self._fetched(
                k, v, place, lambda own: _stretched(own, place, dim), rows=dim == 1, cols=dim == 2
            )
        asking = place.rect if kind == "gather" else rect
        out = attend(
            q,
            k,
            v,
            dim,
            masks=None if valid is None else valid.lines(dim, rect, asking),
            bias=bias,
            offset=offset,
            prefix=prefix,
            kernel=self.kernel,
        )
        return self.exchange.collect_heads(out, place, dim) if kind == "heads" else out

    def _windows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        place: Place,
        shift: int,
        valid: GridMask | None,
        prefix: Prefix | None,
    ) -> Tensor:
        def wanted(own: Rect) -> Rect:
            return windows_of(own, self.window, shift).intersect(place.grid)

        rows, cols = place.shape
        k, v = self._fetched(
            k,
            v,
            place,
            wanted,
            rows=cuts_windows(place.height, rows, self.window, shift),
            cols=cuts_windows(place.width, cols, self.window, shift),
        )
        keys = wanted(place.rect)
        return attend_windows(
            q,
            k,
            v,
            place.rect,
            keys,
            self.window,
            shift,
            key_mask=None if valid is None else valid.within(keys),
            bias=self._tables(),
            prefix=prefix,
            kernel=self.kernel,
        )

    def _all(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        place: Place,
        valid: GridMask | None,
        prefix: Prefix | None,
    ) -> Tensor:
        k, v = self._fetched(k, v, place, lambda _: place.grid, rows=True, cols=True)
        bias, masks = self._tables(), None if valid is None else valid.image()
        return attend_all(
            q, k, v, place.rect, masks=masks, bias=bias, prefix=prefix, kernel=self.kernel
        )

    def _fetched(
        self,
        k: Tensor,
        v: Tensor,
        place: Place,
        wanted: Callable[[Rect], Rect],
        *,
        rows: bool,
        cols: bool,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens that this rank wants, in one exchange."""
        both = torch.cat((k, v), -1)
        both = self.exchange.fetch(both, place, wanted, across_rows=rows, across_cols=cols)
        k, v = both.chunk(2, -1)
        return k, v

    def _tables(self) -> tuple[Tensor, Tensor] | None:
        if self.bias_h is None or self.bias_w is None:
            return None
        return self.per_head(self.bias_h), self.per_head(self.bias_w)

    def _nothing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x[:0])
        zero = self.proj((q + k + v).flatten(3)).sum()
        for table in (self.bias_h, self.bias_w):
            if table is not None:
                zero = zero + self.per_head(table)[:, :0].sum()
        return zero, zero


def _stretched(rect: Rect, place: Place, dim: int) -> Rect:
    """The whole rows (dim 2) or columns (1) of which `rect` has a part."""
    if dim == 2:
        return Rect(rect.top, rect.bottom, 0, place.width)
    return Rect(0, place.height, rect.left, rect.right)


def _table(
    dim: int,
    heads: int,
    passes: Sequence[Pass],
    config: AxialConfig,
    grid: tuple[int, int] | None,
) -> nn.Parameter | None:
    """[N, 2 S - 1] for distances along `dim`; None where no pass attends along it."""
    users = [which for which in passes if dim in which.dims]
    if not users:
        return None
    span = config.span
    if span is None and all(which.windowed for which in users):
        span = config.window
    if span is None:
        config.check_span(grid, passes)
        assert grid is not None
        span = grid[dim - 1]
    table = nn.Parameter(torch.empty(heads, 2 * span - 1))
    nn.init.trunc_normal_(table, std=0.02)  # as Swin's (arXiv 2103.14030)
    return table
