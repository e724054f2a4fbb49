"""Any mesh, same model, for the convolutional members: a step of Axial-ResNet and Axial-DeepLab.

Outputs, losses, every gradient, running statistics, what metrics add up, and segments are those of
one process, in fp64, on uneven sizes and two mesh axes at once, with data ranks and a filler.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from distributed.conv_model_ranks import Case, step
from distributed.launcher import run_ranks

from axialtrain.grid import Place
from axialtrain.tasks.instances import SEGMENTS

CASES = {
    "classification": Case("classification", (5, 3)),
    "all valid": Case("classification", (3, 4), holes=False),
    "clipped tables": Case("classification", (3, 4), span=3),
    "evaluation": Case("classification", (5, 3), training=False),
    "segmentation": Case("segmentation", (5, 4)),
    "panoptic": Case("panoptic", (5, 4)),
    "panoptic, all valid": Case("panoptic", (3, 5), holes=False, span=4),
}
MESHES = [(1, 1, 2), (1, 2, 2), (1, 2, 3), (2, 1, 2)]
QUICK = {("classification", (1, 2, 2)), ("panoptic", (1, 2, 2))}


@functools.cache
def serial(name: str) -> dict[str, Any]:
    return step(CASES[name])


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, mesh, marks=() if (name, mesh) in QUICK else pytest.mark.slow)
        for name in CASES
        for mesh in MESHES
        if name in ("classification", "panoptic") or mesh == (1, 2, 3)
    ]
    # Of two data ranks one has a filler and with it a mask, and the other has none.
    + [pytest.param("all valid", (2, 1, 1), marks=pytest.mark.slow)],
)
def test_a_step_is_that_of_one_process(name, mesh):
    whole = serial(name)
    ranks = run_ranks(step, mesh[0] * mesh[1] * mesh[2], case=CASES[name], mesh=mesh)
    largest = max(float(one.abs().max()) for one in whole["gradients"].values())
    norm = sum(float(one.square().sum()) for one in whole["gradients"].values()) ** 0.5
    covered = torch.zeros(3, *CASES[name].images().present.shape[1:], dtype=torch.bool)
    for rank in ranks:
        where = (rank["images"], *rank["tile"])
        covered[where] = True
        dense = rank["output"].ndim == 4
        expected = whole["output"][where if dense else rank["images"]]
        scale = float(whole["output"].abs().max())
        torch.testing.assert_close(rank["output"], expected, rtol=0, atol=1e-10 * scale)
        torch.testing.assert_close(rank["loss"], whole["loss"], rtol=1e-11, atol=0)
        for key, want in whole["gradients"].items():
            # What a softmax or a batch norm behind it takes out has a gradient of zero.
            scale = max(float(want.abs().max()), 1e-3 * largest)
            torch.testing.assert_close(
                rank["gradients"][key], want, rtol=0, atol=1e-10 * scale, msg=key
            )
        found = sum(float(one.square().sum()) for one in rank["gradients"].values()) ** 0.5
        assert found == pytest.approx(norm, rel=1e-10)
        for key, want in whole["buffers"].items():
            torch.testing.assert_close(rank["buffers"][key], want, rtol=1e-10, atol=1e-12, msg=key)
            assert torch.equal(rank["buffers"][key], ranks[0]["buffers"][key]), key
        if "segments" in whole:
            assert torch.equal(rank["segments"], whole["segments"][where])
    assert covered.all()
    for key, want in whole["scores"].items():
        total = sum(rank["scores"][key] for rank in ranks)
        if name in ("classification", "all valid", "clipped tables", "evaluation"):
            total = total / (mesh[1] * mesh[2])  # each rank of an image counts it
        torch.testing.assert_close(total, want, rtol=1e-10, atol=1e-10, msg=key)


def test_the_case_has_void_stuff_and_things_that_lie_on_several_ranks():
    """Or the comparison above would be of nothing."""
    segments = serial("panoptic")["segments"]
    ids = segments.clamp_min(0) % SEGMENTS
    assert (segments < 0).any(), "void"
    assert ((segments >= 0) & (ids == 0)).any(), "stuff"
    middle = Place(5, 4, shape=(2, 2), at=(0, 0)).finer(16).rect
    above, below = ids[:, : middle.bottom], ids[:, middle.bottom :]
    left, right = ids[:, :, : middle.right], ids[:, :, middle.right :]
    for one, other in ((above, below), (left, right)):
        both = [
            set(a[a > 0].tolist()) & set(b[b > 0].tolist()) for a, b in zip(one, other, strict=True)
        ]
        assert any(both), "an instance on both sides of the cut"
