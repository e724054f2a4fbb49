"""Linear layers in chunks, and in fp32 where a CPU has no arithmetic of bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from axialtrain.mesh import projection
from axialtrain.mesh.projection import Sum, autocasts, chunks, project

BF16 = torch.bfloat16


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setitem(projection.CHUNK, "cpu", 8)
    monkeypatch.setattr(projection, "LEAST", 4)


@pytest.fixture
def no_bf16(monkeypatch):
    monkeypatch.setattr(projection, "CPU", "AVX2")


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(3, 5, 6), (11, 6), (0, 6), (2, 0, 6)], ids=str)
def test_chunks_add_up_to_the_layer(shape, biased, small_chunks):
    """The path of bf16, on fp64, in which it must be exact."""
    x, weight = leaf(*shape, seed=0), leaf(7, 6, seed=1)
    bias = leaf(7, seed=2) if biased else None
    assert len(list(chunks(x, 7))) == -(-x[..., 0].numel() // 4)
    inputs = [one for one in (x, weight, bias) if one is not None]
    got, want = projection._Project.apply(x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    seen = leaf(*want.shape, seed=3).detach()
    for one, other in zip(
        torch.autograd.grad((got * seen).sum(), inputs),
        torch.autograd.grad((want * seen).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_needs_no_gradient_gets_none(small_chunks):
    """Pixels, and frozen weights: the others' gradients are the same."""
    x, weight, bias = leaf(11, 6, seed=0), leaf(7, 6, seed=1), leaf(7, seed=2)
    seen = leaf(11, 7, seed=3).detach()
    want = torch.autograd.grad((F.linear(x, weight, bias) * seen).sum(), (x, weight, bias))
    for frozen in (0, 1):
        given = [
            one.detach().requires_grad_(n != frozen) for n, one in enumerate((x, weight, bias))
        ]
        (projection._Project.apply(*given) * seen).sum().backward()
        assert given[frozen].grad is None
        for one, other in zip(given, want, strict=True):
            if one.requires_grad:
                torch.testing.assert_close(one.grad, other, rtol=1e-12, atol=1e-12)


def test_bf16_is_rounded_once(no_bf16, small_chunks):
    x, weight, bias = (
        leaf(*shape, seed=n, dtype=BF16) for n, shape in enumerate([(40, 6), (7, 6), (7,)])
    )
    exact = [one.detach().double().requires_grad_() for one in (x, weight, bias)]
    got, want = project(x, weight, bias), F.linear(*exact)
    got.sum().backward()
    want.sum().backward()
    assert got.dtype is BF16
    for one, other in (
        (got, want),
        *zip((y.grad for y in (x, weight, bias)), (y.grad for y in exact), strict=True),
    ):
        assert one.dtype is BF16
        # Half of the last of 8 bits, and what fp32 adds to it.
        torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=1e-5)


def test_other_dtypes_and_machines_take_torchs_own(monkeypatch):
    monkeypatch.setattr(projection, "CPU", "AVX512")
    x, weight = leaf(4, 6, seed=0, dtype=BF16), leaf(7, 6, seed=1, dtype=BF16)
    assert "AddmmBackward" in type(project(x, weight, None).grad_fn).__name__ or (
        "MmBackward" in type(project(x, weight, None).grad_fn).__name__
    )
    monkeypatch.setattr(projection, "CPU", "AVX2")
    assert "Project" in type(project(x, weight, None).grad_fn).__name__
    x, weight = leaf(4, 6, seed=0), leaf(7, 6, seed=1)
    assert "Project" not in type(project(x, weight, None).grad_fn).__name__


def test_a_sum_of_bf16_gradients_is_added_up_in_fp32():
    total = Sum(torch.zeros(1, dtype=BF16))
    for _ in range(1000):
        total.add(torch.ones(1, dtype=BF16))
    assert float(total.total()) == 1000  # in bf16 it would stay at 256


@pytest.mark.parametrize("kind", ["cpu", "cuda", "meta"])
def test_what_has_autocast_is_what_torch_says(kind):
    assert autocasts(kind) == torch.amp.is_autocast_available(kind)
