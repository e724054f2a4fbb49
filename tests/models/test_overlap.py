"""Swaps in bands of lines: the serial gradients, and the bytes of a swap at once."""

from dataclasses import replace

import pytest
from distributed.launcher import run_ranks
from distributed.model_ranks import Case, serial, sharded

from axialtrain.mesh.mesh import MeshConfig
from axialtrain.models.recompute import Recompute
from axialtrain.models.registry import model_config
from axialtrain.models.transformer import AxialTransformerConfig
from axialtrain.train.compose import compose_run

pytestmark = pytest.mark.slow

PLAIN = Case((13, 10), ("row+col", "window", "col+row"), depth=3)
CASES = {
    "masked": PLAIN,
    "without a mask": replace(PLAIN, holes=None),
    "relative, skipped, dropped": replace(
        PLAIN, grid=(7, 5), positions="relative", skip_axis=0.6, drop_path=0.5
    ),
    "own projections, recomputed": replace(PLAIN, share=False, recompute=Recompute(2, 0.5)),
    "pooled": replace(PLAIN, grid=(7, 5), pattern=("row", "global", "col"), head="mean"),
}
MESHES = {
    "2x2": {"row": 2, "col": 2},
    "1x3": {"row": 1, "col": 3},
    "2x1, tensor 2": {"row": 2, "tensor": 2},
}


def check(case, mesh, overlap, swap="auto"):
    want, world = serial(case), mesh["row"] * mesh.get("col", 1) * mesh.get("tensor", 1)
    options = {"case": case, "mesh": mesh, "swap": swap, "timeout": 100}
    at_once = run_ranks(sharded, world, **options)
    for got, other in zip(
        run_ranks(sharded, world, overlap=overlap, **options), at_once, strict=True
    ):
        assert got.sent == other.sent
        assert sum(got.sent.values()) > 0
        top, bottom, left, right = got.rect
        size = 2
        part = want.input[:, top * size : bottom * size, left * size : right * size]
        assert_close(got.input, part)
        for name, gradient in want.parameters.items():
            assert_close(got.parameters[name], gradient, name)


def assert_close(got, want, what="input"):
    assert got.shape == want.shape, what
    assert (got - want).abs().max() <= 1e-10 * want.abs().max().clamp_min(1e-30), what


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("overlap", [2, 5])  # 5: some bands are empty
def test_bands_have_the_serial_gradients(overlap, mesh):
    check(CASES["masked"], mesh, overlap)


@pytest.mark.parametrize("name", list(CASES)[1:])
def test_whatever_the_model_does(name):
    check(CASES[name], MESHES["2x2"], 3)


def test_in_two_hops_too():
    check(CASES["masked"], MESHES["2x2"], 3, swap="hierarchical")


def test_prefix_tokens_wait_for_all():
    """They attend to every token: no band is attended to before the others are here."""
    check(replace(PLAIN, grid=(7, 5), prefix=2), MESHES["2x2"], 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mesh.overlap=0"], r"mesh\.overlap=0: allowed are whole numbers from 1"),
        (["mesh.overlap=2", "mesh.exchange=heads"], "allowed is 1 with mesh.exchange=heads"),
    ],
    ids=str,
)
def test_what_no_mesh_does_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose_run(["data.shards=x", *overrides])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (AxialTransformerConfig(prefix_tokens=1), "allowed is 1 with model.prefix_tokens=1"),
        (AxialTransformerConfig(axial_config={"fusion": "sum"}), "allowed is 1 with model.axial_c"),
        (model_config("axial_resnet50s"), "mesh.overlap=2: convolutional models wait"),
        (AxialTransformerConfig(axial_config={"pattern": ["global"]}), "swaps to whole rows"),
    ],
    ids=["prefix", "sum", "convolutions", "global"],
)
def test_models_that_wait_for_all_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        model.check_mesh(MeshConfig(row=2, overlap=2))


def test_the_bands_of_a_run_are_a_key():
    assert compose_run(["data.shards=x", "mesh=2x2", "mesh.overlap=4"])[0].mesh.overlap == 4
