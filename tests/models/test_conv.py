"""Layers that look at neighbours: torch's own results on one rank, and the same on any mesh."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from distributed.conv_ranks import LAYERS, layer, sharded_layer, tile_of
from distributed.launcher import run_ranks
from torch import Tensor

from axialtrain.grid import Layout, Place
from axialtrain.models.conv import AvgPool, Conv, MaxPool, Upsample, cells_of

GRIDS = [(13, 10), (7, 5), (12, 6)]


def image(grid: tuple[int, int], channels: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *grid, channels, generator=generator, dtype=torch.float64)


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("size", "stride", "dilation", "groups"), [
    (1, 1, 1, 1), (1, 2, 1, 1), (3, 1, 1, 1), (3, 2, 1, 1), (7, 2, 1, 1), (5, 1, 1, 4),
    (3, 1, 6, 1), (3, 3, 2, 2),
])  # fmt: skip
def test_convolution_is_torchs(grid, size, stride, dilation, groups):
    conv = Conv(4, 8, size, stride=stride, dilation=dilation, groups=groups, bias=True).double()
    torch.nn.init.normal_(conv.bias)
    got = conv(image(grid), Place(*grid))
    want = F.conv2d(
        nchw(image(grid)),
        conv.weight,
        conv.bias,
        stride,
        dilation * (size // 2),
        dilation,
        groups,
    )
    torch.testing.assert_close(nchw(got), want)
    exit_ = conv.exit(Place(*grid))
    assert got.shape[1:3] == (exit_.height, exit_.width)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("size", "stride"), [(3, 2), (3, 1), (7, 1), (5, 3)])
def test_max_pooling_is_torchs(grid, size, stride):
    x = image(grid) - 5  # outside the image is not a zero that would be the largest
    got = MaxPool(size, stride)(x, Place(*grid))
    torch.testing.assert_close(nchw(got), F.max_pool2d(nchw(x), size, stride, size // 2))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("stride", [2, 3])
def test_average_pooling_is_torchs(grid, stride):
    got = AvgPool(stride)(image(grid), Place(*grid))
    want = F.avg_pool2d(nchw(image(grid)), stride, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(nchw(got), want)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_enlargement_is_torchs(grid, factor):
    got = Upsample(factor)(image(grid), Place(*grid))
    want = F.interpolate(nchw(image(grid)), scale_factor=factor, mode="bilinear")
    torch.testing.assert_close(nchw(got), want)


def test_an_image_that_ends_inside_the_grid_is_enlarged_as_if_it_ended_there():
    grid, inside = (7, 9), (5, 6)
    valid = torch.zeros(2, *grid, dtype=torch.bool)
    valid[:, : inside[0], : inside[1]] = True
    x = torch.where(valid[..., None], image(grid), 0.0)
    got = Upsample(4)(x, Place(*grid), valid)
    want = Upsample(4)(x[:, : inside[0], : inside[1]], Place(*inside))
    torch.testing.assert_close(got[:, : 4 * inside[0], : 4 * inside[1]], want)
    assert not got[:, 4 * inside[0] :].any()
    assert not got[:, :, 4 * inside[1] :].any()


def test_sizes_without_a_centre_are_refused():
    for build in (lambda: Conv(1, 1, 2), lambda: MaxPool(4, 2)):
        with pytest.raises(ValueError, match=r"size=\d: allowed are odd sizes"):
            build()


def test_cells_take_the_validity_of_their_token():
    whole = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    fine = whole.repeat_interleave(4, 1).repeat_interleave(4, 2)
    for layout in Layout:
        for at in itertools.product(range(2), range(3)):
            place = Place(4, 3, shape=(2, 3), at=at).finer(4).under(layout)
            assert torch.equal(cells_of(whole, place), fine[:, *place.rect.slices(place.grid)])
    assert cells_of(None, Place(4, 3)) is None


# --- The same on any mesh -------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [(1, 2), (2, 1), (2, 2), (2, 3)], ids=str)
def test_any_mesh_gives_the_serial_results_and_gradients(mesh):
    """Every kind of layer, on grids of one cell a token and of several, behind one another where a
    coarse grid leaves some ranks with nothing."""
    cases = [
        (name, grid, unit)
        for name in LAYERS
        for grid, unit in (((13, 10), 1), ((7, 5), 1), ((7, 5), 4), ((3, 4), 2))
    ]
    ranks = run_ranks(sharded_layer, mesh[0] * mesh[1], mesh=mesh, cases=cases)
    for index, (name, grid, unit) in enumerate(cases):
        whole = layer(name, Place(*grid).finer(unit))
        found = [rank[index] for rank in ranks]
        for got in found:
            where = (slice(None), *tile_of(got["exit"]))
            torch.testing.assert_close(got["out"], whole["out"][where], rtol=1e-12, atol=1e-12)
            where = (slice(None), *tile_of(got["entry"]))
            torch.testing.assert_close(got["input"], whole["input"][where], rtol=1e-10, atol=1e-10)
        for key in whole["weights"]:
            total = sum(got["weights"][key] for got in found)
            torch.testing.assert_close(total, whole["weights"][key], rtol=1e-10, atol=1e-10)


def test_some_of_those_ranks_had_nothing():
    place = Place(3, 4, shape=(2, 3), at=(0, 0))
    coarse = place.coarser(2).coarser(2)
    assert any(coarse.rect_of(at).empty for at in itertools.product(range(2), range(3)))


def test_a_grid_that_stays_aligned_sends_halos_only_and_pointwise_layers_nothing():
    cases = [
        ("conv 1 x 1, stride 2", (7, 5), 4),
        ("mean of 2", (7, 5), 4),
        ("conv 3 x 3", (7, 5), 4),
    ]
    for rank in run_ranks(sharded_layer, 4, mesh=(2, 2), cases=cases):
        *nothing, halo = rank
        assert [case["sent"] for case in nothing] == [0, 0]
        top, bottom, left, right = halo["entry"]
        # One line of cells to the neighbour below or above, one to the side, and the corner.
        cells = (bottom - top) + (right - left) + 1
        assert halo["sent"] == 2 * cells * 4 * 8  # images, channels, bytes; forward only
