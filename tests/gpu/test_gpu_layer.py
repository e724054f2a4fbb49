"""A whole layer on a GPU: the numbers of the CPU, compiled or not."""

from __future__ import annotations

import copy

import pytest
import torch
from devices import CPU_AND_GPU, DTYPES, assert_near, on, tokens
from torch import Tensor

from axialtrain.attention.config import AxialConfig, Pass
from axialtrain.attention.passes import AxialAttention
from axialtrain.bench.plain import tissue
from axialtrain.grid import Place
from axialtrain.models.layer import Layer

DIM, HEADS, GRID = 64, 2, (24, 40)
PLACE = Place(*GRID)


def config(pattern: str, positions: str) -> AxialConfig:
    return AxialConfig([pattern], positions=positions)


def run(module: Layer, x: Tensor, prefix: Tensor, valid: Tensor | None) -> list[Tensor]:
    """Outputs, and gradients of the inputs and all parameters."""
    x, prefix = x.requires_grad_(), prefix.requires_grad_()
    out, out_prefix = module(x, prefix, PLACE, valid)
    seen = out if valid is None else out * valid[..., None]
    loss = (seen.float() ** 2).mean() + (out_prefix.float() ** 2).mean()
    inputs = (x, prefix, *module.parameters())
    return [seen.detach(), out_prefix.detach(), *torch.autograd.grad(loss, inputs)]


@CPU_AND_GPU
@DTYPES
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    ("pattern", "positions"),
    [("row+col", "rope"), ("row+col", "relative"), ("window+global", "rope"), ("row", "none")],
)
def test_a_layer_forward_and_backward(device, dtype, pattern, positions, masked):
    torch.manual_seed(0)
    layer = Layer(DIM, HEADS, 4 * DIM, config(pattern, positions), grid=GRID)
    valid = tissue(*GRID, 0.5, device=torch.device("cpu")) if masked else None
    x, prefix = tokens(1, *GRID, DIM), tokens(1, 2, DIM, seed=1)
    if valid is not None:
        x = x * valid[..., None]
    # The reference has the weights as the dtype has them.
    there = layer.to(device, dtype)
    reference = copy.deepcopy(there).to("cpu", torch.float64)
    want = run(reference, x.clone(), prefix.clone(), valid)
    inputs = (on(one, device, dtype) for one in (x, prefix))
    got = run(there, *inputs, None if valid is None else valid.to(device))
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert_close_for(one, other, dtype)


def assert_close_for(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """A layer is some twenty roundings deep; a key's bias has a gradient of zero in theory."""
    if want.abs().max() < 1e-9:
        assert got.abs().max() < 1e-3
        return
    if dtype == torch.float32:
        assert_near(got, want, dtype)
        return
    off = (got.double().cpu() - want).norm() / want.norm()
    assert off <= 3e-2, f"off by {off:.3g} of the norm"


@CPU_AND_GPU
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_attention_that_is_compiled(device, positions):
    """On a CPU the graphs are run as they were traced: there need not be a compiler."""
    torch.manual_seed(0)
    torch.compiler.reset()
    module = AxialAttention(DIM, HEADS, (Pass.ROW,), config("row", positions), grid=GRID).to(device)
    compiled = torch.compile(
        module, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    x = on(tokens(1, *GRID, DIM), device, torch.float32)
    none = x.new_zeros(1, 0, DIM)
    want, _ = module(x, none, PLACE, Pass.ROW)
    got, _ = compiled(x, none, PLACE, Pass.ROW)
    assert_near(got, want.double(), torch.float32)
    inputs = (x, *module.parameters())
    weight = torch.ones_like(want)
    expected = torch.autograd.grad(want, inputs, weight)
    for one, other in zip(torch.autograd.grad(got, inputs, weight), expected, strict=True):
        off = (one - other).abs().max()
        assert off <= 1e-5 * max(1.0, float(other.abs().max()))
