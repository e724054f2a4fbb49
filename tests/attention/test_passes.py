"""`AxialAttention`, whatever the pass: its formula, and who may influence whom."""

from __future__ import annotations

import itertools

import pytest
import torch
from formulas import (
    Bias,
    Sees,
    area_bias,
    assert_agree,
    everything,
    formula,
    line,
    line_bias,
    some,
    tokens,
    window,
)
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig, Pass
from axialtrain.attention.passes import AxialAttention
from axialtrain.grid import Place

pytestmark = pytest.mark.slow

IMAGES, HEIGHT, WIDTH, DIM, HEADS = 2, 5, 7, 8, 2
PLACE = Place(HEIGHT, WIDTH)
WINDOW = 3
WHO: dict[Pass, Sees] = {
    Pass.ROW: line(2),
    Pass.COL: line(1),
    Pass.WINDOW: window(WINDOW),
    Pass.SHIFTED: window(WINDOW, WINDOW // 2),
    Pass.GLOBAL: everything,
}
PASSES = pytest.mark.parametrize("which", Pass, ids=lambda which: which.value)


def attention(passes: tuple[Pass, ...], **options) -> AxialAttention:
    """In fp64, with weights large enough that every token says something to every other."""
    torch.manual_seed(0)
    config = AxialConfig([one.value for one in passes], window=WINDOW, **options)
    module = AxialAttention(DIM, HEADS, passes, config, grid=(HEIGHT, WIDTH)).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def turned(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Rotary positions, by multiplication with unit complex numbers."""
    parts = []
    for part, dim in zip(x.chunk(len(dims), -1), dims, strict=True):
        width = part.shape[-1]
        frequencies = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.arange(x.shape[dim], dtype=torch.float64)[:, None] * frequencies
        shape = (1, -1, 1, 1, width // 2) if dim == 1 else (1, 1, -1, 1, width // 2)
        turns = torch.polar(torch.ones_like(angles), angles).view(shape)
        pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
        parts.append(torch.view_as_real(pairs * turns).flatten(-2))
    return torch.cat(parts, -1)


def projected(module: AxialAttention, x: Tensor) -> list[Tensor]:
    """q, k and v: the weight is packed [N][q, k, v][K]."""
    weight = module.qkv.weight.view(HEADS, 3, DIM // HEADS, DIM)
    offset = module.qkv.bias.view(HEADS, 3, DIM // HEADS)
    return [torch.einsum("...d, nkd -> ...nk", x, weight[:, i]) + offset[:, i] for i in range(3)]


def bias_of(module: AxialAttention, which: Pass) -> Bias | None:
    if module.positions != "relative":
        return None
    if which is Pass.ROW:
        return line_bias(module.bias_w, 2)
    if which is Pass.COL:
        return line_bias(module.bias_h, 1)
    return area_bias(module.bias_h, module.bias_w)


def by_hand(
    module: AxialAttention, x: Tensor, prefix: Tensor, which: Pass, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v = projected(module, x)
    if module.positions == "rope":
        q, k = turned(q, which.dims), turned(k, which.dims)
    prefix_q, *own = projected(module, prefix)
    out = formula(q, k, v, WHO[which], mask=valid, bias=bias_of(module, which), prefix=tuple(own))
    out = out.flatten(3) @ module.proj.weight.T + module.proj.bias
    if valid is not None:
        out = out * valid[..., None]
    if not prefix.shape[1]:
        return out, prefix
    merged = formula(prefix_q[:, None], k, v, everything, mask=valid, prefix=tuple(own))[:, 0]
    return out, merged.flatten(2) @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("length", [0, 2], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("positions", ["none", "rope", "relative"])
@PASSES
def test_a_pass_is_its_formula(which, positions, length, masked):
    module = attention((which,), positions=positions)
    x, prefix = tokens(IMAGES, HEIGHT, WIDTH, DIM), tokens(IMAGES, length, DIM, seed=1)
    valid = some(IMAGES, HEIGHT, WIDTH) if masked else None
    got = torch.cat([y.flatten() for y in module(x, prefix, PLACE, which, valid)])
    want = torch.cat([y.flatten() for y in by_hand(module, x, prefix, which, valid)])
    assert_agree(got, want, x, prefix, *module.parameters())


@PASSES
def test_passes_that_share_a_module_share_its_tables(which):
    module = attention(tuple(Pass), positions="relative", span=3)
    assert module.bias_h.shape == module.bias_w.shape == (HEADS, 5)
    x, prefix = tokens(IMAGES, HEIGHT, WIDTH, DIM), tokens(IMAGES, 2, DIM, seed=1)
    got = torch.cat([y.flatten() for y in module(x, prefix, PLACE, which)])
    want = torch.cat([y.flatten() for y in by_hand(module, x, prefix, which, None)])
    assert_agree(got, want, x, prefix)


@pytest.mark.parametrize(
    ("passes", "span", "down", "across"),
    [
        ("row", None, None, WIDTH),
        ("col", None, HEIGHT, None),
        ("row col", None, HEIGHT, WIDTH),
        ("global", None, HEIGHT, WIDTH),
        ("window", None, WINDOW, WINDOW),
        ("window shifted", None, WINDOW, WINDOW),
        ("window row", None, WINDOW, WIDTH),
        ("window col", None, HEIGHT, WINDOW),
        ("row", 4, None, 4),
        ("row col", 4, 4, 4),
        ("window", 2, 2, 2),
    ],
)
def test_a_table_reaches_as_far_as_its_passes_or_the_span(passes, span, down, across):
    module = attention(tuple(map(Pass, passes.split())), positions="relative", span=span)
    for table, reach in ((module.bias_h, down), (module.bias_w, across)):
        assert (table is None) == (reach is None)
        assert table is None or table.shape == (HEADS, 2 * reach - 1)


@pytest.mark.parametrize("positions", ["none", "rope", "relative"])
@pytest.mark.parametrize("at", [(0, 0), (3, 4), (2, 6)], ids=str)
@PASSES
def test_who_is_told_of_a_changed_token(which, at, positions):
    """Rows along rows alone, columns along columns, windows inside of windows."""
    module = attention((which,), positions=positions)
    x, none = tokens(IMAGES, HEIGHT, WIDTH, DIM).detach(), torch.zeros(IMAGES, 0, DIM).double()
    before, _ = module(x, none, PLACE, which)
    x[1, *at] += 1.0
    changed = (module(x, none, PLACE, which)[0] != before).any(-1)
    told = torch.zeros(IMAGES, HEIGHT, WIDTH, dtype=torch.bool)
    if which is Pass.ROW:
        told[1, at[0]] = True
    elif which is Pass.COL:
        told[1, :, at[1]] = True
    elif which is Pass.GLOBAL:
        told[1] = True
    else:
        cuts = [0, 3, 6, 9] if which is Pass.WINDOW else [-1, 2, 5, 8]
        (top, bottom), (left, right) = (
            next((max(a, 0), b) for a, b in itertools.pairwise(cuts) if a <= y < b) for y in at
        )
        told[1, top:bottom, left:right] = True
    assert torch.equal(changed, told)


@PASSES
def test_what_is_not_valid_tells_nobody_and_comes_out_as_zeros(which):
    module = attention((which,))
    x, prefix = tokens(IMAGES, HEIGHT, WIDTH, DIM), tokens(IMAGES, 2, DIM, seed=1)
    valid = some(IMAGES, HEIGHT, WIDTH)
    out, of_prefix = module(x, prefix, PLACE, which, valid)
    assert torch.equal((out != 0).all(-1), valid)
    (grad,) = torch.autograd.grad(out.square().sum() + of_prefix.square().sum(), x)
    assert not grad[~valid].any()


@PASSES
def test_the_prefix_is_told_of_every_token_and_tells_every_token(which):
    module = attention((which,))
    x, prefix = tokens(IMAGES, HEIGHT, WIDTH, DIM), tokens(IMAGES, 2, DIM, seed=1)
    out, of_prefix = module(x, prefix, PLACE, which)
    (grad,) = torch.autograd.grad(of_prefix.square().sum(), x, retain_graph=True)
    assert grad.abs().amax(-1).amin() > 0
    moved, _ = module(x, prefix + 1.0, PLACE, which)
    assert (moved != out).any(-1).all()


@PASSES
def test_an_image_without_a_valid_token_has_no_nan_anywhere(which):
    module = attention((which,), positions="relative")
    x, prefix = tokens(IMAGES, HEIGHT, WIDTH, DIM), tokens(IMAGES, 2, DIM, seed=1)
    valid = some(IMAGES, HEIGHT, WIDTH)
    valid[1] = False
    out, of_prefix = module(x, prefix, PLACE, which, valid)
    assert not out[1].any()
    loss = out.square().sum() + of_prefix.square().sum()
    for grad in torch.autograd.grad(loss, (x, prefix, *module.parameters())):
        assert grad.isfinite().all()


@pytest.mark.parametrize("length", [0, 2], ids=["no prefix", "prefix"])
@PASSES
def test_a_pass_that_is_left_out_gives_every_parameter_a_gradient_of_zero(which, length):
    module = attention((which,), positions="relative")
    x, prefix = tokens(IMAGES, HEIGHT, WIDTH, DIM), tokens(IMAGES, length, DIM, seed=1)
    out, of_prefix = module(x, prefix, PLACE, which, skip=True)
    x, prefix = x + out, prefix + of_prefix
    (x.sum() + prefix.sum()).backward()
    assert not out.any()
    assert not of_prefix.any()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
