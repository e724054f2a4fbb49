"""What `axialize` refuses, with the model left as it was, and what it tells of."""

import pytest

import torchvision_ops  # isort: skip  # noqa: F401 (before timm)
import timm
import torch
from distributed.vit_ranks import HEADS, small_vit
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn

from axialtrain.grid import Place
from axialtrain.models.axialize import axialize

pytestmark = pytest.mark.slow

GLOBAL = {"pattern": ["global"]}


class OtherViT(VisionTransformer):
    """A model whose methods are nobody's knowledge."""


UNSUPPORTED = {
    "another family": (lambda: timm.create_model("resnet18"), "a ResNet is"),
    "swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), "a SwinTransformer is"),
    "eva": (lambda: timm.create_model("eva02_tiny_patch14_224", depth=1), "a Eva is"),
    "a class of one's own": (lambda: OtherViT(depth=1, embed_dim=64, num_heads=1), "a OtherViT is"),
    "a plain module": (lambda: nn.Linear(2, 2), "a Linear is"),
    "an axialized one": (lambda: axialize(small_vit("class"), GLOBAL), "AxialVisionTransformer is"),
    "norms of queries": (lambda: small_vit("class", qk_norm=True), "blocks.0.attn of"),
    "a norm in attention": (lambda: small_vit("class", scale_attn_norm=True), "blocks.0.attn of"),
    "a norm in the MLP": (lambda: small_vit("class", scale_mlp_norm=True), "blocks.0.mlp of"),
    "other attention": (lambda: small_vit("class", attn_layer="diff"), "blocks.0.attn of"),
    "parallel blocks": (
        lambda: small_vit("class", block_fn=ParallelScalingBlock),
        "blocks.0 of",
    ),
    "other norms": (lambda: small_vit("class", norm_layer="rmsnorm"), "norm of"),
    "a norm of patches": (lambda: small_vit("class", embed_norm_layer="layernorm"), "patch_embed"),
    "oblong patches": (lambda: small_vit("class", patch_size=(4, 2)), "patch_embed.patch_size of"),
    "map pooling": (lambda: small_vit("class", global_pool="map"), "global_pool of"),
    "the largest": (lambda: small_vit("class", global_pool="max"), "global_pool of"),
    "no pooling": (lambda: small_vit("class", global_pool=""), "global_pool of"),
    "a pooled prefix": (
        lambda: small_vit("class", global_pool="avg", pool_include_prefix=True),
        "pool_include_prefix of",
    ),
    "dropped positions": (lambda: small_vit("class", pos_drop_rate=0.1), "pos_drop of"),
    "dropped patches": (lambda: small_vit("class", patch_drop_rate=0.1), "patch_drop of"),
    "dropped projections": (lambda: small_vit("class", proj_drop_rate=0.1), "blocks.0.attn of"),
    "a dropped head": (lambda: small_vit("class", drop_rate=0.1), "head_drop of"),
    "a cut patch": (lambda: small_vit("class", img_size=9), "img_size (no multiple of the patch)"),
    "dropped attention": (lambda: small_vit("class", attn_drop_rate=0.1), "blocks.0.attn of"),
}


@pytest.mark.parametrize(("make", "what"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_an_unsupported_model_is_refused_and_left_as_it_was(make, what):
    model = make()
    error = refusal(model, GLOBAL)
    assert what in error
    assert "is not supported: allowed are timm's VisionTransformer" in error


def test_each_block_is_looked_at():
    model = small_vit("class", depth=3)
    model.blocks[1].attn.attn_drop.p = 0.1
    assert "blocks.1.attn of this model is not supported" in refusal(model, GLOBAL)
    model = small_vit("class", depth=3, drop_path_rate=0.3)
    model.blocks[2].drop_path2.drop_prob = 0.1
    assert "blocks.2.drop_path1, drop_path2 of this model" in refusal(model, GLOBAL)
    model = small_vit("class", depth=3)
    model.blocks[2] = model.blocks[1]
    assert "blocks (one of them twice) of this model" in refusal(model, GLOBAL)


WRONG = {
    "no tokens": (GLOBAL, {"grid": (0, 3)}, "grid=(0, 3): allowed is (height, width) in tokens"),
    "three sides": (GLOBAL, {"grid": (4, 4, 4)}, "grid=(4, 4, 4): allowed is (height, width)"),
    "fractions": (GLOBAL, {"grid": (4.0, 4)}, "grid=(4.0, 4): allowed is (height, width)"),
    "one number": (GLOBAL, {"grid": 4}, "grid=4: allowed is (height, width) in tokens"),
    "a window too large": (
        {"pattern": ["window"], "window": 5},
        {},
        "axial_config.window=5 is larger than the grid of 4 x 4 tokens: allowed are 1 to 4",
    ),
    "a window too large for the grid": (
        {"pattern": ["global", "shifted"], "window": 4},
        {"grid": (3, 8)},
        "axial_config.window=4 is larger than the grid of 3 x 8 tokens: allowed are 1 to 3",
    ),
    "factorised positions": (
        {"positions": "axial"},
        {},
        "positions='axial': the model has its own embedding, allowed are ['none', 'rope', 'relat",
    ),
    "a list of passes": (["row+col"], {}, "axial_config=['row+col']: allowed is a dictionary"),
    "a word": (GLOBAL, {"grid": "44"}, "grid=44: allowed is (height, width)"),
    "a pass": ({"pattern": ["diagonal"]}, {}, "unknown pass 'diagonal' in 'diagonal': allowed are"),
    "a key": ({"patern": ["row"]}, {}, "axial_config: unknown key 'patern': allowed are"),
}


@pytest.mark.parametrize(("config", "options", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_grid_or_config_is_refused_and_the_model_left_as_it_was(config, options, message):
    assert message in refusal(small_vit("registers"), config, **options)


def test_what_no_layer_reads_is_named():
    config = {"pattern": ["row"], "skip_axis": 0.5, "span": 3}
    with pytest.warns(
        UserWarning, match=r"axialize: set, and used by no layer: skip_axis=0\.5 .*sp"
    ):
        axialize(small_vit("class"), config)


def test_pixels_are_those_of_the_tile():
    model = axialize(small_vit("class"), {"pattern": ["row+col"]})
    rows, cols = (size // model.patch_embed.patch for size in (32, 48))
    images = torch.randn(1, 3, 32, 48)
    model(images, place=Place(rows, cols))
    for wrong in (Place(rows, cols + 1), Place(rows - 1, cols)):
        with pytest.raises(ValueError, match=r"pixels are \[B, .*\]: allowed here is \[B, "):
            model(images, place=wrong)


def test_a_head_width_that_rotary_positions_cannot_halve_is_refused():
    model = small_vit("class", embed_dim=6 * HEADS)
    assert "must be a multiple of 4" in refusal(model, GLOBAL | {"positions": "rope"})
    axialize(model, {"pattern": ["row+col"], "positions": "rope"})


def refusal(model, config, **options) -> str:
    """What axialize says; afterwards the model is what it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, kind, looks = dict(model.named_parameters()), type(model), repr(model)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (its words are the caller's to read)
        axialize(model, config, **options)
    assert type(model) is kind
    assert repr(model) == looks
    assert all(parameters[name] is value for name, value in model.named_parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    return str(caught.value)
