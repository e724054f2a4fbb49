"""Attention along one axis on a GPU: the formula in fp64, the limits of kernels, memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from devices import CPU_AND_GPU, DTYPES, assert_near, on, sizes, tokens
from torch import Tensor

from axialtrain.attention.axis import attend
from axialtrain.bench.peak import held_at_once
from axialtrain.bench.plain import there_and_back, tissue, triple

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
