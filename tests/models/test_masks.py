"""What is missing influences nothing: neither what stands there, nor how much of it there is."""

from __future__ import annotations

import pytest
import torch
from test_passes_mix import (
    EVERY_KIND,
    MADE_FOR,
    POSITIONS,
    WINDOW,
    Kind,
    assert_close,
    holes,
    told,
)
from test_transformer import BANDS, DIM, GRID, PATCH, PLACE, per_pixel, pixels
from torch import Tensor

from axialtrain.grid import Place
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig

pytestmark = pytest.mark.slow

FILLINGS = [50.0, float("nan"), float("inf")]
SIZES = [(5, 7), (6, 3), (3, 4)]  # of three images; no side is shorter than a window
LARGEST = (6, 7)

Outcome = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def outcome(
    model: AxialTransformer, image: Tensor, valid: Tensor | None, place: Place = PLACE
) -> Outcome:
    """Tokens and prefix, and the gradients of pixels and of parameters."""
    image = image.clone().requires_grad_()
    out, prefix = model(image, valid, place)
    values = dict(model.named_parameters())
    of_image, *gradients = torch.autograd.grad(told((out, prefix)), [image, *values.values()])
    return out, prefix, of_image, dict(zip(values, gradients, strict=True))


def enlarged(x: Tensor, grid: tuple[int, int], filling: float) -> Tensor:
    """x: [B, h * patch, w * patch, bands], with more of it to the right and below."""
    out = torch.full((len(x), grid[0] * PATCH, grid[1] * PATCH, BANDS), filling, dtype=x.dtype)
    out[:, : x.shape[1], : x.shape[2]] = x
    return out


def upper_left(sizes: list[tuple[int, int]], grid: tuple[int, int]) -> Tensor:
    """[B, h, w]: the tokens of images that lie in the upper left of a larger grid."""
    valid = torch.zeros(len(sizes), *grid, dtype=torch.bool)
    for i, (height, width) in enumerate(sizes):
        valid[i, :height, :width] = True
    return valid


def test_a_mask_of_nothing_missing_is_no_mask():
    """Layers are given none, and the numbers are those without: the same to the bit."""
    config = AxialTransformerConfig(patch=PATCH, dim=DIM, heads=2, depth=2, bands=BANDS)
    model = AxialTransformer(config).double()
    seen: list[Tensor | None] = []
    for layer in model.blocks:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[3]))
    image = pixels().detach().double()
    every = torch.ones(len(image), *GRID, dtype=torch.bool)
    got, want = (outcome(model, image, valid) for valid in (every, None))
    assert seen == [None] * 4
    pairs = zip((*got[:3], *got[3].values()), (*want[:3], *want[3].values()), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    every[0, 0, 0] = False
    outcome(model, image, every)
    assert all(one is not None for one in seen[4:])


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Gradients of parameters, to rounding."""
    for name, value in want.items():
        assert_close(got[name], value, name)


@EVERY_KIND
def test_what_stands_in_missing_tokens_changes_nothing(kind):
    model, valid = kind.build(), holes()
    missing = ~per_pixel(valid).expand(-1, -1, -1, BANDS)
    image = pixels(images=3)
    tokens, prefix, of_image, gradients = outcome(model, image, valid)
    assert not tokens[~valid].any()
    assert tokens[valid].abs().amin() > 0
    assert not of_image[missing].any()
    for filling in FILLINGS:
        image[missing] = filling
        got = outcome(model, image, valid)
        assert torch.equal(got[0], tokens)
        assert torch.equal(got[1], prefix)
        assert torch.equal(got[2], of_image)
        assert_same(got[3], gradients)


@pytest.mark.parametrize("positions", POSITIONS)
def test_missing_tokens_enter_the_layers_as_zeros(positions):
    model = Kind(("row+col",), positions, "sequential", shared=True, prefix=0).build()
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    valid = holes()
    model(pixels(images=3), valid, PLACE)
    assert not entered[0][~valid].any()
    assert entered[0][valid].any(-1).all()


@pytest.mark.slow
@EVERY_KIND
@pytest.mark.parametrize(
    ("dtype", "grids", "tolerance"),
    [
        pytest.param(torch.float64, [(5, 8), MADE_FOR], 1e-10, id="fp64"),
        pytest.param(torch.float32, [MADE_FOR], 1e-6, id="fp32"),
    ],
)
def test_any_amount_of_padding_changes_nothing(kind, dtype, grids, tolerance):
    model, image = kind.build().to(dtype), pixels().to(dtype)
    alone = model(image, None, PLACE)
    for grid in grids:
        valid = upper_left([GRID, GRID], grid)
        out, prefix = model(enlarged(image, grid, 50.0), valid, Place(*grid))
        assert not out[~valid].any()
        torch.testing.assert_close(out[:, :5, :7], alone[0], rtol=0, atol=tolerance)
        torch.testing.assert_close(prefix, alone[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("positions", ["rope", "clipped", "axial", "grid", "none"])
def test_padding_far_larger_than_the_image_changes_nothing(positions):
    pattern = ("window", "row+col", "shifted", "global")
    model = Kind(pattern, positions, "sequential", shared=True, prefix=1).build()
    alone = model(pixels(), None, PLACE)
    valid = upper_left([GRID, GRID], (31, 40))
    out, prefix = model(enlarged(pixels(), (31, 40), float("nan")), valid, Place(31, 40))
    assert_close(out[:, :5, :7], alone[0])
    assert_close(prefix, alone[1])


@pytest.mark.slow
@EVERY_KIND
def test_a_batch_of_three_sizes_is_three_images(kind):
    """Output, and the gradients of what each of them is told, summed."""
    model = kind.build()
    images = [pixels(size, seed=i, images=1) for i, size in enumerate(SIZES)]
    valid = upper_left(SIZES, LARGEST)
    batch = torch.cat([enlarged(image, LARGEST, torch.nan) for image in images])
    weight = torch.linspace(-1.0, 2.0, valid.numel() * DIM, dtype=batch.dtype)
    weight = weight.view(*valid.shape, DIM)
    values = dict(model.named_parameters())

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(values.values())))

    out, prefix = model(batch, valid, Place(*LARGEST))
    got = gradients((out * weight).sum() + prefix.square().sum())
    want = [torch.zeros_like(value) for value in values.values()]
    for i, (height, width) in enumerate(SIZES):
        part = slice(i, i + 1), slice(height), slice(width)
        alone, of_prefix = model(images[i], None, Place(height, width))
        assert_close(out[part], alone)
        assert_close(prefix[i : i + 1], of_prefix)
        loss = (alone * weight[part]).sum() + of_prefix.square().sum()
        want = [total + one for total, one in zip(want, gradients(loss), strict=True)]
    assert not out[~valid].any()
    assert_same(*(dict(zip(values, some, strict=True)) for some in (got, want)))


@EVERY_KIND
def test_no_mask_is_a_mask_of_all(kind):
    model = kind.build()
    all_of_them = torch.ones(2, *GRID, dtype=torch.bool)
    *got, gradients = outcome(model, pixels(), None)
    *want, expected = outcome(model, pixels(), all_of_them)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)
    assert_same(gradients, expected)


@EVERY_KIND
def test_an_image_without_a_token_is_zeros_and_teaches_nothing(kind):
    model = kind.build()
    filling = torch.full_like(pixels(), torch.nan)
    nothing = torch.zeros(2, *GRID, dtype=torch.bool)
    out, prefix, of_image, gradients = outcome(model, filling, nothing)
    assert not out.any()
    assert not of_image.any()
    assert prefix.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    if not kind.prefix:
        assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("positions", ["rope", "relative"])
@pytest.mark.parametrize(
    ("pattern", "rows", "columns"),
    [
        ("row", slice(2, 3), slice(None)),
        ("col", slice(None), slice(3, 4)),
        ("window", slice(3, 6), slice(3, 6)),
        ("shifted", slice(2, 5), slice(0, 2)),
    ],
)
def test_a_line_or_window_without_a_token_is_zeros_and_its_neighbours_do_not_notice(
    pattern, rows, columns, positions
):
    model = Kind((pattern,), positions, "sequential", shared=True, prefix=0).build()
    valid = torch.ones(2, *GRID, dtype=torch.bool)
    valid[0, rows, columns] = False
    missing = ~per_pixel(valid).expand(-1, -1, -1, BANDS)
    image = pixels().masked_fill(missing, torch.nan)
    out, _, of_image, gradients = outcome(model, image, valid)
    complete, _ = model(pixels(), None, PLACE)
    assert_close(out, complete * valid[..., None])
    assert of_image.isfinite().all()
    assert not of_image[missing].any()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_window_at_the_border_of_an_image_is_not_filled_up_from_its_padding():
    kind = Kind(("window",), "rope", "sequential", shared=True, prefix=0)
    size = (2 * WINDOW - 1, 2 * WINDOW - 1)
    alone, _ = kind.build()(pixels(size), None, Place(*size))
    valid = upper_left([size, size], (2 * WINDOW, 3 * WINDOW))
    image = enlarged(pixels(size), (2 * WINDOW, 3 * WINDOW), 1e6)
    within, _ = kind.build()(image, valid, Place(2 * WINDOW, 3 * WINDOW))
    assert_close(within[:, : size[0], : size[1]], alone)


@pytest.mark.parametrize(
    "valid",
    [
        torch.ones(2, *GRID),
        torch.ones(2, *GRID[::-1], dtype=torch.bool),
        torch.ones(1, *GRID, dtype=torch.bool),
    ],
    ids=["not boolean", "transposed", "of one image"],
)
def test_a_mask_that_is_not_one_of_these_tokens_is_refused(valid):
    model = Kind(("row+col",), "rope", "sequential", shared=True, prefix=0).build()
    with pytest.raises(ValueError, match=r"valid is .*: allowed is torch\.bool \(2, 5, 7\)"):
        model(pixels(), valid, PLACE)
