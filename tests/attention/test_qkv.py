"""The fused projection with its turns, against projection, taking apart and turning in a row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axialtrain.attention import qkv
from axialtrain.attention.positions import rotary_angles, turns_of
from axialtrain.attention.qkv import HeadProjection, project_heads
from axialtrain.grid import Rect
from axialtrain.mesh import projection

HEADS, K, D = 2, 4, 6
RECT = Rect(4, 7, 10, 15)


def leaf(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None, dims: tuple[int, ...]) -> list[Tensor]:
    """One after the other; pairs of channels turn as complex numbers."""
    packed = F.linear(x, weight, bias).unflatten(-1, (HEADS, 3, K))
    three = [packed[..., i, :] for i in range(3)]
    for number in range(2 if dims else 0):
        parts = []
        for part, dim in zip(three[number].chunk(len(dims), -1), dims, strict=True):
            span = (RECT.top, RECT.bottom) if dim == 1 else (RECT.left, RECT.right)
            angles = rotary_angles(*span, part.shape[-1])
            turns = torch.polar(torch.ones_like(angles), angles)
            turns = turns[:, None, None] if dim == 1 else turns[:, None]
            pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
            parts.append(torch.view_as_real(pairs * turns).flatten(-2))
        three[number] = torch.cat(parts, -1)
    return three


@pytest.fixture(params=["whole", "in chunks"])
def chunked(request, monkeypatch):
    if request.param == "in chunks":
        monkeypatch.setitem(projection.CHUNK, "cpu", 1)
        monkeypatch.setattr(projection, "LEAST", 10)  # two rows of five tokens


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dims", [(), (1,), (2,), (1, 2)], ids=["none", "cols", "rows", "both"])
@pytest.mark.usefixtures("chunked")
def test_values_and_gradients_are_those_of_the_steps_in_a_row(dims, biased):
    x, weight = leaf(2, RECT.height, RECT.width, D, seed=0), leaf(3 * HEADS * K, D, seed=1)
    bias = leaf(3 * HEADS * K, seed=2) if biased else None
    turns = turns_of(RECT, dims, K, x) if dims else (None, None)
    got = project_heads(x, weight, bias, turns, head_dim=K)
    want = by_hand(x, weight, bias, dims)
    inputs = [one for one in (x, weight, bias) if one is not None]
    seen = [leaf(*one.shape, seed=3 + n).detach() for n, one in enumerate(want)]
    sums = [sum((a * b).sum() for a, b in zip(y, seen, strict=True)) for y in (got, want)]
    for one, other in zip(got, want, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad(one, inputs) for one in sums)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_nobody_reads_has_a_gradient_of_zero():
    x, weight = leaf(1, RECT.height, RECT.width, D, seed=0), leaf(3 * HEADS * K, D, seed=1)
    q, _, _ = project_heads(x, weight, None, turns_of(RECT, (2,), K, x), head_dim=K)
    (grad,) = torch.autograd.grad(q.sum(), weight)
    grad = grad.view(HEADS, 3, K, D)
    assert grad[:, 0].any()
    assert not grad[:, 1:].any()


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_empty_parts(shape):
    rect = Rect(0, shape[1], 0, shape[2])
    x, weight = leaf(*shape, D, seed=0), leaf(3 * HEADS * K, D, seed=1)
    three = project_heads(x, weight, None, turns_of(rect, (1,), K, x), head_dim=K)
    assert all(one.shape == (*shape, HEADS, K) for one in three)
    grads = torch.autograd.grad(sum(one.sum() for one in three), (x, weight))
    assert grads[0].shape == x.shape
    assert not grads[1].any()


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=["in fp32", "in bf16"])
@pytest.mark.usefixtures("chunked")
def test_bf16_by_either_arithmetic(wide, monkeypatch):
    """That of a CPU without bf16, and that of a GPU, which turns in fp32 and rounds before."""
    monkeypatch.setattr(qkv, "arithmetic_dtype", lambda _: wide)
    exact = [leaf(2, RECT.height, RECT.width, D, seed=0), leaf(3 * HEADS * K, D, seed=1)]
    mine = [one.detach().bfloat16().requires_grad_() for one in exact]
    exact = [one.detach().double().requires_grad_() for one in mine]
    want = by_hand(*exact, None, (1, 2))
    got = project_heads(*mine, None, turns_of(RECT, (1, 2), K, mine[0]), head_dim=K)
    for one, other in zip(got, want, strict=True):
        assert one.dtype is torch.bfloat16
        assert (one.double() - other).norm() <= 2**-7 * other.norm()
    sum(one.square().sum() for one in got).backward()
    sum(one.square().sum() for one in want).backward()
    for one, other in zip(mine, exact, strict=True):
        assert one.grad.dtype is torch.bfloat16
        assert (one.grad.double() - other.grad).norm() <= 2**-6 * other.grad.norm()


def test_by_head_takes_the_parameters_themselves():
    linear = nn.Linear(D, 3 * D)
    own = HeadProjection.by_head(linear, 3)
    assert own.weight is linear.weight
    assert own.bias is linear.bias
    assert own(torch.zeros(1, 2, D))[0].shape == (1, 2, 2, 3)


def test_nothing_but_the_input_and_the_turns_is_kept_for_backward():
    x, weight = leaf(2, RECT.height, RECT.width, D, seed=0), leaf(3 * HEADS * K, D, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: kept.append(one) or one, lambda one: one
    ):
        project_heads(x, weight, None, turns_of(RECT, (2,), K, x), head_dim=K)
    others = [one for one in kept if one.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert sum(one.numel() for one in others) == RECT.width * K
