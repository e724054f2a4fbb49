"""Queries without a place in the image: one softmax over the prefix and every valid token."""

from __future__ import annotations

import pytest
import torch
from formulas import assert_agree, some, tokens, triple
from torch import Tensor

from axialtrain.attention.merge import attend_everywhere
from axialtrain.mesh.exchange import Exchange

IMAGES, HEIGHT, WIDTH, HEADS, CHANNELS = SHAPE = (2, 3, 5, 2, 4)
QUERIES, PREFIX = 3, 2
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
WITH_PREFIX = pytest.mark.parametrize("with_prefix", [False, True], ids=["no prefix", "prefix"])


def queries(size: float = 1.0) -> Tensor:
    q = tokens(IMAGES, QUERIES, HEADS, CHANNELS, seed=3)
    return (q * size).detach().requires_grad_()


def prefix_of() -> tuple[Tensor, Tensor]:
    k, v = (tokens(IMAGES, PREFIX, HEADS, CHANNELS, seed=seed) for seed in (4, 5))
    return k, v


def one_softmax(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, prefix: tuple[Tensor, Tensor] | None
) -> Tensor:
    """An image at a time: over its prefix and its valid tokens, in one list."""
    out = []
    for b in range(len(q)):
        seen = torch.ones(k.shape[1:3], dtype=torch.bool) if mask is None else mask[b]
        keys, values = k[b][seen], v[b][seen]
        if prefix is not None:
            keys, values = torch.cat((prefix[0][b], keys)), torch.cat((prefix[1][b], values))
        logits = torch.einsum("ink, tnk -> nit", q[b], keys) / CHANNELS**0.5
        out.append(torch.einsum("nit, tnk -> ink", logits.softmax(-1), values))
    return torch.stack(out)


@MASKED
@WITH_PREFIX
def test_one_softmax_over_the_prefix_and_every_valid_token(with_prefix, masked):
    q, (_, k, v) = queries(), triple(*SHAPE)
    mask = some(*SHAPE[:3]) if masked else None
    prefix = prefix_of() if with_prefix else None
    got = attend_everywhere(q, k, v, Exchange(), key_mask=mask, prefix=prefix)
    assert_agree(got, one_softmax(q, k, v, mask, prefix), q, k, v, *(prefix or ()))


@WITH_PREFIX
@pytest.mark.parametrize("which", ["one image", "every image"])
def test_without_a_valid_token_the_prefix_alone_or_zeros(which, with_prefix):
    q, (_, k, v) = queries(), triple(*SHAPE)
    mask = some(*SHAPE[:3])
    mask[1 if which == "one image" else slice(None)] = False
    prefix = prefix_of() if with_prefix else None
    got = attend_everywhere(q, k, v, Exchange(), key_mask=mask, prefix=prefix)
    want = one_softmax(q, k, v, mask, prefix)
    assert_agree(got, want, q, k, v, *(prefix or ()))
    assert got[1].any() == with_prefix


@WITH_PREFIX
@MASKED
@pytest.mark.parametrize("shape", [(2, 0, 5, 2, 4), (2, 3, 0, 2, 4)], ids=str)
def test_an_empty_part_of_the_image_is_an_image_without_tokens(shape, masked, with_prefix):
    q, (_, k, v) = queries(), triple(*shape)
    mask = torch.ones(shape[:3], dtype=torch.bool) if masked else None
    prefix = prefix_of() if with_prefix else None
    inputs = (q, k, v, *(prefix or ()))
    got = attend_everywhere(q, k, v, Exchange(), key_mask=mask, prefix=prefix)
    assert_agree(got, one_softmax(q, k, v, mask, prefix), *inputs)
    assert got.any() == with_prefix


@MASKED
@WITH_PREFIX
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_logits_do_not_overflow(dtype, with_prefix, masked):
    """exp overflows at 89 in fp32 and at 710 in fp64."""
    q, (_, k, v) = queries(3000.0), triple(*SHAPE)
    mask = some(*SHAPE[:3]) if masked else None
    prefix = prefix_of() if with_prefix else None
    inputs = tuple(x.detach().to(dtype).requires_grad_() for x in (q, k, v, *(prefix or ())))
    own = (inputs[3], inputs[4]) if with_prefix else None
    got = attend_everywhere(*inputs[:3], Exchange(), key_mask=mask, prefix=own)
    want = one_softmax(*inputs[:3], mask, own)
    assert_agree(got, want, *inputs, tolerance=1e-11 if dtype is torch.float64 else 1e-3)


@pytest.mark.parametrize("winner", ["prefix", "tokens"])
def test_the_larger_logits_take_all_on_either_side_of_the_merge(winner):
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    far, near = -1000.0 * q, 1000.0 * q
    own, others = (near, far) if winner == "prefix" else (far, near)
    out = attend_everywhere(q, others[:, None], 5 * q[:, None], Exchange(), prefix=(own, 7 * q))
    assert out.item() == (7.0 if winner == "prefix" else 5.0)


@WITH_PREFIX
def test_every_logit_may_be_far_below_zero(with_prefix):
    one, low, v = torch.ones_like(queries()), -1000 * tokens(*SHAPE).abs(), tokens(*SHAPE, seed=1)
    k, of_prefix = prefix_of()
    prefix = (-2000 * k.abs(), of_prefix) if with_prefix else None
    got = attend_everywhere(one, low, v, Exchange(), prefix=prefix)
    torch.testing.assert_close(got, one_softmax(one, low, v, None, prefix))


def test_no_queries():
    q, (_, k, v) = tokens(IMAGES, 0, HEADS, CHANNELS), triple(*SHAPE)
    out = attend_everywhere(q, k, v, Exchange(), prefix=prefix_of())
    assert out.shape == q.shape
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_a_masked_token_is_nothing():
    q, (_, k, v) = queries(), triple(*SHAPE)
    mask = some(*SHAPE[:3])
    poked = [torch.where(mask[..., None, None], x, 1000.0) for x in (k, v)]
    expected = attend_everywhere(q, k, v, Exchange(), key_mask=mask)
    assert torch.equal(attend_everywhere(q, *poked, Exchange(), key_mask=mask), expected)
