"""Ranks are data-major, tensor innermost; groups hold whom they should."""

from __future__ import annotations

import itertools

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


def test_degrees_start_at_one():
    with pytest.raises(ValueError, match=r"mesh.col=0: allowed are whole numbers from 1"):
        MeshConfig(col=0)
