"""The lines of a mask are sorted once a forward, for all layers and for what is computed again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from axialtrain.attention import masks
from axialtrain.attention.masks import GridMask
from axialtrain.grid import Rect
from axialtrain.models.recompute import Recompute
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig

DEPTH, PATCH, GRID = 3, 2, (9, 7)


@pytest.fixture
def planned(monkeypatch) -> list[tuple[bool, tuple[int, ...]]]:
    """(across, shape) of each mask of lines that was planned."""
    calls = []
    plan = masks.plan

    def spy(key_mask, query_mask, *, across, alone):
        made = plan(key_mask, query_mask, across=across, alone=alone)
        assert made is not None, "the mask is one that is worth it"
        calls.append((across, tuple(key_mask.shape)))
        return made

    monkeypatch.setattr(masks, "plan", spy)
    return calls


def step(recompute: Recompute, prefix: int = 0) -> list[Tensor]:
    """Tokens, and the gradient of every parameter."""
    torch.manual_seed(0)
    config = AxialTransformerConfig(
        patch=PATCH, dim=8, heads=2, depth=DEPTH, prefix_tokens=prefix, mlp_ratio=1.0
    )
    model = AxialTransformer(config).double()
    model.recompute = recompute
    valid = torch.rand(2, *GRID) < 0.4
    pixels = torch.randn(2, *(PATCH * size for size in GRID), 3, dtype=torch.float64)
    tokens, own = model(pixels, valid)
    (tokens.square().sum() + own.square().sum()).backward()
    return [tokens.detach(), *(x.grad for x in model.parameters())]


@pytest.mark.parametrize("prefix", [0, 2], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("way", [Recompute(), Recompute(1), Recompute(2, 0.5)], ids=str)
def test_each_axis_is_planned_once_a_forward(planned, monkeypatch, way, prefix):
    got = step(way, prefix)
    assert sorted(planned) == [(False, (2, *GRID)), (True, (2, *GRID[::-1]))]
    # Nothing shared: each pass, and each that is computed again, makes its own.
    monkeypatch.setattr(GridMask, "lines", GridMask._made)
    want = step(way, prefix)
    assert len(planned) == 2 + 2 * DEPTH * (2 if way.every else 1)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", [Recompute(band=40), Recompute(2, 0.5, band=40)], ids=str)
def test_each_band_is_planned_once_a_forward(planned, way):
    """Of all layers, forward and again in backward: one row or column of two images at a time."""
    step(way, 0)
    found = Counter(across for across, _ in planned)
    height, width = GRID
    assert found == {
        False: -(-height // max(1, 40 // (2 * width))),
        True: -(-width // max(1, 40 // (2 * height))),
    }


def test_what_is_shared_is_that_of_the_same_lines_and_queries():
    mask = GridMask(torch.rand(2, *GRID) < 0.4)
    band, part = Rect(2, 5, 0, 7), Rect(2, 5, 0, 3)
    own = mask.lines(2, band, band)
    assert own is mask.lines(2, band, band)
    assert own.queries is own.keys
    others = [mask.lines(1, band, band), mask.lines(2, band, part), mask.lines(2, part, part)]
    assert all(one is not own for one in others)
    assert torch.equal(others[0].keys, mask.valid[:, 2:5].transpose(1, 2))
    assert torch.equal(others[1].queries, mask.valid[:, 2:5, :3])
    assert mask.image() is mask.image()
