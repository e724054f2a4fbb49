"""Attention along one axis of a grid of tokens (axial attention, arXiv 1912.12180)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dim: int,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T scale) v along one axis, each line of the other axis by itself.

    q, k, v: [B, H, W, N, K], last dim contiguous.
    dim: 2 attends along rows (a row is a line of length W), 1 along columns.
    key_mask: [B, H, W], True where a token is a key. A line without any key gives zeros.
    scale: K ** -0.5 where not given.
    Returns [B, H, W, N, K].
    """
    B, H, W, N, _K = q.shape  # noqa: N806 (the field's names)
    if dim not in (1, 2):
        raise ValueError(f"attend: dim={dim}: allowed are 1 (columns) and 2 (rows)")
    if q.numel() == 0:  # an empty part of the grid: no lines to attend along
        return q * k * v
    some = None
    if key_mask is not None:
        some = key_mask.any(dim, keepdim=True)
        # softmax over nothing is NaN: such a line attends to everything, and is zeroed below.
        key_mask = key_mask | ~some
    # No copies: columns fold W into the heads, not into the batch, so that both folds are views.
    if dim == 2:
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # [B H, N, W, K]
        mask = None if key_mask is None else key_mask.reshape(B * H, 1, 1, W)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out = out.transpose(1, 2).unflatten(0, (B, H))
    else:
        q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))  # [B, W N, H, K]
        mask = None
        if key_mask is not None:
            mask = key_mask.transpose(1, 2).repeat_interleave(N, dim=1).unsqueeze(2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out = out.transpose(1, 2).unflatten(2, (W, N))
    if some is not None:
        out = out.masked_fill(~some[..., None, None], 0.0)
    return out
