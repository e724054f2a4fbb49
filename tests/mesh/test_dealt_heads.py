"""Parts of lines and all heads against whole lines and a part of the heads, and back."""

from __future__ import annotations

import pytest
import torch
from distributed.exchange_ranks import BATCH, coordinates, deals, odd_heads, part, whole
from distributed.launcher import run_ranks

from axialtrain.grid import Place, Rect
from axialtrain.mesh.exchange import collect_heads, deal_heads
from axialtrain.mesh.mesh import Mesh

SHAPES = [(1, 2), (2, 1), (2, 2), (2, 3)]
SIZES = [(7, 5), (6, 6)]
HEADS = 6


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_rank_gets_some_heads_of_whole_lines(shape, size):
    """And back; each of the two is the other's adjoint."""
    mesh = {"row": shape[0], "col": shape[1]}
    ranks = run_ranks(deals, shape[0] * shape[1], mesh=mesh, size=size, heads=HEADS, timeout=60)
    tokens = whole(size, (HEADS, 6))[..., :3]
    for (row, col), found in zip(coordinates(shape), ranks, strict=True):
        tile = Place(*size, shape=shape, at=(row, col)).rect
        rows, cols = (
            Rect(tile.top, tile.bottom, 0, size[1]),
            Rect(0, size[0], tile.left, tile.right),
        )
        for dim, lines, parts, mine in ((2, rows, shape[1], col), (1, cols, shape[0], row)):
            some = slice(HEADS // parts * mine, HEADS // parts * (mine + 1))
            assert found[dim].heads == some
            assert torch.equal(found[dim].lines, part(tokens, lines)[..., some, :])
            assert torch.equal(found[dim].returned, part(tokens, tile))
            assert found[dim].inverse
    for dim in (1, 2):
        for which in ("deal", "collect"):
            forward, backward = zip(*(found[dim].products[which] for found in ranks), strict=True)
            values = BATCH * size[0] * size[1] * HEADS * 3
            assert abs(sum(forward) - sum(backward)) <= 1e-12 * values


@pytest.mark.parametrize(("dim", "mesh"), [(2, {"col": 3}), (1, {"row": 3})], ids=str)
def test_heads_that_cannot_be_dealt_out_are_refused(dim, mesh):
    for message in run_ranks(odd_heads, 3, mesh=mesh, heads=4, dim=dim):
        assert (
            "4 heads of a rank cannot be dealt out over 3 ranks: allowed are multiples" in message
        )
        assert "mesh.exchange=swap" in message
        assert "mesh.exchange=gather" in message


def test_one_process_keeps_its_heads():
    x, place, mesh = torch.randn(1, 3, 4, 5, 2), Place(3, 4), Mesh()
    for dim in (1, 2):
        assert deal_heads(x, place, dim, mesh) is x
        assert collect_heads(x, place, dim, mesh) is x
