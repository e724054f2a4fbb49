"""Attention along one axis on a GPU: the formula in fp64, the limits of kernels, memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from devices import CPU_AND_GPU, DTYPES, GPU, assert_near, on, sizes, tokens
from torch import Tensor
from torch.nn.attention import flex_attention

from axialtrain.attention.area import attend_all, attend_windows
from axialtrain.attention.axis import attend
from axialtrain.attention.kernels import FLEX
from axialtrain.bench.peak import held_at_once
from axialtrain.bench.plain import there_and_back, tissue, triple
from axialtrain.grid import Rect

DIMS = pytest.mark.parametrize("dim", [pytest.param(2, id="rows"), pytest.param(1, id="columns")])
SHAPE = (2, 48, 80, 2, 64)  # B, H, W, N, K


def formula(
    q: Tensor, k: Tensor, v: Tensor, dim: int, mask: Tensor | None, table: Tensor | None
) -> Tensor:
    """In the dtype that it gets, with all logits at once; zeros for a line without keys."""
    q, k, v = (x.movedim(dim, 3) for x in (q, k, v))  # [B, lines, N, L, K]
    length = q.shape[3]
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if table is not None:
        index = torch.arange(length)
        logits = logits + table[:, index[None] - index[:, None] + length - 1]
    if mask is None:
        return (logits.softmax(-1) @ v).movedim(3, dim)
    keys = mask.movedim(dim, 2)[:, :, None, None]  # [B, lines, 1, 1, L]
    some = keys.any(-1, keepdim=True)
    weights = logits.masked_fill(~(keys | ~some), -torch.inf).softmax(-1)
    return torch.where(some, weights @ v, 0.0).movedim(3, dim)


@CPU_AND_GPU
@DTYPES
@DIMS
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "relative"])
def test_values_and_gradients_are_those_of_the_formula(device, dtype, dim, masked, biased):
    wide = [tokens(*SHAPE, seed=seed) for seed in range(3)]
    if biased:
        wide.append(tokens(SHAPE[3], 2 * SHAPE[dim] - 1, seed=3))
    weight = tokens(*SHAPE, seed=4)
    mask = None
    if masked:  # blobs, and a line of either kind that has nothing
        mask = tissue(*SHAPE[1:3], 0.5, device=torch.device("cpu")).repeat(2, 1, 1)
        mask[0, 3] = mask[1, :, 7] = False
        weight = weight * mask[..., None, None]  # what a masked token gets, nobody looks at
    reference = [on(x, "cpu", torch.float64) for x in wide]
    want = formula(*reference[:3], dim, mask, reference[3] if biased else None)
    inputs = [on(x, device, dtype) for x in wide]
    table = inputs[3] if biased else None
    keys = None if mask is None else mask.to(device)
    got = attend(*inputs[:3], dim, key_mask=keys, query_mask=keys, bias=table)
    seen = torch.ones(SHAPE[:3], dtype=torch.bool) if mask is None else mask
    assert_near(got.cpu()[seen], want[seen], dtype)
    found = torch.autograd.grad(got, inputs, weight.to(device, dtype))
    expected = torch.autograd.grad(want, reference, weight)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, dtype)


@pytest.fixture
def flex(monkeypatch, request):
    """FlexAttention, on a CPU too, where it has no kernel and computes all logits at once."""
    if request.getfixturevalue("device") == "cpu":
        monkeypatch.setitem(FLEX, "cpu", FLEX["cuda"])
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *given: None)


@pytest.mark.usefixtures("flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@CPU_AND_GPU
@DTYPES
@DIMS
@pytest.mark.parametrize("rich", [False, True], ids=["plain", "masked, prefix, part, far"])
def test_flex_and_chunks_give_a_bias_the_same_values_and_gradients(device, dtype, dim, rich):
    """Of 2 images, whose columns are no view of one batch, and lengths that no block divides."""
    shape = (2, 9, 13, 2, 16) if device == "cpu" else (2, 150, 330, 3, 64)
    heads, width = shape[3:]
    wide = [tokens(*shape, seed=seed) for seed in range(3)]
    wide.append(tokens(heads, 7 if rich else 2 * shape[dim] - 1, seed=3))
    if rich:
        wide += [tokens(2, 3, heads, width, seed=seed) for seed in (5, 6)]
    inputs = {
        name: [on(x, where, kind) for x in wide]
        for name, where, kind in (("flex", device, dtype), ("chunks", "cpu", torch.float64))
    }
    mask = tissue(*shape[1:3], 0.5, device=torch.device("cpu")).repeat(2, 1, 1)
    mask[0, 3] = mask[1, :, 7] = False
    found = {}
    for kernel, (q, k, v, table, *prefix) in inputs.items():
        own, offset = q, 0
        options: dict[str, Any] = {}
        if rich:
            own, offset = q.narrow(dim, 1, shape[dim] - 2), 1
            options = {"key_mask": mask.to(q.device), "prefix": tuple(prefix)}
        out = attend(own, k, v, dim, bias=table, offset=offset, kernel=kernel, **options)
        weight = tokens(*out.shape, seed=4).to(q.device, q.dtype)
        found[kernel] = [out, *torch.autograd.grad(out, inputs[kernel], weight)]
    for got, want in zip(found["flex"], found["chunks"], strict=True):
        assert_near(got, want, dtype)


@pytest.mark.usefixtures("flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@CPU_AND_GPU
@pytest.mark.parametrize(
    ("area", "dtype", "width"),
    [
        pytest.param("windows", torch.float32, 64, id="windows, fp32"),
        pytest.param("image", torch.float32, 64, id="image, fp32"),
        pytest.param("image", torch.bfloat16, 64, id="image, bf16"),
        pytest.param("image", torch.bfloat16, 128, id="image, bf16, 128 channels"),
    ],
)
def test_flex_and_chunks_over_areas(device, area, dtype, width):
    """Two biases a pair: in bf16 the kernels of flex that need the most shared memory."""
    shape = (1, 9, 14, 2, width // 4) if device == "cpu" else (1, 40, 66, 2, width)
    wide = [tokens(*shape, seed=seed) for seed in range(3)]
    wide += [tokens(2, 9, seed=3), tokens(2, 25, seed=4)]
    grid = Rect(0, shape[1], 0, shape[2])
    found = {}
    for kernel, where, kind in (("flex", device, dtype), ("chunks", "cpu", torch.float64)):
        inputs = [on(x, where, kind) for x in wide]
        q, k, v, *tables = inputs
        bias = (tables[0], tables[1])
        if area == "image":
            out = attend_all(q, k, v, grid, bias=bias, kernel=kernel)
        else:
            out = attend_windows(q, k, v, grid, grid, 8, 4, bias=bias, kernel=kernel)
        weight = tokens(*shape, seed=5).to(where, kind)
        found[kernel] = [out, *torch.autograd.grad(out, inputs, weight)]
    for got, want in zip(found["flex"], found["chunks"], strict=True):
        assert_near(got, want, dtype)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_flex_takes_lengths_that_change(device):
    """Its kernels are made for lengths that vary once they do; there is no end of new ones."""
    for length in range(200, 900, 50):
        q, k, v = triple(1, 4, length, 2, 64, device=torch.device(device), dtype=torch.bfloat16)
        table = tokens(2, 2 * length - 1).to(device, torch.float32).requires_grad_()
        out, want = (attend(q, k, v, 2, bias=table, kernel=one) for one in ("flex", "chunks"))
        assert_near(out, want.double(), torch.bfloat16)
        weight = torch.ones_like(out)
        for got, other in zip(
            torch.autograd.grad(out, (q, k, v, table), weight),
            torch.autograd.grad(want, (q, k, v, table), weight),
            strict=True,
        ):
            off = (got.double() - other.double()).norm() / other.double().norm()
            assert off <= 3e-2


@CPU_AND_GPU
@DTYPES
@pytest.mark.parametrize(
    ("dim", "shape"),
    [
        pytest.param(1, (1, 3, 8200, 8, 8), id="65,600 columns x heads"),
        pytest.param(2, (1, 65_600, 3, 2, 8), id="65,600 rows"),
        pytest.param(2, (5, 13_200, 3, 2, 8), id="66,000 rows of 5 images"),
    ],
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_more_lines_than_a_kernel_takes(device, dtype, dim, shape, masked):
    """Memory-efficient attention takes fewer than 65,536 heads, flash as many images at most."""
    wide = [tokens(*shape, seed=seed) for seed in range(3)]
    weight = tokens(*shape, seed=4)
    mask = None
    if masked:
        mask = torch.ones(shape[:3], dtype=torch.bool)
        mask[:, ::3, 0] = mask[:, 1, ::5] = False
        weight = weight * mask[..., None, None]
    reference = [on(x, "cpu", torch.float64) for x in wide]
    want = formula(*reference, dim, mask, None)
    inputs = [on(x, device, dtype) for x in wide]
    keys = None if mask is None else mask.to(device)
    got = attend(*inputs, dim, key_mask=keys, query_mask=keys)
    seen = torch.ones(shape[:3], dtype=torch.bool) if mask is None else mask
    assert_near(got.cpu()[seen], want[seen], dtype)
    found = torch.autograd.grad(got, inputs, weight.to(device, dtype))
    for one, other in zip(found, torch.autograd.grad(want, reference, weight), strict=True):
        assert_near(one, other, dtype)


@sizes(cpu=(1, 12, 14, 2, 8), gpu=(1, 2048, 2080, 8, 64))
@DIMS
def test_a_grid_whose_numbers_32_bits_do_not_count(device, size, dim):
    """2048 x 2080 tokens of 512 channels: more than 2^31. Each line is what it is alone."""
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 70 << 30:
        pytest.skip("needs a GPU of 70 GiB")
    dtype = torch.bfloat16
    q, k, v = triple(*size, device=torch.device(device), dtype=dtype)
    out = attend(q, k, v, dim)
    grads = torch.autograd.grad(out, (q, k, v), out.detach())
    lines = 3 - dim  # the other dim
    for line in (0, size[lines] // 2, size[lines] - 1):
        alone = [
            x.detach().narrow(lines, line, 1).double().cpu().requires_grad_() for x in (q, k, v)
        ]
        want = formula(*alone, dim, None, None)
        assert_near(out.narrow(lines, line, 1), want, dtype)
        weight = out.detach().narrow(lines, line, 1).double().cpu()
        for got, one in zip(grads, torch.autograd.grad(want, alone, weight), strict=True):
            assert_near(got.narrow(lines, line, 1), one, dtype)


@sizes(cpu=(48, 512, 4, 4), gpu=(64, 4096, 8, 64))
@DIMS
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "relative"])
def test_nothing_of_the_size_of_all_logits_is_held(device, size, dim, biased):
    lines, length, heads, width = size
    where = torch.device(device)
    shape = (1, lines, length, heads, width) if dim == 2 else (1, length, lines, heads, width)
    q, k, v = triple(*shape, device=where, dtype=torch.float32)
    others: list[Tensor] = []
    if biased:
        others = [torch.zeros(heads, 2 * length - 1, device=where, requires_grad=True)]
    way = there_and_back(
        partial(attend, dim=dim, bias=others[0] if others else None), q, k, v, *others
    )
    way()  # what stays
    held, _ = held_at_once(way, where)
    logits = lines * heads * length**2 * 4
    chunk = 2**24  # bytes of the logits that a chunk has
    assert held <= 12 * q.nbytes + 6 * chunk < logits
