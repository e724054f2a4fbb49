"""Attention along one axis of a grid of tokens (axial attention, arXiv 1912.12180)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from axialtrain.attention.biased import attend_biased
from axialtrain.attention.positions import relative_bias

Prefix = tuple[Tensor, Tensor]  # keys and values [B, n, N, K] that belong to every line


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dim: int,
    *,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    offset: int = 0,
    prefix: Prefix | None = None,
) -> Tensor:
    """softmax(q k^T scale + bias) v along one axis, each line of the other axis by itself.

    q: [B, H, W, N, K]; k, v: the same, or longer along `dim`; last dim contiguous.
    dim: 2 attends along rows (a row is a line of length W), 1 along columns.
    key_mask: bool [B, H, W] of k, True where a token is a key. A line without any gives zeros.
    bias: a relative table [N, 2 S - 1], see `relative_bias`. With it, lines are attended to in
        chunks that are computed again in backward: nothing of size L^2 outlives a chunk.
    scale: K ** -0.5 where not given.
    offset: coordinate of the first query along `dim`, where that of the first key is 0.
    prefix: keys and values that join every line, without bias.
    Returns [B, H, W, N, K], of q's size.

    Tied row attention (MSA Transformer, section 3: one attention map for all rows) is this
    function with the rows folded into the head width: see docs/attention.md.
    """
    if dim not in (1, 2):
        raise ValueError(f"attend: dim={dim}: allowed are 1 (columns) and 2 (rows)")
    if q.numel() == 0 or k.numel() == 0:
        return nothing(q, k, v, bias, *(prefix or ()))
    length = k.shape[dim]
    if prefix is not None:
        k, v, key_mask = _joined(k, v, dim, prefix, key_mask)
    some = None
    if key_mask is not None:
        some = key_mask.any(dim, keepdim=True)
        # softmax over nothing is NaN: such a line attends to everything, and is zeroed below.
        key_mask = key_mask | ~some
    if bias is not None:
        out = _with_bias(q, k, v, dim, key_mask, bias, scale, (offset, length))
    else:
        out = _without_bias(q, k, v, dim, key_mask, scale)
    if some is not None:
        out = out.masked_fill(~some[..., None, None], 0.0)
    return out


def nothing(q: Tensor, *others: Tensor | None) -> Tensor:
    """What no query or no key gives: zeros of q's size, in the graph of all that are given.

    An empty part of the grid must take part in the collectives of backward all the same.
    """
    out = torch.zeros_like(q)
    for x in (q, *others):
        if x is not None:
            out = out + x[:0].sum()
    return out


def _without_bias(
    q: Tensor, k: Tensor, v: Tensor, dim: int, mask: Tensor | None, scale: float | None
) -> Tensor:
    B, H, W, N, _K = q.shape  # noqa: N806 (the field's names)
    # No copies: columns fold W into the heads, not into the batch, so that both folds are views.
    if dim == 2:
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # [B H, N, W, K]
        keys = None if mask is None else mask.reshape(B * H, 1, 1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale)
        return out.transpose(1, 2).unflatten(0, (B, H))
    q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))  # [B, W N, H, K]
    keys = None
    if mask is not None:
        keys = mask.transpose(1, 2).repeat_interleave(N, dim=1).unsqueeze(2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale)
    return out.transpose(1, 2).unflatten(2, (W, N))


def _with_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dim: int,
    mask: Tensor | None,
    table: Tensor,
    scale: float | None,
    coordinates: tuple[int, int],
) -> Tensor:
    offset, length = coordinates
    if dim == 1:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if mask is None else mask.transpose(1, 2)
    queries = (offset, offset + q.shape[2])
    out = attend_biased(
        q, k, v, mask, lambda: relative_bias(table, queries, (0, length)), scale=scale
    )
    return out.transpose(1, 2) if dim == 1 else out


def _joined(
    k: Tensor, v: Tensor, dim: int, prefix: Prefix, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of every line, the prefix's first."""
    lines = 3 - dim
    k, v = (
        torch.cat((y.unsqueeze(lines).expand(*_widened(x, y, dim)), x), dim)
        for x, y in zip((k, v), prefix, strict=True)
    )
    if mask is not None:
        shape = list(mask.shape)
        shape[dim] = prefix[0].shape[1]
        mask = torch.cat((mask.new_ones(shape), mask), dim)
    return k, v, mask


def _widened(x: Tensor, prefix: Tensor, dim: int) -> list[int]:
    shape = list(x.shape)
    shape[dim] = prefix.shape[1]
    return shape
