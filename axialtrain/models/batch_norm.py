"""Batch norm over all images of the batch and all of their valid tokens, wherever they are.

Composed around two differentiable sums over the ranks, so that no backward of ours has a
collective: that of a sum over ranks is a sum over ranks (`mesh.collectives.sum_over`). Local
statistics are combined as mean and centred squares (Chan, Golub, LeVeque 1979): a plain sum of
squares would lose the variance of channels whose mean is large. What a rank does to its values,
before and behind the sums, keeps these values alone for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from axialtrain.mesh.exchange import Exchange


@dataclass(frozen=True)
class Moments:
    """Of some values of C channels: how many there are of each, their mean [C], and the sum [C] of
    the squares of what they are above it. In fp32 at least."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    @staticmethod
    def of(x: Tensor, valid: Tensor | None) -> Moments:
        """x: [..., C], zeros where not valid; valid: bool [...], None where all count."""
        return Moments(
            *_Moments.apply(x.flatten(0, -2), None if valid is None else valid.flatten()[:, None])
        )

    def of_parts(self) -> Moments:
        """Those of several parts, [P] and [P, C], together."""
        return self._sum(lambda x: x.sum(0))

    def joined(self, total: Callable[[Tensor], Tensor]) -> Moments:
        """With those that other ranks have. total: the sum over ranks, called twice."""
        return self._sum(total)

    def _sum(self, total: Callable[[Tensor], Tensor]) -> Moments:
        count = self.count[..., None]
        sums = total(torch.cat((count * self.mean, count), -1))
        mean = sums[:-1] / sums[-1].clamp_min(1)
        squares = total(self.squares + count * (self.mean - mean).square())
        return Moments(sums[-1], mean, squares)


class _Moments(torch.autograd.Function):
    """x: [M, C], valid: bool [M, 1] -> what `Moments` has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        count = x.new_full((), len(x)) if valid is None else valid.sum().to(x)
        mean = x.sum(0) / count.clamp_min(1)
        ctx.save_for_backward(x, count, mean)
        ctx.mark_non_differentiable(count)
        above = x - mean
        if valid is not None:
            above.masked_fill_(~valid, 0.0)
        return count, mean, above.square_().sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, of_mean: Tensor, of_squares: Tensor) -> tuple[Tensor, None]:
        """What is above the mean adds up to zero, so squares depend on the mean not at all.

        Where x is not valid the gradient is that of a zero that was put there, which has none.
        """
        x, count, mean = ctx.saved_tensors
        above = x - mean
        return torch.addcmul(of_mean / count.clamp_min(1), above, 2 * of_squares, out=above), None


class _Normalise(torch.autograd.Function):
    """(x - mean) * factor + bias. x: [..., C]; the others: [C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(factor, *((x, mean) if ctx.needs_input_grad[2] else ()))
        above = x - mean
        return torch.addcmul(bias, above, factor, out=above)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor, *x_and_mean = ctx.saved_tensors
        of_x = grad * factor if ctx.needs_input_grad[0] else None
        total = grad.flatten(0, -2).sum(0)
        of_factor = None
        if x_and_mean:
            x, mean = x_and_mean
            of_factor = (x - mean).mul_(grad).flatten(0, -2).sum(0)
        return of_x, -factor * total, of_factor, total


class BatchNorm(nn.Module):
    """Batch norm (arXiv 1502.03167) of channels C, with torch's parameters, buffers and defaults.

    In training over the images that all data ranks have at a time, micro_batch x mesh.data: a model
    with it depends on that product, and on nothing else of the mesh. Statistics are in fp32 at
    least, the running ones too, whatever dtype the module is cast to, and equal on all ranks.

    start: of the weight.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, channels: int, *, start: float = 1.0, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.full((channels,), start))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.exchange = Exchange()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x: [..., C] -> the same, normalised; zeros where not valid. valid: bool [...]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if valid is not None:
            wide = torch.where(valid[..., None], wide, 0.0)  # NaN * 0 is NaN, in gradients too
        moments = Moments.of(wide, valid) if self.training else None
        mean, factor = self.normalisation(moments)
        out: Tensor = _Normalise.apply(wide, mean, factor, self.bias.to(wide))
        if valid is not None:
            out = torch.where(valid[..., None], out, 0.0)
        return out.to(x.dtype)

    def normalisation(self, moments: Moments | None) -> tuple[Tensor, Tensor]:
        """(mean, factor), [C] each: values become (value - mean) * factor + bias.

        moments: of this rank's values while training, None in evaluation. A collective in training.
        """
        if moments is None:
            # Backward may come when they have moved on.
            mean, var = self.running_mean.clone(), self.running_var
        else:
            of_batch = moments.joined(self.exchange.total)
            mean, var = of_batch.mean, of_batch.squares / of_batch.count.clamp_min(1)
            self._follow(of_batch)
        return mean, self.weight.to(var) * torch.rsqrt(var + self.eps)

    @torch.no_grad()
    def _follow(self, batch: Moments) -> None:
        """Move the running statistics towards the batch's; a batch without values moves nothing."""
        share = self.momentum * (batch.count > 0).to(batch.mean)
        unbiased = batch.squares / (batch.count - 1).clamp_min(1)
        self.running_mean.lerp_(batch.mean.to(self.running_mean), share.to(self.running_mean))
        self.running_var.lerp_(unbiased.to(self.running_var), share.to(self.running_var))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchNorm:
        # .bfloat16() and .half() cast buffers too, and a running mean that moves by a tenth of a
        # small difference would stand still in them.
        exact = {"running_mean": self.running_mean, "running_var": self.running_var}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            now = getattr(self, name)
            if now.device.type != "meta" and before.device.type != "meta":
                wide = torch.promote_types(now.dtype, torch.float32)
                setattr(self, name, before.to(now.device, wide))
        return self


class LogitNorm(BatchNorm):
    """Batch norm in front of a softmax: only its factors matter.

    What it would add is the same for all keys of a query, and a softmax does not see it. So the
    bias has a gradient of zero, exactly, and not of rounding, which Adam would turn into steps.
    """

    def forward(  # type: ignore[override]
        self, parts: tuple[Tensor, Tensor, Tensor] | None
    ) -> Tensor:
        """-> factors [C] of the logits.

        parts: while training, of P parts of this rank's logits, what `Moments` has: counts [P],
            means [P, C], squares [P, C]. None in evaluation.
        """
        _, factor = self.normalisation(None if parts is None else Moments(*parts).of_parts())
        return factor + 0.0 * self.bias.to(factor)
