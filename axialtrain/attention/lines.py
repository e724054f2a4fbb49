"""Softmax attention within lines of tokens: what every pass comes down to.

A line is any set of tokens that attend to each other: a row, a column, a window, an image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2**22  # logits that exist at a time where there is a bias: 16 MB in fp32

Prefix = tuple[Tensor, Tensor]  # keys and values [B, n, N, K] that belong to every line
Bias = Callable[[int, int], Tensor]  # [N, stop - start, L]: of queries start..stop of a line


def attend_lines(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Bias | None = None,
    prefix: Prefix | None = None,
    scale: float | None = None,
    across: bool = False,
) -> Tensor:
    """softmax(q k^T scale + bias) v, each of X lines by itself.

    q: [B, X, Lq, N, K]; k, v: [B, X, L, N, K].
    mask: bool [B, X, L], True where a token is a key. A line without any gives zeros.
    bias: the same for all lines. With one, logits exist in chunks, which are computed again in
        backward: fused kernels take no learned bias (flash), or keep its gradient at the size of
        all logits (memory-efficient).
    prefix: keys and values that join every line, without bias.
    scale: K ** -0.5 where not given.
    across: whether lines lie across memory, so that [B, L, X, N, K] is what is contiguous.
    Returns [B, X, Lq, N, K]. Nothing may be empty: see `nothing`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if prefix is not None:
        k, v, mask = _joined(k, v, mask, prefix, across)
    some = None
    if mask is not None:
        some = mask.any(2, keepdim=True)
        # softmax over nothing is NaN: such a line attends to everything, and is zeroed below.
        mask = mask | ~some
    if bias is not None:
        out = _in_chunks(q, k, v, mask, bias, scale)
    else:
        out = _fused(q, k, v, mask, scale, across)
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


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, across: bool
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


def _in_chunks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Bias, scale: float
) -> Tensor:
    images, lines, queries, heads, _ = q.shape
    whole = CHUNK // (queries * heads * k.shape[2])  # lines in a chunk; 0: not even one
    sizes = (
        max(1, min(whole // lines, images)),
        max(1, min(whole, lines)),
        queries if whole else max(1, CHUNK // (heads * k.shape[2])),
    )
    # split, not slices: their gradients are joined once, not added up at full size.
    by_image = []
    for q1, k1, v1, mask1 in _split(sizes[0], 0, q, k, v, mask):
        by_line = []
        for q2, k2, v2, mask2 in _split(sizes[1], 1, q1, k1, v1, mask1):
            parts, start = [], 0
            if sizes[2] < queries:  # gradients from many parts: added up in fp32 at least
                k2, v2 = _wide(k2), _wide(v2)
            for part in q2.split(sizes[2], 2):
                stop = start + part.shape[2]
                parts.append(
                    checkpoint(
                        _with_bias,
                        part,
                        k2,
                        v2,
                        mask2,
                        partial(bias, start, stop),
                        scale,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                )
                start = stop
            by_line.append(_cat(parts, 2))
        by_image.append(_cat(by_line, 1))
    return _cat(by_image, 0)


def _split(
    size: int, dim: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    parts = q.split(size, dim)
    masks = [None] * len(parts) if mask is None else mask.split(size, dim)
    return list(zip(parts, k.split(size, dim), v.split(size, dim), masks, strict=True))


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _with_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Callable[[], Tensor],
    scale: float,
) -> Tensor:
    # Logits in fp32 at least, as fused kernels keep theirs.
    logits = torch.einsum("b x q n k, b x s n k -> b x n q s", _wide(q) * scale, _wide(k))
    added = _wide(bias())
    if missing := logits.shape[-1] - added.shape[-1]:  # keys of the prefix have none
        added = F.pad(added, (missing, 0))
    logits = logits + added
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None, None], -torch.inf)
    out = torch.einsum("b x n q s, b x s n k -> b x q n k", logits.softmax(-1).to(v.dtype), v)
    return out.to(q.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
