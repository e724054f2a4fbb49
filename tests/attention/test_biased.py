"""Relative biases along a line: which entry a pair takes, chunks, and what is held at once."""

from __future__ import annotations

import pytest
import torch
from formulas import assert_agree, formula, line, line_bias, some, tokens, triple
from peak import Peak
from torch import Tensor

from axialtrain.attention.axis import attend

SHAPE = (2, 3, 5, 2, 4)  # B, H, W, N, K
DIMS = [pytest.param(2, id="rows"), pytest.param(1, id="columns")]
HEADS = SHAPE[3]
CHUNK = "axialtrain.attention.lines.CHUNK"


def table(entries: int, heads: int = HEADS) -> Tensor:
    return tokens(heads, entries, seed=5)


def some_keys(dim: int) -> Tensor:
    """About half of the tokens, and none in one of the lines."""
    mask = some(*SHAPE[:3])
    mask[(1, 2) if dim == 2 else (1, slice(None), 2)] = False
    return mask


@pytest.mark.parametrize("dim", DIMS)
def test_a_query_at_i_and_a_key_at_j_take_the_entry_j_minus_i_plus_span_minus_1(dim):
    """With no other logits, a table that is large at one entry makes the value there the result."""
    length = SHAPE[dim]
    v = tokens(*SHAPE).detach()
    zero = torch.zeros_like(v)
    for distance in range(1 - length, length):
        one_hot = torch.zeros(HEADS, 2 * length - 1, dtype=v.dtype)
        one_hot[:, distance + length - 1] = 1000.0
        out = attend(zero, zero, v, dim, bias=one_hot).movedim(dim, 0)
        for i in range(length):
            if 0 <= i + distance < length:
                torch.testing.assert_close(out[i], v.select(dim, i + distance))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("span", [-1, 0, 2], ids=["clipped", "as long as the line", "longer"])
def test_the_formula_and_its_gradients(span, masked, dim):
    q, k, v = triple(*SHAPE)
    bias = table(2 * (SHAPE[dim] + span) - 1)
    mask = some_keys(dim) if masked else None
    got = attend(q, k, v, dim, key_mask=mask, bias=bias)
    want = formula(q, k, v, line(dim), mask=mask, bias=line_bias(bias, dim))
    assert_agree(got, want, q, k, v, bias)


@pytest.mark.parametrize("dim", DIMS)
def test_a_table_of_span_1_is_the_same_for_every_pair_and_changes_nothing(dim):
    q, k, v = triple(*SHAPE)
    torch.testing.assert_close(attend(q, k, v, dim, bias=table(1)), attend(q, k, v, dim))


@pytest.mark.parametrize("dim", DIMS)
def test_the_scale_is_that_of_the_products_and_not_of_the_bias(dim):
    q, k, v = triple(*SHAPE)
    bias = table(2 * SHAPE[dim] - 1)
    got = attend(q, k, v, dim, bias=bias, scale=0.3)
    want = formula(q, k, v, line(dim), bias=line_bias(bias, dim), scale=0.3)
    assert_agree(got, want, q, k, v, bias)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("span", [2, 7], ids=["clipped", "long"])
def test_queries_that_are_a_part_of_the_line(span, masked, dim):
    q, k, v = triple(*SHAPE)
    part = q.narrow(dim, 1, 2)
    bias = table(2 * span - 1)
    mask = some_keys(dim) if masked else None
    got = attend(part, k, v, dim, key_mask=mask, bias=bias, offset=1)
    at = (0, 1) if dim == 2 else (1, 0)
    want = formula(part, k, v, line(dim), at=at, mask=mask, bias=line_bias(bias, dim))
    assert_agree(got, want, q, k, v, bias)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("part", [False, True], ids=["whole lines", "part of the line"])
def test_prefix_keys_have_no_bias(part, masked, dim):
    q, k, v = triple(*SHAPE)
    prefix = tokens(2, 3, HEADS, 4, seed=7), tokens(2, 3, HEADS, 4, seed=8)
    bias = table(2 * SHAPE[dim] - 1)
    mask = some_keys(dim) if masked else None
    queries = q.narrow(dim, 1, 2) if part else q
    offset = 1 if part else 0
    got = attend(queries, k, v, dim, key_mask=mask, bias=bias, offset=offset, prefix=prefix)
    want = formula(
        queries,
        k,
        v,
        line(dim),
        at=(0, offset) if dim == 2 else (offset, 0),
        mask=mask,
        bias=line_bias(bias, dim),
        prefix=prefix,
    )
    assert_agree(got, want, q, k, v, bias, *prefix)


@pytest.mark.parametrize("dim", DIMS)
def test_a_table_is_learned_where_all_else_is_frozen(dim):
    q, k, v = (x.detach() for x in triple(*SHAPE))
    bias = table(2 * SHAPE[dim] - 1)
    want = formula(q, k, v, line(dim), bias=line_bias(bias, dim))
    assert_agree(attend(q, k, v, dim, bias=bias), want, bias)


@pytest.mark.parametrize("dim", DIMS)
def test_a_line_without_keys_gives_zeros_and_zero_gradients(dim):
    q, k, v = triple(*SHAPE)
    bias = table(2 * SHAPE[dim] - 1)
    out = attend(q, k, v, dim, key_mask=torch.zeros(SHAPE[:3], dtype=torch.bool), bias=bias)
    assert not out.any()
    for grad in torch.autograd.grad(out.sum(), (q, k, v, bias)):
        assert not grad.any()  # NaN would be something


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("shape", [(2, 0, 5, 2, 4), (2, 3, 0, 2, 4)], ids=str)
def test_an_empty_part_gives_its_table_a_gradient_of_zero(shape, dim):
    """It takes part in the collectives of backward like any other."""
    q, k, v = triple(*shape)
    bias = table(9)
    out = attend(q, k, v, dim, bias=bias)
    assert out.shape == shape
    inputs = (q, k, v, bias)
    for x, grad in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


@pytest.mark.parametrize("chunk", [1, 35, 170, 700], ids=["a query", "queries", "lines", "images"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("with_prefix", [False, True], ids=["no prefix", "prefix"])
def test_chunks_change_nothing(monkeypatch, with_prefix, masked, dim, chunk):
    """The last one being shorter. A line has 50 logits, or 80 with a prefix; an image 7 lines."""
    shape = (3, 7, 5, 2, 4) if dim == 2 else (3, 5, 7, 2, 4)
    q, k, v = triple(*shape)
    bias = table(7)
    inputs = [q, k, v, bias]
    options = {"key_mask": some(*shape[:3]) if masked else None, "bias": bias}
    if with_prefix:
        options["prefix"] = tokens(3, 3, 2, 4, seed=7), tokens(3, 3, 2, 4, seed=8)
        inputs += options["prefix"]
    whole = attend(q, k, v, dim, **options)
    monkeypatch.setattr(CHUNK, chunk)
    assert_agree(attend(q, k, v, dim, **options), whole, *inputs, tolerance=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, dim, **options), whole)


def used(images: int, lines: int, length: int, dim: int) -> Peak:
    """Forward and backward over `lines` lines an image, of two heads of one channel."""
    shape = (images, lines, length, 2, 1) if dim == 2 else (images, length, lines, 2, 1)
    inputs = (*triple(*shape), table(2 * length - 1))
    mask = some(*shape[:3], share=0.9)
    with Peak() as peak:
        out = attend(*inputs[:3], dim, key_mask=mask, bias=inputs[3])
        torch.autograd.grad(out.sum(), inputs)
    return peak


@pytest.mark.parametrize("share", [0.25, 2], ids=["a part of a line", "two lines"])
@pytest.mark.parametrize("images", [1, 32])
@pytest.mark.parametrize("dim", DIMS)
def test_no_more_than_a_chunk_of_logits_is_held_at_once(monkeypatch, dim, images, share):
    lines, length = 32, 128  # of all images
    a_line = 2 * length * length  # logits
    monkeypatch.setattr(CHUNK, int(share * a_line))
    peak = used(images, lines // images, length, dim)
    chunk, all_logits, activations = 8 * share * a_line, 8 * lines * a_line, 16 * lines * length
    assert peak.largest <= chunk
    assert peak.bytes <= 5 * chunk + 12 * activations < all_logits / 2


@pytest.mark.parametrize("dim", DIMS)
def test_more_lines_hold_no_more_logits(monkeypatch, dim):
    """What a further line adds to the peak are its tokens, a few times, and nothing of L^2."""
    length = 128
    monkeypatch.setattr(CHUNK, 2 * length * length)
    few, many = (used(1, lines, length, dim).bytes for lines in (8, 32))
    assert (many - few) / 24 <= 12 * 8 * length * 2 < 8 * 2 * length * length


@pytest.mark.parametrize("dim", DIMS)
def test_nothing_of_the_size_of_the_logits_is_kept_for_backward(monkeypatch, dim):
    lines, length = 16, 64
    monkeypatch.setattr(CHUNK, 2 * length * length)
    shape = (1, lines, length, 2, 1) if dim == 2 else (1, length, lines, 2, 1)
    inputs = (*triple(*shape), table(2 * length - 1))
    with Peak() as peak:
        out = attend(*inputs[:3], dim, bias=inputs[3])
        kept = peak.now
    assert kept <= 6 * 8 * out.numel() < 8 * 2 * length * length * lines / 8
