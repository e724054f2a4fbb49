"""Position-sensitive attention against eq. 4 of its paper, written out one query at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from formulas import assert_agree, some, tokens
from peak import Peak
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from axialtrain.attention.position_sensitive import attend_with_positions, logit_moments

SHAPE = (2, 3, 5, 2)  # B, X, L, N
K = 3
V = 2 * K
HEADS = SHAPE[3]


def inputs(span: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, table, factors."""
    q, k = tokens(*SHAPE, K), tokens(*SHAPE, K, seed=1)
    factors = tokens(3 * HEADS, seed=4)
    return q, k, tokens(*SHAPE, V, seed=2), tokens(2 * K + V, 2 * span - 1, seed=3), factors


def entry(table: Tensor, distance: int) -> Tensor:
    """r at a distance, which stands S - 1 behind the first; farther ones take the outermost."""
    reach = table.shape[1] // 2
    return table[:, min(max(distance, -reach), reach) + reach]


def logits_of(
    q: Tensor, k: Tensor, table: Tensor, b: int, x: int, n: int, o: int, p: int
) -> Tensor:
    """The three logits of query o and key p: q k, q r^q, k r^k.

    r^q stands at (o - p), r^k at (p - o).
    """
    query, key = q[b, x, o, n], k[b, x, p, n]
    return torch.stack(
        (
            query @ key,
            query @ entry(table[:K], o - p),
            key @ entry(table[K : 2 * K], p - o),
        )
    )


def eq4(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, factors: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    contents, positions = torch.zeros_like(v), torch.zeros_like(v)
    images, lines, length, heads = SHAPE
    for b, x, o, n in itertools.product(*map(range, (images, lines, length, heads))):
        keys = [p for p in range(length) if mask is None or mask[b, x, p]]
        if not keys:
            continue
        scale = factors.view(3, heads)[:, n]
        logits = torch.stack([logits_of(q, k, table, b, x, n, o, p) @ scale for p in keys])
        weights = logits.exp() / logits.exp().sum()
        of_values = torch.stack([entry(table[2 * K :], o - p) for p in keys])
        contents[b, x, o, n] = weights @ torch.stack([v[b, x, p, n] for p in keys])
        positions[b, x, o, n] = weights @ of_values
    return contents, positions


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("span", [5, 8, 2], ids=["of the line", "longer", "clipped"])
@pytest.mark.parametrize("chunk", [2**22, 2 * 2 * 25 + 12 * 25, 60, 1])
def test_it_is_equation_4_in_chunks_of_lines_and_of_queries(chunk, span, masked):
    q, k, v, table, factors = inputs(span)
    mask = some(*SHAPE[:3]) if masked else None
    if mask is not None:
        mask[1, 2] = False  # a line without a key
    got = attend_with_positions(q, k, v, table, factors, mask, chunk=chunk)
    want = eq4(q, k, v, table, factors, mask)
    assert_agree(torch.stack(got), torch.stack(want), q, k, v, table, factors)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("chunk", [2**22, 2 * 2 * 25 + 12 * 25, 60, 1])
def test_moments_are_those_of_all_logits_of_valid_pairs(chunk, masked):
    q, k, _, table, _ = inputs(3)
    images, lines, length, heads = SHAPE
    mask = some(*SHAPE[:3]) if masked else None
    count, mean, squares = logit_moments(q, k, table, mask, chunk=chunk)
    all_mean = (count[:, None] * mean).sum(0) / count.sum()
    all_squares = (squares + count[:, None] * (mean - all_mean).square()).sum(0)
    found = []
    for n in range(heads):
        found.append(
            torch.stack(
                [
                    logits_of(q, k, table, b, x, n, o, p)
                    for b, x, o, p in itertools.product(
                        *map(range, (images, lines, length, length))
                    )
                    if mask is None or (mask[b, x, o] and mask[b, x, p])
                ]
            )
        )
    every = torch.stack(found, 1)  # [pairs, N, 3]
    torch.testing.assert_close(count.sum(), torch.tensor(len(every), dtype=torch.float64))
    want_mean = every.mean(0).T.flatten()
    want = (every.var(0, correction=0) * len(every)).T.flatten()
    assert_agree(torch.cat((all_mean, all_squares)), torch.cat((want_mean, want)), q, k, table)


@pytest.mark.slow
def test_in_bf16_the_gradient_of_a_table_is_added_up_in_fp32():
    """In many chunks as in one; and moments are in fp32 on ranks that have no line, too."""
    found = []
    for chunk in (2**30, 600):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 40, 16, 2, 4, generator=generator).bfloat16() for _ in range(3))
        table = torch.randn(12, 31, generator=generator).bfloat16().requires_grad_()
        mask = torch.ones(2, 40, 16, dtype=torch.bool)
        moments = logit_moments(q, k, table, mask, chunk=chunk)
        out = attend_with_positions(q, k, v, table, torch.ones(6), mask, chunk=chunk)
        assert all(one.dtype is torch.bfloat16 for one in out)
        (moments[1].sum() + sum(one.float().square().sum() for one in out)).backward()
        found.append(table.grad.float())
        for rows in (q, q[:, :0]):
            for given in (mask[:, : rows.shape[1]], None):
                stats = logit_moments(rows, rows, table, given, chunk=chunk)
                assert all(one.dtype is torch.float32 for one in stats)
    torch.testing.assert_close(*found, rtol=0.02, atol=0.004 * float(found[0].abs().max()))


def test_no_tokens_or_no_lines_stay_in_the_graph():
    for shape in ((2, 0, 5, 2), (2, 3, 0, 2)):
        q, k, v = (tokens(*shape, width) for width in (K, K, V))
        table, factors = tokens(2 * K + V, 5), tokens(6)
        count, mean, squares = logit_moments(q, k, table, chunk=60)
        assert (count.sum(), mean.abs().sum(), squares.abs().sum()) == (0, 0, 0)
        contents, positions = attend_with_positions(q, k, v, table, factors, chunk=60)
        assert contents.shape == positions.shape == v.shape
        total = mean.sum() + squares.sum() + contents.sum() + positions.sum()
        for gradient in torch.autograd.grad(total, (q, k, v, table, factors)):
            assert not gradient.any()


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_no_more_logits_than_a_chunk_exist_at_a_time(masked):
    """64 lines of 64 tokens in chunks of 8: the peak stays under what all logits would take."""
    q, k = (torch.randn(1, 64, 64, 4, 4, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 64, 64, 4, 8, requires_grad=True)
    table, factors = torch.randn(16, 127, requires_grad=True), torch.ones(12, requires_grad=True)
    mask = torch.ones(1, 64, 64, dtype=torch.bool) if masked else None
    line = 4 * 64 * 64  # logits of one kind

    def peak_of(chunk: int) -> Peak:
        with Peak() as peak:
            moments = logit_moments(q, k, table, mask, chunk=chunk)
            out = attend_with_positions(q, k, v, table, factors, mask, chunk=chunk)
            (sum(x.sum() for x in moments) + sum(x.square().sum() for x in out)).backward()
        return peak

    chunked, whole = peak_of(8 * line + 16 * 64 * 64), peak_of(2**40)
    of_all = 64 * line * 4
    assert whole.largest == of_all, "the check sees logits where there are all"
    assert chunked.largest <= of_all / 8
    assert chunked.bytes < whole.bytes / 2


def test_moments_without_logits_stand_a_large_mean():
    """In fp32, of logits whose mean is 300 times their deviation, to six digits."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 40, 50, 1, 4, generator=generator) * 0.1 + 30 for _ in range(2))
    table = torch.randn(16, 99, generator=generator) * 0.1 + 30
    _, mean, squares = logit_moments(q, k, table, chunk=60)
    everything = torch.ones(1, 40, 50, dtype=torch.bool)
    wide = [x.double() for x in (q, k, table)]
    _, mean64, squares64 = logit_moments(*wide, everything, chunk=2**20)
    assert (mean64.square() / (squares64 / (40 * 50 * 50))).min() > 300**2
    torch.testing.assert_close(mean.double(), mean64, rtol=1e-6, atol=0)
    torch.testing.assert_close(squares.double(), squares64, rtol=1e-6, atol=0)


class Products(TorchDispatchMode):
    """The matrices of batched products, and those of which neither rows nor columns lie together.

    torch's kernel on a CPU copies each of these by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.every: list[Tensor] = []
        self.apart: list[tuple[torch.Size, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.bmm:
            self.every += args
            self.apart += [(x.shape, x.stride()) for x in args if 1 not in x.stride()[1:]]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
def test_products_take_their_matrices_as_they_lie(masked):
    q, k, v, table, factors = inputs(5)
    mask = some(*SHAPE[:3]) if masked else None
    q, k, v = torch.cat((q, k, v), -1).split((K, K, V), -1)  # as a layer has them
    with Products() as products:
        moments = logit_moments(q, k, table, mask, chunk=60)
        both = torch.stack(attend_with_positions(q, k, v, table, factors, mask, chunk=60), -1)
        (both.square().sum() + sum(one.sum() for one in moments)).backward()
    assert products.every
    assert not products.apart
