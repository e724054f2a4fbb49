"""The backbone and its heads in one process: shapes, names, and who may influence whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig, Pass
from axialtrain.attention.passes import AxialAttention
from axialtrain.grid import Layout, Place
from axialtrain.models.heads import MaskedReconstructor, Segmenter
from axialtrain.models.layer import Layer
from axialtrain.models.patches import PatchEmbed, to_patches
from axialtrain.models.transformer import (
    AxialTransformer,
    AxialTransformerConfig,
)

PATCH, BANDS, DIM = 2, 3, 16
GRID = (5, 7)
PLACE = Place(*GRID)
M = TypeVar("M", bound=nn.Module)


def config(
    pattern: Sequence[str] = ("row+col",), attention: dict[str, Any] | None = None, **options: Any
) -> AxialTransformerConfig:
    return AxialTransformerConfig(
        **{"patch": PATCH, "dim": DIM, "depth": 2, "heads": 4, "mlp_ratio": 2.0, "bands": BANDS}
        | {"axial_config": AxialConfig(list(pattern), **(attention or {}))}
        | options
    )


def random_weights(model: M) -> M:
    """In fp64 and large enough that every token says something to every other."""
    torch.manual_seed(0)
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def backbone(pattern=("row+col",), attention=None, **options) -> AxialTransformer:
    return random_weights(AxialTransformer(config(pattern, attention, **options)))


def pixels(grid=GRID, seed=0, images=2) -> Tensor:
    shape = (images, grid[0] * PATCH, grid[1] * PATCH, BANDS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_tokens(fraction=0.6) -> Tensor:
    return torch.rand(2, *GRID, generator=torch.Generator().manual_seed(7)) < fraction


def per_pixel(tokens: Tensor) -> Tensor:
    """[B, h, w] -> [B, h * patch, w * patch, 1]."""
    return tokens.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[..., None]


ALL = torch.ones(2, *GRID, dtype=torch.bool)


@pytest.mark.parametrize(
    "pattern", [("row+col",), ("col+row",), ("row",), ("col",), ("row", "col")]
)
def test_tokens_in_the_shape_of_the_grid(pattern):
    out, _ = backbone(pattern)(pixels(), ALL, PLACE)
    assert out.shape == (2, *GRID, DIM)
    assert out.isfinite().all()


def test_a_place_that_is_left_out_is_that_of_the_whole_image():
    model = backbone()
    assert torch.equal(model(pixels())[0], model(pixels(), None, PLACE)[0])


def test_parameter_names_are_timms():
    model = AxialTransformer(config(depth=1))
    linear = ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj")
    linear += ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2")
    norms = ("blocks.0.norm1", "blocks.0.norm2", "norm")
    expected = {f"{name}.{what}" for name in linear + norms for what in ("weight", "bias")}
    assert model.state_dict().keys() == expected


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_patches_are_those_of_a_strided_convolution():
    """timm embeds patches with one: its weight [D, C, p, p], flattened, is ours."""
    embed = PatchEmbed(4, BANDS, DIM).double()
    image = torch.randn(2, 12, 20, BANDS, dtype=torch.float64)
    kernel = embed.proj.weight.view(DIM, BANDS, 4, 4)
    expected = F.conv2d(image.movedim(-1, 1), kernel, embed.proj.bias, stride=4).movedim(1, -1)
    valid = torch.ones(2, 3, 5, dtype=torch.bool)
    torch.testing.assert_close(embed(image, valid), expected)


def test_positions_are_told_apart():
    """With rope the tokens of an image of equal pixels change when two patches change places."""
    image = pixels()
    swapped = image.clone()
    swapped[:, :, :PATCH], swapped[:, :, PATCH : 2 * PATCH] = (
        image[:, :, PATCH : 2 * PATCH],
        image[:, :, :PATCH],
    )
    for positions, same in (("none", True), ("rope", False)):
        model = backbone(axial_config=AxialConfig(["row"], positions=positions))
        one, other = (model(x, ALL, PLACE)[0][:, :, 2:] for x in (image, swapped))
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9) is same


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, values = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))


@pytest.mark.parametrize("corner", [(0, 0), (2, 1)], ids=str)
def test_an_image_in_a_larger_grid_is_the_image_alone(corner):
    """Wherever it lies: missing tokens are no keys, and rotary positions see differences alone."""
    model = backbone()
    alone, _ = model(pixels(), ALL, PLACE)
    rows, columns = GRID[0] + 2, GRID[1] + 3
    grid = PLACE.rect.shifted(-corner[0], -corner[1])  # the larger one, seen from the image
    image = torch.full((2, rows * PATCH, columns * PATCH, BANDS), 3.0, dtype=torch.float64)
    image[:, *PLACE.rect.scaled(PATCH).slices(grid.scaled(PATCH))] = pixels()
    valid = torch.zeros(2, rows, columns, dtype=torch.bool)
    valid[:, *PLACE.rect.slices(grid)] = True
    within = model(image, valid, Place(rows, columns))[0][:, *PLACE.rect.slices(grid)]
    torch.testing.assert_close(within, alone, rtol=1e-10, atol=1e-10)


class Patches(nn.Module):
    """Stands in for a backbone: a token is its patch of pixels."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.config = AxialTransformerConfig(
            patch=patch,
            dim=BANDS * patch**2,
            heads=1,
            axial_config=AxialConfig(positions="none"),
            bands=BANDS,
        )

    def forward(
        self, image: Tensor, valid: Tensor, place: Place, chance: None
    ) -> tuple[Tensor, Tensor]:
        return to_patches(image, self.config.patch), image.new_zeros(len(image), 0, 1)


@pytest.mark.parametrize("cells", [1, 2, 4])
def test_each_cell_of_a_segmenter_lies_where_its_pixels_are(cells):
    """A head that names each cell's mean colour turns the image into its own reduction."""
    patch = 4
    model = Segmenter(Patches(patch), classes=BANDS, cells=cells).double()
    side = patch // cells
    weight = torch.zeros(cells, cells, BANDS, BANDS, patch, patch, dtype=torch.float64)
    for i in range(cells):
        for j in range(cells):
            for band in range(BANDS):
                rows, columns = slice(i * side, (i + 1) * side), slice(j * side, (j + 1) * side)
                weight[i, j, band, band, rows, columns] = side**-2
    with torch.no_grad():
        model.head.weight.copy_(weight.flatten(0, 2).flatten(1))
        model.head.bias.zero_()
    image = torch.randn(2, 3 * patch, 5 * patch, BANDS, dtype=torch.float64)
    expected = F.avg_pool2d(image.movedim(-1, 1), side).movedim(1, -1)
    got = model(image, torch.ones(2, 3, 5, dtype=torch.bool), Place(3, 5))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("cells", [0, 3])
def test_cells_divide_the_patch(cells):
    with pytest.raises(ValueError, match=f"task.cells={cells} does not divide") as error:
        Segmenter(AxialTransformer(config(patch=4)), classes=2, cells=cells)
    assert "[1, 2, 4]" in str(error.value)


def test_hidden_pixels_influence_nothing():
    model = random_weights(MaskedReconstructor(AxialTransformer(config())))
    hidden = some_tokens(0.5)
    image = pixels().requires_grad_()
    out = model(image, ALL, hidden, PLACE)
    assert out.shape == (2, *GRID, BANDS * PATCH**2)
    loss = out.square().sum()
    (grad,) = torch.autograd.grad(loss, image, retain_graph=True)
    at_hidden = per_pixel(hidden).expand_as(grad)
    assert not grad[at_hidden].any()
    assert grad[~at_hidden].abs().amin() > 0
    expected = gradients(model, loss)
    other = torch.where(per_pixel(hidden), pixels(seed=1), pixels())
    again = model(other, ALL, hidden, PLACE)
    assert torch.equal(again, out)
    for name, gradient in gradients(model, again.square().sum()).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert expected["mask_token"].abs().amin() > 0


def test_a_hidden_token_that_is_not_valid_is_no_token():
    model = random_weights(MaskedReconstructor(AxialTransformer(config())))
    valid, hidden = some_tokens(), some_tokens(0.8)
    assert (hidden & ~valid).any()
    got = model(pixels(), valid, hidden, PLACE)
    assert torch.equal(got, model(pixels(), valid, hidden & valid, PLACE))


def test_a_layer_says_where_it_leaves_the_tokens():
    place = Place(13, 10, Layout.TILE, (2, 3), (1, 2))
    for pattern, layout in (("row", Layout.ROWS), ("row+col", Layout.COLS), ("col", Layout.COLS)):
        layer = Layer(8, 2, 8, AxialConfig([pattern]))
        assert layer.exit(place) == place.under(layout)


def test_heads_are_packed_one_after_the_other():
    """[N][q, k, v][K]: half of the rows of qkv and half of the columns of proj are whole heads."""
    which, attention = Pass.ROW, AxialConfig(["row"])
    whole = random_weights(AxialAttention(DIM, 4, (which,), attention))
    none = torch.zeros(2, 0, DIM, dtype=torch.float64)
    x = torch.randn(2, *GRID, DIM, dtype=torch.float64)
    total = whole.proj.bias
    for half in range(2):
        part = AxialAttention(DIM, 4, (which,), attention).double()
        rows = whole.qkv.weight.chunk(2)[half], whole.qkv.bias.chunk(2)[half]
        part.qkv.weight, part.qkv.bias = map(nn.Parameter, rows)
        part.proj.weight = nn.Parameter(whole.proj.weight.chunk(2, dim=1)[half])
        nn.init.zeros_(part.proj.bias)
        total = total + part(x, none, PLACE, which)[0]
    torch.testing.assert_close(total, whole(x, none, PLACE, which)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 0}, r"model\.patch=0: allowed are whole numbers from 1"),
        ({"depth": 0}, r"model\.depth=0: allowed"),
        ({"heads": -1}, r"model\.heads=-1: allowed"),
        ({"bands": 0}, r"model\.bands=0: allowed"),
        ({"mlp_ratio": 0.0}, r"model\.mlp_ratio=0\.0: allowed are numbers above 0"),
        ({"dim": 16, "heads": 3}, r"model\.heads=3 does not divide model\.dim=16"),
        (
            {"dim": 12, "heads": 4},
            r"rope needs an even head width, .*model.heads=4 = 3",
        ),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_an_odd_head_width_is_fine_without_rope():
    options = config(dim=12, heads=4, axial_config=AxialConfig(positions="none"))
    assert AxialTransformer(options)(pixels().float(), ALL, PLACE)[0].shape == (2, *GRID, 12)


# --- What is not allowed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_scale": True}, r"model\.layer_scale=True: allowed are null and numbers above 0"),
        ({"layer_scale": "a"}, r"model\.layer_scale='a': allowed are null and numbers above 0"),
        ({"mlp_ratio": "a"}, r"model\.mlp_ratio='a': allowed are numbers above 0"),
        ({"drop_path": True}, r"model\.drop_path=True: allowed is 0 to below 1"),
        ({"qkv_bias": "no"}, r"model\.qkv_bias='no': allowed are true and false"),
        ({"axial_config": None}, r"model\.axial_config=None: allowed is a dictionary"),
    ],
    ids=str,
)
def test_a_value_that_is_not_allowed_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_whole_number_is_a_scale():
    scale = AxialTransformer(config(layer_scale=1)).blocks[0].ls1.gamma
    assert scale.dtype is torch.float32
    assert scale.eq(1).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"grid": [9, 9]}, r"grid=\[9, 9\] \(positions=rope, no grid_embedding\)"),
        ({"attention": {"window": 3}}, r"window=3 \(no layer has windows\)"),
    ],
    ids=str,
)
def test_what_no_layer_reads_is_named(options, said):
    with pytest.warns(UserWarning, match=f"set, and used by no layer: {said}"):
        config(**options)


@pytest.mark.parametrize("place", [None, Place(6, 7), Place(5, 7)], ids=str)
def test_pixels_are_those_of_the_tile_in_whole_patches(place):
    model = backbone(attention={"positions": "none"})
    right = pixels()
    if place == PLACE:
        assert model(right, place=place)[0].shape == (2, *GRID, DIM)
        right = right[..., :2]
    elif place is None:
        right = right[:, :-1]
    with pytest.raises(ValueError, match=r"pixels are \[B, .*\]: allowed here is \[B, .*\]; pad"):
        model(right, place=place)
