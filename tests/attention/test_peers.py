"""The same numbers as others' code: the `axial-attention` package, and timm's rotary positions."""

from __future__ import annotations

import pytest
import torch
import torchvision_ops  # noqa: F401 (before timm)
from axial_attention import AxialAttention as Package
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, apply_rot_embed_cat
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig, Pass
from axialtrain.attention.passes import AxialAttention
from axialtrain.attention.positions import rotate_tokens
from axialtrain.grid import Place, Rect
from axialtrain.models.layer import Layer

DIM, HEADS = 32, 4
SIZES = pytest.mark.parametrize("size", [(5, 9), (8, 3), (1, 6)], ids=str)
PLAIN = {"share_projections": False, "positions": "none"}


def package(*, summed: bool) -> Package:
    torch.manual_seed(0)
    return Package(DIM, heads=HEADS, sum_axial_out=summed)


def images(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, *size, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()


def load(ours: AxialAttention, theirs: nn.Module) -> None:
    """theirs: to_q [N K, D], to_kv [(k, v) N K, D]; ours: head by head, [N][q, k, v][K]."""
    k, v = theirs.to_kv.weight.chunk(2)
    packed = [w.view(HEADS, DIM // HEADS, DIM) for w in (theirs.to_q.weight, k, v)]
    ours.load_state_dict(
        {
            "qkv.weight": torch.stack(packed, 1).view(3 * DIM, DIM),
            "proj.weight": theirs.to_out.weight,
            "proj.bias": theirs.to_out.bias,
        }
    )


def both_axes(theirs: Package) -> list[tuple[AxialAttention, Pass]]:
    """The package attends along the height first."""
    ours = []
    for one, which in zip(theirs.axial_attentions, (Pass.COL, Pass.ROW), strict=True):
        module = AxialAttention(DIM, HEADS, (which,), AxialConfig(**PLAIN), qkv_bias=False)
        load(module, one.fn)
        ours.append((module, which))
    return ours


def assert_same(got: Tensor, want: Tensor, x: Tensor) -> None:
    """In fp32: values, and gradients with respect to the input."""
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    found, expected = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@SIZES
def test_passes_that_are_summed_are_those_of_the_package(size):
    theirs, x = package(summed=True), images(size)
    none, place = x.new_zeros(2, 0, DIM), Place(*size)
    got = sum(module(x, none, place, which)[0] for module, which in both_axes(theirs))
    assert_same(got, theirs(x), x)


@SIZES
def test_passes_in_sequence_are_those_of_the_package(size):
    theirs, x = package(summed=False), images(size)
    none, place = x.new_zeros(2, 0, DIM), Place(*size)
    got = x
    for module, which in both_axes(theirs):
        got, _ = module(got, none, place, which)
    assert_same(got, theirs(x), x)


@SIZES
def test_a_layer_of_fusion_sum_adds_what_the_package_gives(size):
    theirs, x = package(summed=True), images(size)
    layer = Layer(DIM, HEADS, DIM, AxialConfig(["col+row"], fusion="sum", **PLAIN))
    layer.norm1 = nn.Identity()
    nn.init.zeros_(layer.mlp.fc2.weight)
    nn.init.zeros_(layer.mlp.fc2.bias)
    for module, (loaded, _) in zip(layer.attn, both_axes(theirs), strict=True):
        module.load_state_dict(loaded.state_dict() | {"qkv.bias": torch.zeros(3 * DIM)})
    out, _ = layer(x, x.new_zeros(2, 0, DIM), Place(*size))
    assert_same(out - x, theirs(x), x)


def turned_by_timm(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x: [B, H, W, N, K] on a whole grid: half of K turns with either coordinate."""
    rope = RotaryEmbeddingCat(x.shape[-1], in_pixels=False, temperature=10_000.0)
    embedding = rope.get_embed(list(size), dtype=torch.float64)  # [H W, 2 K]
    heads = x.flatten(1, 2).transpose(1, 2)
    return apply_rot_embed_cat(heads, embedding).transpose(1, 2).unflatten(1, size)


@SIZES
def test_rotary_positions_over_both_axes_are_timms(size):
    """timm's frequencies are in fp32."""
    x = torch.randn(2, *size, HEADS, 16, dtype=torch.float64)
    (got,) = rotate_tokens((x,), Rect(0, size[0], 0, size[1]), (1, 2))
    torch.testing.assert_close(got, turned_by_timm(x, size), rtol=1e-6, atol=3e-6)


@SIZES
@pytest.mark.parametrize("dim", [1, 2], ids=["columns", "rows"])
def test_rotary_positions_along_one_axis_are_timms_half_for_it(dim, size):
    """In a head of twice the width, timm's half for an axis is as wide as our head."""
    x = torch.randn(2, *size, HEADS, 16, dtype=torch.float64)
    (got,) = rotate_tokens((x,), Rect(0, size[0], 0, size[1]), (dim,))
    want = turned_by_timm(torch.cat((x, x), -1), size).chunk(2, -1)[dim - 1]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=3e-6)


def test_rotary_positions_of_a_part_are_timms_in_the_whole_grid():
    x = torch.randn(2, 9, 12, HEADS, 16, dtype=torch.float64)
    part = (slice(None), slice(4, 8), slice(3, 12))
    (got,) = rotate_tokens((x[part],), Rect(4, 8, 3, 12), (1, 2))
    torch.testing.assert_close(got, turned_by_timm(x, (9, 12))[part], rtol=1e-6, atol=1e-5)
