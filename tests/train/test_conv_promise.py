"""Convolutional models under DeepSpeed, at every ZeRO stage: the steps of plain torch.

Plain torch means: one process, the whole batch at once, fp64, `clip_grad_norm_` and SGD. Running
statistics count as what a step changes, as weights do. What is allowed is rounding: a few times
what the same plain steps in fp32 differ by from those in fp64.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from distributed.conv_model_ranks import CLIP, LR, STEPS, Case, engine_steps, part_of
from distributed.launcher import run_ranks

from axialtrain.grid import Layout, Place
from axialtrain.mesh.mesh import Mesh
from axialtrain.tasks.objective import image_means

pytestmark = pytest.mark.slow

CASES = {
    "classification": Case("classification", (3, 4), dtype=torch.float32),
    "panoptic": Case("panoptic", (3, 5), dtype=torch.float32),
}


@functools.cache
def plain(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    case = CASES[name]
    model, task = case.build().to(dtype), case.make_task()
    task.prepare(Mesh(), torch.device("cpu"))
    start = {key: value.detach().clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), LR)
    norms, losses = [], []
    batch = part_of(case.images(dtype), Place(*case.grid), range(3))
    for _ in range(STEPS):
        loss = image_means(
            *task.loss(model(*task.inputs(batch)), batch), batch.weight, Mesh()
        ).sum()
        optimizer.zero_grad()
        (loss / 3).backward()
        losses.append(loss.item() / 3)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    model.eval()
    with torch.no_grad():
        loss = image_means(
            *task.loss(model(*task.inputs(batch)), batch), batch.weight, Mesh()
        ).sum()
    return {
        "start": start,
        "state": model.state_dict(),
        "norms": norms,
        "losses": losses,
        "held_out": loss.item() / 3,
    }


@pytest.mark.parametrize(
    ("name", "mesh", "stage"),
    [
        ("classification", (1, 2, 2), 0),
        ("classification", (2, 1, 2), 3),
        ("panoptic", (2, 2, 1), 2),
        ("panoptic", (1, 2, 2), 3),
    ],
)
def test_steps_are_those_of_plain_torch(name, mesh, stage):
    want = plain(name)
    assert min(want["norms"]) > 2 * CLIP, "clipping should be at work"
    weights, statistics = (4 * one for one in away(plain(name, torch.float32), want))
    assert weights < 2e-3, "rounding is small beside a step"
    assert statistics < 2e-3
    size = mesh[0] * mesh[1] * mesh[2]
    for rank in run_ranks(engine_steps, size, case=CASES[name], mesh=mesh, stage=stage):
        assert rank["norms"] == pytest.approx(want["norms"], rel=1e-4)
        assert rank["losses"] == pytest.approx(want["losses"], rel=1e-5)
        assert rank["held_out"] == pytest.approx(want["held_out"], rel=1e-4), "in evaluation"
        assert rank["state"].keys() == want["state"].keys()
        found = away(rank, want)
        assert found[0] <= weights
        assert found[1] <= statistics


def away(one: dict[str, Any], want: dict[str, Any]) -> tuple[float, float]:
    """How far weights, and running statistics, are from where they should be, of the way gone."""
    shares = []
    for statistics in (False, True):
        moved = difference = 0.0
        for key, value in want["state"].items():
            if key.endswith(("running_mean", "running_var")) is statistics:
                moved += float((value - want["start"][key]).square().sum())
                difference += float((one["state"][key] - value).square().sum())
        shares.append((difference / moved) ** 0.5)
    return shares[0], shares[1]


def test_in_bf16_statistics_stay_exact_and_losses_near():
    """Parameters in bf16, running statistics in fp32, losses within what bf16 rounds.

    On 2 x 2 ranks, of which some have no line of the last stage's 3 x 4 cells."""
    want = plain("classification")
    ranks = run_ranks(
        engine_steps, 4, case=CASES["classification"], mesh=(1, 2, 2), stage=2, precision="bf16"
    )
    rows = Place(3, 4, shape=(2, 2)).under(Layout.ROWS)
    assert any(rows.rect_of(at).empty for at in ((0, 0), (0, 1), (1, 0), (1, 1)))
    for rank in ranks:
        assert rank["losses"] == pytest.approx(want["losses"], rel=0.05)
        assert rank["buffers_are"] == {torch.float32}
        assert rank["state"]["backbone.bn1.running_var"].dtype is torch.float32
        for key in want["state"]:
            if key.endswith(("running_mean", "running_var")):
                assert torch.equal(rank["state"][key], ranks[0]["state"][key])
        key = "backbone.bn1.running_mean"  # the first norm, of what bf16 has rounded least
        way = (want["state"][key] - want["start"][key]).norm()
        assert (rank["state"][key] - want["state"][key]).norm() <= 0.05 * way
