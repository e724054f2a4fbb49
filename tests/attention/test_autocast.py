"""Autocast, under which our linear layers take and give what torch's do."""

from __future__ import annotations

import pytest
import torch

from axialtrain.attention.qkv import HeadProjection
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
