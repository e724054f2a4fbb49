"""timm's weights in models of ours: the same logits, and a sentence where they do not fit."""

import copy
import os
import pickle
import sys

import pytest

import torchvision_ops  # isort: skip  # noqa: F401 (before timm)
import timm
import torch
from distributed.vit_ranks import randomised
from safetensors.torch import save_file
from torch import nn

from axialtrain.attention.config import AxialConfig
from axialtrain.models.axialize import axialize
from axialtrain.models.heads import Classifier
from axialtrain.models.registry import create_model, model_config
from axialtrain.models.timm_weights import (
    config_of,
    from_timm,
    load_timm,
    matching,
    pack_heads,
    read_timm,
    unpack_heads,
)
from axialtrain.models.transformer import AxialTransformer

pytestmark = pytest.mark.slow

TINY = "axial_vit_tiny_patch16"
SMALL = {"depth": 2, "num_classes": 7, "img_size": 64}  # images of 4 x 4 patches of 16 px
GLOBAL = {"pattern": ["global"]}
# (timm's, its options, options of ours)
MODELS = {
    "deit": ("deit_tiny_patch16_224", {}, {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, {"prefix_tokens": 2}),
    "registers, layer scale": (
        "vit_tiny_patch16_224",
        {"reg_tokens": 3, "init_values": 0.1},
        {"prefix_tokens": 4, "layer_scale": 1.0},
    ),
    "no bias": ("vit_small_patch16_224", {"qkv_bias": False}, {"qkv_bias": False}),
    "patches of 32": ("vit_small_patch32_224", {"img_size": 96}, {"grid": [3, 3]}),
    "one band": (
        "vit_tiny_patch16_224",
        {"in_chans": 1, "mlp_ratio": 3},
        {"bands": 1, "mlp_ratio": 3.0},
    ),
}
NAMES = {"no bias": "axial_vit_small_patch16", "patches of 32": "axial_vit_small_patch32"}


def timms(which, **options):
    name, own, _ = MODELS[which]
    return randomised(timm.create_model(name, **SMALL | own | options)).eval()


def ours(which, axial_config=GLOBAL, **options):
    options = {"depth": 2, "grid": [4, 4], **MODELS[which][2], **options}
    config = model_config(NAMES.get(which, TINY), axial_config=axial_config, **options)
    distilled = which == "distilled"
    return Classifier(AxialTransformer(config), 7, "prefix", distilled=distilled).eval()


def loaded(model, state):
    load_timm(model, from_timm(state, model.backbone.config, "init=FILE"), "init=FILE")
    return model


def some_images(model, height=64, width=64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, model.patch_embed.proj.in_channels, height, width, generator=generator)


# --- What is read is timm's -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("which", MODELS)
def test_logits_are_timms(which):
    theirs = timms(which)
    images = some_images(theirs, *theirs.patch_embed.img_size)
    want = theirs(images)
    assert want.std() > 0.1
    got = loaded(ours(which), theirs.state_dict())(images.movedim(1, -1))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 160), (32, 64)], ids=str)
@pytest.mark.parametrize("which", ["deit", "distilled", "registers, layer scale"])
def test_an_image_of_another_size_is_timms_with_dynamic_sizes(which, size):
    theirs = timms(which, dynamic_img_size=True)
    images = some_images(theirs, *size)
    got = loaded(ours(which), theirs.state_dict())(images.movedim(1, -1))
    torch.testing.assert_close(got, theirs(images), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {"pattern": ["row+col"], "positions": "rope"},
        {"pattern": ["row", "col+global"], "fusion": "sum"},
        {"pattern": ["window", "shifted"], "window": 3, "positions": "rope"},
    ],
    ids=lambda config: ",".join(config["pattern"]),
)
@pytest.mark.parametrize("which", ["deit", "distilled"])
def test_a_model_of_ours_is_the_axialized_one_with_the_same_weights(which, config):
    theirs = timms(which)
    images = some_images(theirs, 80, 112)
    model = loaded(ours(which, config), theirs.state_dict())
    want = axialize(theirs, {"positions": "none", **config})(images)
    torch.testing.assert_close(model(images.movedim(1, -1)), want, rtol=0, atol=1e-5)


def test_a_model_by_name_takes_timms_weights():
    theirs = randomised(timm.create_model("vit_tiny_patch16_224")).eval()
    model = create_model(TINY, axial_config=GLOBAL).eval()
    assert loaded(model, theirs.state_dict()) is model
    images = some_images(theirs, 224, 224)
    with torch.no_grad():
        got, want = model(images.movedim(1, -1)), theirs(images)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", MODELS)
def test_weights_tell_the_model_that_they_are_of(which):
    model = ours(which)
    assert config_of(timms(which).state_dict(), "init=FILE") == model.backbone.config


def test_heads_are_packed_one_after_the_other():
    plain = torch.arange(3 * 4 * 2)  # [q, k, v][N][K]
    packed = pack_heads(plain, 4).view(4, 3, 2)
    assert torch.equal(packed[1, 2], plain.view(3, 4, 2)[2, 1])
    weight = torch.randn(3 * 4 * 2, 5)
    assert torch.equal(unpack_heads(pack_heads(weight, 4), 4), weight)


def test_what_timm_has_no_place_for_starts_anew():
    state = timms("deit", num_classes=3).state_dict()
    relative = {"pattern": ["row+col"], "positions": "relative"}
    model = ours("deit", relative)
    before = copy.deepcopy(model.state_dict())
    packed = from_timm(state, model.backbone.config, "init=FILE")
    fresh = load_timm(model, packed, "init=FILE")
    tables = [f"backbone.blocks.{n}.attn.bias_{axis}" for n in (0, 1) for axis in "hw"]
    assert sorted(fresh) == sorted([*tables, "head.weight", "head.bias"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name in fresh), name
    assert matching(model, packed, "init=FILE")[1:] == (fresh, ["head.weight", "head.bias"][2:])


@torch.no_grad()
@pytest.mark.parametrize("grid", [[7, 7], [3, 3], [5, 8]], ids=str)
@pytest.mark.parametrize("which", ["deit", "distilled", "registers, layer scale"])
def test_positions_of_another_image_size_are_resampled_as_timm_does(which, grid):
    theirs = timms(which)
    model = loaded(ours(which, grid=grid), theirs.state_dict())
    prefix = theirs.num_prefix_tokens
    want = timm.layers.resample_abs_pos_embed(
        theirs.pos_embed, new_size=grid, num_prefix_tokens=prefix
    )[0]
    got = model.state_dict()
    torch.testing.assert_close(
        got["backbone.grid_embed.table"].flatten(0, 1), want[prefix:], rtol=0, atol=1e-6
    )
    assert torch.equal(got["backbone.prefix_embed"], want[:prefix])


# --- Files ----------------------------------------------------------------------------------------


def test_a_file_is_torchs_or_safetensors(tmp_path):
    state = timms("deit").state_dict()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"model": state, "epoch": 3}, tmp_path / "release.pth")  # as DeiT's are
    ours = {f"module.{name}": value for name, value in state.items()}
    torch.save({"state_dict": {}, "state_dict_ema": ours}, tmp_path / "checkpoint.pth")  # timm's
    save_file(state, tmp_path / "file.safetensors")
    for path in tmp_path.iterdir():
        read = read_timm(str(path), "init")
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], value) for name, value in state.items())


def test_a_name_is_read_from_timms_hub(monkeypatch):
    """Which is not here: what timm would give for it is made by the test."""
    theirs, asked = timms("deit"), []

    def create_model(name, **options):
        asked.append((name, options))
        return theirs

    monkeypatch.setattr(timm, "create_model", create_model)
    read = read_timm("timm:deit_tiny_patch16_224", "init")
    assert asked == [("deit_tiny_patch16_224", {"pretrained": True})]
    assert all(torch.equal(read[name], value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("error", [OSError, RuntimeError, ValueError])
def test_a_hub_that_cannot_be_reached_is_said(monkeypatch, error):
    def create_model(name, **options):
        raise error("no route")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ValueError, match=r"^init=timm:x: cannot be had from timm's hub \(no route"):
        read_timm("timm:x", "init=timm:x")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"embed_dim": 320, "num_heads": 4}, "heads of 64 channels"),
        ({"act_layer": "relu"}, "GELU"),
        ({"norm_layer": nn.LayerNorm}, "norms with eps=1e-6"),
        ({"global_pool": "avg", "fc_norm": False}, "class token pooling"),
        ({"qk_norm": True}, "timm's VisionTransformer"),
    ],
    ids=str,
)
def test_a_name_of_a_model_whose_weights_do_not_tell_all_is_refused(monkeypatch, options, what):
    theirs = timms("deit", **options)
    monkeypatch.setattr(timm, "create_model", lambda name, **_: theirs)
    with pytest.raises(ValueError, match=f"^init=timm:x: .*allowed are .*{what}"):
        read_timm("timm:x", "init=timm:x")


def test_a_name_that_timm_does_not_know_is_refused():
    with pytest.raises(ValueError, match=r"^init=timm:vit: cannot be had .*Unknown model \(vit\)"):
        read_timm("timm:vit", "init=timm:vit")


class Shout:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_code_in_a_file_does_not_run(tmp_path, how, suffix):
    path, proof = tmp_path / f"file{suffix}", tmp_path / "it ran"
    content = {"model": timms("deit").state_dict(), "epoch": Shout(str(proof))}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    assert refused_file(path)
    assert not proof.exists()
    with path.open("rb") as file:
        pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
    assert proof.exists(), "the file is as harmful as meant"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("length", [0, 1, 9, 1000, -1000])
def test_a_damaged_file_is_refused(tmp_path, suffix, length):
    path = tmp_path / f"file{suffix}"
    state = {"weight": torch.randn(100, 100)}
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[:length])
    assert refused_file(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": 3}, torch.zeros(2)], ids=str)
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    assert "holds no state_dict (names and tensors)" in refused_file(tmp_path / "file.pth")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.pth"):
        assert "no such file: allowed are a file of weights and timm:NAME" in refused_file(path)


def refused_file(path) -> str:
    with pytest.raises(ValueError, match=r"^init=FILE: ") as caught:
        read_timm(str(path), "init=FILE")
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


# --- Weights that do not fit ----------------------------------------------------------------------


MISMATCHED = {
    "dim": (("no bias", {"qkv_bias": True}), "has dim=384, and model.dim=192"),
    "depth": (("deit", {"depth": 3}), "has depth=3, and model.depth=2"),
    "patch": (
        ("patches of 32", {"img_size": 128, "embed_dim": 192, "num_heads": 3}),
        "has patch=32, and model.patch=16",
    ),
    "bands": (("one band", {"mlp_ratio": 4}), "has bands=1, and model.bands=3"),
    "mlp": (("deit", {"mlp_ratio": 3}), "has mlp_width .*=576, and model.mlp_width .*=768"),
    "distillation token": (("distilled", {}), "has prefix_tokens=2, and model.prefix_tokens=1"),
    "registers": (("deit", {"reg_tokens": 4}), "has prefix_tokens=5, and model.prefix_tokens=1"),
    "no class token": (
        ("deit", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
        "has no cls_token: allowed are weights of timm's ViT and DeiT",
    ),
    "layer scale": (("deit", {"init_values": 0.1}), "has layer scale, and model.layer_scale=None"),
    "no bias": (("deit", {"qkv_bias": False}), "has qkv_bias=False, and model.qkv_bias=True"),
    "no bias of the output": (
        ("deit", {"proj_bias": False}),
        "has no blocks.0.attn.proj.bias: allowed are weights of timm's ViT and DeiT",
    ),
    "norms of queries": (
        ("deit", {"qk_norm": True}),
        "has blocks.0.attn.q_norm.weight: allowed are weights of timm's ViT and DeiT",
    ),
    "a norm first": (("deit", {"pre_norm": True}), "has no patch_embed.proj.bias: allowed are"),
    "mean pooling": (("deit", {"global_pool": "avg"}), "has no norm.weight: allowed are"),
    "tokens without positions": (
        ("deit", {"no_embed_class": True}),
        "no pos_embed with an entry for each of 1 prefix tokens and a square grid: allowed are",
    ),
    "no square": (("deit", {"img_size": (64, 32)}), "1 prefix tokens and a square grid: allowed"),
    "no positions": (("deit", {"pos_embed": "none"}), "has no pos_embed with .*: allowed are"),
    "heads": (
        ("deit", {"embed_dim": 144, "num_heads": 2}),
        "has width 144, which is no multiple of 64 up to 1024: allowed are",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), MISMATCHED.values(), ids=MISMATCHED)
def test_weights_of_another_model_are_refused(wrong, message):
    which, options = wrong
    refused(timms(which, **options).state_dict(), message)


def test_weights_without_layer_scale_are_refused_where_there_is_one():
    state = timms("deit").state_dict()
    refused(state, "has no layer scale, and model.layer_scale=1", layer_scale=1.0)


@pytest.mark.parametrize(
    "name", ["resnet18", "swin_tiny_patch4_window7_224", "mixer_s32_224", "eva02_tiny_patch14_224"]
)
def test_weights_of_another_family_are_refused(name):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    refused(state, r"allowed are weights of timm's ViT and DeiT \(vit_\*, deit_\*\)")


def test_separate_projections_are_refused():
    config = {"pattern": ["row+col"], "share_projections": False}
    message = "has one set of projections per layer: allowed is axial_config.share_projections=true"
    refused(timms("deit").state_dict(), message, axial_config=config)


def test_factorised_positions_are_refused():
    config = AxialConfig(["row+col"], positions="axial")
    refused(
        timms("deit").state_dict(),
        "axial_config.positions=axial: .*allowed are none, rope and relative",
        axial_config=config,
    )


@pytest.mark.parametrize(
    "name",
    [
        "patch_embed.proj.weight",
        "cls_token",
        "pos_embed",
        "norm.bias",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.1.attn.proj.weight",
    ],
)
def test_a_weight_that_is_missing_or_of_another_shape_is_named(name):
    state = timms("deit").state_dict()
    refused({key: value for key, value in state.items() if key != name}, "")
    for shape in ((), (3,), (10, 192), (2, 3, 5, 7)):
        refused(state | {name: torch.zeros(shape)}, "")


def test_a_tensor_of_fewer_values_than_it_claims_is_refused():
    """Before anything is made of it: a stranger's file may claim a size beyond any memory."""
    state, name = timms("deit").state_dict(), "blocks.1.mlp.fc2.weight"
    refused(state | {name: torch.zeros(1).expand(192, 768)}, f"has {name} of .* with fewer values")
    refused(state | {name: torch.zeros(192, 768, dtype=torch.long)}, f"has {name} of torch.int64")
    refused(state | {name: torch.zeros(192, 768).to_sparse()}, f"has {name} of .*sparse")


def test_weights_of_an_axialized_model_are_refused():
    """They go back through `deaxialize_state_dict` first."""
    refused(axialize(timms("deit"), GLOBAL).state_dict(), "")


def refused(state, message, **options):
    with pytest.raises(ValueError, match=rf"^init=FILE: .*{message}"):
        loaded(ours("deit", **options), state)


def test_without_timm_it_is_said_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "axialtrain.models.timm_models")
    monkeypatch.setitem(sys.modules, "timm", None)
    message = r"^init=a: needs timm: install the extra timm \(launch/install\.sh timm\)"
    with pytest.raises(ValueError, match=message):
        read_timm("timm:vit_tiny_patch16_224", "init=a")


@pytest.mark.parametrize("error", ["RuntimeError", "ImportError"])
def test_with_a_torchvision_of_another_torch_it_is_no_package_that_is_missing(
    monkeypatch, tmp_path, error
):
    (tmp_path / "timm.py").write_text(f"raise {error}('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "axialtrain.models.timm_models")
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.syspath_prepend(tmp_path)
    message = r"^init=a: timm cannot be imported \(operator .*a torchvision that was not built for"
    with pytest.raises(ValueError, match=message):
        read_timm("timm:vit_tiny_patch16_224", "init=a")
