"""Models by name are timm's ViTs, in the number of their parameters and in the names of them."""

from dataclasses import replace

import pytest

import torchvision_ops  # isort: skip  # noqa: F401 (before timm)
import torch
from distributed.vit_ranks import small_options
from timm.models.vision_transformer import VisionTransformer

from axialtrain.attention.config import AxialConfig
from axialtrain.models.heads import Classifier
from axialtrain.models.registry import create_model, list_models, model_config
from axialtrain.models.transformer import AxialTransformer
from axialtrain.train.compose import compose_run

# timm's table of vit_{tiny,small,base}.
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
NAMES = {f"axial_vit_{size}_patch{patch}": (size, patch) for size in SIZES for patch in (8, 16, 32)}
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
    assert list_models() == sorted(NAMES)
    assert list_models("axial_vit_*") == sorted(NAMES)
    assert list_models("*_small_*") == [f"axial_vit_small_patch{patch}" for patch in (16, 32, 8)]
    assert list_models("*patch32") == [f"axial_vit_{s}_patch32" for s in ("base", "small", "tiny")]
    assert list_models("vit_*") == []


def test_what_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"model 'vit_huge' is unknown: allowed are \['axial_vit_"):
        create_model("vit_huge")
    with pytest.raises(ValueError, match=r"patch16: unknown key 'widht': allowed are \['patch', "):
        create_model(TINY, widht=3)
    with pytest.raises(ValueError, match=r"axial_config: unknown key 'windw': allowed are"):
        create_model(TINY, axial_config={"windw": 3})
    with pytest.raises(ValueError, match=r"pool='median': allowed are \['mean', 'prefix', 'atten"):
        create_model(TINY, depth=1, pool="median")
    with pytest.raises(ValueError, match=r"model\.depth=0: allowed are whole numbers from 1"):
        create_model(TINY, depth=0)
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


@pytest.mark.parametrize("name", ["axial_vit_small_patch16", "axial_vit_base_patch8"])
def test_a_name_is_an_option_of_the_command_line(name):
    config, _, _ = compose_run([f"model={name}", "data.shards=x"])
    assert config.model == model_config(name)
    overrides = ["model.depth=3", "model.axial_config.pattern=[row,col+global]"]
    config, _, _ = compose_run([f"model={name}", "data.shards=x", *overrides])
    assert config.model == model_config(
        name, depth=3, axial_config={"pattern": ["row", "col+global"]}
    )
