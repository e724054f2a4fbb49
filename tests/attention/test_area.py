"""Attention within windows and over the whole image, against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formulas import (
    area_bias,
    assert_agree,
    everything,
    formula,
    some,
    tokens,
    triple,
    window,
)
from peak import Peak
from torch import Tensor

from axialtrain.attention.area import attend_all, attend_windows
from axialtrain.attention.masks import LineMasks
from axialtrain.grid import Rect

pytestmark = pytest.mark.slow

IMAGES, HEIGHT, WIDTH, HEADS, CHANNELS = SHAPE = (2, 5, 7, 2, 4)
GRID = Rect(0, HEIGHT, 0, WIDTH)
PARTS = [
    pytest.param(GRID, id="whole image"),
    pytest.param(Rect(1, 4, 2, 6), id="a part"),  # cuts through windows of every size here
    pytest.param(Rect(4, 5, 6, 7), id="a corner"),
]
CUTS = [
    pytest.param((2, 0), id="2"),
    pytest.param((2, 1), id="2 shifted"),
    pytest.param((3, 0), id="3"),
    pytest.param((3, 1), id="3 shifted"),
    pytest.param((5, 2), id="5 shifted"),
]
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


def tables(down: int, right: int) -> tuple[Tensor, Tensor]:
    return tokens(HEADS, 2 * down - 1, seed=5), tokens(HEADS, 2 * right - 1, seed=6)


def prefix_of(length: int = 3) -> tuple[Tensor, Tensor]:
    return tuple(tokens(IMAGES, length, HEADS, CHANNELS, seed=seed) for seed in (7, 8))


def touched(rect: Rect, size: int, shift: int) -> Rect:
    """The image's tokens from the last cut before `rect` to the first behind it, step by step."""

    def before(at: int) -> int:
        return next(cut for cut in range(at, at - size, -1) if (cut + shift) % size == 0)

    def behind(at: int) -> int:
        return next(cut for cut in range(at, at + size) if (cut + shift) % size == 0)

    whole = Rect(before(rect.top), behind(rect.bottom), before(rect.left), behind(rect.right))
    return whole.intersect(GRID)


def windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    part: Rect,
    cut: tuple[int, int],
    mask: Tensor | None,
    **options: Any,
) -> Tensor:
    """`attend_windows` of the queries of a part, given the windows it touches, as on a mesh."""
    keys = touched(part, *cut)
    theirs = (slice(None), *keys.slices(GRID))
    return attend_windows(
        q[:, *part.slices(GRID)],
        k[theirs],
        v[theirs],
        part,
        keys,
        *cut,
        key_mask=None if mask is None else mask[theirs],
        **options,
    )


def some_keys(cut: tuple[int, int] = (1, 0)) -> Tensor:
    """About half of the tokens, and none in the window of token (3, 4) of the second image."""
    mask = some(*SHAPE[:3])
    size, shift = cut
    top, left = ((at + shift) // size * size - shift for at in (3, 4))
    mask[1, max(top, 0) : top + size, max(left, 0) : left + size] = False
    return mask


@MASKED
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("part", PARTS)
def test_windows_are_cut_at_coordinates_of_the_image(part, cut, masked):
    q, k, v = triple(*SHAPE)
    mask = some_keys(cut) if masked else None
    got = windowed(q, k, v, part, cut, mask)
    queries = q[:, *part.slices(GRID)]
    want = formula(queries, k, v, window(*cut), at=(part.top, part.left), mask=mask)
    assert_agree(got, want, q, k, v)


@MASKED
@pytest.mark.parametrize("reach", [2, 3, 6], ids=["clipped", "as large as a window", "longer"])
@pytest.mark.parametrize("cut", [(3, 0), (3, 1)], ids=["3", "3 shifted"])
@pytest.mark.parametrize("part", PARTS[:2])
def test_the_bias_in_a_window_is_that_of_both_distances_added(part, cut, reach, masked):
    q, k, v = triple(*SHAPE)
    bias = tables(reach, reach + 1)
    mask = some_keys(cut) if masked else None
    got = windowed(q, k, v, part, cut, mask, bias=bias)
    want = formula(
        q[:, *part.slices(GRID)],
        k,
        v,
        window(*cut),
        at=(part.top, part.left),
        mask=mask,
        bias=area_bias(*bias),
    )
    assert_agree(got, want, q, k, v, *bias)


@MASKED
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("part", PARTS[:2])
def test_a_prefix_joins_every_window(part, with_bias, masked):
    q, k, v = triple(*SHAPE)
    prefix, bias, cut = prefix_of(), tables(3, 3), (3, 1)
    mask = some_keys(cut) if masked else None
    got = windowed(q, k, v, part, cut, mask, prefix=prefix, bias=bias if with_bias else None)
    want = formula(
        q[:, *part.slices(GRID)],
        k,
        v,
        window(*cut),
        at=(part.top, part.left),
        mask=mask,
        bias=area_bias(*bias) if with_bias else None,
        prefix=prefix,
    )
    assert_agree(got, want, q, k, v, *prefix, *(bias if with_bias else ()))


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_a_window_without_keys_gives_zeros_and_zero_gradients(with_bias):
    q, k, v = triple(*SHAPE)
    mask = torch.ones(SHAPE[:3], dtype=torch.bool)
    empty = (1, slice(2, 4), slice(4, 6))
    mask[empty] = False
    out = windowed(q, k, v, GRID, (2, 0), mask, bias=tables(2, 2) if with_bias else None)
    assert not out[empty].any()
    assert torch.equal(out.abs().amin((3, 4)) > 0, mask)
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert grad.isfinite().all()
        assert not grad[empty].any()


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_a_shifted_window_does_not_reach_around_the_image(with_bias):
    """A cyclic roll would join the first column to the last."""
    q, k, v = triple(*SHAPE)
    options = {"bias": tables(2, 2) if with_bias else None}
    before = windowed(q, k, v, GRID, (2, 1), None, **options)
    moved = v.detach().clone()
    moved[:, 0, 0] += 1.0
    changed = (windowed(q, k, moved, GRID, (2, 1), None, **options) != before).any(-1).any(-1)
    expected = torch.zeros(SHAPE[:3], dtype=torch.bool)
    expected[:, 0, 0] = True  # alone in its window of 2 x 2
    assert torch.equal(changed, expected)


@MASKED
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("with_prefix", [False, True], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("reach", [None, 3, 9], ids=["no bias", "clipped", "longer"])
def test_every_token_attends_to_the_whole_image(reach, with_prefix, part, masked):
    q, k, v = triple(*SHAPE)
    mask = some(*SHAPE[:3]) if masked else None
    bias = None if reach is None else tables(reach, reach + 2)
    prefix = prefix_of() if with_prefix else None
    queries = q[:, *part.slices(GRID)]
    got = attend_all(queries, k, v, part, masks=LineMasks.of_images(mask), bias=bias, prefix=prefix)
    want = formula(
        queries,
        k,
        v,
        everything,
        at=(part.top, part.left),
        mask=mask,
        bias=None if bias is None else area_bias(*bias),
        prefix=prefix,
    )
    assert_agree(got, want, q, k, v, *(bias or ()), *(prefix or ()))


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_an_image_without_keys_gives_zeros_and_zero_gradients(with_bias):
    q, k, v = triple(*SHAPE)
    mask = torch.ones(SHAPE[:3], dtype=torch.bool)
    mask[1] = False
    bias = tables(5, 7) if with_bias else None
    out = attend_all(q, k, v, GRID, masks=LineMasks.of_images(mask), bias=bias)
    assert not out[1].any()
    assert out[0].abs().amin() > 0
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert grad.isfinite().all()
        assert not grad[1].any()


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(2, 0, 7, 2, 4), (2, 5, 0, 2, 4)], ids=str)
def test_no_queries_give_every_input_a_gradient_of_zero(shape, with_bias):
    q, (_, k, v) = tokens(*shape), triple(*SHAPE)
    bias, prefix = tables(2, 2) if with_bias else None, prefix_of()
    inputs = (q, k, v, *prefix, *(bias or ()))
    rect = Rect(0, shape[1], 0, shape[2])
    none = tokens(2, 0, 0, 2, 4), tokens(2, 0, 0, 2, 4)
    for out, given in (
        (attend_all(q, k, v, rect, bias=bias, prefix=prefix), inputs),
        (
            attend_windows(q, *none, rect, Rect(0, 0, 0, 0), 2, 1, bias=bias, prefix=prefix),
            (q, *none, *inputs[3:]),
        ),
    ):
        assert out.shape == shape
        for x, grad in zip(given, torch.autograd.grad(out.sum(), given), strict=True):
            assert grad.shape == x.shape
            assert not grad.any()


CHUNKS = pytest.mark.parametrize("chunk", [1, 1200], ids=["least", "some, the last one short"])


CHUNK = "axialtrain.attention.lines.CHUNK"


@MASKED
@CHUNKS
@pytest.mark.parametrize("part", PARTS[:2])
def test_chunks_change_nothing_within_windows(monkeypatch, part, chunk, masked):
    q, k, v = triple(*SHAPE)
    bias, prefix, cut = tables(2, 3), prefix_of(), (3, 1)
    mask = some_keys(cut) if masked else None
    whole = windowed(q, k, v, part, cut, mask, bias=bias, prefix=prefix)
    monkeypatch.setattr(CHUNK, chunk)
    got = windowed(q, k, v, part, cut, mask, bias=bias, prefix=prefix)
    assert_agree(got, whole, q, k, v, *bias, *prefix, tolerance=1e-12)


@MASKED
@CHUNKS
@pytest.mark.parametrize("part", PARTS[:2])
def test_chunks_change_nothing_over_the_whole_image(monkeypatch, part, chunk, masked):
    q, k, v = triple(*SHAPE)
    queries = q[:, *part.slices(GRID)]
    bias, prefix = tables(3, 9), prefix_of()
    masks = LineMasks.of_images(some(*SHAPE[:3])) if masked else None
    options = {"masks": masks, "bias": bias, "prefix": prefix}
    whole = attend_all(queries, k, v, part, **options)
    monkeypatch.setattr(CHUNK, 2 * chunk)  # 2 rows of the image are 1960 logits
    got = attend_all(queries, k, v, part, **options)
    assert_agree(got, whole, q, k, v, *bias, *prefix, tolerance=1e-12)


def test_over_the_whole_image_no_more_than_a_chunk_of_logits_is_held_at_once(monkeypatch):
    height, width = 32, 16
    a_row = 2 * width * height * width  # logits of a row of queries
    monkeypatch.setattr(CHUNK, 2 * a_row)
    q, k, v = triple(1, height, width, 2, 1)
    bias = tables(height, width)
    with Peak() as peak:
        out = attend_all(q, k, v, Rect(0, height, 0, width), bias=bias)
        torch.autograd.grad(out.sum(), (q, k, v, *bias))
    chunk, all_logits = 8 * 2 * a_row, 8 * height * a_row
    assert peak.largest <= chunk
    assert peak.bytes <= 5 * chunk + 20 * 8 * q.numel() < all_logits / 2


def test_windows_hold_no_more_than_a_chunk_of_logits_at_once(monkeypatch):
    size, across = 8, 6
    a_window = 2 * size**4  # logits
    monkeypatch.setattr(CHUNK, 2 * a_window)
    q, k, v = triple(1, across * size, across * size, 2, 1)
    bias = tables(size, size)
    rect = Rect(0, across * size, 0, across * size)
    with Peak() as peak:
        out = attend_windows(q, k, v, rect, rect, size, 0, bias=bias)
        torch.autograd.grad(out.sum(), (q, k, v, *bias))
    chunk, all_logits = 8 * 2 * a_window, 8 * across**2 * a_window
    assert peak.largest <= chunk
    assert peak.bytes <= 5 * chunk + 10 * 8 * q.numel() < all_logits / 2
