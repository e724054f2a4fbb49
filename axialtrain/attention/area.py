"""Attention over both axes: within windows, and over the whole image."""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from axialtrain.attention.bias import area_bias
from axialtrain.attention.lines import Prefix, attend_lines, nothing
from axialtrain.attention.masks import LineMasks
from axialtrain.grid import Rect, window_bands

Tables = tuple[Tensor, Tensor]  # relative, of vertical and of horizontal distances: [N, 2 S - 1]


def attend_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Rect,
    keys: Rect,
    size: int,
    shift: int,
    *,
    key_mask: Tensor | None = None,
    bias: Tables | None = None,
    prefix: Prefix | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Each token attends to the window of size x size tokens that it lies in.

    Windows are cut at the coordinates k * size - shift of the grid.
    q: [B, h, w, N, K], the tokens of `queries`; k, v: those of `keys`, all tokens of the image in
        windows that `queries` touches.
    key_mask: bool [B, h', w'] of k; None where all are keys. A window without keys gives zeros.
    bias: the bias of a pair is that of its vertical plus that of its horizontal distance.
    prefix: keys and values [B, n, N, K] that join every window, without bias.
    kernel: "auto", or one of `config.KERNELS`, with a bias of `config.BIASED_KERNELS`.
    Returns [B, h, w, N, K].
    """
    if q.numel() == 0:
        return nothing(q, k, v, *(bias or ()), *(prefix or ()))
    # Whole windows, and those that the tile or the image cuts, apart: nothing is padded.
    rows = window_bands((queries.top, queries.bottom), (keys.top, keys.bottom), size, shift)
    cols = window_bands((queries.left, queries.right), (keys.left, keys.right), size, shift)
    lines = []
    q_rows = q.split([band.queries for band in rows], 1)
    kv_rows = [x.split([band.keys for band in rows], 1) for x in (k, v)]
    mask_rows = _split(key_mask, [band.keys for band in rows], 1)
    for number, row in enumerate(rows):
        pieces = []
        q_cols = q_rows[number].split([band.queries for band in cols], 2)
        k_cols, v_cols = (x[number].split([band.keys for band in cols], 2) for x in kv_rows)
        mask_cols = _split(mask_rows[number], [band.keys for band in cols], 2)
        for one_q, one_k, one_v, mask, col in zip(
            q_cols, k_cols, v_cols, mask_cols, cols, strict=True
        ):
            i, j = row.windows, col.windows
            a, b = row.queries // i, col.queries // j
            first = (
                Rect(row.start, row.start + a, col.start, col.start + b),
                Rect(row.first, row.first + row.keys // i, col.first, col.first + col.keys // j),
            )  # queries and keys of the first window; in the others they lie alike
            cut = partial(rearrange, pattern="B (i a) (j b) ... -> B (i j) (a b) ...", i=i, j=j)
            out = attend_lines(
                cut(one_q),
                cut(one_k),
                cut(one_v),
                masks=None if mask is None else LineMasks(cut(mask)),
                prefix=prefix,
                kernel=kernel,
                bias=None if bias is None else area_bias(bias, *first),
            )
            pieces.append(
                rearrange(out, "B (i j) (a b) N K -> B (i a) (j b) N K", i=i, j=j, a=a, b=b)
            )
        lines.append(torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0])
    return torch.cat(lines, 1) if len(lines) > 1 else lines[0]


def attend_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Rect,
    *,
    masks: LineMasks | None = None,
    bias: Tables | None = None,
    prefix: Prefix | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Each token attends to every token of the image, as in a standard ViT.

    q: [B, h, w, N, K], the tokens of `queries`; k, v: [B, H, W, N, K] of the whole grid.
    masks: of each image as one line of its tokens. An image without keys gives zeros.
    bias, prefix, kernel: as in `attend_windows`.
    Returns [B, h, w, N, K].
    """
    if q.numel() == 0:
        return nothing(q, k, v, *(bias or ()), *(prefix or ()))
    grid = Rect(0, k.shape[1], 0, k.shape[2])
    out = attend_lines(
        q.flatten(1, 2)[:, None],  # one line of all tokens
        k.flatten(1, 2)[:, None],
        v.flatten(1, 2)[:, None],
        masks=masks,
        prefix=prefix,
        kernel=kernel,
        bias=None if bias is None else area_bias(bias, queries, grid),
    )
    return out[:, 0].unflatten(1, q.shape[1:3])


def _split(mask: Tensor | None, sizes: list[int], dim: int) -> list[Tensor | None]:
    return [None] * len(sizes) if mask is None else list(mask.split(sizes, dim))
