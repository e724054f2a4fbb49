"""Attention along one axis of a grid of tokens (axial attention, arXiv 1912.12180)."""

from __future__ import annotations

from torch import Tensor

from axialtrain.attention.bias import line_bias
from axialtrain.attention.lines import Prefix, attend_lines, nothing
from axialtrain.attention.masks import LineMasks


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dim: int,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    masks: LineMasks | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    offset: int = 0,
    prefix: Prefix | None = None,
    kernel: str = "auto",
) -> Tensor:
    """softmax(q k^T scale + bias) v along one axis, each line of the other axis by itself.

    q: [B, H, W, N, K]; k, v: the same, or longer along `dim`; last dim contiguous.
    dim: 2 attends along rows (a row is a line of length W), 1 along columns.
    key_mask: bool [B, H, W] of k, True where a token is a key. A line without any gives zeros.
    query_mask: bool [B, H, W] of q, True where a token asks; the others get zeros. All ask where
        it is not given, those that are no keys too.
    masks: both of these, as `LineMasks.along(dim, key_mask, query_mask)`, where attention is called
        with them more than once: the layers of a model share it, so that lines are sorted once.
    bias: a relative table [N, 2 S - 1], see `positions.relative_bias`. With it, no buffer of all
        L^2 logits exists either: see `attend_lines`.
    scale: K ** -0.5 where not given.
    offset: coordinate of the first query along `dim`, where that of the first key is 0.
    prefix: keys and values [B, n, N, K] that join every line, without bias.
    kernel: "auto", or one of `config.KERNELS`, with a bias of `config.BIASED_KERNELS`.
    Returns [B, H, W, N, K], of q's size.

    Where many tokens are masked, on both sides, they cost nothing: see `compact`.

    Tied row attention (MSA Transformer: one attention map for all rows) is this function with the
    rows folded into the head width: see docs/attention.md.
    """
    if dim not in (1, 2):
        raise ValueError(f"attend: dim={dim}: allowed are 1 (columns) and 2 (rows)")
    if masks is None and not (key_mask is None and query_mask is None):
        masks = LineMasks.along(dim, key_mask, query_mask)
    elif masks is not None and not (key_mask is None and query_mask is None):
        raise ValueError("attend: masks= and key_mask= or query_mask=: allowed is one way only")
    if q.numel() == 0 or k.numel() == 0:
        return nothing(q, k, v, bias, *(prefix or ()))
    learned = None
    if bias is not None:
        learned = line_bias(bias, (offset, offset + q.shape[dim]), (0, k.shape[dim]))
    if dim == 1:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = attend_lines(
        q,
        k,
        v,
        masks=masks,
        bias=learned,
        prefix=prefix,
        scale=scale,
        across=dim == 1,
        kernel=kernel,
    )
    return out.transpose(1, 2) if dim == 1 else out
