"""What attention is measured against, written as anybody would, and what it is measured on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from axialtrain.bench.timing import Way

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def drawn(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Normal numbers, a leaf that wants a gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device)
    return x.to(dtype).requires_grad_()


def triple(*shape: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    q, k, v = (drawn(*shape, device=device, dtype=dtype, seed=seed) for seed in range(3))
    return q, k, v


def there_and_back(attention: Attention, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Way:
    """Forward, and backward to q, k, v and `others`."""
    weight = torch.ones_like(q)

    def run() -> None:
        torch.autograd.grad(attention(q, k, v), (q, k, v, *others), weight)

    return run


def formula(q: Tensor, k: Tensor, v: Tensor, dim: int) -> Tensor:
    """softmax(q k^T / sqrt(K)) v along dim 1 or 2 of [B, H, W, N, K], with all logits at once."""
    # [B, lines, N, L, K], copied: products of bf16 in other orders are many times slower on a CPU.
    lines = (x.movedim(dim, 3).contiguous() for x in (q, k, v))
    return formula_of_lines(*lines).movedim(3, dim)


def formula_of_lines(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v of [..., L, K], with all logits at once."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def tissue(height: int, width: int, share: float, *, device: torch.device, seed: int = 0) -> Tensor:
    """bool [1, H, W]: a few blobs that cover `share` of a slide."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 1, 7, 7, generator=generator)
    field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0]
    least = field.flatten().sort(descending=True).values[round(share * field.numel()) - 1]
    return (field >= least).to(device)
