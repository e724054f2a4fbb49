"""Batch norm over all images of the batch and all of their valid tokens, wherever they are.

Where all tokens count, torch's kernels do the work (`_OfAll`). With a mask it is composed of two
differentiable sums over the ranks, and needs no backward of its own: that of a sum over ranks is a
sum over ranks (`mesh.collectives.sum_over`). Local statistics are combined as
mean and centred squares (Chan, Golub, LeVeque 1979): a plain sum of squares would lose the variance
of channels whose mean is large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from axialtrain.mesh.exchange import Exchange

Total = Callable[[Tensor], Tensor]  # the sum over ranks


@dataclass(frozen=True)
class Moments:
    """Of some values of C channels: how many there are of each, their mean [C], and the sum [C] of
    the squares of what they are above it. In fp32 at least."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    @staticmethod
    def of(x: Tensor, valid: Tensor) -> Moments:
        """x: [..., C], finite; valid: bool [...], which of them count."""
        flat = x.reshape(-1, x.shape[-1])
        here = valid.reshape(-1, 1)
        count = here.sum().to(flat)
        mean = torch.where(here, flat, 0.0).sum(0) / count.clamp_min(1)
        return Moments(count, mean, torch.where(here, flat - mean, 0.0).square().sum(0))

    def of_parts(self) -> Moments:
        """Those of several parts, [P] and [P, C], together."""
        return self._sum(lambda x: x.sum(0))

    def joined(self, total: Total) -> Moments:
        """With those that other ranks have. total: the sum over ranks, called twice."""
        return self._sum(total)

    def _sum(self, total: Total) -> Moments:
        count = self.count[..., None]
        sums = total(torch.cat((count * self.mean, count), -1))
        mean = sums[:-1] / sums[-1].clamp_min(1)
        squares = total(self.squares + count * (self.mean - mean).square())
        return Moments(sums[-1], mean, squares)


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
        if valid is None:
            return self._of_all(wide).to(x.dtype)
        wide = torch.where(valid[..., None], wide, 0.0)  # NaN * 0 is NaN, in gradients too
        moments = Moments.of(wide, valid) if self.training else None
        mean, factor = self.normalisation(moments)
        out = (wide - mean) * factor + self.bias.to(wide)
        return torch.where(valid[..., None], out, 0.0).to(x.dtype)

    def _of_all(self, x: Tensor) -> Tensor:
        """x: [..., C] of fp32 at least, all of which counts."""
        weight, bias = self.weight.to(x), self.bias.to(x)
        if not self.training:
            # Without its mean, or beside a large one the kernel would lose digits.
            return _normalised(
                x - self.running_mean.to(x), self.running_var.to(x), weight, bias, self.eps
            )
        out, *moments = _OfAll.apply(x, weight, bias, self.eps, self.exchange.total)
        self._follow(Moments(*moments))
        return out

    def normalisation(self, moments: Moments | None) -> tuple[Tensor, Tensor]:
        """(mean, factor), [C] each: values become (value - mean) * factor + bias.

        moments: of this rank's values while training, None in evaluation. A collective in training.
        """
        if moments is None:
            mean, var = self.running_mean, self.running_var
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


class _OfAll(torch.autograd.Function):
    """x: [..., C], normalised by its own moments over all ranks, by torch's kernels; and these.

    torch's kernel of training sees one rank alone. So this is its SyncBatchNorm: a kernel that
    counts, and the one of evaluation, whose backward takes the moments for constants; what x adds
    to a gradient by way of these follows from sums. Kernels get values without their mean: beside
    a large one they would lose digits.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, total: Total
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        sums = total(torch.cat((flat.sum(0), flat.new_full((1,), len(flat)))))
        mean, count = sums[:-1] / sums[-1].clamp_min(1), sums[-1]
        centred = x - mean
        squares = torch.zeros_like(mean)
        if len(flat):  # or the kernel has nothing to count
            above, var = torch.batch_norm_update_stats(_maps(centred), None, None, 0.0)
            squares = (var + above.square()) * len(flat)
        squares = total(squares)
        var = squares / count.clamp_min(1)
        ctx.save_for_backward(centred, weight, count, var)
        ctx.eps, ctx.total = eps, total
        ctx.mark_non_differentiable(count, mean, squares)
        return _normalised(centred, var, weight, bias, eps), count, mean, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        centred, weight, count, var = ctx.saved_tensors
        of_x, of_weight, of_bias = torch.zeros_like(centred), weight * 0, weight * 0
        if centred.numel():
            maps, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                _maps(grad), _maps(centred), weight, torch.zeros_like(var), var,
                None, None, False, ctx.eps, [True] * 3,
            )  # fmt: skip
            of_x = _like(centred, maps)
        sums = ctx.total(torch.stack((of_weight, of_bias))) / count.clamp_min(1)
        factor = torch.rsqrt(var + ctx.eps)
        of_x.addcmul_(centred, weight * factor.square() * sums[0], value=-1)
        of_x.sub_(weight * factor * sums[1])
        return of_x, of_weight, of_bias, None, None


def _maps(x: Tensor) -> Tensor:
    """[..., C] as [1, C, T, 1], the order in memory being torch's "channels last"."""
    return x.reshape(1, -1, 1, x.shape[-1]).movedim(-1, 1)


def _like(x: Tensor, maps: Tensor) -> Tensor:
    """[1, C, T, 1] as x: [..., C]."""
    return maps.movedim(1, -1).reshape(x.shape)


def _normalised(centred: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """centred: [..., C], above their mean."""
    if not centred.numel():
        return centred + 0 * (weight + bias).sum()
    mean = torch.zeros_like(var)
    return _like(centred, F.batch_norm(_maps(centred), mean, var, weight, bias, False, 0.0, eps))


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
