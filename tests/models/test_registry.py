"""Models by name have the parameters of timm's ViTs, and of the published Axial-ResNets."""

from dataclasses import replace

import pytest

import torchvision_ops  # isort: skip  # noqa: F401 (before timm)
import torch
from distributed.vit_ranks import small_options
from timm.models.vision_transformer import VisionTransformer

from axialtrain.attention.config import AxialConfig
from axialtrain.mesh.mesh import MeshConfig
from axialtrain.models.axial_resnet import AxialResNet
from axialtrain.models.deeplab import AxialDeepLab, PanopticDeepLab
from axialtrain.models.heads import Classifier
from axialtrain.models.position_sensitive import PositionSensitiveAttention
from axialtrain.models.registry import (
    KINDS,
    build_backbone,
    create_model,
    kind_of,
    list_models,
    model_config,
)
from axialtrain.models.transformer import AxialTransformer
from axialtrain.train.compose import compose_run

# timm's table of vit_{tiny,small,base}.
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
NAMES = {f"axial_vit_{size}_patch{patch}": (size, patch) for size in SIZES for patch in (8, 16, 32)}
CONVOLUTIONAL = [
    *(f"axial_resnet{size}" for size in ("26s", "50s", "50m", "50l")),
    "conv_stem_axial_resnet50s",
    *(f"axial_deeplab_{size}" for size in "sml"),
]
TINY = "axial_vit_tiny_patch16"


def numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_as_many_as_timms(name):
    size, patch = NAMES[name]
    dim, heads = SIZES[size]
    with torch.device("meta"):
        timms = VisionTransformer(patch_size=patch, embed_dim=dim, num_heads=heads)
        ours = create_model(name)
    assert numbers(ours) == numbers(timms)


@pytest.mark.parametrize("size", SIZES)
def test_tables_and_separate_projections_add_their_own(size):
    name, (dim, heads) = f"axial_vit_{size}_patch16", SIZES[size]
    with torch.device("meta"):
        timms = VisionTransformer(embed_dim=dim, num_heads=heads, depth=2)
        for pattern, passes in ((["global"], 0), (["window", "row+col+shifted"], 2), (["col"], 0)):
            shared, relative, apart = (
                create_model(name, depth=2, axial_config={"pattern": pattern} | more)
                for more in ({}, {"positions": "relative"}, {"share_projections": False})
            )
            assert numbers(shared) == numbers(timms)
            if pattern == ["global"]:
                assert numbers(relative) == numbers(timms) + 2 * heads * 2 * (2 * 14 - 1)
            again = 4 * dim * dim + 4 * dim + 2 * dim  # projections and their norm
            assert numbers(apart) == numbers(timms) + passes * again


def test_known_numbers_of_parameters():
    with torch.device("meta"):
        assert numbers(create_model(TINY)) == 5_717_416
        base = create_model("axial_vit_base_patch16", num_classes=0)
    assert numbers(base.blocks[0].attn) == 2_362_368


def test_layers_have_timms_names_and_shapes():
    options = {"embed_dim": 384, "num_heads": 6, "depth": 2}
    with torch.device("meta"):
        timms = VisionTransformer(**options).state_dict()
        ours = create_model("axial_vit_small_patch16", depth=2).backbone.state_dict()
    for name, value in timms.items():
        if name.startswith(("blocks", "norm")):
            assert ours[name].shape == value.shape, name
    beside = {"patch_embed.proj.weight", "prefix", "prefix_embed", "grid_embed.table"}
    assert ours.keys() - timms.keys() == beside - {"patch_embed.proj.weight"}


def test_names_are_listed_by_pattern():
    assert list_models() == sorted([*NAMES, *CONVOLUTIONAL])
    assert list_models("axial_vit_*") == sorted(NAMES)
    assert list_models("*_small_*") == [f"axial_vit_small_patch{patch}" for patch in (16, 32, 8)]
    assert list_models("*patch32") == [f"axial_vit_{s}_patch32" for s in ("base", "small", "tiny")]
    assert list_models("vit_*") == []


def test_what_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"model 'vit_huge' is unknown: allowed are \['axial_de"):
        create_model("vit_huge")
    with pytest.raises(ValueError, match=r"patch16: unknown key 'widht': allowed are \['patch', "):
        create_model(TINY, widht=3)
    with pytest.raises(ValueError, match=r"axial_config: unknown key 'windw': allowed are"):
        create_model(TINY, axial_config={"windw": 3})
    with pytest.raises(ValueError, match=r"pool='median': allowed are \['mean', 'prefix', 'atten"):
        create_model(TINY, depth=1, pool="median")
    with pytest.raises(ValueError, match=r"model\.depth=0: allowed are whole numbers from 1"):
        create_model(TINY, depth=0)
    with pytest.raises(ValueError, match=r"resnet50s: unknown key 'dim': allowed are \['layers'"):
        create_model("axial_resnet50s", dim=3)
    with pytest.raises(ValueError, match=r"deeplab_s\.trunk: unknown key 'widht': allowed are \['"):
        create_model("axial_deeplab_s", trunk={"widht": 3})
    with pytest.raises(ValueError, match=r"model\.trunk\.output_stride=32: the decoders need 16"):
        create_model("axial_deeplab_s", trunk={"output_stride": 32})
    for pool in ("prefix", "attention"):
        with pytest.raises(ValueError, match=f"pool='{pool}': an Axial-ResNet .* is 'mean'$"):
            create_model("axial_resnet26s", pool=pool)
    with pytest.raises(ValueError, match=r"axial_deeplab_s: pool='mean': it names a class for"):
        create_model("axial_deeplab_s", pool="mean")
    with pytest.raises(ValueError, match=r"reads 1 prefix token\(s\), and model\.prefix_tokens=0"):
        create_model(TINY, depth=1, prefix_tokens=0)


def test_overrides_replace_keys_and_leave_the_registry_as_it_is():
    before = model_config(TINY)
    changed = model_config(TINY, depth=3, axial_config={"pattern": ["global"], "window": 4})
    assert changed == replace(
        before, depth=3, axial_config=AxialConfig(["global"], positions="none", window=4)
    )
    whole = AxialConfig(["row"], positions="rope")
    assert model_config(TINY, axial_config=whole).axial_config == whole
    assert model_config(TINY) == before
    assert before.axial_config == AxialConfig(["row+col"], positions="none")


def test_a_model_is_a_classifier_or_the_bare_backbone():
    options = small_options()
    classifier = create_model("axial_vit_tiny_patch8", num_classes=7, pool="mean", **options)
    assert isinstance(classifier, Classifier)
    assert classifier.pool == "mean"
    assert classifier(torch.zeros(2, 10, 6, 3)).shape == (2, 7)  # B H W C, any size
    backbone = create_model("axial_vit_tiny_patch8", num_classes=0, **options)
    assert isinstance(backbone, AxialTransformer)
    tokens, prefix = backbone(torch.zeros(2, 10, 6, 3))
    assert (tokens.shape[:3], prefix.shape[:2]) == ((2, 5, 3), (2, 1))


# --- Axial-ResNet and Axial-DeepLab ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("axial_resnet50s", 11_586_216),  # as published
        ("axial_resnet50m", 25_179_400),
        ("axial_resnet50l", 43_973_480),
        ("conv_stem_axial_resnet50s", 12_481_000),
    ],
)
def test_known_numbers_of_parameters_of_axial_resnets(name, expected):
    with torch.device("meta"):
        classifier = create_model(name)
        again = Classifier(AxialResNet(model_config(name)), 1000, "mean")
    assert classifier.pool == "mean"
    assert numbers(classifier) == numbers(again) == expected


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_every_attention_layer_has_the_parameters_of_the_formula(name):
    config = model_config(name)
    trunk = config.trunk if name.startswith("axial_deeplab") else config
    with torch.device("meta"):
        backbone = create_model(name, num_classes=0)
    layers = [one for one in backbone.modules() if isinstance(one, PositionSensitiveAttention)]
    # A stage strides behind the attention of its first block, whose map is the finer one.
    sides = [[56], [56, 28], [28, 14], [14, 7]]
    expected = [
        (channels, trunk.span or (side[0] if block == 0 else side[-1]))
        for blocks, channels, side in zip(trunk.layers, trunk.channels, sides, strict=True)
        for block in range(blocks)
        for _ in ("columns", "rows")
    ]
    n = trunk.heads
    assert [(one.dim, one.span) for one in layers] == expected
    for one, (c, span) in zip(layers, expected, strict=True):
        tables = 2 * (c // n) * (2 * span - 1)
        assert numbers(one) == 2 * c**2 + 4 * c + 6 * n + 4 * c + tables
    if name == "axial_resnet50s":
        assert numbers(layers[0]) == 10_528


def test_models_of_each_kind_are_built_from_their_configs():
    for name, kind in (
        (TINY, AxialTransformer),
        ("axial_resnet26s", AxialResNet),
        ("axial_deeplab_s", AxialDeepLab),
    ):
        config = model_config(name)
        with torch.device("meta"):
            assert type(build_backbone(config)) is kind
        assert isinstance(config, KINDS[kind_of(config)])


@torch.no_grad()
def test_an_axial_deeplab_is_panoptic_or_the_bare_backbone():
    small = {"semantic": 8, "instance": 8, "head": 8, "aspp": [], "trunk": {"width": 0.125}}
    config = model_config("axial_deeplab_s", **small)
    before = model_config("axial_deeplab_s")
    assert config.trunk == replace(before.trunk, width=0.125)
    assert before.trunk.width == 0.5, "the registry is as it was"
    model = create_model("axial_deeplab_s", num_classes=5, **small).eval()
    assert isinstance(model, PanopticDeepLab)
    assert model(torch.zeros(1, 32, 48, 3)).shape == (1, 32, 48, 5 + 3)
    backbone = create_model("axial_deeplab_s", num_classes=0, **small)
    assert isinstance(backbone, AxialDeepLab)
    assert backbone.config == config


@torch.no_grad()
def test_an_axial_resnet_has_the_contract_of_a_backbone():
    options = {"width": 0.125, "heads": 2, "image": [64, 96]}
    backbone = create_model("axial_resnet26s", num_classes=0, **options).eval()
    assert isinstance(backbone, AxialResNet)
    tokens, prefix = backbone(torch.zeros(2, 64, 96, 3))
    assert (tokens.shape, prefix.shape) == ((2, 2, 3, 256), (2, 0, 256))
    classifier = create_model("axial_resnet26s", num_classes=7, **options).eval()
    assert classifier(torch.zeros(2, 64, 96, 3)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"96 x 96 px exceeds model\.image=\[64, 96\]"):
        backbone(torch.zeros(2, 96, 96, 3))


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_models_are_spread_over_the_image_only(name):
    config = model_config(name)
    config.check_mesh(MeshConfig(data=2, row=3, col=5))
    with pytest.raises(ValueError, match=r"mesh\.tensor=2: convolutional models .*allowed is 1"):
        config.check_mesh(MeshConfig(tensor=2))


def test_transformers_refuse_a_mesh_that_does_not_divide_them():
    config = model_config(TINY)
    config.check_mesh(MeshConfig(row=3, col=5, tensor=3))
    with pytest.raises(ValueError, match=r"tensor=2 does not divide model\.heads=3: allowed are"):
        config.check_mesh(MeshConfig(tensor=2))
    with pytest.raises(ValueError, match=r"tensor=3 does not divide the MLP width of model=784"):
        replace(config, mlp_ratio=784 / 192).check_mesh(MeshConfig(tensor=3))
    with pytest.raises(ValueError, match=r"exchange=heads: row passes deal out the 3 heads"):
        config.check_mesh(MeshConfig(col=2, exchange="heads"))


# --- From the command line ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["axial_resnet50m", "conv_stem_axial_resnet50s"])
def test_an_axial_resnet_is_an_option_of_the_command_line(name):
    overrides = ["model.width=1", "model.layers=[1,2,3,1]", "model.span=9"]
    config, _, _ = compose_run([f"model={name}", "data.shards=x"])
    assert config.model == model_config(name)
    config, _, _ = compose_run([f"model={name}", "data.shards=x", *overrides])
    assert config.model == model_config(name, width=1.0, layers=[1, 2, 3, 1], span=9)


def test_an_axial_deeplab_is_an_option_of_the_command_line():
    config, _, _ = compose_run(["model=axial_deeplab_l", "data.shards=x"])
    assert config.model == model_config("axial_deeplab_l")
    overrides = ["model.trunk.width=0.25", "model.trunk.heads=4", "model.aspp=[]", "model.head=8"]
    config, _, _ = compose_run(["model=axial_deeplab_s", "data.shards=x", *overrides])
    assert config.model == model_config(
        "axial_deeplab_s", trunk={"width": 0.25, "heads": 4}, aspp=[], head=8
    )


@pytest.mark.parametrize("name", ["axial_vit_small_patch16", "axial_vit_base_patch8"])
def test_a_name_is_an_option_of_the_command_line(name):
    config, _, _ = compose_run([f"model={name}", "data.shards=x"])
    assert config.model == model_config(name)
    overrides = ["model.depth=3", "model.axial_config.pattern=[row,col+global]"]
    config, _, _ = compose_run([f"model={name}", "data.shards=x", *overrides])
    assert config.model == model_config(
        name, depth=3, axial_config={"pattern": ["row", "col+global"]}
    )
