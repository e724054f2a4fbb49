"""Queries that stand nowhere in the image and see all of it: prefix tokens, attention pooling."""

from __future__ import annotations

import torch
from torch import Tensor

from axialtrain.attention.lines import Prefix
from axialtrain.mesh.exchange import Exchange
from axialtrain.mesh.projection import no_autocast


def attend_everywhere(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exchange: Exchange,
    *,
    key_mask: Tensor | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """softmax(q k^T K^-0.5) v over all tokens of the image, merged over the ranks that hold them.

    q: [B, n, N, K], the same on every rank of the image; k, v: [B, h, w, N, K] of this rank's
        tokens, of which there may be none. Linear cost.
    key_mask: bool [B, h, w]. An image without keys gives zeros.
    prefix: keys and values [B, m, N, K] that every rank has, and that count once.
    Returns [B, n, N, K], the same on every rank.

    The merge (arXiv 1805.02867): the maximum of the logits over the ranks, without gradient, then
    the sums of weights and of weighted values. One all-reduce of each. All of it in fp32 at least,
    under autocast too: weights are at most 1 each, and their sum over an image leaves fp16.
    """
    with no_autocast(q):
        return _merged(q, k, v, exchange, key_mask, prefix)


def _merged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exchange: Exchange,
    key_mask: Tensor | None,
    prefix: Prefix | None,
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.to(wide) * q.shape[-1] ** -0.5
    k, v = k.flatten(1, 2), v.flatten(1, 2)
    logits = torch.einsum("b i n c, b t n c -> b n i t", q, k.to(wide))
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask.flatten(1)[:, None, None], -torch.inf)
    own = None
    if prefix is not None:
        own = torch.einsum("b i n c, b t n c -> b n i t", q, prefix[0].to(wide))

    # A part without keys has the maximum -inf and two sums of 0.
    none = logits.new_full((*logits.shape[:3], 1), -torch.inf)
    top = exchange.max(torch.cat((logits, none), -1).amax(-1, keepdim=True))
    if own is not None:
        top = torch.maximum(top, own.detach().amax(-1, keepdim=True))
    top = torch.where(top.isfinite(), top, 0.0)

    total = exchange.sum(_sums((logits - top).exp(), v))
    if own is not None and prefix is not None:
        total = total + _sums((own - top).exp(), prefix[1])
    weighted, weights = total[..., :-1], total[..., -1:]
    out = weighted / torch.where(weights > 0, weights, 1.0)
    return out.transpose(1, 2).to(v.dtype)


def _sums(weights: Tensor, v: Tensor) -> Tensor:
    """[B, N, n, K + 1]: sum of weighted values, and of the weights."""
    weighted = torch.einsum("b n i t, b t n c -> b n i c", weights, v.to(weights.dtype))
    return torch.cat((weighted, weights.sum(-1, keepdim=True)), -1)
