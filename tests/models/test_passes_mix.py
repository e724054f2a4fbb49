"""Every mixture of passes, fusion, projections, positions and prefix against plain formulas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import torchvision_ops  # noqa: F401  # isort: skip
from test_transformer import (
    BANDS,
    DIM,
    GRID,
    PATCH,
    PLACE,
    backbone,
    config,
    parameters,
    per_pixel,
    pixels,
    random_weights,
    some_tokens,
)
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from axialtrain.attention import lines
from axialtrain.attention.config import AxialConfig, Pass
from axialtrain.attention.passes import AxialAttention
from axialtrain.grid import Place
from axialtrain.models.layer import Layer
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig

pytestmark = pytest.mark.slow

WINDOW = 3
MADE_FOR = (8, 10)  # grid of learned positions: larger than GRID

PATTERNS = [
    ("row+col",),
    ("col+row",),
    ("row", "col"),
    ("window",),
    ("shifted",),
    ("global",),
    ("row+window+global",),
    ("window", "row+col", "shifted", "global"),
    ("window+shifted", "col+global"),
]
POSITIONS: dict[str, dict[str, Any]] = {
    "rope": {"positions": "rope"},
    "relative": {"positions": "relative"},
    "clipped": {"positions": "relative", "span": 3},
    "axial": {"positions": "axial"},
    "grid": {"positions": "none"},  # and an embedding of each place
    "none": {"positions": "none"},
}


@dataclass(frozen=True)
class Kind:
    """What an axial_config may say of the layers of a model."""

    pattern: tuple[str, ...]
    positions: str
    fusion: str
    shared: bool
    prefix: int

    def __str__(self) -> str:
        projections = "shared" if self.shared else "separate"
        pattern = ",".join(self.pattern)
        return f"{pattern}-{self.positions}-{self.fusion}-{projections}-{self.prefix} prefix"

    @property
    def attention(self) -> dict[str, Any]:
        return {
            "fusion": self.fusion,
            "share_projections": self.shared,
            "window": WINDOW,
            **POSITIONS[self.positions],
        }

    def build(self, grid: Sequence[int] = MADE_FOR, **options: Any) -> AxialTransformer:
        depth = max(2, len(self.pattern))
        options = {
            "depth": depth,
            "grid": list(grid),
            "grid_embedding": self.positions == "grid",
            "prefix_tokens": self.prefix,
        } | options
        return backbone(self.pattern, self.attention, **options)


def every_kind() -> Iterator[Kind]:
    """Each pattern with each kind of positions; the other options take turns."""
    others = itertools.cycle(itertools.product(("sequential", "sum"), (True, False), (0, 2)))
    for positions, pattern in itertools.product(POSITIONS, PATTERNS):
        yield Kind(pattern, positions, *next(others))


EVERY_KIND = pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=str(kind)) for kind in every_kind()]
)


def assert_close(got: Tensor, want: Tensor, what: str = "") -> None:
    torch.testing.assert_close(
        got, want, rtol=1e-10, atol=1e-10, msg=lambda message: f"{what}: {message}"
    )


# ---- the model written out: one softmax over all tokens and the prefix


def allowed_pairs(which: Pass, i: Tensor, j: Tensor) -> Tensor:
    """[T, T]: whether a token attends to another, from their rows i and columns j."""

    def same(x: Tensor) -> Tensor:
        return x[:, None] == x[None, :]

    shift = WINDOW // 2 if which is Pass.SHIFTED else 0
    return {
        Pass.ROW: same(i),
        Pass.COL: same(j),
        Pass.GLOBAL: same(torch.zeros_like(i)),
    }.get(which, same((i + shift) // WINDOW) & same((j + shift) // WINDOW))


def turned(x: Tensor, along: Sequence[Tensor]) -> Tensor:
    """x: [B, T, N, K]. Each of `along` [T] turns its share of the channels, pair by pair, as
    complex numbers (RoFormer, eq. 34).
    """
    parts = []
    for part, at in zip(x.chunk(len(along), -1), along, strict=True):
        channels = part.shape[-1]
        powers = torch.arange(0, channels, 2, dtype=x.dtype) / channels
        angles = at[:, None, None] / 10_000.0**powers
        pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
        turn = torch.polar(torch.ones_like(angles), angles)
        parts.append(torch.view_as_real(pairs * turn).flatten(-2))
    return torch.cat(parts, -1)


def plain_attention(
    attn: AxialAttention, x: Tensor, prefix: Tensor, which: Pass, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """What `attn` must give, from its weights alone."""
    height, width = x.shape[1:3]
    n, channels = prefix.shape[1], attn.head_dim
    i, j = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    along = {Pass.ROW: (j,), Pass.COL: (i,)}.get(which, (i, j))
    qkv = F.linear(torch.cat((prefix, x.flatten(1, 2)), 1), attn.qkv.weight, attn.qkv.bias)
    q, k, v = qkv.unflatten(-1, (-1, 3, channels)).unbind(3)
    if attn.positions == "rope":
        q, k = (torch.cat((y[:, :n], turned(y[:, n:], along)), 1) for y in (q, k))
    logits = torch.einsum("bqnk,bsnk->bnqs", q, k) / channels**0.5
    for table, at, dim in ((attn.bias_h, i, 1), (attn.bias_w, j, 2)):
        if table is not None and dim in which.dims:
            reach = table.shape[1] // 2
            distance = (at[None, :] - at[:, None]).clamp(-reach, reach)
            logits[:, :, n:, n:] += table[:, distance + reach]
    allowed = torch.ones(len(x), 1, *logits.shape[2:], dtype=torch.bool)
    allowed[:, :, n:, n:] = allowed_pairs(which, i, j)
    allowed[..., n:] &= valid.flatten(1)[:, None, None]
    some = allowed.any(-1, keepdim=True)
    weights = logits.masked_fill(~allowed & some, -torch.inf).softmax(-1) * some
    mixed = torch.einsum("bnqs,bsnk->bqnk", weights, v).flatten(2)
    out = F.linear(mixed, attn.proj.weight, attn.proj.bias)
    return out[:, n:].unflatten(1, (height, width)) * valid[..., None], out[:, :n]


def plain_layer(
    layer: Layer, x: Tensor, prefix: Tensor, valid: Tensor, factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `layer` must give. factors: [branch, B], those of the passes and of the MLP."""
    passes = layer.passes
    if factors is None:
        factors = torch.ones(len(passes) + 1, len(x), dtype=x.dtype)
    seen = x, prefix
    for number, which in enumerate(passes):
        attn = layer.attn[number] if isinstance(layer.attn, nn.ModuleList) else layer.attn
        norm = layer.norm1[number] if isinstance(layer.norm1, nn.ModuleList) else layer.norm1
        entering = seen if layer.summed else (x, prefix)
        out, of_prefix = plain_attention(attn, *map(norm, entering), which, valid)
        scale = getattr(layer.ls1, "gamma", 1.0)
        x = x + factors[number, :, None, None, None] * scale * out
        prefix = prefix + factors[number, :, None, None] * scale * of_prefix

    def mlp(y: Tensor) -> Tensor:
        y = F.gelu(F.linear(layer.norm2(y), layer.mlp.fc1.weight, layer.mlp.fc1.bias))
        y = F.linear(y, layer.mlp.fc2.weight, layer.mlp.fc2.bias)
        return y * getattr(layer.ls2, "gamma", 1.0)

    x = x + factors[-1, :, None, None, None] * mlp(x)
    return x, prefix + factors[-1, :, None, None] * mlp(prefix)


def extent(used: Tensor) -> int:
    """Lines up to the last used one."""
    return int(used.nonzero().max()) + 1 if used.any() else 1


def resized(table: Tensor, valid: Tensor, mode: str, **options: bool) -> Tensor:
    """[H, W, D]: a table [H0, W0, D] of positions, resized to the extent of one image."""
    size = (extent(valid.any(1)), extent(valid.any(0)))
    image = table.permute(2, 0, 1)[None]
    resized = F.interpolate(image, size=size, mode=mode, align_corners=False, **options)
    below, right = (whole - part for whole, part in zip(valid.shape, size, strict=True))
    return F.pad(resized, (0, right, 0, below))[0].permute(1, 2, 0)


def plain_backbone(model: AxialTransformer, image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """What `model` must give. image: [B, h * patch, w * patch, bands]."""
    kept = torch.where(per_pixel(valid), image, 0.0).movedim(-1, 1)
    x = F.unfold(kept, PATCH, stride=PATCH).transpose(1, 2).unflatten(1, valid.shape[1:])
    x = F.linear(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias)
    if model.pos_embed is not None:
        places = model.pos_embed.rows[:, None] + model.pos_embed.cols
        x = x + torch.stack([resized(places, one, "bilinear") for one in valid])
    if model.grid_embed is not None:
        table = model.grid_embed.table
        x = x + torch.stack([resized(table, one, "bicubic", antialias=True) for one in valid])
    x = x * valid[..., None]
    prefix = x.new_zeros(len(x), 0, DIM)
    if model.prefix is not None:
        own = model.prefix if model.prefix_embed is None else model.prefix + model.prefix_embed
        prefix = own.expand(len(x), -1, -1)
    for layer in model.blocks:
        x, prefix = plain_layer(layer, x, prefix, valid)
    return model.norm(x) * valid[..., None], model.norm(prefix)


def holes() -> Tensor:
    """Tokens of three images: some here and there; without a row, a column and a window; none."""
    valid = torch.ones(3, *GRID, dtype=torch.bool)
    valid[0] = some_tokens()[0]
    valid[1, 1] = valid[1, :, 5] = False
    valid[1, 3:5, :3] = False
    valid[2] = False
    return valid


def told(out: tuple[Tensor, Tensor]) -> Tensor:
    """A loss in which every number of the output counts for something else."""
    weights = [torch.linspace(-1.0, 2.0, x.numel(), dtype=x.dtype).view_as(x) for x in out]
    return sum(
        ((x * weight).sum() for x, weight in zip(out, weights, strict=True)), torch.zeros(())
    )


def assert_is_its_formulas(model: AxialTransformer) -> None:
    found = []
    for run in (lambda *x: model(*x, PLACE), lambda *x: plain_backbone(model, *x)):
        image = pixels(images=3).requires_grad_()
        out = run(image, holes())
        values = dict(model.named_parameters()) | {"pixels": image}
        gradients = torch.autograd.grad(told(out), list(values.values()))
        found.append((*out, *gradients))
    for name, got, want in zip(["tokens", "prefix", *values], *found, strict=True):
        assert_close(got, want, name)


@EVERY_KIND
def test_the_backbone_is_what_its_formulas_say(kind):
    assert_is_its_formulas(kind.build())


@pytest.mark.parametrize("fusion", ["sequential", "sum"])
def test_scaled_branches_and_no_qkv_bias(fusion):
    kind = Kind(("row+col", "global"), "rope", fusion, shared=False, prefix=2)
    assert_is_its_formulas(kind.build(layer_scale=0.1, qkv_bias=False))


@pytest.mark.parametrize("pattern", PATTERNS, ids=",".join)
def test_relative_positions_in_small_chunks(monkeypatch, pattern):
    """As on images whose logits do not fit into memory at once."""
    model = Kind(pattern, "clipped", "sequential", shared=True, prefix=1).build()
    found = []
    for chunk in (lines.CHUNK, 3000, 600):  # all at once, some lines, some queries of a line
        monkeypatch.setattr(lines, "CHUNK", chunk)
        out = model(pixels(images=3), holes(), PLACE)
        found.append((*out, *torch.autograd.grad(told(out), list(model.parameters()))))
    for want, *others in zip(*found, strict=True):
        for got in others:
            assert_close(got, want)


# ---- the other axis first


def transposed(model: AxialTransformer, kind: Kind) -> AxialTransformer:
    """The model that sees rows where `model` sees columns."""
    other = {"row": "col", "col": "row"}
    pattern = tuple(
        "+".join(other.get(name, name) for name in layer.split("+")) for layer in kind.pattern
    )
    twin = replace(kind, pattern=pattern).build(MADE_FOR[::-1])
    swaps = {"bias_h": "bias_w", "bias_w": "bias_h", "rows": "cols", "cols": "rows"}
    weights = {}
    for name, value in model.state_dict().items():
        *module, last = name.split(".")
        value = value.transpose(0, 1) if last == "table" else value
        weights[".".join([*module, swaps.get(last, last)])] = value
    embed = weights["patch_embed.proj.weight"].view(DIM, BANDS, PATCH, PATCH)
    weights["patch_embed.proj.weight"] = embed.transpose(2, 3).flatten(1)
    if kind.positions == "rope":
        for name in [name for name in weights if ".qkv." in name]:
            module = model.get_submodule(name.rsplit(".qkv", 1)[0])
            if areas(model, name):
                weights[name] = halves_swapped(weights[name], module.head_dim)
    twin.load_state_dict(weights)
    return twin


def areas(model: AxialTransformer, name: str) -> bool:
    """Whether the parameter `name` is that of attention over both axes."""
    _, layer, _, number, *_ = name.split(".")
    passes = model.blocks[int(layer)].passes
    some = [passes[int(number)]] if number.isdigit() else passes
    return len(some[0].dims) == 2


def halves_swapped(qkv: Tensor, channels: int) -> Tensor:
    """Over both axes, rope turns the first half of q and k by the row, the second by the column."""
    parts = qkv.clone().unflatten(0, (-1, 3, channels))
    parts[:, :2] = parts[:, :2].roll(channels // 2, 2)
    return parts.flatten(0, 2)


def mixes_lines_and_areas(kind: Kind) -> bool:
    """Whether rope gives the channels of a projection to one axis in this pass, two in that."""
    layers = [AxialConfig([layer]).passes(0) for layer in kind.pattern]
    mixed = any(len({len(which.dims) for which in passes}) == 2 for passes in layers)
    return kind.positions == "rope" and kind.shared and mixed


# Where rows and windows share a projection, rope gives its channels to one axis in the one and to
# two in the other: no permutation of them is right for both, so those models have no transpose.
@pytest.mark.parametrize(
    "kind",
    [pytest.param(one, id=str(one)) for one in every_kind() if not mixes_lines_and_areas(one)],
)
def test_the_transposed_image_with_the_other_order_of_axes_is_the_transposed_result(kind):
    model, valid = kind.build(), holes()
    out, prefix = model(pixels(images=3), valid, PLACE)
    flipped = transposed(model, kind)(
        pixels(images=3).transpose(1, 2), valid.transpose(1, 2), Place(*GRID[::-1])
    )
    assert_close(flipped[0].transpose(1, 2), out)
    assert_close(flipped[1], prefix)


def test_the_other_order_of_axes_is_another_model():
    one, other = (
        backbone([pattern])(pixels(), None, PLACE)[0] for pattern in ("row+col", "col+row")
    )
    assert (one - other).abs().max() > 1e-3


# ---- who attends to whom


def reached(layers: Sequence[str], token: tuple[int, int], prefix: bool) -> Tensor:
    """[H, W]: who knows of a token after these layers."""
    height, width = GRID
    i, j = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    knows = (i == token[0]) & (j == token[1])
    told = False  # the prefix
    for which in [which for layer in layers for which in AxialConfig([layer]).passes(0)]:
        knows = knows | (allowed_pairs(which, i, j) & knows).any(1) | told
        told = prefix
    return knows.view(GRID)


@pytest.mark.parametrize(
    ("layers", "number"),
    [
        (["row"], 7),
        (["col"], 5),
        (["window"], 6),
        (["shifted"], 9),
        (["global"], 35),
        (["row", "row"], 7),
        (["col", "row"], 35),
        (["row+col"], 35),
        (["window", "shifted"], 15),
        (["window+shifted"], 15),
        (["window", "row"], 14),
        (["row", "window"], 14),
        (["window+col"], 15),
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", [0, 1])
def test_who_knows_of_a_changed_token(layers, number, prefix):
    token, image = (3, 4), pixels()
    model = backbone(layers, {"window": WINDOW}, depth=len(layers), prefix_tokens=prefix)
    before, of_prefix = model(image, None, PLACE)
    image[1, token[0] * PATCH, token[1] * PATCH] += 1.0
    after, of_prefix_after = model(image, None, PLACE)
    expected = torch.zeros(2, *GRID, dtype=torch.bool)
    expected[1] = reached(layers, token, bool(prefix))
    assert torch.equal((after != before).any(-1), expected)
    if prefix:
        assert torch.equal(
            (of_prefix_after != of_prefix).any(-1)[:, 0], torch.tensor([False, True])
        )
        number = 35 if sum(len(layer.split("+")) for layer in layers) > 1 else number
    assert expected.sum() == number


def test_summed_passes_do_not_hear_of_each_other():
    image = pixels()
    model = backbone(["row+col"], {"fusion": "sum"}, depth=1)
    before, _ = model(image, None, PLACE)
    image[0, 3 * PATCH, 4 * PATCH] += 1.0
    changed = (model(image, None, PLACE)[0] != before).any(-1)
    expected = torch.zeros(2, *GRID, dtype=torch.bool)
    expected[0, 3] = expected[0, :, 4] = True
    assert torch.equal(changed, expected)


# ---- parameters


@pytest.mark.parametrize("fusion", ["sequential", "sum"])
@pytest.mark.parametrize("pattern", ["row", "row+col", "window+row+col", "row+row"])
def test_shared_projections_have_the_parameters_of_timms_layer(pattern, fusion):
    layer = Layer(192, 3, 768, AxialConfig([pattern], fusion=fusion))
    ours, timms = (
        {name: value.shape for name, value in module.state_dict().items()}
        for module in (layer, Block(192, 3, qkv_bias=True))
    )
    assert ours == timms


@pytest.mark.parametrize("pattern", ["row", "row+col", "row+col+row", "window+global"])
def test_attention_of_vit_b_has_its_parameters_whatever_the_passes(pattern):
    with torch.device("meta"):
        layer = Layer(768, 12, 3072, AxialConfig([pattern]))
    assert parameters(layer.attn) == 2_362_368
    assert parameters(layer) == 7_087_872


@pytest.mark.parametrize(("fusion", "norms"), [("sequential", 3), ("sum", 1)])
def test_separate_projections_are_those_of_each_pass(fusion, norms):
    config = AxialConfig(["row+col+global"], fusion=fusion, share_projections=False)
    with torch.device("meta"):
        layer = Layer(768, 12, 3072, config)
    one = 2_362_368
    assert [parameters(attn) for attn in layer.attn] == [one, one, one]
    assert parameters(layer.norm1) == norms * 2 * 768
    mlp_and_its_norm = 7_087_872 - one - 2 * 768
    assert parameters(layer) == 3 * one + norms * 2 * 768 + mlp_and_its_norm


def test_one_pass_has_nothing_to_separate():
    layer = Layer(16, 4, 32, AxialConfig(["row"], share_projections=False))
    assert "attn.qkv.weight" in layer.state_dict()
    assert "norm1.weight" in layer.state_dict()


def test_the_total_of_deit_tiny():
    """timm's vit_tiny and deit_tiny, patch 16, at 224 x 224, 1000 classes."""
    with torch.device("meta"):
        model = AxialTransformer(
            AxialTransformerConfig(dim=192, depth=12, heads=3, prefix_tokens=1)
        )
        head = nn.Linear(192, 1000)
    assert parameters(model) + parameters(head) + 197 * 192 == 5_717_416


@pytest.mark.parametrize("shared", [True, False])
def test_relative_positions_add_tables_of_the_axes_attended_along(shared):
    """Two axes of 2 L - 1 entries a head; windows need no more than their own distances."""

    def added(pattern: str, **options: int) -> int:
        plain, relative = (
            Layer(
                16,
                4,
                32,
                AxialConfig([pattern], positions=kind, share_projections=shared, **options),
                grid=MADE_FOR,
            )
            for kind in ("none", "relative")
        )
        return parameters(relative) - parameters(plain)

    down, right, window = (4 * (2 * length - 1) for length in (*MADE_FOR, WINDOW))
    assert added("row") == right
    assert added("col") == down
    assert added("row+col") == down + right
    assert added("global") == down + right
    assert added("row+row") == (1 if shared else 2) * right
    assert added("window", window=WINDOW) == 2 * window
    assert added("row+window", window=WINDOW) == right + (1 if shared else 2) * window
    assert added("row+col", span=4) == 2 * 4 * 7


# ---- a standard ViT


def vit_block(block: Block, tokens: Tensor) -> Tensor:
    """[B, n, D] -> the same: a ViT layer (arXiv 2010.11929, eq. 2 and 3), packed as timm's."""
    y = F.layer_norm(tokens, (DIM,), block.norm1.weight, block.norm1.bias, eps=1e-6)
    qkv = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias)
    q, k, v = qkv.unflatten(-1, (3, 4, DIM // 4)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    tokens = tokens + F.linear(y, block.attn.proj.weight, block.attn.proj.bias)
    y = F.layer_norm(tokens, (DIM,), block.norm2.weight, block.norm2.bias, eps=1e-6)
    y = F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias))
    return tokens + F.linear(y, block.mlp.fc2.weight, block.mlp.fc2.bias)


def test_global_attention_with_a_prefix_token_is_a_standard_vit_layer():
    """timm's block, weights repacked from [N][q, k, v][K] to [q, k, v][N][K], class token first."""
    layer = random_weights(Layer(DIM, 4, 32, AxialConfig(["global"], positions="none")))
    weights = layer.state_dict()
    for name in ("attn.qkv.weight", "attn.qkv.bias"):
        weights[name] = weights[name].unflatten(0, (4, 3, DIM // 4)).transpose(0, 1).flatten(0, 2)
    block = Block(DIM, 4, mlp_ratio=2.0, qkv_bias=True).double()
    block.norm1.eps = block.norm2.eps = 1e-6
    block.load_state_dict(weights)
    x = torch.randn(2, *GRID, DIM, dtype=torch.float64)
    token = torch.randn(2, 1, DIM, dtype=torch.float64)
    out, of_token = layer(x, token, PLACE)
    got = torch.cat((of_token, out.flatten(1, 2)), 1)
    tokens = torch.cat((token, x.flatten(1, 2)), 1)
    assert_close(got, vit_block(block, tokens), "plain formula")
    assert_close(got, block(tokens), "timm")


# ---- positions and sizes


@pytest.mark.parametrize("pattern", PATTERNS, ids=",".join)
@pytest.mark.parametrize("span", [1, 2, 4])
def test_farther_than_the_span_takes_the_outermost_bias(pattern, span):
    kind = Kind(pattern, "relative", "sequential", shared=True, prefix=0)
    options = kind.attention | {"span": span}
    short = backbone(pattern, options, depth=len(pattern))
    long = backbone(pattern, options | {"span": 16}, depth=len(pattern))
    weights = {}
    for name, value in short.state_dict().items():
        if "bias_" in name:
            value = F.pad(value[None], (16 - span, 16 - span), mode="replicate")[0]
        weights[name] = value
    long.load_state_dict(weights)
    assert_close(short(pixels(), None, PLACE)[0], long(pixels(), None, PLACE)[0])


@pytest.mark.parametrize("positions", ["rope", "clipped", "axial", "grid", "none"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=",".join)
def test_images_of_other_sizes(pattern, positions):
    kind = Kind(pattern, positions, "sequential", shared=True, prefix=1)
    model = kind.build()
    for grid in ((3, 4), (9, 5), (4, 13)):
        got = model(pixels(grid), None, Place(*grid))
        want = plain_backbone(model, pixels(grid), torch.ones(2, *grid, dtype=torch.bool))
        for one, other in zip(got, want, strict=True):
            assert_close(one, other)


@pytest.mark.parametrize(
    ("pattern", "fits", "exceeds"),
    [
        (("row",), (20, 10), (4, 11)),
        (("col",), (8, 20), (9, 4)),
        (("row+col",), (8, 10), (8, 11)),
        (("window", "row"), (20, 10), (4, 11)),
        (("global",), (8, 10), (9, 10)),
        (("window",), (20, 20), None),
    ],
    ids=str,
)
def test_tables_that_do_not_reach_are_refused(pattern, fits, exceeds):
    kind = Kind(pattern, "relative", "sequential", shared=True, prefix=0)
    model = kind.build()
    assert model(pixels(fits), None, Place(*fits))[0].isfinite().all()
    if exceeds is not None:
        message = (
            rf"{exceeds[0]} x {exceeds[1]} tokens exceeds the relative positions, "
            r"made for model\.grid=\[8, 10\]: allowed .*axial_config\.span"
        )
        with pytest.raises(ValueError, match=message):
            model(pixels(exceeds), None, Place(*exceeds))


@pytest.mark.parametrize("pattern", [("window",), ("row", "row+shifted")])
def test_a_window_larger_than_the_grid_is_refused(pattern):
    model = backbone(pattern, {"window": 6})
    model(pixels((6, 7)), None, Place(6, 7))
    message = r"axial_config\.window=6 is larger than the grid of 5 x 7 tokens: allowed are 1 to 5"
    with pytest.raises(ValueError, match=message):
        model(pixels(), None, PLACE)


def test_only_windows_have_a_size():
    out, _ = backbone(["row+col"], {"window": 100})(pixels(), None, PLACE)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        (
            {"positions": "axial"},
            {},
            r"axial_config\.positions=axial .*model's grid, \[height, width\] in tokens",
        ),
        (
            {"positions": "relative"},
            {},
            r"axial_config\.positions=relative .*axial_config\.span, or the model's grid",
        ),
        ({}, {"prefix_tokens": -1}, r"model\.prefix_tokens=-1: allowed are whole numbers from 0"),
        ({}, {"drop_path": 1.0}, r"model\.drop_path=1\.0: allowed is 0 to below 1"),
        ({}, {"drop_path": -0.1}, r"model\.drop_path=-0\.1: allowed"),
        ({}, {"prefix_tokens": 1.5}, r"model\.prefix_tokens=1\.5: allowed are whole numbers"),
        ({}, {"grid_embedding": True}, r"grid_embedding.*grid"),
        ({}, {"grid": [4.5, 3]}, r"model\.grid=\[4\.5, 3\]: allowed"),
        ({}, {"grid": [4]}, r"model\.grid=\[4\]: allowed is \[height, width\] in tokens"),
        ({}, {"grid": [4, 0]}, r"model\.grid=\[4, 0\]: .* at least 1"),
        ({}, {"grid": [4, 5, 6]}, r"model\.grid=\[4, 5, 6\]: allowed"),
        ({"window": 0}, {}, r"axial_config\.window=0: allowed are whole numbers from 1"),
        ({"span": 0}, {}, r"axial_config\.span=0: allowed are whole numbers from 1"),
        ({"skip_axis": 1.5}, {}, r"axial_config\.skip_axis=1\.5: allowed is 0 to 1"),
        ({"fusion": "mean"}, {}, r"axial_config\.fusion='mean': allowed .*'sequential', 'sum'"),
        (
            {"share_projections": "no"},
            {},
            r"axial_config\.share_projections='no': allowed are true, false",
        ),
    ],
    ids=str,
)
def test_options_that_make_no_model_are_refused(attention, options, message):
    with pytest.raises(ValueError, match=message):
        config(("row+col",), attention, **options)


def test_windows_alone_need_no_grid_for_relative_positions():
    model = backbone(["window", "shifted"], {"positions": "relative", "window": WINDOW})
    assert model.blocks[0].attn.bias_h.shape == (4, 2 * WINDOW - 1)


@pytest.mark.parametrize("which", ["window", "shifted", "global"])
def test_rope_over_both_axes_needs_a_head_width_of_four(which):
    message = rf"rope in a {which} pass .* must be a multiple of 4: got .*model\.heads=8 = 2"
    with pytest.raises(ValueError, match=message):
        config(("row", which), heads=8)
