"""timm's ViT and DeiT, turned axial: with one global pass they are what they were, and of any size.

What is allowed is rounding; timm resamples a position embedding in fp32.
"""

import copy
import functools
import pickle

import pytest

import torchvision_ops  # isort: skip  # noqa: F401 (before timm)
import timm
import torch
import torch.nn.functional as F
from distributed.vit_ranks import (
    CLASSES,
    HEADS,
    KINDS,
    PATCH,
    randomised,
    small_options,
    small_vit,
)
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import nn

from axialtrain.attention.config import AxialConfig
from axialtrain.attention.positions import GridEmbedding
from axialtrain.grid import Place
from axialtrain.models.axialize import axialize, axialize_state_dict, deaxialize_state_dict
from axialtrain.models.chance import Chance
from axialtrain.models.registry import create_model

pytestmark = pytest.mark.slow

GLOBAL = {"pattern": ["global"]}
# Class, distillation and register tokens, with and without a place in the embedding; layer scale;
# pooling by mean; patches of 14, 16 and 32; a norm before the layers.
# All are as narrow as the tiny ones, and have two layers.
ARCHITECTURES = {
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_tiny_patch16_224": {"reg_tokens": 2, "init_values": 0.1},
    "vit_small_patch32_224": {"img_size": (224, 96)},
    "vit_base_patch32_clip_224": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 126},
    "vit_little_patch16_reg4_gap_256": {},
    "vit_medium_patch16_gap_240": {},
}
TINY = {"depth": 2, "embed_dim": 192, "num_heads": 3, "num_classes": 7}
PATTERNS = {
    "global": {},
    "row+col": {"positions": "rope"},
    "row,col+global": {"positions": "relative", "span": 4},
    "window,shifted": {"positions": "relative"},
    "col+row": {"fusion": "sum", "share_projections": False},
}


def of_pattern(pattern):
    return {"pattern": pattern.split(","), "window": 3, **PATTERNS[pattern]}


def named(name):
    return timm.create_model(name, **TINY | ARCHITECTURES[name]).eval()


random_named = functools.cache(lambda name: randomised(named(name)))


def axial(model, config=GLOBAL, **options):
    return axialize(copy.deepcopy(model), config, **options)


def some_images(*size, dtype=torch.float32):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_same(got, want, tolerance=1e-5):
    assert want.std() > 0.1, "an output near zero hides what is wrong"
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


# --- With one global pass -------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_features_are_timms(name):
    theirs = random_named(name)
    images = some_images(*theirs.patch_embed.img_size)
    ours = axial(theirs)
    assert_same(ours(images), theirs(images))
    features = ours.forward_features(images)
    assert_same(features, theirs.forward_features(images), 2e-5)
    assert_same(ours.forward_head(features, pre_logits=True), pre_logits(theirs, images), 2e-5)


def pre_logits(model, images):
    return model.forward_head(model.forward_features(images), pre_logits=True)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (26, 14), (5, 31), (4, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_another_size_is_timms_with_dynamic_sizes(kind, size):
    """Larger and smaller, of other ratios, and no multiple of the patch."""
    theirs = small_vit(kind, dynamic_img_size=True, dynamic_img_pad=True)
    images = some_images(*size)
    want = theirs(images), theirs.forward_features(images).flatten(1)
    for ours in (axial(small_vit(kind)), axial(theirs)):
        assert_same(ours(images), want[0])
        assert_same(ours.forward_features(images).flatten(1), want[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "mean"])
def test_under_autocast_logits_are_timms_to_its_precision(kind):
    theirs = small_vit(kind, dynamic_img_size=True)
    images = some_images(26, 14)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = theirs(images), axial(theirs)(images)
    assert got.dtype is want.dtype is torch.bfloat16
    assert_same(got, want, 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_timms(kind):
    theirs = small_vit(kind).double().train()
    if kind == "distilled":
        theirs.set_distilled_training(True)
    ours = axial(theirs)
    grads = []
    for model in (theirs, ours):
        images = some_images(8, 8, dtype=torch.float64).requires_grad_()
        output = model(images)
        assert isinstance(output, tuple) == (kind == "distilled"), "both heads while it trains"
        logits = torch.cat(output, 1) if isinstance(output, tuple) else output
        (logits * torch.arange(1.0, logits.shape[1] + 1)).sum().backward()
        grads.append({name: value.grad for name, value in model.named_parameters()})
        grads[-1]["pixels"] = images.grad
    want, got = grads[0], deaxialize_state_dict(grads[1], heads=HEADS, patch=PATCH)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (got[name] - gradient).abs().max() <= 1e-10 * scale, name


# --- To axial and back ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back_is_bit_equal(name):
    theirs = random_named(name)
    patch, heads = theirs.patch_embed.patch_size[0], theirs.blocks[0].attn.num_heads
    ours = axial(theirs, {"pattern": ["row+col"], "positions": "rope"})
    back = deaxialize_state_dict(ours.state_dict(), heads=heads, patch=patch)
    assert all(torch.equal(back[key], value) for key, value in ours.timm_state_dict().items())
    with torch.device("meta"):
        fresh = named(name)
    fresh.load_state_dict(back, strict=True, assign=True)
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    images = some_images(*theirs.patch_embed.img_size)
    assert torch.equal(fresh(images), theirs(images))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_timm_become_those_of_an_axialized_model(kind):
    theirs = small_vit(kind, depth=3)
    ours = axial(theirs)
    converted = axialize_state_dict(theirs.state_dict(), heads=HEADS)
    for key, value in ours.state_dict().items():
        assert torch.equal(converted[key], value), key
    other = axial(randomised(copy.deepcopy(theirs), seed=1))
    other.load_state_dict(converted, strict=True)
    assert torch.equal(other(some_images(8, 8)), ours(some_images(8, 8)))


def test_what_timm_has_no_place_for_is_refused_on_the_way_back():
    relative = axial(small_vit("class"), {"pattern": ["row+col"], "positions": "relative"})
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.bias_h: a timm model has no relative"):
        deaxialize_state_dict(relative.state_dict(), heads=HEADS, patch=PATCH)
    apart = {"pattern": ["row+col"], "share_projections": False}
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.0\.qkv.* one set of projections"):
        state = axial(small_vit("class"), apart).state_dict()
        deaxialize_state_dict(state, heads=HEADS, patch=PATCH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 5}, "patch=5: a patch has 12 values, allowed is a side whose square divides"),
        ({"heads": 7}, "heads=7 does not divide the width 48"),
    ],
    ids=str,
)
def test_a_wrong_patch_or_number_of_heads_on_the_way_back_is_refused(options, message):
    state = axial(small_vit("class")).state_dict()
    with pytest.raises(ValueError, match=message):
        deaxialize_state_dict(state, **{"heads": HEADS, "patch": PATCH} | options)
    with pytest.raises(ValueError, match="these are no weights of an axialized model"):
        deaxialize_state_dict(small_vit("class").state_dict(), heads=HEADS, patch=PATCH)


def test_separate_projections_of_single_passes_have_a_way_back():
    """Each layer has one pass, and so one set of projections."""
    theirs = small_vit("class")
    ours = axial(theirs, {"pattern": ["row", "col"], "share_projections": False})
    back = deaxialize_state_dict(ours.state_dict(), heads=HEADS, patch=PATCH)
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())


# --- In place, and still timm's -------------------------------------------------------------------


def test_it_is_the_same_model_with_the_same_parameters():
    model = small_vit("registers")
    model.cls_token.requires_grad_(False)
    kind, own = type(model), dict(model.named_parameters())
    state = torch.get_rng_state()
    assert axialize(model, {"pattern": ["row+col"], "positions": "rope"}) is model
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert isinstance(model, kind)
    assert not model.training
    now = dict(model.named_parameters())
    assert now.keys() == own.keys()
    for name, parameter in own.items():  # which an optimizer may hold already
        assert now[name] is parameter, name
    assert not model.cls_token.requires_grad


def test_separate_projections_start_as_copies():
    theirs = small_vit("class")
    config = {"pattern": ["row+col"], "positions": "rope"}
    shared = axial(theirs, config)
    apart = axial(theirs, config | {"share_projections": False})
    images = some_images(9, 12)
    torch.testing.assert_close(apart(images), shared(images), rtol=0, atol=1e-6)
    first, second = apart.blocks[0].attn
    assert torch.equal(first.qkv.weight, second.qkv.weight)
    assert first.qkv.weight.data_ptr() != second.qkv.weight.data_ptr()
    apart(images).sum().backward()
    assert not torch.equal(first.qkv.weight.grad, second.qkv.weight.grad)


def test_the_head_can_be_changed():
    model = axial(small_vit("class"))
    model.reset_classifier(3)
    assert model.get_classifier() is model.head
    assert model(some_images(8, 8)).shape == (2, 3)
    model.reset_classifier(0)
    assert model(some_images(8, 8)).shape == (2, model.num_features)
    distilled = axial(small_vit("distilled"))
    distilled.reset_classifier(3)
    assert distilled.get_classifier() == (distilled.head, distilled.head_dist)
    assert distilled(some_images(8, 8)).shape == (2, 3)


@torch.no_grad()
def test_the_pool_can_be_changed_to_the_mean():
    theirs = small_vit("class")
    ours = axial(theirs)
    for model in (theirs, ours):
        model.reset_classifier(0, "avg")
    assert_same(ours(some_images(8, 8)), theirs(some_images(8, 8)))
    for pool in ("max", "avgmax", "map", ""):
        with pytest.raises(ValueError, match=f"global_pool='{pool}': allowed are token, avg"):
            ours.reset_classifier(0, pool)
    assert ours.global_pool == "avg"


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("forward_intermediates", [torch.zeros(2, 3, 8, 8)]),
        ("get_intermediate_layers", [torch.zeros(2, 3, 8, 8)]),
        ("prune_intermediate_layers", []),
        ("set_input_size", [(16, 16)]),
    ],
)
def test_methods_that_walk_through_timms_blocks_are_refused(method, arguments):
    model = axial(small_vit("class"))
    with pytest.raises(ValueError, match=f"{method}: is not supported by an axialized model"):
        getattr(model, method)(*arguments)


@pytest.mark.parametrize("pattern", ["global", "row+col"])
def test_layers_are_recomputed_in_backward_where_timm_is_told_to(pattern):
    """`set_grad_checkpointing`, which timm's training script calls on request."""
    model = axial(small_vit("class"), of_pattern(pattern)).train()
    runs, calls = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for recomputed in (False, True):
        model.set_grad_checkpointing(recomputed)
        model.zero_grad()
        model(some_images(8, 8)).square().sum().backward()
        runs.append([value.grad.clone() for value in model.parameters()])
    assert len(calls) == 1 + 2
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_optimizers_of_timm_group_its_parameters_as_before():
    theirs = small_vit("registers")
    ours = axial(theirs, {"pattern": ["row+col"]})
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    groups = []
    for model in (theirs, ours):
        names = {id(value): name for name, value in model.named_parameters()}
        made = create_optimizer_v2(model, "adamw", lr=1, weight_decay=0.1, layer_decay=0.5)
        groups.append(
            {
                names[id(value)]: (group["lr_scale"], group["weight_decay"])
                for group in made.param_groups
                for value in group["params"]
            }
        )
    # A convolution's bias and a projection's are 1-D, their weights are not: nothing changes.
    assert groups[0] == groups[1]
    assert len(set(groups[0].values())) > 4


def test_states_copies_and_pickles_hold_the_model():
    model = axial(small_vit("mean"), {"pattern": ["row+col"], "positions": "relative", "span": 9})
    images = some_images(13, 8)
    want = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), want)
        assert isinstance(other, VisionTransformer)
    other = randomised(copy.deepcopy(model), seed=1)
    assert not torch.equal(other(images), want)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(images), want)


def test_dtype_and_mode_are_kept():
    model = axial(small_vit("class").bfloat16().train(), {"positions": "relative", "span": 2})
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    assert model(some_images(8, 8).bfloat16()).dtype is torch.bfloat16
    assert all(layer.training for layer in model.blocks)


def test_drop_path_is_drawn_from_torchs_generator():
    plain = small_vit("class", depth=4)
    model = axial(small_vit("class", depth=4, drop_path_rate=0.8))
    images = some_images(8, 8)
    assert torch.equal(model(images), axial(plain)(images)), "nothing is left out in evaluation"
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model.train()(images))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], axial(plain)(images))


def test_drop_path_drops_as_often_as_in_timm():
    """A block whose branches give ones: what comes out counts those that are kept."""
    options = {"drop_path_rate": 0.25, "final_norm": False, "num_classes": 0, "img_size": PATCH}
    theirs = small_vit("class", **options).train()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            value.fill_(1.0 if name in ("blocks.1.attn.proj.bias", "blocks.1.mlp.fc2.bias") else 0)
    images = torch.zeros(2000, 3, PATCH, PATCH)
    for model in (theirs, axial(theirs)):
        torch.manual_seed(0)
        out = model(images)
        assert out.unique().tolist() == pytest.approx([0, 4 / 3, 8 / 3])
        assert out.mean().item() == pytest.approx(2, abs=0.08)  # four deviations


# --- Positions and sizes --------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["class", "mean", "distilled"])
def test_rotary_and_relative_positions_come_on_top(kind):
    theirs, images = small_vit(kind), some_images(8, 8)
    plain = theirs(images)
    assert_same(axial(theirs)(images), plain)
    for positions in ("rope", "relative"):
        model = axial(theirs, GLOBAL | {"positions": positions})
        for layer in model.blocks:
            for table in (layer.attn.bias_h, layer.attn.bias_w):
                if table is not None:
                    nn.init.normal_(table)
        assert (model(images) - plain).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_partial_patch_is_filled_with_zeros(pattern):
    model = randomised(axial(small_vit("class"), of_pattern(pattern)))
    images = some_images(9, 13)
    whole = F.pad(images, (0, 1, 0, 1))
    assert torch.equal(model(images), model(whole))
    assert model.forward_features(images).shape == (2, 1 + 5 * 7, model.embed_dim)


SIZES = [(9, 14), (16, 7)]  # px


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["class", "mean", "registers", "distilled"])
def test_each_image_of_a_padded_batch_is_as_it_is_alone(kind, pattern):
    model = randomised(axial(small_vit(kind), of_pattern(pattern)).double())
    check_alone(model, lambda pixels: pixels)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pool", ["prefix", "mean"])
def test_each_image_of_a_padded_batch_is_as_it_is_alone_in_a_model_of_ours(pool, pattern):
    model = create_model(
        "axial_vit_tiny_patch8",
        num_classes=CLASSES,
        pool=pool,
        **small_options() | {"axial_config": of_pattern(pattern)},
    )
    check_alone(randomised(model).double(), lambda pixels: pixels.movedim(1, -1))


def check_alone(model, layout):
    """What lies outside an image is neither read nor does it move the image's positions."""
    batch = torch.full((2, 3, 16, 14), torch.nan, dtype=torch.float64)
    valid = torch.zeros(2, 8, 7, dtype=torch.bool)
    alone = []
    for index, (height, width) in enumerate(SIZES):
        h, w = -(-height // PATCH), -(-width // PATCH)
        image = some_images(height, width, dtype=torch.float64)[index]
        image = F.pad(image, (0, w * PATCH - width, 0, h * PATCH - height))
        batch[index, :, : h * PATCH, : w * PATCH] = image
        valid[index, :h, :w] = True
        alone.append(model(layout(image[None]))[0])
    together = model(layout(batch), valid)
    assert_same(together, torch.stack(alone), 1e-12)
    stretched = model(layout(batch.nan_to_num()))  # as if both filled the batch
    assert (together - stretched).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(4, 4), (9, 7), (3, 2), (4, 9), (8, 5)], ids=str)
def test_a_position_embedding_resampled_in_parts_is_timms_resampled_whole(size):
    embed = randomised(GridEmbedding(4, 5, 3))
    flat = embed.table.detach().flatten(0, 1)[None]
    timms = resample_abs_pos_embed(flat, size, (4, 5), num_prefix_tokens=0).view(1, *size, 3)
    exact = F.interpolate(
        embed.table.detach().double().permute(2, 0, 1)[None],
        size,
        mode="bicubic",
        antialias=True,
    ).permute(0, 2, 3, 1)
    for at in ((0, 0), (0, 1), (1, 0), (1, 1)):
        place = Place(*size, shape=(2, 2), at=at)
        part = (slice(None), *place.rect.slices(place.grid))
        zeros = torch.zeros(1, place.rect.height, place.rect.width, 3)
        assert_same(embed(zeros, place, None), timms[part], 1e-6)
        double = copy.deepcopy(embed).double()(zeros.double(), place, None)
        assert_same(double, exact[part], 1e-12)


def test_relative_tables_are_of_the_grid_that_is_given():
    config = {"pattern": ["row+col"], "positions": "relative"}
    model = axial(small_vit("class"), config, grid=(6, 9))
    assert model.blocks[0].attn.bias_h.shape == (HEADS, 2 * 6 - 1)
    assert model.blocks[0].attn.bias_w.shape == (HEADS, 2 * 9 - 1)
    assert model(some_images(12, 18)).shape == (2, CLASSES)
    with pytest.raises(ValueError, match=r"7 x 9 tokens exceeds .*\[6, 9\]: allowed is up to that"):
        model(some_images(13, 18))
    own = axial(small_vit("class"), config)  # the model's, where none is given
    assert own.blocks[0].attn.bias_h.shape == (HEADS, 2 * 4 - 1)
    clipped = axial(small_vit("class"), config | {"span": 2})
    assert clipped(some_images(40, 50)).shape == (2, CLASSES)


def test_a_config_is_a_dictionary_or_an_axial_config():
    theirs, given = small_vit("class"), {"pattern": ["row+col"]}
    assert axial(theirs, given).axial_config == AxialConfig(["row+col"], positions="none")
    assert given == {"pattern": ["row+col"]}
    assert axial(theirs, AxialConfig(["row+col"])).axial_config.positions == "rope"


def test_training_with_the_draws_of_a_step_is_the_same_each_time():
    model = axial(small_vit("class", drop_path_rate=0.5), {"pattern": ["row+col"]}).train()
    images, chance = some_images(8, 8), Chance(0, 3, (7, 9))
    assert torch.equal(model(images, chance=chance), model(images, chance=chance))


def test_distilled_training_is_timms_switch():
    model = axial(small_vit("distilled")).train()
    assert isinstance(model, VisionTransformerDistilled)
    images = some_images(8, 8)
    mean = model(images)
    model.set_distilled_training(True)
    by_label, by_teacher = model(images)
    assert torch.equal((by_label + by_teacher) / 2, mean)
    assert torch.equal(model.eval()(images), mean)
