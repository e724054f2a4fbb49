"""Linear layers of tokens, whole or in slices over the tensor axis, at the speed of the machine.

torch's linear layer in bf16 on a CPU without bf16 arithmetic (AVX2) takes 7 times as long as in
fp32, and the gradient of its input 80 times (measured, 4096 x 384 x 1152). There it is computed in
fp32, a chunk of tokens at a time, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Numbers of the widest tensor of a chunk: on a CPU it stays in the cache, on a GPU it fills it.
CHUNK = {"cpu": 2**20, "cuda": 2**27}
LEAST = 512  # tokens of a chunk: below, products are no longer at their full rate
# Asked once: in a graph of torch's compiler it could not be.
CPU = torch.backends.cpu.get_cpu_capability()

Arithmetic = Callable[..., Any]  # (x, weight, bias, ...) -> what the layer gives


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of tensors like x are fastest here: x's own, or fp32."""
    slow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if slow and _without_16_bits() else x.dtype


def _without_16_bits() -> bool:
    return CPU in ("AVX2", "DEFAULT", "NO AVX")


def autocasts(kind: str) -> bool:
    """Whether devices of this kind have autocast. So does torch's `is_autocast_available`, which
    the compiler of torch 2.11 cannot trace."""
    return kind != "meta"


def autocasted(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """x and the others as torch's linear layer would take them where autocast is on."""
    kind = x.device.type
    if not autocasts(kind) or not torch.is_autocast_enabled(kind):
        return [x, *others]
    dtype = torch.get_autocast_dtype(kind)
    return [None if one is None else one.to(dtype) for one in (x, *others)]


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Within it autocast is off on x's device, where there is one: not on meta."""
    kind = x.device.type
    if not autocasts(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def tokens_at_a_time(x: Tensor, width: int) -> int:
    """How many tokens a chunk has, of `width` numbers each at their widest."""
    return max(LEAST, CHUNK.get(x.device.type, CHUNK["cuda"]) // max(1, width))


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [..., I], weight: [O, I], bias: [O] -> x weight^T + bias, [..., O]."""
    if x.dtype is not weight.dtype or arithmetic_dtype(x) is x.dtype:
        return F.linear(x, weight, bias)
    with no_autocast(x):
        return _Project.apply(x, weight, bias)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        wide = arithmetic_dtype(x)
        matrix, offset = weight.to(wide), None if bias is None else bias.to(wide)
        out = x.new_empty(*x.shape[:-1], len(weight))
        tokens = out.view(-1, len(weight))
        for some in chunks(x, max(weight.shape)):
            tokens[some] = F.linear(x.reshape(-1, x.shape[-1])[some].to(wide), matrix, offset)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = arithmetic_dtype(x)
        matrix = weight.to(wide)
        of_weight, of_bias = Sum(weight), Sum(weight[:, 0])
        of_x = None  # of pixels nobody asks for it
        if ctx.needs_input_grad[0]:
            of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat, tokens = x.reshape(-1, x.shape[-1]), grad.reshape(-1, len(weight))
        for some in chunks(x, max(weight.shape)):
            part = tokens[some].to(wide)
            if of_x is not None:
                of_x.view(-1, x.shape[-1])[some] = part @ matrix
            if ctx.needs_input_grad[1]:
                of_weight.add(part.t() @ flat[some].to(wide))
            if ctx.biased:
                of_bias.add(part.sum(0))
        return of_x, of_weight.total(), of_bias.total() if ctx.biased else None


def chunks(x: Tensor, width: int) -> Iterator[slice]:
    """The tokens of x, [..., D], a chunk at a time."""
    count = x.shape[:-1].numel()
    size = tokens_at_a_time(x, width)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class Sum:
    """A parameter's gradient, added up over chunks in fp32 at least. Zeros where there is none."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.now: Tensor | None = None

    def add(self, part: Tensor) -> None:
        wide = torch.promote_types(self.like.dtype, torch.float32)
        self.now = part.to(wide) if self.now is None else self.now.add_(part)

    def total(self) -> Tensor:
        if self.now is None:
            return torch.zeros_like(self.like, memory_format=torch.contiguous_format)
        return self.now.to(self.like.dtype)


class Projection(nn.Linear):
    """torch's linear layer, with its names, by an arithmetic that a slice of it takes over.

    `parallelize` replaces it by fairscale's layers, which call `arithmetic` on the slice of a rank.
    """

    arithmetic: Arithmetic = staticmethod(project)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.arithmetic(x, self.weight, self.bias)
        return out
