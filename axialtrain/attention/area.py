"""Attention over both axes: within windows, and over the whole image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from axialtrain.attention.axis import Prefix, nothing
from axialtrain.attention.biased import CHUNK, attend_biased
from axialtrain.attention.positions import relative_bias
from axialtrain.grid import Rect
from axialtrain.mesh.exchange import crop

Tables = tuple[Tensor, Tensor]  # relative, of vertical and of horizontal distances: [N, 2 S - 1]


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Rect,
    keys: Rect,
    size: int,
    *,
    key_mask: Tensor | None = None,
    bias: Tables | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """Each token attends to the window of size x size tokens that it lies in.

    q: [B, h, w, N, K], the tokens of `queries`; k, v: those of `keys`, whole windows that
        `queries` touches (`grid.windows_of`).
    key_mask: bool [B, h', w'] of k, False outside the image; None where all are keys. A window
        without keys gives zeros.
    bias: the bias of a pair is that of its vertical plus that of its horizontal distance.
    prefix: keys and values that join every window, without bias.
    Returns [B, h, w, N, K].
    """
    if q.numel() == 0:
        return nothing(q, k, v, *(bias or ()), *(prefix or ()))
    across = keys.width // size

    def cut(x: Tensor) -> Tensor:
        return rearrange(x, "B (i a) (j b) ... -> B (i j) (a b) ...", a=size, b=size)

    q, k, v = (cut(x) for x in (crop(q, queries, keys), k, v))
    mask = None if key_mask is None else cut(key_mask)
    side = (0, size)
    out = _attend(
        q,
        k,
        v,
        mask,
        prefix,
        None if bias is None else partial(_area_bias, bias, side, side, side, side),
    )
    out = rearrange(out, "B (i j) (a b) N K -> B (i a) (j b) N K", a=size, j=across)
    return crop(out, keys, queries)


def attend_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Rect,
    *,
    key_mask: Tensor | None = None,
    bias: Tables | None = None,
    prefix: Prefix | None = None,
) -> Tensor:
    """Each token attends to every token of the image, as in a standard ViT.

    q: [B, h, w, N, K], the tokens of `queries`; k, v: [B, H, W, N, K] of the whole grid.
    key_mask: bool [B, H, W]. An image without keys gives zeros.
    bias, prefix: as in `attend_windows`. With a bias, some rows of queries are taken at a time.
    Returns [B, h, w, N, K].
    """
    if q.numel() == 0:
        return nothing(q, k, v, *(bias or ()), *(prefix or ()))
    _, height, width = k.shape[:3]
    _, _, w, heads, _ = q.shape
    columns = (queries.left, queries.right)
    k, v = (x.flatten(1, 2).unsqueeze(1) for x in (k, v))  # one line of all tokens
    mask = None if key_mask is None else key_mask.flatten(1, 2).unsqueeze(1)
    if bias is None:
        out = _attend(q.flatten(1, 2).unsqueeze(1), k, v, mask, prefix, None)
        return out.squeeze(1).unflatten(1, q.shape[1:3])
    rows = max(1, CHUNK // (q.shape[0] * w * heads * height * width))
    parts, top = [], queries.top
    for part in q.split(rows, 1):
        some = (top, top + part.shape[1])
        top = some[1]
        out = _attend(
            part.flatten(1, 2).unsqueeze(1),
            k,
            v,
            mask,
            prefix,
            partial(_area_bias, bias, some, (0, height), columns, (0, width)),
            again=rows < q.shape[1],
        )
        parts.append(out.squeeze(1).unflatten(1, part.shape[1:3]))
    return torch.cat(parts, 1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    prefix: Prefix | None,
    bias: Callable[[], Tensor] | None,
    *,
    again: bool = False,
) -> Tensor:
    """q: [B, X, Lq, N, K]; k, v: [B, X, L, N, K]; mask: [B, X, L] -> [B, X, Lq, N, K]."""
    if prefix is not None:
        k, v = (
            torch.cat((y.unsqueeze(1).expand(-1, x.shape[1], -1, -1, -1), x), 2)
            for x, y in zip((k, v), prefix, strict=True)
        )
        if mask is not None:
            mask = F.pad(mask, (prefix[0].shape[1], 0), value=True)
    some = None
    if mask is not None:
        some = mask.any(2, keepdim=True)
        mask = mask | ~some  # softmax over nothing is NaN: zeroed below
    if bias is not None:
        out = attend_biased(q, k, v, mask, bias, again=again)
    else:
        lines, fold = q.shape[1], "B X L N K -> (B X) N L K"
        q, k, v = (rearrange(x, fold) for x in (q, k, v))
        keys = None if mask is None else rearrange(mask, "B X L -> (B X) 1 1 L")
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        out = rearrange(out, "(B X) N L K -> B X L N K", X=lines)
    if some is not None:
        out = out.masked_fill(~some[..., None, None], 0.0)
    return out


def _area_bias(
    tables: Tables,
    query_rows: tuple[int, int],
    key_rows: tuple[int, int],
    query_cols: tuple[int, int],
    key_cols: tuple[int, int],
) -> Tensor:
    """[N, queries, keys] of tokens taken row by row from two rectangles."""
    vertical = relative_bias(tables[0], query_rows, key_rows)[:, :, None, :, None]
    horizontal = relative_bias(tables[1], query_cols, key_cols)[:, None, :, None, :]
    return (vertical + horizontal).flatten(3, 4).flatten(1, 2)
