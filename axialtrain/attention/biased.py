"""Softmax attention with a learned bias: in chunks that are computed again in backward.

Fused kernels take no learned bias (flash), or keep its gradient at the size of all logits
(memory-efficient: [lines, N, L, L]). Here the logits of one chunk of lines exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 2**24  # logits of a chunk: 64 MB in fp32, large enough to keep the matrix products busy


def attend_biased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Callable[[], Tensor],
    *,
    scale: float | None = None,
    again: bool = False,
) -> Tensor:
    """softmax(q k^T scale + bias) v for many lines that share a bias.

    q: [B, X, Lq, N, K] of X lines; k, v: [B, X, n + L, N, K]; mask: bool [B, X, n + L] or None,
    some key True in each line. bias: makes [N, Lq, L], that of the last L keys; it is called once a
    chunk, forward and backward, and may have learned tables inside.
    again: whether this is a chunk of something larger, to be computed again in backward.
    Returns [B, X, Lq, N, K].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lines = max(1, CHUNK // (q.shape[0] * q.shape[2] * q.shape[3] * k.shape[2]))
    if lines >= q.shape[1]:
        return (_again if again else _attend)(q, k, v, mask, bias, scale)
    # split, not slices: their gradients are joined once, not added up at full size.
    masks = [None] * -(-q.shape[1] // lines) if mask is None else mask.split(lines, 1)
    chunks = zip(q.split(lines, 1), k.split(lines, 1), v.split(lines, 1), masks, strict=True)
    return torch.cat([_again(*chunk, bias, scale) for chunk in chunks], 1)


def _again(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Callable[[], Tensor],
    scale: float,
) -> Tensor:
    """`_attend`, keeping nothing for backward but its arguments."""
    return checkpoint(
        _attend, q, k, v, mask, bias, scale, use_reentrant=False, preserve_rng_state=False
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Callable[[], Tensor],
    scale: float,
) -> Tensor:
    logits = torch.einsum("b x q n k, b x s n k -> b x n q s", q * scale, k)
    added = bias()
    logits = logits + F.pad(added, (logits.shape[-1] - added.shape[-1], 0)).to(logits.dtype)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None, None], -torch.inf)
    kept = torch.promote_types(logits.dtype, torch.float32)
    return torch.einsum(
        "b x n q s, b x s n k -> b x q n k", logits.softmax(-1, dtype=kept).to(v.dtype), v
    )
