"""Ranks are data-major, tensor innermost; groups hold whom they should."""

from __future__ import annotations

import itertools
import re

import pytest
from distributed.launcher import run_ranks
from distributed.model_ranks import mesh_layout, wrong_size

from axialtrain.mesh.mesh import Mesh, MeshConfig

SHAPES = [
    {"data": 1, "row": 2, "col": 3, "tensor": 1},
    {"data": 2, "row": 2, "col": 1, "tensor": 2},
    {"data": 1, "row": 2, "col": 2, "tensor": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups(shape):
    axes = list(shape)
    coordinates = list(itertools.product(*(range(n) for n in shape.values())))
    ranks = run_ranks(mesh_layout, len(coordinates), mesh=shape)
    spans = {axis: {axis} for axis in axes} | {
        "spatial": {"row", "col"},
        "replicas": {"data", "row", "col"},
    }
    for rank, got in enumerate(ranks):
        mine = coordinates[rank]
        assert got["coordinates"] == dict(zip(axes, mine, strict=True))
        for name, free in spans.items():
            expected = tuple(
                other
                for other, at in enumerate(coordinates)
                if all(a in free or at[i] == mine[i] for i, a in enumerate(axes))
            )
            assert got[name] == expected, name


def test_a_mesh_that_does_not_match_is_refused_on_every_rank():
    for message in run_ranks(wrong_size, 2, mesh={"row": 2, "col": 2}):
        assert "needs 4 processes, 2 were started" in message


def test_one_process_is_a_mesh():
    mesh = Mesh()
    assert mesh.shape == (1, 1)
    assert mesh.spatial.size == mesh.replicas.size == 1
    assert mesh.place(3, 4).rect.area == 12


@pytest.mark.parametrize("axis", ["data", "row", "col", "tensor"])
@pytest.mark.parametrize("degree", [0, -2])
def test_every_degree_starts_at_one(axis, degree):
    with pytest.raises(ValueError, match=rf"mesh.{axis}={degree}: allowed are whole numbers from"):
        MeshConfig(**{axis: degree})


@pytest.mark.parametrize(
    ("key", "allowed"),
    [("exchange", "swap, heads, gather"), ("swap", "auto, direct, hierarchical")],
)
def test_an_unknown_way_to_exchange_is_named_with_what_is_allowed(key, allowed):
    for make in (MeshConfig, Mesh):
        with pytest.raises(ValueError, match=rf"mesh.{key}='rings': allowed are {allowed}$"):
            make(**{key: "rings"})
    for value in allowed.split(", "):
        assert getattr(MeshConfig(**{key: value}), key) == value


ROWS_REFUSED = (
    "mesh.exchange=heads: row passes deal out the 6 heads over tensor x col = 2 x 2 ranks: "
    "allowed are multiples of 4, mesh.exchange=swap and mesh.exchange=gather"
)
COLS_REFUSED = ROWS_REFUSED.replace("row passes", "column passes").replace("x col", "x row")


@pytest.mark.parametrize(
    ("mesh", "heads", "rows", "cols", "refused"),
    [
        (MeshConfig(col=2, tensor=2, exchange="heads"), 6, True, False, ROWS_REFUSED),
        (MeshConfig(row=2, tensor=2, exchange="heads"), 6, True, True, COLS_REFUSED),
        (MeshConfig(row=2, tensor=2, exchange="heads"), 6, True, False, ""),
        (MeshConfig(row=2, col=2, tensor=2, exchange="heads"), 6, False, False, ""),
        (MeshConfig(row=2, col=2, tensor=2, exchange="heads"), 8, True, True, ""),
        (MeshConfig(row=5, col=5, exchange="swap"), 6, True, True, ""),
        (MeshConfig(row=5, col=5, exchange="gather"), 6, True, True, ""),
    ],
)
def test_heads_must_be_enough_for_those_that_they_are_dealt_to(mesh, heads, rows, cols, refused):
    if not refused:
        mesh.check_heads(heads, rows=rows, cols=cols)
        return
    with pytest.raises(ValueError, match=rf"^{re.escape(refused)}$"):
        mesh.check_heads(heads, rows=rows, cols=cols)
