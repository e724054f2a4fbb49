"""The devices that a test of tests/gpu runs on: the same body on a CPU, so that it is known to run
where there is no GPU, and on a GPU, which is what it is there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here"),
)
CPU = pytest.mark.slow  # a rehearsal, of some 100 small cases: not for the quick run
CPU_AND_GPU = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=GPU)]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# max|d| over max|reference|: of fp32 that of all tests; bf16 has 8 bits.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def sizes(cpu: Any, gpu: Any) -> pytest.MarkDecorator:
    """Small ones on a CPU, and those that matter on a GPU."""
    cases = [
        pytest.param("cpu", cpu, marks=CPU, id="cpu"),
        pytest.param("cuda", gpu, marks=GPU, id="cuda"),
    ]
    return pytest.mark.parametrize(("device", "size"), cases)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """In fp64 on the CPU, the same everywhere, of values that bf16 has too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().double()


def on(x: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """A leaf there."""
    return x.detach().to(device, dtype).requires_grad_()


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """want: in fp64."""
    assert got.dtype == dtype
    off = (got.detach().double().cpu() - want.detach().cpu()).abs().max()
    assert off <= CLOSE[dtype] * want.abs().max(), (
        f"off by {off:.3g}, the largest is {want.abs().max():.3g}"
    )
