"""Passes that are computed again band by band: the gradients of the plain run, on any mesh."""

from dataclasses import replace

import pytest
import torch
from distributed.launcher import run_ranks
from distributed.model_ranks import Case, serial, sharded
from torch import nn

from axialtrain.models.by_band import in_bands
from axialtrain.models.patches import PatchEmbed
from axialtrain.models.recompute import Recompute
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig
from axialtrain.train.compose import compose_run

PLAIN = Case((7, 5), ("row+col", "row+window", "col+row+global"), depth=3)
CASES = {
    "masked": PLAIN,
    "without a mask": replace(PLAIN, holes=None),
    "relative, own projections": replace(PLAIN, positions="relative", share=False),
    "skipped, dropped": replace(PLAIN, skip_axis=0.9, drop_path=0.5),
    "one pass a layer, pooled": replace(PLAIN, pattern=("row", "col"), head="mean"),
    "with a prefix, whole": replace(PLAIN, prefix=2),
    "summed, whole": replace(PLAIN, pattern=("row+col",), fusion="sum"),
}
BANDS = {"a line": Recompute(band=1), "several, layers again": Recompute(2, 0.5, band=25)}


def assert_same(got, want):
    """To 1e-10 in fp64: sums over tokens are taken in another order."""
    assert got.parameters.keys() == want.parameters.keys()
    for name, gradient in want.parameters.items():
        assert_close(got.parameters[name], gradient, name)
    assert got.unused == want.unused


def assert_close(got, want, what):
    assert got.shape == want.shape, what
    assert (got - want).abs().max() <= 1e-10 * want.abs().max().clamp_min(1e-30), what


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_plain_run(name):
    want = serial(CASES[name])
    for way in BANDS.values():
        got = serial(replace(CASES[name], recompute=way))
        assert_close(got.output, want.output, "output")
        assert_close(got.input, want.input, "input")
        assert_same(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"row": 2, "col": 2}, {"row": 2, "tensor": 2}], ids=str)
def test_on_a_mesh_too(mesh):
    """Parts of uneven size, of which bands of one or two rows or columns are cut."""
    plain = replace(CASES["masked"], grid=(13, 10))
    want = serial(plain)
    case = replace(plain, recompute=Recompute(2, band=40))
    for got in run_ranks(sharded, 4, case=case, mesh=mesh, timeout=100):
        top, bottom, left, right = (2 * edge for edge in got.rect)
        assert_close(got.output, want.output[:, top:bottom, left:right], "output")
        assert_close(got.input, want.input[:, top:bottom, left:right], "input")
        assert_same(got, want)


@pytest.mark.parametrize("exchange", ["heads", "gather"])
def test_passes_of_parts_of_lines_are_taken_whole(exchange):
    case = CASES["masked"]
    want = serial(case)
    options = {"mesh": {"row": 2, "col": 2}, "exchange": exchange, "timeout": 100}
    for got in run_ranks(sharded, 4, case=replace(case, recompute=Recompute(1, band=9)), **options):
        assert_same(got, want)


def test_empty_parts():
    """Two rows over two by two ranks: two of them have none of whole rows."""
    case = Case((2, 3), ("row+col",), holes=None)
    want = serial(case)
    case = replace(case, recompute=Recompute(1, band=4))
    for got in run_ranks(sharded, 4, case=case, mesh={"row": 2, "col": 2}, timeout=100):
        assert_same(got, want)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))
        self.unused = nn.Parameter(torch.ones(3))
        self.calls: list[int] = []

    def forward(self, x):
        self.calls.append(x.shape[1])
        return (x * self.weight).exp()


def test_each_band_runs_once_forward_and_once_in_backward():
    scale, x = Scale(), torch.randn(2, 7, 3, requires_grad=True)
    out = in_bands(lambda part, _: scale(part), x, [3, 0, 2, 2], 1, [scale])
    assert scale.calls == [3, 0, 2, 2]
    out.sum().backward()
    assert scale.calls == 2 * [3, 0, 2, 2]
    got = (x.grad, scale.weight.grad)
    x.grad = scale.weight.grad = None
    want = (x * scale.weight).exp()
    assert torch.equal(out, want)
    want.sum().backward()
    torch.testing.assert_close(got, (x.grad, scale.weight.grad))
    assert torch.equal(scale.unused.grad, torch.zeros(3))


@pytest.mark.parametrize("masked", [False, True])
def test_patches_are_made_in_bands_of_which_the_pixels_alone_are_kept(masked):
    """Of 5 x 4 tokens 2 rows at a time. Masked pixels may be anything."""
    torch.manual_seed(0)
    embed = PatchEmbed(2, 3, 8).double()
    pixels = torch.randn(2, 10, 8, 3).double().requires_grad_()
    valid = torch.rand(2, 5, 4) < 0.7 if masked else None
    if valid is not None:
        with torch.no_grad():
            pixels[~valid.repeat_interleave(2, 1).repeat_interleave(2, 2)] = torch.nan
    found = []
    for band in (0, 17):
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: (kept.append(x), x)[1], lambda x: x
        ):
            out = embed(pixels, valid, band)
        others = [x for x in kept if x.data_ptr() != pixels.data_ptr()]
        found.append((out, *torch.autograd.grad(out.square().sum(), (pixels, embed.proj.weight))))
        assert (max((x.numel() for x in others), default=0) >= pixels.numel()) == (band == 0)
    for want, got in zip(*found, strict=True):
        assert_close(got, want, "patches")


def test_gradcheck():
    scale = Scale().double()
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, _: in_bands(lambda part, _: scale(part), x, [2, 3], 1, [scale]), (x, scale.weight)
    )


def test_what_is_frozen_gets_no_gradient():
    scale, x = Scale(), torch.randn(2, 5, 3)
    scale.unused.requires_grad_(False)
    in_bands(lambda part, _: scale(part), x, [2, 3], 1, [scale]).sum().backward()
    assert scale.weight.grad is not None
    assert scale.unused.grad is None
    scale.weight.requires_grad_(False)
    scale.unused.requires_grad_(True)
    in_bands(lambda part, _: scale(part), x, [2, 3], 1, [scale]).sum().backward()
    assert scale.unused.grad.tolist() == [0, 0, 0]
    with torch.no_grad():
        assert not in_bands(lambda part, _: scale(part), x, [2, 3], 1, [scale]).requires_grad


def test_autocast_is_the_same_in_backward():
    linear, x = nn.Linear(4, 4), torch.randn(1, 6, 4)
    seen = []

    def run(part, _):
        seen.append(linear(part))
        return seen[-1]

    with torch.autocast("cpu", torch.bfloat16):
        in_bands(run, x, [3, 3], 1, [linear]).float().sum().backward()
    assert [one.dtype for one in seen] == [torch.bfloat16] * 4


def test_gradients_are_added_up_in_fp32():
    """256 + 1 is 256 in bf16: of 65 bands with the gradients 256, 1, 1, ... 64 would be lost."""
    scale = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    module = nn.ParameterList([scale])
    x = torch.ones(1, 65, 1, dtype=torch.bfloat16)
    x[:, 0] = 256
    in_bands(lambda part, _: part * scale, x, [1] * 65, 1, [module]).float().sum().backward()
    assert scale.grad.item() == 320


def test_evaluation_takes_bands_too():
    torch.manual_seed(0)
    model = AxialTransformer(AxialTransformerConfig(patch=2, dim=8, heads=2, depth=2)).eval()
    pixels = torch.randn(1, 10, 12, 3)
    calls: list[torch.Size] = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))
    want, _ = model(pixels)
    model.recompute = Recompute(1, band=12)
    got, _ = model(pixels)
    assert calls == [(1, 5, 6, 8), *3 * [(1, 5, 2, 8)]]
    torch.testing.assert_close(got, want)


BAND = ["data.shards=x", "train.recompute_band=64"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.recompute_band=-1"], "train.recompute_band=-1: allowed are whole numbers from 0"),
        (["model=axial_resnet50s"], "recompute_band=64: only an axial transformer can: allowed"),
        (["model.axial_config.pattern=[window]"], "no pass of rows or columns: allowed is 0"),
        (["model.prefix_tokens=1"], "at once: allowed is 0 with model.prefix_tokens=1"),
        (["model.axial_config.fusion=sum"], "allowed is 0 with model.axial_config.fusion=sum"),
        (["mesh=2x2", "mesh.exchange=gather"], "allowed is 0 with mesh.exchange=gather"),
        (["mesh=2x2", "mesh.overlap=2"], "allowed is 0 with mesh.overlap=2"),
        (["zero=3"], "zero.stage=3 gathers its weights: allowed is 0, or zero.stage of 0, 1, 2"),
        (["task=reconstruction"], "task=reconstruction compares with them: allowed is 0"),
        (
            ["task=classification", "task.distilled=true", "task.distill.teacher=timm:x"],
            "allowed is 0 with task.distill.teacher=timm:x",
        ),
    ],
    ids=str,
)
def test_what_it_does_not_go_with_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose_run([*BAND, *overrides])


def test_a_run_is_told_of_its_bands():
    train = compose_run([*BAND, "train.recompute=2"])[0].train
    assert (train.recompute, train.recompute_band, train.lean) == (2, 64, True)
