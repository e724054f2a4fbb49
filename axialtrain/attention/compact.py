"""Attention where many tokens are masked: lines without their gaps, those of like length together.

A softmax does not know in which order its keys come, and positions have been turned into queries
and keys before. So each line is compacted to its own tokens, lines are sorted into buckets by how
many they have, and a bucket is padded to its longest. A masked token is neither read nor attended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BUCKETS = 16  # of different lengths, at most: a line is padded by a 16th of its length, at most
WORTH = 0.7  # share of the pairs of tokens up to which compacting costs less than it saves

# q, k, v: [1, X, L, N, K], mask: bool [1, X, L] or None -> [1, X, Lq, N, K]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Side:
    """Where the tokens of one side, queries or keys, are in the buckets.

    widths: slots of a line in each bucket. tokens, empty: of each slot, its token (in memory's
    order), and which slots have none. slots, unused: of each token, its slot, and which have none.
    """

    widths: list[int]
    tokens: Tensor
    empty: Tensor
    slots: Tensor
    unused: Tensor


@dataclass(frozen=True)
class Plan:
    """lines: of each bucket, the numbers of its lines, counted through the images."""

    lines: list[Tensor]
    queries: Side
    keys: Side
    counts: Tensor  # keys of each line


def plan(key_mask: Tensor, query_mask: Tensor, *, across: bool, alone: bool) -> Plan | None:
    """How to compact; None where it would not be worth it.

    key_mask, query_mask: bool [B, X, L] and [B, X, Lq]. across: whether [B, L, X] is the order in
    memory. alone: whether a line has no other keys than these, so that without any it is left out.
    """
    counts, asked = key_mask.sum(2).flatten(), query_mask.sum(2).flatten()
    pairs = counts.numel() * key_mask.shape[2] * query_mask.shape[2]
    if int((counts * asked).sum()) > WORTH * pairs:
        return None
    used = asked > 0
    if alone:
        used &= counts > 0
    step = -(-key_mask.shape[2] // BUCKETS)
    bucket = torch.where(used, (counts + step - 1) // step, -1)
    lines = [(bucket == one).nonzero()[:, 0] for one in sorted(set(bucket.tolist()) - {-1})]
    sides = (
        _side(mask.flatten(0, 1) & used[:, None], number, lines, mask.shape, across)
        for mask, number in ((query_mask, asked), (key_mask, counts))
    )
    return Plan(lines, *sides, counts)


def _side(
    mask: Tensor, counts: Tensor, lines: list[Tensor], shape: torch.Size, across: bool
) -> Side:
    images, number, length = shape
    device, total = mask.device, mask.numel()
    tokens = torch.arange(total, device=device)
    if across:
        tokens = tokens.view(images, length, number).transpose(1, 2)
    tokens = tokens.reshape(images * number, length)
    widths = [int(counts[some].max()) for some in lines]
    first = torch.zeros(len(mask), dtype=torch.long, device=device)  # slot of each line
    start = 0
    for some, width in zip(lines, widths, strict=True):
        first[some] = start + width * torch.arange(len(some), device=device)
        start += width * len(some)
    own_tokens = tokens[mask]
    own_slots = (first[:, None] + mask.cumsum(1) - 1)[mask]
    of_slot = torch.full((start,), -1, device=device)
    of_slot[own_slots] = own_tokens
    of_token = torch.full((total,), -1, device=device)
    of_token[own_tokens] = own_slots
    return Side(widths, *_or_zeros(of_slot), *_or_zeros(of_token))


def _or_zeros(index: Tensor) -> tuple[Tensor, Tensor]:
    return index.clamp_min(0), (index < 0).nonzero()[:, 0]


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
    number = [len(some) for some in plan.lines]
    buckets = []
    for x, side in ((q, plan.queries), (k, plan.keys), (v, plan.keys)):
        flat = (x.transpose(1, 2) if across else x).flatten(0, 2)
        packed = _Pick.apply(flat, side.tokens, side.empty, side.slots, side.unused)
        sizes = [n * width for n, width in zip(number, side.widths, strict=True)]
        # split, not slices: their gradients are joined once, not added up at full size.
        parts = packed.split(sizes)
        buckets.append(
            [
                part.unflatten(0, (n, width))
                for part, n, width in zip(parts, number, side.widths, strict=True)
            ]
        )
    out = []
    for some, width, q1, k1, v1 in zip(plan.lines, plan.keys.widths, *buckets, strict=True):
        counts = plan.counts[some]
        mask = None
        if int(counts.min()) < width:
            mask = torch.arange(width, device=counts.device) < counts[:, None]
        if prefix is not None:
            image = some // q.shape[1]
            k1, v1 = (
                torch.cat((own[image], x), 1) for own, x in zip(prefix, (k1, v1), strict=True)
            )
            if mask is not None:
                mask = F.pad(mask, (prefix[0].shape[1], 0), value=True)
        one = attention(q1[None], k1[None], v1[None], None if mask is None else mask[None])
        out.append(one[0].flatten(0, 1))
    side = plan.queries
    flat = _Pick.apply(torch.cat(out), side.slots, side.unused, side.tokens, side.empty)
    images, lines, length = q.shape[:3]
    if across:
        return flat.unflatten(0, (images, length, lines)).transpose(1, 2)
    return flat.unflatten(0, (images, lines, length))


class _Pick(torch.autograd.Function):
    """x[index], zeros at `holes`. As no entry is picked twice, the adjoint picks back likewise."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, holes: Tensor, back: Tensor, back_holes: Tensor
    ) -> Tensor:
        ctx.save_for_backward(back, back_holes)
        return x.index_select(0, index).index_fill_(0, holes, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        back, holes = ctx.saved_tensors
        return grad.index_select(0, back).index_fill_(0, holes, 0.0), None, None, None, None
