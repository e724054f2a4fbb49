"""Attention where many tokens are masked: lines without their gaps, those of like length together.

A softmax does not know in which order its keys come, and positions have been turned into queries
and keys before. So each line is compacted to its own tokens, lines are sorted into buckets by how
many they have, and a bucket is padded to its longest. A masked token is neither read nor attended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BUCKETS = 16  # of different lengths, at most: a line is padded by a 16th of its length, at most,
STEP = 16  # or by so many tokens where that is more: short lines are cheaper than many calls
LEAST = 128  # tokens of lines of which all ask: of shorter ones, more time is lost than won
WORTH = 0.7  # share of the pairs of tokens up to which compacting costs less than it saves

Counts = npt.NDArray[np.int64]  # a number for each line, on the host

# q, k, v: [1, X, L, N, K], mask: bool [1, X, L] or None -> [1, X, Lq, N, K]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Side:
    """Where the tokens of one side, queries or keys, are in the buckets.

    widths, sizes: slots of a line in each bucket, and of all of its lines.
    tokens: of each slot, its token (in memory's order), or 0 where it is `empty`.
    slots: of each token, its slot; one past the last where it has none.
    """

    widths: list[int]
    sizes: list[int]
    tokens: Tensor
    empty: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Plan:
    """images: of each bucket, the image of each of its lines.

    masks: of each bucket, bool [lines, keys], True where a slot is a key; None where all are.
    """

    images: list[Tensor]
    masks: list[Tensor | None]
    queries: Side
    keys: Side


def plan(key_mask: Tensor, query_mask: Tensor, *, across: bool, alone: bool) -> Plan | None:
    """How to compact; None where it would not be worth it.

    key_mask, query_mask: bool [B, X, L] and [B, X, Lq]. across: whether [B, L, X] is the order in
    memory. alone: whether a line has no other keys than these, so that without any it is left out.

    The host waits for the device once, for how many tokens each line has: all sizes follow.
    """
    device, same = key_mask.device, query_mask is key_mask
    sums = [mask.sum(2).flatten() for mask in ((key_mask,) if same else (key_mask, query_mask))]
    read = torch.stack(sums).cpu().numpy()
    counts, asked = read[0], read[-1]
    pairs = counts.size * key_mask.shape[2] * query_mask.shape[2]
    if (counts * asked).sum() > WORTH * pairs:
        return None
    used = asked > 0
    if alone:
        used &= counts > 0
    step = max(STEP, -(-key_mask.shape[2] // BUCKETS))
    bucket = np.where(used, (counts + step - 1) // step, -1)
    lines = [np.flatnonzero(bucket == one) for one in np.unique(bucket[used])]
    keys = _side(key_mask, counts, lines, across)
    queries = keys if same else _side(query_mask, asked, lines, across)
    masks: list[Tensor | None] = []
    for some, width in zip(lines, keys.widths, strict=True):
        mask = None
        if counts[some].min() < width:
            own = _sent(counts[some], device)
            mask = torch.arange(width, device=device) < own[:, None]
        masks.append(mask)
    images = [_sent(some // key_mask.shape[1], device) for some in lines]
    return Plan(images, masks, queries, keys)


def _side(mask: Tensor, counts: Counts, lines: list[Counts], across: bool) -> Side:
    """counts: tokens of each line. lines: the numbers of those of each bucket."""
    images, number, length = mask.shape
    device, total = mask.device, mask.numel()
    widths = [int(counts[some].max()) for some in lines]
    sizes = [some.size * width for some, width in zip(lines, widths, strict=True)]
    size, filled = sum(sizes), sum(int(counts[some].sum()) for some in lines)
    starts = np.full_like(counts, -1)  # slot of the first token of each line that has one
    for some, width, end in zip(lines, widths, np.cumsum(sizes), strict=True):
        starts[some] = end + width * np.arange(-some.size, 0)
    first = _sent(starts, device)[:, None]
    mask = mask.flatten(0, 1)
    slots = torch.where(mask & (first >= 0), first + mask.cumsum(1) - 1, size)
    slots = slots.view(images, number, length)
    slots = (slots.transpose(1, 2) if across else slots).flatten()
    # Tokens without a slot share one more, which is cut off: no size depends on the device.
    tokens = torch.full((size + 1,), -1, device=device)
    tokens[slots] = torch.arange(total, device=device)
    tokens = tokens[:size]
    empty = (tokens < 0).nonzero_static(size=size - filled)[:, 0]
    return Side(widths, sizes, tokens.clamp_min(0), empty, slots)


def _sent(numbers: Counts, device: torch.device) -> Tensor:
    # Or the host would wait until the device has done all that it was given before.
    return torch.from_numpy(numbers).to(device, non_blocking=True)


def attend_compacted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    attention: Attention,
    *,
    prefix: tuple[Tensor, Tensor] | None,
    across: bool,
) -> Tensor:
    """What `attention` gives for lines without their masked tokens; zeros for masked queries.

    q: [B, X, Lq, N, K]; k, v: [B, X, L, N, K]; prefix: keys and values [B, n, N, K].
    Returns [B, X, Lq, N, K].
    """
    buckets = []
    for x, side in ((q, plan.queries), (k, plan.keys), (v, plan.keys)):
        packed = _Pack.apply((x.transpose(1, 2) if across else x).flatten(0, 2), side)
        shapes = [(len(some), width) for some, width in zip(plan.images, side.widths, strict=True)]
        buckets.append([x.unflatten(0, shape) for x, shape in zip(packed, shapes, strict=True)])
    out = []
    for image, mask, q1, k1, v1 in zip(plan.images, plan.masks, *buckets, strict=True):
        if prefix is not None:
            k1, v1 = (
                torch.cat((own[image], x), 1) for own, x in zip(prefix, (k1, v1), strict=True)
            )
            if mask is not None:
                mask = F.pad(mask, (prefix[0].shape[1], 0), value=True)
        one = attention(q1[None], k1[None], v1[None], None if mask is None else mask[None])
        out.append(one[0].flatten(0, 1))
    flat = _Unpack.apply(plan.queries, *out)
    images, lines, length = q.shape[:3]
    if across:
        return flat.unflatten(0, (images, length, lines)).transpose(1, 2)
    return flat.unflatten(0, (images, lines, length))


class _Pack(torch.autograd.Function):
    """Tokens [T, ...] to the slots of each bucket, zeros in those that are empty."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, side: Side) -> tuple[Tensor, ...]:
        ctx.side = side
        return _packed(tokens, side)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _unpacked(grads, ctx.side), None


class _Unpack(torch.autograd.Function):
    """The adjoint: what is in the slots of each bucket to tokens, zeros to those without one."""

    @staticmethod
    def forward(ctx: Any, side: Side, *slots: Tensor) -> Tensor:
        ctx.side = side
        return _unpacked(slots, side)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_packed(grad, ctx.side)


def _packed(tokens: Tensor, side: Side) -> tuple[Tensor, ...]:
    return tokens.index_select(0, side.tokens).index_fill_(0, side.empty, 0.0).split(side.sizes)


def _unpacked(slots: Sequence[Tensor], side: Side) -> Tensor:
    # A row of zeros for all tokens that have no slot: filling them in takes four times as long.
    zeros = slots[0].new_zeros(1, *slots[0].shape[1:])
    return torch.cat([*slots, zeros]).index_select(0, side.slots)
