"""Softmax attention within lines of tokens: what every pass comes down to.

A line is any set of tokens that attend to each other: a row, a column, a window, an image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from axialtrain.attention.bias import Bias
from axialtrain.attention.chunked import CPU_CHUNK, attend_in_chunks
from axialtrain.attention.compact import attend_compacted
from axialtrain.attention.flex import attend_flex
from axialtrain.attention.kernels import kernel_for, lines_at_a_time
from axialtrain.attention.masks import LineMasks

CHUNK = 2**22  # logits that exist at a time in chunks, at most: 16 MB in fp32

Fused = Callable[..., Tensor]  # of q, k, v and mask
Prefix = tuple[Tensor, Tensor]  # keys and values [B, n, N, K] that belong to every line


def attend_lines(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    masks: LineMasks | None = None,
    bias: Bias | None = None,
    prefix: Prefix | None = None,
    scale: float | None = None,
    across: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """softmax(q k^T scale + bias) v, each of X lines by itself.

    q: [B, X, Lq, N, K]; k, v: [B, X, L, N, K].
    masks: which tokens are keys, and which ask; all where not given. Given again, nothing is found
        out a second time.
    bias: the same for all lines. With one, logits exist in chunks, which are computed again in
        backward, or within FlexAttention's kernel: torch's fused attention takes no learned bias
        (flash), or keeps its gradient at the size of all logits (memory-efficient).
    prefix: keys and values that join every line, without bias.
    scale: K ** -0.5 where not given.
    across: whether lines lie across memory, so that [B, L, X, N, K] is what is contiguous.
    kernel: see `kernels.kernel_for`.
    Returns [B, X, Lq, N, K]. Nothing may be empty: see `nothing`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kernel = kernel_for(q, k, kernel, biased=bias is not None)
    mask, query_mask = (None, None) if masks is None else (masks.keys, masks.queries)
    if masks is not None and bias is None and not torch.compiler.is_compiling():
        compact = masks.plan(q.shape[2], across=across, alone=prefix is None)
        if compact is not None:
            if not compact.images:
                return nothing(q, k, v, *(prefix or ()))
            attention = partial(_attend, scale=scale, across=False, kernel=kernel)
            return attend_compacted(q, k, v, compact, attention, prefix=prefix, across=across)
    if prefix is not None:
        k, v, mask = _joined(k, v, mask, prefix, across)
    some = None
    if mask is not None:
        some = mask.any(2, keepdim=True)
        # softmax over nothing is NaN: such a line attends to everything, and is zeroed below.
        mask = mask | ~some
        if query_mask is not None:
            some = some & query_mask
    elif query_mask is not None:
        some = query_mask
    out = _attend(q, k, v, mask, bias, scale=scale, across=across, kernel=kernel)
    return out if some is None else out.masked_fill(~some[..., None, None], 0.0)


def nothing(q: Tensor, *others: Tensor | None) -> Tensor:
    """What no query or no key gives: zeros of q's size, in the graph of all that are given.

    An empty part of the grid must take part in the collectives of backward all the same.
    """
    out = torch.zeros_like(q)
    for x in (q, *others):
        if x is not None:
            out = out + x[:0].sum()
    return out


def _joined(
    k: Tensor, v: Tensor, mask: Tensor | None, prefix: Prefix, across: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of every line, the prefix's first; in the memory order that they had."""
    lines = k.shape[1]
    if across:
        k, v = (
            torch.cat((y[:, :, None].expand(-1, -1, lines, -1, -1), x.transpose(1, 2)), 1)
            for x, y in zip((k, v), prefix, strict=True)
        )
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    else:
        k, v = (
            torch.cat((y[:, None].expand(-1, lines, -1, -1, -1), x), 2)
            for x, y in zip((k, v), prefix, strict=True)
        )
    if mask is not None:
        mask = F.pad(mask, (prefix[0].shape[1], 0), value=True)
    return k, v, mask


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Bias | None = None,
    *,
    scale: float,
    across: bool,
    kernel: str,
) -> Tensor:
    """Lines that have a key each: in chunks, or fused."""
    if kernel == "chunks":
        chunk = min(CHUNK, CPU_CHUNK) if q.device.type == "cpu" else CHUNK
        return attend_in_chunks(q, k, v, mask=mask, bias=bias, scale=scale, chunk=chunk)
    if bias is not None:
        shares = bias.shares(bias.tables)
        one: Fused = partial(attend_flex, shares=shares, scale=scale, across=across)
    else:
        one = partial(_fused, scale=scale, across=across)
    images, lines = lines_at_a_time(q, k, across, kernel)
    # split, not slices: their gradients are joined once, not added up at full size.
    by_image = []
    for q1, k1, v1, mask1 in _split(images, 0, q, k, v, mask):
        by_line = [
            one(q2, k2, v2, mask=mask2) for q2, k2, v2, mask2 in _split(lines, 1, q1, k1, v1, mask1)
        ]
        by_image.append(_cat(by_line, 1, across))
    return _cat(by_image, 0, across)


def _split(
    size: int, dim: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    if size >= q.shape[dim]:
        return [(q, k, v, mask)]
    parts = q.split(size, dim)
    masks = [None] * len(parts) if mask is None else mask.split(size, dim)
    return list(zip(parts, k.split(size, dim), v.split(size, dim), masks, strict=True))


def _cat(parts: list[Tensor], dim: int, across: bool) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if across:  # joined in memory's order
        return torch.cat([part.transpose(1, 2) for part in parts], 2 * dim).transpose(1, 2)
    return torch.cat(parts, dim)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, scale: float, across: bool
) -> Tensor:
    images, lines, _, heads, _ = q.shape
    # No copies: lines along memory fold into the batch, lines across it into the heads.
    if across:
        q, k, v = (x.transpose(1, 2).flatten(2, 3).transpose(1, 2) for x in (q, k, v))
        keys = None if mask is None else mask.repeat_interleave(heads, 1)[:, :, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale)
        return out.transpose(1, 2).unflatten(2, (lines, heads)).transpose(1, 2)
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    keys = None if mask is None else mask.flatten(0, 1)[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale)
    return out.transpose(1, 2).unflatten(0, (images, lines))
