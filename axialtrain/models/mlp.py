"""The MLP of a layer, whole or in chunks of tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from axialtrain.mesh.crossing import Crossing
from axialtrain.mesh.projection import (
    Projection,
    Sum,
    arithmetic_dtype,
    autocasted,
    no_autocast,
)


class Mlp(nn.Module):
    """fc1 -> GELU -> fc2, with timm's names.

    chunk: tokens at a time where there are more of them. Their hidden activations, which are
    mlp_ratio times as wide as the tokens, are then computed again in backward, so that those of one
    chunk are all that ever exist. None: all at once, kept for backward.

    In chunks the parameters of fc1 and fc2 are used without calling these, with whose calls ZeRO 3
    gathers them: there `train.engine` sets None.
    """

    def __init__(self, dim: int, width: int, chunk: int | None = None) -> None:
        super().__init__()
        self.chunk = chunk
        self.fc1 = Projection(dim, width)
        self.act = nn.GELU()
        self.fc2 = Projection(width, dim)
        self.copied, self.summed = Crossing("copied"), Crossing("summed")

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> [..., D]."""
        if self.chunk is None or x.shape[:-1].numel() <= self.chunk:
            out: Tensor = self.fc2(self.act(self.fc1(x)))
            return out
        fc1, fc2 = self.fc1, self.fc2
        *inner, offset = autocasted(self.copied(x), fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        with no_autocast(x):
            return self.summed(_Chunked.apply(*inner, self.chunk)) + offset


class _Chunked(torch.autograd.Function):
    """gelu(x first^T + bias) second^T, of a chunk of tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, bias: Tensor, second: Tensor, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(x, first, bias, second)
        ctx.chunk = chunk
        wide = arithmetic_dtype(x)
        out = x.new_empty(*x.shape[:-1], len(second))  # no view: it may be summed in its place
        inward, offset, outward = first.to(wide), bias.to(wide), second.to(wide)
        parts = zip(x.flatten(0, -2).split(chunk), out.flatten(0, -2).split(chunk), strict=True)
        for part, goal in parts:
            goal.copy_(F.linear(F.gelu(F.linear(part.to(wide), inward, offset)), outward))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, first, bias, second = ctx.saved_tensors
        wide = arithmetic_dtype(x)
        inward, offset, outward = first.to(wide), bias.to(wide), second.to(wide)
        of_first, of_bias, of_second = Sum(first), Sum(bias), Sum(second)
        of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        parts = zip(
            x.flatten(0, -2).split(ctx.chunk),
            grad.flatten(0, -2).split(ctx.chunk),
            of_x.view(-1, x.shape[-1]).split(ctx.chunk),
            strict=True,
        )
        for part, of_out, goal in parts:
            seen, of_out = part.to(wide), of_out.to(wide)
            hidden = F.linear(seen, inward, offset)
            of_second.add(of_out.t() @ F.gelu(hidden))
            of_hidden = torch.ops.aten.gelu_backward(of_out @ outward, hidden)
            of_first.add(of_hidden.t() @ seen)
            of_bias.add(of_hidden.sum(0))
            goal.copy_(of_hidden @ inward)
        return of_x, of_first.total(), of_bias.total(), of_second.total(), None
