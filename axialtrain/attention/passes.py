"""Multi-head attention whose projections serve any pass of a layer."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from axialtrain.attention.axis import attend
from axialtrain.attention.config import Pass
from axialtrain.attention.positions import rotary_angles, rotate


class AxialAttention(nn.Module):
    """Row or column attention with timm's parameter names (`qkv`, `proj`).

    The fused QKV weight is packed head by head, [N][q, k, v][K]: a contiguous slice of it is a set
    of whole heads. N is read off the width of the projection, so that a module that holds a slice
    of the heads computes just those.

    Raises ValueError where `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int, *, positions: str = "rope") -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"model.heads={heads} does not divide model.dim={dim}")
        self.head_dim = dim // heads
        if positions == "rope" and self.head_dim % 2:
            raise ValueError(
                f"positions 'rope' needs an even head width, got {self.head_dim} "
                f"(model.dim={dim} / model.heads={heads})"
            )
        self.positions = positions
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, which: Pass, valid: Tensor) -> Tensor:
        """x: [B, h, w, D] under which.layout, valid: [B, h, w] -> [B, h, w, D]."""
        qkv = rearrange(
            self.qkv(x), "B h w (N three K) -> three B h w N K", three=3, K=self.head_dim
        )
        q, k, v = qkv.unbind(0)
        if self.positions == "rope":
            # The active axis is whole here, so its coordinates start at 0 on every rank.
            angles = rotary_angles(0, x.shape[which.dim], self.head_dim, device=x.device)
            q, k = rotate(q, angles, which.dim), rotate(k, angles, which.dim)
        out = attend(q, k, v, which.dim, key_mask=valid)
        return self.proj(rearrange(out, "B h w N K -> B h w (N K)"))
