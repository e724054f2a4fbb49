"""The MLP in chunks of tokens: its formula, and how much of it exists at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axialtrain.models import mlp
from axialtrain.models.mlp import Mlp
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig

DIM, WIDTH = 6, 20


def module(chunk: int | None, dtype: torch.dtype = torch.float64) -> Mlp:
    torch.manual_seed(0)
    made = Mlp(DIM, WIDTH, chunk).to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, DIM, generator=generator, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("chunk", [1, 4, 29, 30, 31, None], ids=str)
def test_it_is_its_formula_whatever_the_chunk(chunk):
    made, x = module(chunk), tokens(2, 3, 5)
    hidden = F.gelu(F.linear(x, made.fc1.weight, made.fc1.bias))
    want = F.linear(hidden, made.fc2.weight, made.fc2.bias)
    seen = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).double()
    inputs = (x, *made.parameters())
    got = made(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((got * seen).sum(), inputs),
        torch.autograd.grad((want * seen).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_nothing_but_the_input_and_the_weights_is_kept_for_backward():
    made, x = module(4), tokens(2, 3, 5)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: kept.append(one) or one, lambda one: one
    ):
        made(x)
    assert kept
    assert {one.data_ptr() for one in kept} <= {y.data_ptr() for y in (x, *made.parameters())}


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=["in fp32", "in bf16"])
def test_gradients_in_bf16_are_added_up_in_fp32(wide, monkeypatch):
    monkeypatch.setattr(mlp, "arithmetic_dtype", lambda _: wide)
    made = module(4, torch.bfloat16)
    x = tokens(2, 30, 50).detach().bfloat16().requires_grad_()
    exact = Mlp(DIM, WIDTH).double()
    exact.load_state_dict(made.state_dict())
    y = x.detach().double().requires_grad_()
    made(x).float().sum().backward()
    exact(y).sum().backward()
    for (name, one), other in zip(made.named_parameters(), exact.parameters(), strict=True):
        assert one.grad.dtype is torch.bfloat16
        assert (one.grad.double() - other.grad).norm() <= 0.01 * other.grad.norm(), name
    assert (x.grad.double() - y.grad).norm() <= 0.01 * y.grad.norm()


def test_the_chunk_of_a_model_reaches_its_layers():
    def chunks(**options) -> set[int | None]:
        model = AxialTransformer(AxialTransformerConfig(dim=16, heads=2, depth=2, **options))
        return {one.chunk for one in model.modules() if isinstance(one, Mlp)}

    assert chunks() == {65536}
    assert chunks(mlp_chunk=7) == {7}
    assert chunks(mlp_chunk=None) == {None}


@pytest.mark.parametrize("chunk", [0, -1, 2.5, "all", True])
def test_other_chunks_are_refused(chunk):
    with pytest.raises(ValueError, match=r"model\.mlp_chunk=.* allowed are null and whole numbers"):
        AxialTransformerConfig(mlp_chunk=chunk)
