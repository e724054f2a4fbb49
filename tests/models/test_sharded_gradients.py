"""Any mesh, same model: output, input and parameter gradients against serial, in fp64."""

from __future__ import annotations

import functools

import pytest
import torch
from distributed.launcher import run_ranks
from distributed.model_ranks import PATCH, Case, Gradients, bad_tensor_degree, serial, sharded

PATTERNS = [("row+col",), ("col+row",), ("row",), ("col",), ("row", "col"), ("row+col", "col+row")]
GRIDS = [(16, 16), (13, 10), (7, 5)]
MESHES = ["1x2", "2x1", "2x2", "2x3"]

expected_of = functools.lru_cache(maxsize=None)(serial)


def degrees(mesh: str, **others: int) -> dict[str, int]:
    row, col = mesh.split("x")
    return {"row": int(row), "col": int(col)} | others


def assert_close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    scale = want.abs().max().clamp_min(1e-30)
    error = (got - want).abs().max() / scale
    assert got.shape == want.shape, what
    assert error <= 1e-10, f"{what}: {error:.1e} of its largest value"


def check(
    case: Case, mesh: dict[str, int], exchange: str = "swap", swap: str = "auto"
) -> list[Gradients]:
    expected = expected_of(case)
    world = torch.Size(mesh.values()).numel()
    ranks: list[Gradients] = run_ranks(
        sharded, world, case=case, mesh=mesh, exchange=exchange, swap=swap
    )
    output = torch.full_like(expected.output, torch.nan)
    grad = torch.full_like(expected.input, torch.nan)
    for got in ranks:
        top, bottom, left, right = got.rect
        rows, cols = slice(top * 2, bottom * 2), slice(left * 2, right * 2)
        if case.head == "tokens":
            output[:, rows, cols] = got.output
        else:
            assert_close(got.output, expected.output, "pooled output")
            output = got.output
        rows, cols = slice(top * PATCH, bottom * PATCH), slice(left * PATCH, right * PATCH)
        grad[:, rows, cols] = got.input
        assert got.parameters.keys() == expected.parameters.keys()
        for name, want in expected.parameters.items():
            assert_close(got.parameters[name], want, name)
    assert_close(output, expected.output, "output")
    assert_close(grad, expected.input, "input gradient")
    return ranks


@pytest.mark.parametrize("pattern", PATTERNS, ids=",".join)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("mesh", MESHES)
def test_gradients(mesh, grid, pattern):
    check(Case(grid, pattern), degrees(mesh))


@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("holes", [True, False])
def test_positions_and_masks(positions, holes):
    check(Case((13, 10), positions=positions, holes=holes), degrees("2x2"))


@pytest.mark.parametrize("pattern", PATTERNS, ids=",".join)
@pytest.mark.parametrize("mesh", ["1x2", "2x2"])
def test_gradients_with_tensor_parallel(mesh, pattern):
    row_by_col = degrees(mesh, tensor=2)
    ranks = check(Case((13, 10), pattern), row_by_col)
    # Replicated parameters must have one gradient, or the ranks would drift apart.
    for left, right in zip(ranks[::2], ranks[1::2], strict=True):
        assert set(left.sharded) == {n for n in left.parameters if is_sharded(n)}
        for name in left.parameters.keys() - left.sharded.keys():
            assert torch.equal(left.parameters[name], right.parameters[name]), name


def is_sharded(name: str) -> bool:
    return any(part in name for part in ("qkv", "fc1", "proj.weight", "fc2.weight")) and (
        "patch_embed" not in name
    )


def test_an_empty_part_is_among_the_cases():
    from axialtrain.grid import Layout, Place

    parts = [Place(7, 5, Layout.COLS, (2, 3), (r, c)).rect for r in range(2) for c in range(3)]
    assert any(part.empty for part in parts)


def test_a_layer_moves_tokens_once_per_pass():
    """M (P - 1) / P bytes per pass on a dividing grid, forward, and the same backward."""
    case = Case((16, 16), ("row+col",), depth=2, holes=False)
    ranks = check(case, degrees("1x2"))
    tokens = 2 * 16 * 16 // 2
    activations, mask = tokens * 16 * 8, tokens  # fp64 of D = 16; one byte a token
    # TILE is COLS on 1 x 2: into ROWS and back in each of 2 layers, forward and backward; the
    # mask goes once, to ROWS alone.
    for got in ranks:
        assert got.sent["col"] + got.sent["spatial"] == 8 * activations // 2 + mask // 2


def test_heads_must_divide():
    for message in run_ranks(bad_tensor_degree, 3, mesh={"tensor": 3}):
        assert "mesh.tensor=3 does not divide" in message
        assert "heads=4" in message
        assert "[1, 2, 4]" in message
