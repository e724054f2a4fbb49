"""Batch norm over the batch, wherever its cells are: torch's results, masks, precision, meshes."""

from __future__ import annotations

import pytest
import torch
from distributed.conv_ranks import sharded_norm, whole_norm
from distributed.launcher import run_ranks
from torch import Tensor, nn

from axialtrain.models.batch_norm import BatchNorm, LogitNorm, Moments

CHANNELS = 5


def values(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, CHANNELS, generator=generator, dtype=torch.float64) * 3 + 2


def pair() -> tuple[BatchNorm, nn.BatchNorm1d]:
    """Ours and torch's, with the same random parameters and running statistics."""
    ours, torchs = BatchNorm(CHANNELS).double(), nn.BatchNorm1d(CHANNELS).double()
    generator = torch.Generator().manual_seed(1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        drawn = torch.rand(CHANNELS, generator=generator, dtype=torch.float64) + 0.5
        for module in (ours, torchs):
            getattr(module, name).data.copy_(drawn)
    return ours, torchs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_it_is_torchs_over_the_valid_cells(training, masked):
    ours, torchs = pair()
    ours.train(training)
    torchs.train(training)
    x = values(2, 7, 6).requires_grad_()
    valid = torch.rand(2, 7, 6, generator=torch.Generator().manual_seed(2)) < 0.7
    grad = values(2, 7, 6, seed=3)
    if not masked:
        valid = torch.ones_like(valid)
    out = ours(x, valid if masked else None)
    (out * grad).sum().backward()
    other = x.detach()[valid].requires_grad_()
    want = torchs(other)
    (want * grad[valid]).sum().backward()
    torch.testing.assert_close(out[valid], want)
    assert not out[~valid].any()
    torch.testing.assert_close(x.grad[valid], other.grad, rtol=1e-11, atol=1e-11)
    assert not x.grad[~valid].any()
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(torchs, name).grad)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(torchs, name))


def test_what_is_not_valid_may_be_anything():
    x, valid = values(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 1, 2] = False
    x[0, 1, 2] = torch.nan
    x.requires_grad_()
    norm = BatchNorm(CHANNELS).double()
    norm(x, valid).sum().backward()
    assert x.grad.isfinite().all()
    assert norm.running_var.isfinite().all()


def test_a_large_mean_does_not_cost_the_variance():
    x = (values(1, 64, 64) + 1e4).float()
    got = BatchNorm(CHANNELS)(x)
    want = nn.BatchNorm1d(CHANNELS).double()(x.double().flatten(0, 2)).view(x.shape)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-3)  # x itself is within 1e-3


def test_a_batch_without_cells_moves_no_statistics():
    norm, _ = pair()
    before = norm.running_mean.clone(), norm.running_var.clone()
    out = norm(values(2, 3, 3), torch.zeros(2, 3, 3, dtype=torch.bool))
    assert not out.any()
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])


def test_one_cell_gives_its_bias():
    norm, _ = pair()
    out = norm(values(1, 1, 1))
    torch.testing.assert_close(out[0, 0, 0], norm.bias.detach())
    assert norm.running_var.isfinite().all()


def test_in_bf16_the_statistics_stay_in_fp32_and_are_those_of_fp32():
    exact, norm = BatchNorm(CHANNELS), BatchNorm(CHANNELS)
    norm.running_mean.add_(1 / 3)  # not a number of bf16
    exact.running_mean.add_(1 / 3)
    norm.bfloat16()
    assert norm.weight.dtype is torch.bfloat16
    x = values(2, 9, 9).bfloat16().requires_grad_()
    out = norm(x)
    want = exact(x.detach().float())
    assert out.dtype is torch.bfloat16
    assert norm.running_mean.dtype is norm.running_var.dtype is torch.float32
    torch.testing.assert_close(norm.running_mean, exact.running_mean, rtol=0, atol=0)
    torch.testing.assert_close(norm.running_var, exact.running_var, rtol=0, atol=0)
    torch.testing.assert_close(out.float(), want, rtol=0.01, atol=0.01)
    out.sum().backward()
    assert norm.weight.grad.dtype is torch.bfloat16
    assert norm.double().running_mean.dtype is torch.float64


def kept_maps(norm: BatchNorm, x: Tensor, valid: Tensor | None) -> int:
    """How many tensors of x's size are kept for backward."""
    kept: dict[int, int] = {}

    def pack(one: Tensor) -> Tensor:
        storage = one.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        out = norm(x, valid)  # lives until all are counted
    assert out.shape == x.shape
    return sum(size >= x.nbytes for size in kept.values())


@pytest.mark.parametrize("masked", [False, True])
def test_one_map_is_kept_for_backward(masked):
    x = values(2, 9, 9).requires_grad_()
    valid = torch.rand(2, 9, 9) < 0.7 if masked else None
    norm = BatchNorm(CHANNELS).double()
    assert kept_maps(norm, x, valid) == 1
    assert kept_maps(norm.eval(), x, valid) == 1
    assert kept_maps(norm.requires_grad_(False), x, valid) == 0


def test_a_frozen_norm_passes_gradients_on():
    ours, torchs = pair()
    found = []
    for norm in (ours.eval(), torchs.eval()):
        norm.requires_grad_(False)
        x = values(2, 9).requires_grad_()
        found.append(torch.autograd.grad(norm(x.view(-1, CHANNELS)).square().sum(), x)[0])
    torch.testing.assert_close(*found)


def test_backward_of_evaluation_may_come_behind_a_step():
    norm, _ = pair()
    x = values(2, 9)
    norm.eval()
    (want,) = torch.autograd.grad(norm(x).square().sum(), norm.weight)
    out = norm(x)
    norm.train()(values(2, 9, seed=1))  # moves the running statistics
    (got,) = torch.autograd.grad(out.square().sum(), norm.weight)
    assert torch.equal(got, want)


def test_moments_in_parts_are_those_of_all():
    x = values(8)
    parts = [Moments.of(part, None) for part in x.split((1, 5, 2))]
    count, mean, squares = (
        torch.stack([getattr(part, key) for part in parts]) for key in ("count", "mean", "squares")
    )
    joined = Moments(count, mean, squares).of_parts()
    torch.testing.assert_close(joined.count, torch.tensor(8.0, dtype=torch.float64))
    torch.testing.assert_close(joined.mean, x.mean(0))
    torch.testing.assert_close(joined.squares, x.var(0, correction=0) * 8)


def test_a_norm_of_logits_has_a_bias_without_gradient():
    norm = LogitNorm(CHANNELS).double()
    x = values(20).requires_grad_()
    parts = [Moments.of(part, None) for part in x.split((1, 12, 7))]
    factor = norm(
        tuple(
            torch.stack([getattr(one, key) for one in parts])
            for key in ("count", "mean", "squares")
        )
    )
    torch.testing.assert_close(factor, (x.var(0, correction=0) + norm.eps).rsqrt())
    factor.square().sum().backward()
    assert torch.equal(norm.bias.grad, torch.zeros_like(norm.bias))
    torch.testing.assert_close(norm.running_mean, 0.1 * x.detach().mean(0))
    norm.eval()
    torch.testing.assert_close(norm(None), (norm.running_var + norm.eps).rsqrt())


@pytest.mark.parametrize("mesh", [(1, 1, 2), (2, 1, 1), (1, 2, 2), (2, 2, 1), (1, 2, 3)], ids=str)
def test_any_mesh_gives_the_serial_results_gradients_and_statistics(mesh):
    """data x row x col; the last image of two data ranks is a filler, without a valid cell."""
    data, row, col = mesh
    whole = whole_norm(data)
    ranks = run_ranks(sharded_norm, data * row * col, mesh=mesh)
    for rank in ranks:
        where = rank["where"]
        for key in ("out", "input"):
            torch.testing.assert_close(rank[key], whole[key][where], rtol=1e-11, atol=1e-11)
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(rank[key], whole[key], rtol=1e-12, atol=0)
            assert torch.equal(rank[key], ranks[0][key]), "equal on all ranks, bit by bit"
    for key in ("weight", "bias"):
        total = sum(rank[key] for rank in ranks)
        torch.testing.assert_close(total, whole[key], rtol=1e-11, atol=1e-11)
