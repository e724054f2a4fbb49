"""What training leaves out: counted draws, the same everywhere, and what they do to a layer."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from test_passes_mix import assert_close, holes, plain_layer, told
from test_transformer import DIM, GRID, PLACE, backbone, config, pixels, random_weights
from torch import Tensor

from axialtrain.attention.config import AxialConfig
from axialtrain.models.chance import Chance
from axialtrain.models.layer import Layer
from axialtrain.models.transformer import AxialTransformer

pytestmark = pytest.mark.slow

MANY = 4000
SAMPLES = tuple(range(MANY))


def skips(seed: int = 1, layer: int = 0, share: float = 0.5, passes: int = 2) -> list[int | None]:
    """Which pass each of many steps leaves out."""
    return [Chance(seed, step, ()).skipped(layer, passes, share) for step in range(MANY)]


def dropped(
    seed: int = 1, layer: int = 0, branch: int = 0, share: float = 0.5, first: int = 0
) -> list[bool]:
    """Whether a branch of each of many samples is left out."""
    samples = tuple(range(first, first + MANY))
    return [factor == 0 for factor in Chance(seed, 0, samples).kept(layer, branch, share)]


def assert_near(count: int, share: float) -> None:
    """Of MANY draws; five deviations of a binomial. Seeds are fixed: it holds or it does not."""
    assert abs(count - MANY * share) < 5 * (MANY * share * (1 - share)) ** 0.5


# ---- the draws


def test_draws_are_those_of_philox_counters():
    """Runs resume on their draws, so they are a format: key and counter are as written here."""

    def draw(number: int, *words: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[11, number], counter=[0, *words]))

    chance = Chance(11, 5, (3, 2**40))
    factors = [0.0 if draw(sample, 4, 1, 7).random() < 0.4 else 1 / 0.6 for sample in (3, 2**40)]
    assert chance.kept(7, 4, 0.4) == factors
    for layer in range(20):
        axis = draw(5, 0, 2, layer)
        assert (axis.random() < 0.4) == (chance.skipped(layer, 3, 0.4) is not None)


def test_draws_are_the_same_again():
    once, again = (Chance(3, 8, (5, 1, 9)) for _ in range(2))
    for layer in range(20):
        assert once.skipped(layer, 3, 0.5) == again.skipped(layer, 3, 0.5)
        assert once.kept(layer, 1, 0.5) == again.kept(layer, 1, 0.5)
        assert once.kept(layer, 1, 0.5) == once.kept(layer, 1, 0.5)


def test_a_sample_draws_the_same_beside_any_others_and_in_any_step():
    alone = [Chance(3, step, (one,)).kept(2, 1, 0.5)[0] for step, one in enumerate(range(40))]
    assert Chance(3, 0, tuple(range(40))).kept(2, 1, 0.5) == alone
    assert Chance(3, 7, tuple(range(39, -1, -1))).kept(2, 1, 0.5) == alone[::-1]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_passes_are_skipped_as_often_as_they_should_be(share):
    found = skips(share=share, passes=3)
    assert_near(sum(which is not None for which in found), share)
    for which in range(3):
        assert_near(found.count(which), share / 3)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_branches_are_dropped_as_often_as_they_should_be(share):
    assert_near(sum(dropped(share=share)), share)
    factors = set(Chance(0, 0, SAMPLES).kept(0, 0, share))
    assert factors == {0.0, 1 / (1 - share)}


def test_nothing_and_everything():
    assert skips(share=0.0) == [None] * MANY
    assert skips(passes=1, share=1.0) == [None] * MANY
    assert None not in skips(share=1.0)
    assert not any(dropped(share=0.0))
    assert Chance(0, 0, SAMPLES).kept(0, 0, 0.0) == [1.0] * MANY


@pytest.mark.parametrize("other", [{"seed": 2}, {"layer": 1}, {"layer": 2}], ids=str)
def test_which_pass_is_skipped_is_independent_of(other):
    """Two independent draws, each a pass or none, agree in 3/8 of the steps; streams that are the
    same agree always, and those of which one lags behind do after a shift.
    """
    one, two = skips(), skips(**other)
    assert_near(sum(a == b for a, b in zip(one, two, strict=True)), 3 / 8)
    for shift in range(1, 5):
        for a, b in ((one, two[shift:]), (one[shift:], two)):
            assert sum(x == y for x, y in zip(a, b, strict=False)) < MANY / 2


@pytest.mark.parametrize(
    "other",
    [{"seed": 2}, {"layer": 1}, {"branch": 1}, {"branch": 2}, {"first": 1}, {"first": MANY}],
    ids=str,
)
def test_which_branch_is_dropped_is_independent_of(other):
    pairs = zip(dropped(), dropped(**other), strict=True)
    assert_near(sum(a == b for a, b in pairs), 0.5)


def test_layers_branches_and_steps_are_not_added_up():
    """Layer 1 of branch 0 is not layer 0 of branch 1, nor seed 2 in step 1 seed 1 in step 2."""
    for one, other in (
        (dropped(layer=1), dropped(branch=1)),
        (dropped(layer=3, branch=2), dropped(layer=2, branch=3)),
        (dropped(seed=2, first=1), dropped(seed=1, first=2)),
    ):
        assert_near(sum(a == b for a, b in zip(one, other, strict=True)), 0.5)


def test_neighbouring_steps_draw_independently():
    assert sum(a == b for a, b in itertools.pairwise(skips())) < MANY * 0.42


def test_passes_and_branches_have_streams_of_their_own():
    pairs = zip(skips(), dropped(), strict=True)
    assert_near(sum((which is not None) == gone for which, gone in pairs), 0.5)


# ---- what they do to a layer

FUSIONS = pytest.mark.parametrize("fusion", ["sequential", "sum"])
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])


def layer_of(passes: str, index: int = 0, drop_path: float = 0.0, **attention: Any) -> Layer:
    settings = AxialConfig([passes], window=3, **attention)
    return random_weights(Layer(DIM, 4, 32, settings, index=index, drop_path=drop_path, grid=GRID))


def tokens(images: int = 3, prefix: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (images, *GRID, DIM), (images, prefix, DIM)
    x, of_prefix = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x, of_prefix


@FUSIONS
@SHARED
@pytest.mark.parametrize("positions", ["rope", "relative"])
@pytest.mark.parametrize("passes", ["row+col", "window+row+global"])
def test_a_skipped_pass_is_left_out_and_the_others_make_up_for_it(
    passes, positions, shared, fusion
):
    layer = layer_of(
        passes, positions=positions, fusion=fusion, share_projections=shared, skip_axis=0.8
    )
    count = len(layer.passes)
    x, prefix = tokens()
    seen = set()
    for step in range(8):
        chance = Chance(0, step, (0, 1, 2))
        skipped = chance.skipped(0, count, 0.8)
        seen.add(skipped)
        factors = torch.ones(count + 1, 3, dtype=x.dtype)
        factors[:count] /= 1 - 0.8 / count
        if skipped is not None:
            factors[skipped] = 0
        got = layer(x, prefix, PLACE, holes(), chance)
        want = plain_layer(layer, x, prefix, holes(), factors)
        for one, other in zip(got, want, strict=True):
            assert_close(one, other)
    assert len(seen) > count - 1


@FUSIONS
@SHARED
@pytest.mark.parametrize("prefix", [0, 2])
def test_every_parameter_has_a_gradient_and_those_of_the_skipped_pass_zeros(prefix, shared, fusion):
    """Not None: partitioned parameters are gathered by all ranks, or by none."""
    layer = layer_of(
        "row+col", positions="relative", fusion=fusion, share_projections=shared, skip_axis=1.0
    )
    seen = set()
    for step in range(6):
        chance = Chance(0, step, (0, 1, 2))
        skipped = chance.skipped(0, 2, 1.0)
        assert skipped is not None
        seen.add(skipped)
        layer.zero_grad()
        told(layer(*tokens(prefix=prefix), PLACE, holes(), chance)).backward()
        gradients = {name: one.grad for name, one in layer.named_parameters()}
        own = {name for name in gradients if name.endswith(("bias_w", "bias_h")[skipped])}
        if not shared:
            lists = ("attn", "norm1") if fusion == "sequential" else ("attn",)
            starts = tuple(f"{name}.{skipped}." for name in lists)
            own |= {name for name in gradients if name.startswith(starts)}
        for name, gradient in gradients.items():
            assert gradient is not None, name
            assert gradient.any() == (name not in own), name
    assert seen == {0, 1}


@FUSIONS
def test_drop_path_leaves_out_branches_of_whole_images(fusion):
    samples = tuple(range(20, 28))
    layer = layer_of("row+col", index=3, drop_path=0.5, fusion=fusion)
    x, prefix = tokens(images=8)
    valid = torch.rand(8, *GRID, generator=torch.Generator().manual_seed(1)) < 0.7
    chance = Chance(4, 0, samples)
    # Summed passes are one residual branch, of the first's number.
    branches = (0, 1, 2) if fusion == "sequential" else (0, 0, 2)
    factors = torch.tensor([chance.kept(3, one, 0.5) for one in branches], dtype=x.dtype)
    assert set(factors.flatten().tolist()) == {0.0, 2.0}
    got = layer(x, prefix, PLACE, valid, chance)
    want = plain_layer(layer, x, prefix, valid, factors)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)


def test_drop_path_and_skipped_passes_together():
    layer = layer_of("row+col", drop_path=0.3, skip_axis=1.0)
    x, prefix = tokens()
    for step in range(4):
        chance = Chance(4, step, (2, 7, 5))
        factors = torch.tensor([chance.kept(0, one, 0.3) for one in range(3)], dtype=x.dtype)
        factors[:2] *= 2
        factors[chance.skipped(0, 2, 1.0)] = 0
        got = layer(x, prefix, PLACE, holes(), chance)
        want = plain_layer(layer, x, prefix, holes(), factors)
        for one, other in zip(got, want, strict=True):
            assert_close(one, other)


def test_an_image_of_which_everything_is_dropped_comes_out_as_it_went_in():
    layer = layer_of("row", drop_path=0.5)
    x, prefix = tokens(images=1)
    sample = next(
        i
        for i in range(100)
        if not any(Chance(0, 0, (i,)).kept(0, branch, 0.5)[0] for branch in (0, 1))
    )
    out, of_prefix = layer(x, prefix, PLACE, None, Chance(0, 0, (sample,)))
    assert torch.equal(out, x)
    assert torch.equal(of_prefix, prefix)


def test_what_runs_has_the_expectation_of_evaluation():
    """Of a summed layer, whose passes do not see each other, without its MLP."""
    layer = layer_of("row+col", fusion="sum", skip_axis=0.6, drop_path=0.2)
    torch.nn.init.zeros_(layer.mlp.fc2.weight)
    torch.nn.init.zeros_(layer.mlp.fc2.bias)
    x, prefix = tokens(images=1, prefix=0)
    runs = 300
    with torch.no_grad():
        change = layer(x, prefix, PLACE)[0] - x
        outs = [layer(x, prefix, PLACE, None, Chance(0, i, (i,)))[0] - x for i in range(runs)]
    mean = torch.stack(outs).mean(0)
    assert (mean - change).norm() < 0.2 * change.norm()


# ---- the model


def test_drop_path_grows_linearly_over_the_depth():
    model = AxialTransformer(config(depth=5, drop_path=0.4))
    assert [block.drop_path for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [block.index for block in model.blocks] == [0, 1, 2, 3, 4]


def test_drop_path_of_a_single_layer_is_said_to_be_of_no_use():
    with pytest.warns(UserWarning, match=r"used by no layer: drop_path=0\.4"):
        model = AxialTransformer(config(depth=1, drop_path=0.4))
    assert model.blocks[0].drop_path == 0


def test_a_backbone_gives_its_layers_their_own_draws():
    model = backbone(["row+col"], {"skip_axis": 0.5}, depth=6, drop_path=0.3, prefix_tokens=1)
    chance = Chance(5, 6, (7, 8, 9))
    assert len({chance.skipped(layer, 2, 0.5) for layer in range(6)}) == 3
    valid = holes()
    got = model(pixels(images=3), valid, PLACE, chance=chance)
    x = torch.where(valid[..., None], model.patch_embed(pixels(images=3), valid), 0.0)
    prefix = model.prefix.expand(3, -1, -1)
    for number, layer in enumerate(model.blocks):
        factors = torch.ones(3, 3, dtype=x.dtype)
        if number:
            drop = 0.3 * number / 5
            factors = torch.tensor([chance.kept(number, i, drop) for i in range(3)], dtype=x.dtype)
        factors[:2] /= 1 - 0.5 / 2
        skipped = chance.skipped(number, 2, 0.5)
        if skipped is not None:
            factors[skipped] = 0
        x, prefix = plain_layer(layer, x, prefix, valid, factors)
    assert_close(got[0], model.norm(x) * valid[..., None])
    assert_close(got[1], model.norm(prefix))


LEAVES_OUT = pytest.mark.parametrize(
    ("attention", "options"), [({"skip_axis": 0.9}, {}), ({}, {"drop_path": 0.9})], ids=str
)


@LEAVES_OUT
def test_evaluation_leaves_nothing_out(attention, options):
    plain = backbone()(pixels(), None, PLACE)[0]
    model = backbone(attention=attention, **options).eval()
    for chance in (None, Chance(0, 0, (0, 1))):
        assert torch.equal(model(pixels(), None, PLACE, chance=chance)[0], plain)
    assert not torch.equal(
        model.train()(pixels(), None, PLACE, chance=Chance(0, 0, (0, 1)))[0], plain
    )


@LEAVES_OUT
def test_training_without_the_draws_is_refused(attention, options):
    model = backbone(attention=attention, **options)
    message = r"drop_path or axial_config\.skip_axis needs .*chance=Chance\(seed, step, samples\)"
    with pytest.raises(ValueError, match=message):
        model(pixels(), None, PLACE)


def test_draws_are_those_of_the_images_that_are_given():
    model = backbone(drop_path=0.5)
    message = r"chance\.samples has 3 entries: allowed is one for each of the 2 images"
    with pytest.raises(ValueError, match=message):
        model(pixels(), None, PLACE, chance=Chance(0, 0, (0, 1, 2)))


def test_a_model_that_leaves_nothing_out_needs_no_draws():
    model = backbone()
    want, _ = model(pixels(), None, PLACE)
    assert torch.equal(model(pixels(), None, PLACE, chance=Chance(0, 0, (0, 1)))[0], want)


@pytest.mark.parametrize("pattern", ["row", "global"])
def test_a_layer_of_one_pass_keeps_it(pattern):
    attended = backbone([pattern])(pixels(), None, PLACE)[0]
    with pytest.warns(UserWarning, match=r"skip_axis=1\.0 \(no layer has several passes\)"):
        model = backbone([pattern], {"skip_axis": 1.0})
    for step in range(3):
        got, _ = model(pixels(), None, PLACE, chance=Chance(0, step, (0, 1)))
        assert torch.equal(got, attended)
