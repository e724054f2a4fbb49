"""Queries, keys and values of tokens, with rotary positions, in one step.

The projection is called a chunk of tokens at a time, and what it gives is turned while it is in the
cache: no packed tensor of all three exists, nor an unturned one, in forward or in backward.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from axialtrain.attention.positions import Turns, turned
from axialtrain.mesh.projection import (
    Projection,
    Sum,
    arithmetic_dtype,
    autocasted,
    no_autocast,
    tokens_at_a_time,
)

Three = tuple[Tensor, Tensor, Tensor]


def project_heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, turns: Turns = (None, None), *, head_dim: int
) -> Three:
    """q, k, v: [..., h, w, N, K] each, of x: [..., h, w, D]; q and k turned.

    weight: [N 3 K, D], packed head by head, [N][q, k, v][K]; bias: [N 3 K].
    turns: see `positions.turns_of`; without any, x is [..., D]. Under autocast all are cast as
    torch's linear layer casts them.
    Adjoint: the turns backwards, then that of the projection.
    """
    rows, cols = turns
    given = autocasted(x, weight, bias)
    with no_autocast(x):
        return _ProjectHeads.apply(*given, rows, cols, head_dim)


class HeadProjection(Projection):
    """The fused projection of an attention: `qkv`, with timm's names and weights head by head."""

    def __init__(self, dim: int, head_dim: int, *, bias: bool) -> None:
        super().__init__(dim, 3 * dim, bias=bias)
        self.arithmetic = partial(project_heads, head_dim=head_dim)

    @classmethod
    def by_head(cls, linear: nn.Linear, head_dim: int) -> HeadProjection:
        """With the parameters of `linear` themselves."""
        with torch.device("meta"):  # what it would draw is thrown away
            own = cls(linear.in_features, head_dim, bias=linear.bias is not None)
        own.weight, own.bias = linear.weight, linear.bias
        return own.train(linear.training)

    def forward(  # type: ignore[override]
        self, x: Tensor, rows: Tensor | None = None, cols: Tensor | None = None
    ) -> Three:
        """x: [B, h, w, D] with the turns of its rows and columns, or [B, n, D] without."""
        out: Three = self.arithmetic(x, self.weight, self.bias, (rows, cols))
        return out


class _ProjectHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        cols: Tensor | None,
        head_dim: int,
    ) -> Three:
        ctx.save_for_backward(x, weight, rows, cols)
        ctx.biased, ctx.head_dim = bias is not None, head_dim
        wide = arithmetic_dtype(x)
        shape = (x.shape[-2], len(weight) // (3 * head_dim), head_dim)
        lines, width = _lines(x), shape[1] * head_dim
        # A matrix for each of the three, so that what it gives needs no copy to be taken apart.
        three = _apart(weight, head_dim).to(wide)
        offsets = [None] * 3 if bias is None else _apart(bias, head_dim).to(wide).unbind(0)
        outs = []
        for number, (matrix, offset) in enumerate(zip(three.unbind(0), offsets, strict=True)):
            parts = _parts(x, 3 * width)
            out = None if len(parts) == 1 else x.new_empty(len(lines), *shape)
            for some in parts:
                part = torch.nn.functional.linear(lines[some].to(wide), matrix, offset)
                part = part.view(len(part), *shape)  # w may be 0
                if number < 2:
                    part = turned(part, _of(rows, some), cols, in_place=True)
                if out is None:
                    out = part.to(x.dtype)
                else:
                    out[some] = part
            assert out is not None, "there is one part at least"
            outs.append(out.view(*x.shape[:-1], *shape[1:]))
        return outs[0], outs[1], outs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows, cols = ctx.saved_tensors
        wide = arithmetic_dtype(x)
        lines = _lines(x)
        matrix = _apart(weight, ctx.head_dim).to(wide).flatten(0, 1)
        of_weight, of_bias = Sum(matrix), Sum(matrix[:, 0])
        of_x = torch.empty_like(lines, memory_format=torch.contiguous_format)
        three = [grad.reshape(*lines.shape[:2], *grad.shape[-2:]) for grad in grads]
        for some in _parts(x, len(weight)):
            packed = torch.stack([grad[some] for grad in three], 2).to(wide)
            q_and_k = packed[:, :, :2].flatten(2, 3)
            done = turned(q_and_k, _of(rows, some), cols, back=True, in_place=True)
            if done is not q_and_k:  # in bf16 it is turned in fp32
                q_and_k.copy_(done)
            packed = packed.view(packed.shape[:2].numel(), len(weight))
            seen = lines[some].flatten(0, 1).to(wide)
            of_x[some] = (packed @ matrix).view_as(of_x[some])
            of_weight.add(packed.t() @ seen)
            if ctx.biased:
                of_bias.add(packed.sum(0))
        together = _together(of_weight.total(), ctx.head_dim).to(weight.dtype)
        offset = _together(of_bias.total(), ctx.head_dim).to(weight.dtype) if ctx.biased else None
        return of_x.view(x.shape), together, offset, None, None, None


def _lines(x: Tensor) -> Tensor:
    """[B, h, w, D] -> [B h, w, D]."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def _parts(x: Tensor, width: int) -> list[slice]:
    """The lines of x, a chunk at a time; one part at least."""
    count = x.shape[:-2].numel()
    size = max(1, tokens_at_a_time(x, width) // max(1, x.shape[-2]))
    return [slice(start, min(start + size, count)) for start in range(0, max(count, 1), size)]


def _of(rows: Tensor | None, some: slice) -> Tensor | None:
    """The turns of some lines; after the last row of an image comes the first of the next."""
    if rows is None:
        return None
    return rows[torch.arange(some.start, some.stop, device=rows.device) % max(1, len(rows))]


def _apart(weight: Tensor, head_dim: int) -> Tensor:
    """[N 3 K, ...] -> [3, N K, ...]."""
    return weight.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(1, 2)


def _together(weight: Tensor, head_dim: int) -> Tensor:
    """[3 N K, ...] -> [N 3 K, ...]."""
    return weight.unflatten(0, (3, -1, head_dim)).transpose(0, 1).flatten(0, 2)
