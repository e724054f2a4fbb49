"""Autocast, under which our linear layers take and give what torch's do."""

from __future__ import annotations

import pytest
import torch

from axialtrain.attention.merge import attend_everywhere
from axialtrain.attention.position_sensitive import attend_with_positions, logit_moments
from axialtrain.attention.qkv import HeadProjection
from axialtrain.mesh.exchange import Exchange
from axialtrain.models.mlp import Mlp


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.float() - want.float()).abs().max() <= 2e-2 * want.float().abs().max()


def test_queries_keys_and_values():
    torch.manual_seed(0)
    qkv, x = HeadProjection(16, 4, bias=True), torch.randn(2, 3, 16, requires_grad=True)
    inputs = (x, qkv.weight, qkv.bias)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = qkv(x)
        plain = torch.nn.functional.linear(x, qkv.weight, qkv.bias)
    assert q.dtype is k.dtype is v.dtype is plain.dtype is torch.bfloat16
    got = torch.stack((q, k, v), -2).flatten(-3)  # head by head: [N][q, k, v][K]
    near(got, plain)
    weight = torch.randn_like(plain)
    grads = torch.autograd.grad(got, inputs, weight)
    for one, other in zip(grads, torch.autograd.grad(plain, inputs, weight), strict=True):
        assert one.dtype is other.dtype is torch.float32
        near(one, other)


@pytest.mark.parametrize("chunk", [None, 4], ids=["whole", "in chunks"])
def test_the_mlp_whatever_its_chunks(chunk):
    torch.manual_seed(0)
    mlp, x = Mlp(16, 32, chunk), torch.randn(2, 7, 16, requires_grad=True)
    inputs = (x, *mlp.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        out = mlp(x)
        hidden = torch.nn.functional.linear(x, mlp.fc1.weight, mlp.fc1.bias)
        plain = torch.nn.functional.linear(mlp.act(hidden), mlp.fc2.weight, mlp.fc2.bias)
    assert out.dtype is plain.dtype is torch.bfloat16
    near(out, plain)
    weight = torch.randn_like(plain)
    grads = torch.autograd.grad(out, inputs, weight)
    for one, other in zip(grads, torch.autograd.grad(plain, inputs, weight), strict=True):
        assert one.dtype is other.dtype is torch.float32
        near(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", [3, 160])  # of 160 x 160 tokens the sums are beyond fp16
def test_prefix_tokens_are_merged_in_fp32(dtype, side):
    torch.manual_seed(0)
    q, own = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 4)
    k, v = torch.randn(1, side, side, 2, 4), 3 + torch.randn(1, side, side, 2, 4)
    inputs = tuple(x.requires_grad_() for x in (q, k, v, own))
    want = attend_everywhere(q, k, v, Exchange(), prefix=(own, own))
    weight = torch.randn_like(want)
    grads = torch.autograd.grad(want, inputs, weight)
    with torch.autocast("cpu", dtype):
        got = attend_everywhere(q, k, v, Exchange(), prefix=(own, own))
    assert torch.equal(got, want)
    for one, other in zip(torch.autograd.grad(got, inputs, weight), grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_position_sensitive_attention_is_computed_in_fp32(dtype, masked):
    torch.manual_seed(0)
    # The sums of all logits, and of their squares above the mean, are beyond fp16.
    q, k = (1.4 + 0.1 * torch.randn(1, 20, 150, 1, 16) for _ in range(2))
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, torch.randn(1, 20, 150, 1, 2)))
    table = torch.randn(34, 299, requires_grad=True)
    inputs = (q, k, v, table)
    mask = torch.rand(1, 20, 150) < 0.8 if masked else None

    def both():
        moments = logit_moments(q, k, table, mask, chunk=2**18)
        factors = moments[2].sum(0).rsqrt()
        return *moments, *attend_with_positions(q, k, v, table, factors, mask, chunk=2**18)

    want = both()
    grads = torch.autograd.grad([x.float().square().mean().log() for x in want[1:]], inputs)
    with torch.autocast("cpu", dtype):
        got = both()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    again = torch.autograd.grad([x.float().square().mean().log() for x in got[1:]], inputs)
    for one, other in zip(again, grads, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
