"""Attention with a learned bias on a GPU, by torch's FlexAttention.

One fused kernel that asks for the bias of each pair of tokens: no buffer of all logits exists, in
forward or in backward. It adds up the gradient of the bias by atomics, in no fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from axialtrain.attention.bias import Share, bias_at

GRAPHS = 64  # kernels that torch may make of this
REACH = 2**31 - 1  # numbers from the first to the last of a line: its kernels count in 32 bits

# Of the forward kernel alone. Triton fetches biases ahead as it does keys and values, and each
# stage of that holds numbers for all pairs of a tile: with the three stages that torch takes up to
# 379 KB in 16 bits at 64 channels a head. A block of an H100 or H200 has 232: none would start.
OPTIONS: Any = {"fwd_num_stages": 2}  # torch's type of it knows no prefixes
SHORT = 128  # lines of fewer queries: torch takes another kernel, with one stage


def attend_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    shares: tuple[Share, ...],
    scale: float,
    across: bool,
) -> Tensor:
    """softmax(q k^T scale + bias) v, each line by itself; lines are folded into the batch.

    q: [B, X, Lq, N, K]; k, v: [B, X, L, N, K], in one image (B = 1) where lines lie across memory
    (`across`). mask: bool [B, X, L], with a key in every line. shares: of the last keys; those
    before (of a prefix) have no bias.
    Returns [B, X, Lq, N, K], in memory ordered as q. No copies, but of what 32 bits cannot count.
    """
    images, lines = q.shape[:2]
    q, k, v = (_folded(x, across) for x in (q, k, v))
    before = k.shape[2] - len(shares[0][2])
    if before:
        shares = tuple((x, at, F.pad(keys, (before, 0), value=-1)) for x, at, keys in shares)
    usual = q.shape[-1] ** -0.5
    if scale != usual:  # a number that varies is none that a kernel could be made for
        q = q * (scale / usual)
    some = None if mask is None else mask.flatten(0, 1)
    # A layer that is compiled takes it into its own graph.
    one = _compiled() if q.is_cuda and not torch.compiler.is_compiling() else _flex
    return one(q, k, v, shares, some).transpose(1, 2).unflatten(0, (images, lines))


def _folded(x: Tensor, across: bool) -> Tensor:
    """[B, X, L, N, K] -> [B X, N, L, K], a view."""
    if across:
        assert len(x) == 1, "lines across memory are folded image by image"
        if (x.shape[2] - 1) * x.stride(2) > REACH:
            x = x.contiguous()
    return x.flatten(0, 1).transpose(1, 2)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shares: tuple[Share, ...],
    mask: Tensor | None,
) -> Tensor:
    """q, k, v: [X, N, L, K]; mask: bool [X, L]. Their scale is K ** -0.5."""

    def score(logit: Tensor, line: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        logit = logit + bias_at(shares, head, query, key)
        # Here, and not in a block mask: that would be made anew, from all pairs, for each mask.
        return logit if mask is None else torch.where(mask[line, key], logit, -torch.inf)

    options = None if q.shape[-2] < SHORT else OPTIONS
    out: Tensor = flex_attention(q, k, v, score_mod=score, kernel_options=options)
    return out


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Made on first use. torch keeps a kernel for each dtype, head width and number of heads, of
    rows and columns, lines and areas, with and without mask and gradient; lengths become variables
    of it when they change.

    fullgraph: where there are more than GRAPHS torch says so, and does not go on without a kernel
    and with a buffer of all logits.
    """
    several = torch._dynamo.config.patch(recompile_limit=GRAPHS)
    made: Callable[..., Tensor] = several(torch.compile(_flex, fullgraph=True))
    return made
