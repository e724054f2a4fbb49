"""Rotary position embedding along one axis (RoFormer, arXiv 2104.09864, eq. 34)."""

from __future__ import annotations

import torch
from torch import Tensor

Device = torch.device | str | None


def rotary_angles(
    start: int, stop: int, head_dim: int, *, base: float = 10_000.0, device: Device = None
) -> Tensor:
    """Angles [stop - start, K / 2] of the tokens with global coordinates start..stop.

    Channel pair i turns by coordinate * base^(-2 i / K). In fp64, so that far coordinates of a
    gigapixel image keep their phase.
    """
    if head_dim % 2:
        raise ValueError(f"rope needs an even head width, got K={head_dim}")
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    coordinates = torch.arange(start, stop, dtype=torch.float64, device=device)
    return coordinates[:, None] * base ** (-pairs / head_dim)


def rotate(x: Tensor, angles: Tensor, dim: int) -> Tensor:
    """Turn the channel pairs (2 i, 2 i + 1) of x by the angles of the tokens along `dim`.

    x: [B, H, W, N, K]; angles: [L, K / 2] with L the size of `dim` (1 or 2). Computed in fp32 at
    least, and rounded to x's dtype once.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = [1] * x.ndim
    shape[dim], shape[-1] = angles.shape
    cos = angles.cos().to(x.device, dtype).view(shape)
    sin = angles.sin().to(x.device, dtype).view(shape)
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)
