"""Position-sensitive attention within lines (Axial-DeepLab, arXiv 2003.07853, eq. 4).

    y_o = sum_p softmax_p(q_o k_p + q_o r^q_{p-o} + k_p r^k_{p-o}) (v_p + r^v_{p-o})

with a factor for each head and each of the three logits, which stands for the batch norm between
them and their sum, and with what content and positions give kept apart, for the batch norm behind.
The batch norm needs the moments of all logits before any factor is known. Of whole lines they
follow from sums over tokens, without a logit (`_moments_of_all`); with a mask there are two walks
over the logits. Walks go in chunks over lines and queries, and compute a chunk again in backward:
no more logits than a chunk's exist at a time.

Tables hold r for queries, keys and values, K + K + V channels, shared by the heads. Of the distance
d = (coordinate of the key) - (coordinate of the query), r^q and r^v stand at S - 1 - d, r^k at
S - 1 + d, as in the first public code; farther distances than S - 1 take the outermost entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from axialtrain.attention.positions import relative_bias, widened
from axialtrain.mesh.projection import no_autocast

# Logits of a kind that exist at a time: on a CPU what its caches hold, elsewhere 256 MB, so that
# there are few kernels.
CPU_CHUNK, CHUNK = 2**20, 2**26

KINDS = 3  # q k, q r, k r
Stats = tuple[Tensor, Tensor, Tensor]  # counts, means, sums of centred squares


def chunk_on(device: torch.device) -> int:
    """Logits of a kind that exist at a time."""
    return CPU_CHUNK if device.type == "cpu" else CHUNK


def logit_moments(
    q: Tensor, k: Tensor, table: Tensor, mask: Tensor | None = None, *, chunk: int
) -> Stats:
    """The moments of the three kinds of logits, in P parts: some lines and queries at a time.

    Returns how many there are [P], their means [P, 3 N] and the sums of the squares of what they
    are above them [P, 3 N], channels ordered by kind, then head; in fp32 at least.

    q, k: [B, X, L, N, K], X lines of L tokens. table: [2 K + V, 2 S - 1]. mask: bool [B, X, L];
    a logit counts where its query and its key are valid.
    """
    if q.numel() == 0:
        none = (widened(q).sum() + widened(k).sum() + widened(table)[:, :0].sum()).expand(
            KINDS * q.shape[3]
        )
        return none.new_zeros(1), none[None], none[None]
    if mask is None:
        return _again(_moments_of_all, q.flatten(0, 1), k.flatten(0, 1), table)
    table = widened(table)  # its gradient comes from many chunks
    parts: list[Stats] = [
        _again(_moments, q1, k1, table, mask1, start)
        for q1, k1, _, mask1, start in _chunks(q, k, k, mask, table, chunk)
    ]
    count, mean, squares = (torch.stack(one) for one in zip(*parts, strict=True))
    return count, mean, squares


def attend_with_positions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    factors: Tensor,
    mask: Tensor | None = None,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """(what contents give, what positions give), [B, X, L, N, V] each; their sum is eq. 4.

    factors: [3 N] of the logits, by kind, then head. v: [B, X, L, N, V]; the others as in
    `logit_moments`. Masked keys are left out, a line without any gives zeros.
    """
    if q.numel() == 0:
        zero = q.sum() + k.sum() + table[:, :0].sum() + factors[:0].sum()
        return v + zero, v + zero
    table = widened(table)  # its gradient comes from many chunks
    parts: list[tuple[Tensor, Tensor]] = [
        _again(_attend, q1, k1, v1, table, factors, mask1, start)
        for q1, k1, v1, mask1, start in _chunks(q, k, v, mask, table, chunk)
    ]
    lines, queries = _sizes(q, table, chunk)
    across = -(-q.shape[2] // queries)  # chunks of a group of lines
    contents, positions = (
        torch.cat(
            [torch.cat(kind[first : first + across], 1) for first in range(0, len(kind), across)]
        )
        for kind in zip(*parts, strict=True)
    )
    assert contents.shape[0] == q.shape[0] * q.shape[1], lines
    return contents.unflatten(0, q.shape[:2]), positions.unflatten(0, q.shape[:2])


def _again(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns; all that it makes on the way is made again in backward.

    In fp32 at least, under autocast too: of products in fp16 the moments are not finite.
    """
    with no_autocast(arguments[0]):
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _sizes(q: Tensor, table: Tensor, chunk: int) -> tuple[int, int]:
    """(lines, queries) of a chunk: half of it are logits, half the table, spread over queries and
    keys once for all lines."""
    images, lines, length, heads, _ = q.shape
    queries = max(1, min(length, chunk // (2 * len(table) * length)))
    return max(1, min(images * lines, chunk // (2 * heads * queries * length))), queries


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, table: Tensor, chunk: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, int]]:
    """Lines and queries of each chunk, images and lines folded; `start` is its first query."""
    lines, queries = _sizes(q, table, chunk)
    if queries < q.shape[2]:  # gradients from many chunks: added up in fp32 at least
        k, v = widened(k), widened(v)
    # split, not slices: their gradients are joined once, not added up at full size.
    q, k, v = (x.flatten(0, 1).split(lines) for x in (q, k, v))
    masks = [None] * len(q) if mask is None else mask.flatten(0, 1).split(lines)
    for q1, k1, v1, mask1 in zip(q, k, v, masks, strict=True):
        start = 0
        for part in q1.split(queries, 1):
            yield part, k1, v1, mask1, start
            start += part.shape[1]


def _logits(q: Tensor, k: Tensor, table: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """[x, N, q, s] of each kind: q k, q r, k r."""
    width, length = q.shape[-1], k.shape[1]
    here, keys = (start, start + q.shape[1]), (0, length)
    of_query = relative_bias(table[:width].flip(1), here, keys)
    of_key = relative_bias(table[width : 2 * width], here, keys)
    return (
        torch.einsum("x q n k, x s n k -> x n q s", q, k),
        torch.einsum("x q n k, k q s -> x n q s", q, of_query),
        _of_keys(k, of_key),
    )


def _of_keys(k: Tensor, of_key: Tensor) -> Tensor:
    """[x, N, q, s] of keys [x, s, N, K] and their positions [K, q, s]."""
    of_key = of_key.transpose(1, 2).contiguous()  # in this order, see `_backward_laid_out`
    logits = _backward_laid_out(torch.einsum("x s n k, k s q -> s x n q", k, of_key))
    return rearrange(logits, "s x n q -> x n q s")


def _backward_laid_out(x: Tensor) -> Tensor:
    """x, contiguous, whose gradient will be.

    On a CPU torch takes batched products one by one, and copies each matrix, where neither its rows
    nor its columns lie together.
    """
    if x.requires_grad:
        x.register_hook(Tensor.contiguous)
    return x


def _moments_of_all(q: Tensor, k: Tensor, table: Tensor) -> Stats:
    """The moments of all logits of the lines q, k: [x, L, N, K], as one part.

    A sum of squares of products is one of products of sums: sum_ij (q_i k_j)^2 is the sum of the
    entries of (sum_i q_i q_i^T) * (sum_j k_j k_j^T), and so on. It costs about K / L of what the
    logits do. In fp64, in which the mean's square can be taken off the mean square.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, table = q.double(), k.double(), table.double()
    lines, length, _, width = q.shape
    count = q.new_full((), lines * length**2)
    sums = [(q.sum(1) * k.sum(1)).sum((0, 2))]
    squares = [(_gram(q, "x n") * _gram(k, "x n")).sum((0, 2, 3))]
    # The distance of own - other coordinate, 1 - L to L - 1: each token has a window of L of them.
    span = (table.shape[1] + 1) // 2
    steps = torch.arange(1 - length, length, device=q.device).clamp(1 - span, span - 1)
    for x, of_x in ((q, table[:width]), (k, table[width : 2 * width])):
        line = of_x[:, steps + span - 1]
        sums.append(torch.einsum("x l n k, k l -> n", x, _windows(line, length)))
        outer = _windows(line[:, None] * line, length)
        squares.append(torch.einsum("l n k j, k j l -> n", _gram(x, "l n"), outer))
    means = torch.cat(sums) / count
    above = (torch.cat(squares) - count * means.square()).clamp_min(0)
    return count.to(dtype)[None], means.to(dtype)[None], above.to(dtype)[None]


def _gram(x: Tensor, keep: str) -> Tensor:
    """x: [x, l, n, K] -> [keep, K, K], products of channels summed over the other dims."""
    return torch.einsum(f"x l n k, x l n j -> {keep} k j", x, x)


def _windows(line: Tensor, length: int) -> Tensor:
    """[..., 2 L - 1] -> [..., L], the sums of the windows of L entries."""
    sums = F.pad(line.cumsum(-1), (1, 0))
    return sums[..., length:] - sums[..., :-length]


def _moments(q: Tensor, k: Tensor, table: Tensor, mask: Tensor, start: int) -> Stats:
    kinds = _logits(widened(q), widened(k), widened(table), start)
    pairs = mask[:, None, start : start + q.shape[1], None] & mask[:, None, None]
    count = pairs.sum().to(kinds[0])
    means = [torch.where(pairs, kind, 0.0).sum((0, 2, 3)) / count.clamp_min(1) for kind in kinds]
    squares = [
        torch.where(pairs, kind - mean[:, None, None], 0.0).square().sum((0, 2, 3))
        for kind, mean in zip(kinds, means, strict=True)
    ]
    return count, torch.cat(means), torch.cat(squares)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    factors: Tensor,
    mask: Tensor | None,
    start: int,
) -> tuple[Tensor, Tensor]:
    """[x, q, N, V] of contents, and of positions."""
    dtype, width, length = q.dtype, q.shape[-1], k.shape[1]
    q, k, v, table = widened(q), widened(k), widened(v), widened(table)
    of_qk, of_qr, of_kr = (part[:, None] for part in factors.chunk(KINDS))
    here, keys = (start, start + q.shape[1]), (0, length)
    # The factors are applied to queries and keys, of which there are fewer than of logits.
    logits = torch.einsum("x q n k, x s n k -> x n q s", q * of_qk, k)
    of_query = relative_bias(table[:width].flip(1), here, keys)
    logits = logits + torch.einsum("x q n k, k q s -> x n q s", q * of_qr, of_query)
    of_key = relative_bias(table[width : 2 * width], here, keys)
    logits = logits + _of_keys(k * of_kr, of_key)
    if mask is not None:
        # softmax over nothing is NaN: such a line attends to everything, and is zeroed below.
        some = mask.any(1, keepdim=True)
        logits = logits.masked_fill(~(mask | ~some)[:, None, None], -torch.inf)
    weights = logits.softmax(-1)
    of_value = relative_bias(table[2 * width :].flip(1), here, keys)
    contents = _backward_laid_out(torch.einsum("x n q s, x s n v -> x n q v", weights, v))
    positions = _backward_laid_out(torch.einsum("x n q s, v q s -> q x n v", weights, of_value))
    contents = rearrange(contents, "x n q v -> x q n v")
    positions = rearrange(positions, "q x n v -> x q n v")
    if mask is not None:
        contents, positions = (
            out.masked_fill(~some[..., None, None], 0.0) for out in (contents, positions)
        )
    return contents.to(dtype), positions.to(dtype)
