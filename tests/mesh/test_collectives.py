"""The collectives on activations: their values, their true adjoints, and the bytes they count."""

from __future__ import annotations

import pytest
import torch
from distributed.exchange_ranks import maxima, maximum_in_the_graph, sums, uneven
from distributed.launcher import run_ranks

from axialtrain.mesh.collectives import max_over, sum_over
from axialtrain.mesh.mesh import Group

GROUPS = ("row", "col", "spatial")
SHAPE = (3, 4, 5)


@pytest.mark.parametrize("mesh", [(2, 3), (1, 2)], ids=str)
def test_sum_over_and_its_adjoint(mesh):
    row, col = mesh
    ranks = run_ranks(sums, row * col, mesh={"row": row, "col": col}, shape=SHAPE)
    for name, size in zip(GROUPS, (row, col, row * col), strict=True):
        found = [rank[name] for rank in ranks]
        for got in found:
            peers = [found[other] for other in got["ranks"].tolist()]
            assert len(peers) == size
            torch.testing.assert_close(got["out"], sum(peer["x"] for peer in peers))
            torch.testing.assert_close(got["grad"], sum(peer["y"] for peer in peers))
        forward = sum((got["out"] * got["y"]).sum() for got in found)
        backward = sum((got["x"] * got["grad"]).sum() for got in found)
        torch.testing.assert_close(forward, backward, rtol=1e-12, atol=1e-12)


def test_sum_over_counts_what_a_ring_sends():
    """2 (P - 1) / P of the tensor forward, the same backward; nothing where a rank is alone."""
    count = torch.Size(SHAPE).numel() * 8
    for found in run_ranks(sums, 2, mesh={"row": 1, "col": 2}, shape=SHAPE):
        sent = {name: int(found[name]["sent"]) for name in GROUPS}
        assert sent == {"row": 0, "col": 2 * count, "spatial": 2 * count}


def test_the_sum_of_one_rank_is_its_own():
    x = torch.randn(3, requires_grad=True)
    assert sum_over(x, Group()) is x
    assert max_over(x, Group()) is x


@pytest.mark.parametrize("mesh", [(2, 3), (1, 2)], ids=str)
def test_max_over(mesh):
    row, col = mesh
    ranks = run_ranks(maxima, row * col, mesh={"row": row, "col": col})
    for name, size in zip(GROUPS, (row, col, row * col), strict=True):
        for found in ranks:
            _, out, sent, members = found[name]
            assert len(members) == size
            assert torch.equal(out, torch.stack([ranks[i][name][0] for i in members]).amax(0))
            assert (out[0] == -torch.inf).all()
            assert sent == 2 * out.numel() * 8 * (size - 1) // size


def test_a_maximum_has_no_gradient():
    for needs_gradient, out in run_ranks(maximum_in_the_graph, 2, mesh={"row": 2}):
        assert not needs_gradient
        assert out.tolist() == [1, 1]


def test_all_to_all_of_uneven_messages():
    for me, (got, sent) in enumerate(run_ranks(uneven, 3, mesh={"col": 3})):
        assert got == [10.0 * other + me for other in range(3) for _ in range(me + other)]
        assert sent == 4 * sum(me + other for other in range(3) if other != me)
