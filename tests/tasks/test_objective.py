"""The loss is the plain mean over the images of a step, whatever the mesh, gradients included."""

import pytest
import torch
from distributed.launcher import run_ranks
from distributed.task_ranks import (
    IMAGES,
    mean_over_images,
    square_errors,
    step_losses,
    whole_images,
)

from axialtrain.mesh.mesh import Mesh, MeshConfig
from axialtrain.tasks.objective import image_means, judged, rank_loss, shown_loss

MESHES = {
    "one process": MeshConfig(),
    "2x2": MeshConfig(row=2, col=2),
    "3x1": MeshConfig(row=3),
    "data 2, row 2": MeshConfig(data=2, row=2),
    "data 4": MeshConfig(data=4),
    "col 2, tensor 2": MeshConfig(col=2, tensor=2),
    "data 2, tensor 2": MeshConfig(data=2, tensor=2),
}


@pytest.mark.parametrize("grid", [(13, 10), (7, 5)], ids=str)
@pytest.mark.parametrize("mesh", MESHES)
def test_it_is_the_mean_over_images(mesh, grid):
    batch = whole_images(grid, 1, dtype=torch.float64)
    values = batch.pixels[..., 0].clone().requires_grad_()
    sums, targets = square_errors(values, batch)
    assert sorted(targets.tolist())[:2] == [0, 0], "images without a target are among them"
    assert targets.unique().numel() == IMAGES - 1
    expected = mean_over_images(sums, targets)
    expected.backward()

    mesh = MESHES[mesh]
    ranks = run_ranks(step_losses, mesh.size, mesh=mesh, grid=grid)
    # What DeepSpeed makes of the losses: the mean over replicas and over micro-batches.
    mean = sum(sum(got.losses) / len(got.losses) for got in ranks) / mesh.size
    assert mean == pytest.approx(expected.item(), rel=1e-12)
    gradient = torch.full_like(values, torch.nan)
    fillers = 0
    for got in ranks:
        for where, part in zip(got.where, got.gradients, strict=True):
            gradient[where] = part / (got.replicas * len(got.losses))
        for part in got.of_fillers:
            assert not part.any()
            fillers += len(part)
        assert got.shown.item() == pytest.approx(expected.item(), rel=1e-12)
        assert got.shown.dtype == torch.float64
        assert not got.shown.requires_grad
        assert torch.equal(got.shown, ranks[0].shown)
    assert fillers, "a filler is among them"
    torch.testing.assert_close(gradient, values.grad, rtol=1e-12, atol=0)


def test_who_is_judged_has_a_target_and_is_no_filler():
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert judged(torch.tensor([0, 3, 2, 1]), weight, Mesh()).item() == 2.0
    by_term = torch.tensor([[0, 0], [0, 1], [2, 2], [1, 0]])  # one target of any term is enough
    assert judged(by_term, weight, Mesh()).item() == 2.0


def test_without_targets_there_is_no_nan():
    """0 / 0, on its way into the gradient too; and a filler counts nothing, whatever it holds."""
    sums = torch.tensor([0.0, 6.0, 5.0], requires_grad=True)
    means = image_means(sums, torch.tensor([0, 3, 2]), torch.tensor([1.0, 1.0, 0.0]), Mesh())
    assert means.tolist() == [0.0, 2.0, 0.0]
    loss = rank_loss(means, Mesh(), batch=2, accumulation=1)
    loss.backward()
    assert loss.item() == 1.0
    assert sums.grad.tolist() == [0.0, pytest.approx(1 / 6), 0.0]
    assert shown_loss(means.sum(), Mesh(), batch=2).item() == 1.0
