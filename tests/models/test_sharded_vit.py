"""Any mesh, same model, for timm's ViTs turned axial and ours of their names: logits, gradients of
the pixels and of every parameter against serial, in fp64.

Both images differ in extent where there are holes, so each has its position embedding resampled
apart; the last row and column of patches are cut unless said otherwise. No mesh divides the grids.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed.launcher import run_ranks
from distributed.vit_ranks import (
    Case,
    Result,
    engine_steps,
    plain_steps,
    refused_without_chance,
    serial,
    sharded,
)

pytestmark = pytest.mark.slow

RELATIVE = (("positions", "relative"), ("span", 4))
ROPE = (("positions", "rope"),)
MIXED = ("window,shifted", "row+global")

CLASS = Case("class", attention=ROPE, holes=True)
REGISTERS = Case("registers", (7, 5), ("col+row", "global"), RELATIVE)
MEAN = Case("mean", attention=(("fusion", "sum"), ("share_projections", False)), holes=True)
BARE = Case("bare", (12, 6), ("row", "col"), ROPE, partial=False, holes=False)
CLIP = Case("clip", (7, 5), ("window", "shifted"), holes=True)
DISTILLED = Case("distilled", attention=RELATIVE, holes=True)
CHANCE = Case("distilled", (7, 5), attention=(("skip_axis", 0.6),), chance=True)
AGAIN = replace(CHANCE, recompute=True)
PLAIN = Case("class", (4, 4), ("global",), partial=False)  # timm's own
OURS = Case("our prefix", attention=ROPE, holes=True)
OURS_DISTILLED = Case("ours, distilled", (7, 5), ("window", "row+global"), RELATIVE, holes=True)
OURS_MEAN = Case("our mean", (7, 5), ("row", "col"), RELATIVE, holes=True)
OURS_ATTENTION = Case("our attention", (12, 6), attention=ROPE, chance=True)

# (case, mesh, exchange)
QUICK = [
    (CLASS, "1x2", "direct"),
    (REGISTERS, "2x2", "hierarchical"),
    (MEAN, "2x1", "heads"),
    (BARE, "2x2", "gather"),
    (CLIP, "2x2", "direct"),
    (DISTILLED, "2x2", "heads"),
    (CHANCE, "1x2x2", "direct"),
    (AGAIN, "2x2", "direct"),
    (PLAIN, "2x2", "direct"),
    (DISTILLED, "2x1x2", "gather"),
    (OURS, "2x2", "direct"),
    (OURS_DISTILLED, "1x2x2", "heads"),
]
SLOW = [
    *((case, "2x3", "direct") for case in (CLASS, REGISTERS, MEAN, BARE, CLIP, DISTILLED, OURS)),
    (CLASS, "2x3", "heads"),
    (REGISTERS, "1x2", "heads"),
    (REGISTERS, "2x1x2", "heads"),
    (MEAN, "2x3", "gather"),
    (MEAN, "1x2x2", "hierarchical"),
    (CLIP, "1x2x2", "gather"),
    (CHANCE, "2x3", "hierarchical"),
    (OURS_DISTILLED, "2x3", "direct"),
    (OURS_MEAN, "2x2", "direct"),
    (OURS_MEAN, "2x1x2", "gather"),
    (OURS_ATTENTION, "2x2", "heads"),
    (OURS_ATTENTION, "2x3", "direct"),
    (CLASS, "2x2x2", "heads"),
    (replace(DISTILLED, holes=None), "2x2x2", "direct"),
    (OURS, "2x2x2", "gather"),
]

expected_of = functools.lru_cache(maxsize=None)(serial)


def degrees(mesh: str) -> dict[str, int]:
    return dict(zip(("row", "col", "tensor"), map(int, mesh.split("x")), strict=False))


def ids(value: Any) -> str:
    if isinstance(value, Case):
        return f"{value.kind}-{','.join(value.pattern)}-{value.grid[0]}x{value.grid[1]}"
    return str(value)


def assert_close(got: torch.Tensor | None, want: torch.Tensor | None, what: str) -> None:
    assert (got is None) == (want is None), what
    if got is None or want is None:
        return
    assert got.shape == want.shape, what
    error = (got - want).abs().max() / want.abs().max().clamp_min(1e-30)
    assert error <= 1e-10, f"{what}: {error:.1e} of its largest value"


def check(case: Case, mesh: str, exchange: str) -> None:
    expected, shape = expected_of(case), degrees(mesh)
    swap = exchange if exchange in ("direct", "hierarchical") else "auto"
    exchange = exchange if exchange in ("heads", "gather") else "swap"
    world, tensor = torch.Size(shape.values()).numel(), shape.get("tensor", 1)
    ranks: list[Result] = run_ranks(
        sharded, world, case=case, mesh=shape, exchange=exchange, swap=swap, timeout=120
    )
    pixels = torch.full_like(expected.pixels, torch.nan)
    for rank, got in enumerate(ranks):
        assert torch.equal(got.logits, ranks[0].logits), "alike on all ranks of an image"
        top, bottom, left, right = got.rect
        pixels[:, :, top:bottom, left:right] = got.pixels
        assert got.parameters.keys() == expected.parameters.keys()
        peer = ranks[rank - rank % tensor]
        for name, want in expected.parameters.items():
            assert_close(got.parameters[name], want, name)
            if want is not None:
                assert torch.equal(got.parameters[name], peer.parameters[name]), name
        assert got.sharded == {n for n in expected.parameters if tensor > 1 and is_sharded(n)}
    assert_close(ranks[0].logits, expected.logits, "logits")
    assert_close(pixels, expected.pixels, "gradient of the pixels")


def is_sharded(name: str) -> bool:
    split = r"attn(\.\d)?\.(qkv\.weight|qkv\.bias|proj\.weight)"
    return bool(re.search(rf"\.({split}|mlp\.(fc1\.weight|fc1\.bias|fc2\.weight))$", name))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mesh", "exchange"), QUICK[4:], ids=ids)
def test_gradients_of_more_cases(case, mesh, exchange):
    check(case, mesh, exchange)


@pytest.mark.parametrize(("case", "mesh", "exchange"), QUICK[:4], ids=ids)
def test_gradients(case, mesh, exchange):
    check(case, mesh, exchange)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "mesh", "exchange"), SLOW, ids=ids)
def test_gradients_of_the_other_cases(case, mesh, exchange):
    check(case, mesh, exchange)


@pytest.mark.parametrize("case", dict.fromkeys(case for case, *_ in QUICK + SLOW), ids=ids)
def test_the_comparison_is_not_an_empty_one(case):
    """Every parameter has a gradient, but for what the last layer makes of a pooled-away image."""
    expected = expected_of(case)
    assert expected.logits.std() > 0.1
    for name, gradient in expected.parameters.items():
        if gradient is None or not gradient.any():
            assert re.search(r"blocks\.1\..*(bias_[hw]|attn\.1|norm1\.1)|skip", name) or case.chance


def test_drop_path_on_a_mesh_asks_for_the_draws_of_the_step():
    (said, _) = run_ranks(refused_without_chance, 2)
    assert "needs the draws of the step: give chance=Chance(seed, step, samples), or call" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "stage"),
    [
        (Case("class", (7, 5), attention=RELATIVE), 1),
        (Case("class", (7, 5), attention=RELATIVE), 3),
        (Case("mean", (7, 5), attention=RELATIVE), 3),
        (Case("distilled", (7, 5), ("row", "global"), ROPE), 2),
    ],
    ids=ids,
)
def test_an_axialized_model_takes_the_steps_of_one_process_under_deepspeed(case, stage):
    norms, weights = plain_steps(case, steps=2, lr=0.01)
    _, start = plain_steps(case, steps=0, lr=0.01)
    ranks = run_ranks(
        engine_steps, 4, case=case, mesh={"row": 2, "col": 2}, stage=stage, steps=2, lr=0.01
    )
    for got_norms, got in ranks:
        assert got_norms == pytest.approx(norms, rel=1e-5)
        assert got.keys() == weights.keys()
        away = sum((got[name] - weights[name]).square().sum() for name in weights)
        moved = sum((start[name] - weights[name]).square().sum() for name in weights)
        assert away.sqrt() <= 1e-5 * moved.sqrt()
