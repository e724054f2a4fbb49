"""Targets, losses and segments are those of plain loops over pixels, and the same on any mesh."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed.launcher import run_ranks
from distributed.panoptic_ranks import (
    CLASSES,
    PATCH,
    SIGMA,
    THINGS,
    VOID,
    Learned,
    a_config,
    a_scene,
    an_output,
    ids_too_large,
    learned,
    plain_targets,
)
from distributed.task_ranks import IMAGES
from torch import Tensor, nn

from axialtrain.data.batch import Batch
from axialtrain.grid import Rect
from axialtrain.mesh.mesh import Mesh, MeshConfig
from axialtrain.tasks import instances
from axialtrain.tasks.instances import centre_heat, centres_of_mass, offsets_to
from axialtrain.tasks.merge import MergeConfig
from axialtrain.tasks.objective import hardest, image_means
from axialtrain.tasks.panoptic import Panoptic, PanopticConfig, TermWeights

GRID = (7, 5)
CPU = torch.device("cpu")


def a_task(**options) -> Panoptic:
    task = Panoptic(a_config(**options))
    task.prepare(Mesh(), CPU)
    return task


# --- Targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2**20])
@pytest.mark.parametrize("sigma", [SIGMA, 8.0])
def test_targets_are_those_of_a_plain_loop(sigma, chunk, monkeypatch):
    monkeypatch.setattr(instances, "CHUNK", chunk)
    scene = a_scene(GRID)
    rect = scene.place.rect.scaled(PATCH)
    things = torch.isin(scene.labels, torch.tensor(THINGS))
    ids, end = instances.instance_ids(scene.instances, things, Mesh())
    centres, exist = centres_of_mass(ids, end, rect, Mesh())
    heat, offsets = centre_heat(centres, exist, rect, sigma), offsets_to(centres, ids, rect)
    assert exist.sum() > 10
    for image in range(IMAGES):
        want = plain_targets(scene.labels[image].numpy(), scene.instances[image].numpy(), sigma)
        np.testing.assert_array_equal(ids[image].numpy() > 0, want.inside)
        np.testing.assert_allclose(heat[image].numpy(), want.heat, rtol=1e-14)
        got = offsets[image].numpy() * want.inside[..., None]
        np.testing.assert_allclose(got, want.offsets, rtol=1e-14, atol=1e-14)


def test_centre_heat_ends_three_sigma_and_a_pixel_away():
    heat = centre_heat(
        torch.tensor([[[30.0, 30.0]]]), torch.tensor([[True]]), Rect(0, 61, 0, 61), 8
    )
    assert (heat[0, 30] > 0).sum() == 6 * 8 + 3
    assert heat.max() == heat[0, 30, 30] == 1


def test_centres_are_rounded_half_to_even():
    """As the public code rounds; the offset points to where the centre is."""
    ids = torch.tensor([[[1, 1, 0, 2, 2, 0]]])
    rect = Rect(0, 1, 0, 6)
    centres, exist = centres_of_mass(ids, 3, rect, Mesh())
    assert centres[0, 1:].tolist() == [[0, 0.5], [0, 3.5]]
    heat = centre_heat(centres, exist, rect, 0.5)
    assert (heat[0, 0] == 1).nonzero()[:, 0].tolist() == [0, 4]
    assert offsets_to(centres, ids, rect)[0, 0, :2].tolist() == [[0, 0.5], [0, -0.5]]


def test_an_id_that_is_too_large_is_refused_by_all_ranks():
    for said in run_ranks(ids_too_large, 2, mesh=MeshConfig(col=2)):
        assert said.startswith("an instance has id 1048576: allowed are 1 to 1048575")


# --- Losses ---------------------------------------------------------------------------------------


def plain_loss(output: Tensor, scene: Batch, config: PanopticConfig) -> Tensor:
    """[IMAGES], the published losses of whole images."""
    losses = []
    for image in range(IMAGES):
        labels = scene.labels[image].long()
        targets = plain_targets(labels.numpy(), scene.instances[image].numpy(), config.sigma)
        said = output[image]
        known = labels != VOID
        total = said.sum() * 0
        if known.any():
            errors = F.cross_entropy(said[known][:, :CLASSES], labels[known], reduction="none")
            count = max(1, int(config.hard * len(errors)))
            total = total + errors.topk(count).values.mean() * config.weights.semantic
        judged, inside = torch.from_numpy(targets.judged), torch.from_numpy(targets.inside)
        if judged.any():
            heat = torch.from_numpy(targets.heat)[judged]
            error = (said[judged][:, CLASSES] - heat).square().mean()
            total = total + error * config.weights.centre
        if inside.any():
            offsets = torch.from_numpy(targets.offsets)[inside]
            error = (said[inside][:, CLASSES + 1 :] - offsets).abs().sum(1).mean()
            total = total + error * config.weights.offset
        losses.append(total)
    return torch.stack(losses)


@pytest.mark.parametrize("hard", [1.0, 0.3, 1e-9])
def test_loss_is_the_published_one(hard):
    task, scene = a_task(hard=hard), a_scene(GRID)
    output = an_output(scene).requires_grad_()
    got = image_means(*task.loss(output, scene), scene.weight, Mesh())
    assert got.shape == (IMAGES, 3)
    want = plain_loss(output, scene, task.config)
    torch.testing.assert_close(got.sum(1), want, rtol=1e-12, atol=0)
    assert (got > 0).sum(0).tolist() == [4, 4, 3], "an image has no labels, another no instances"
    weights = torch.arange(1.0, IMAGES + 1).double()
    (gradient,) = torch.autograd.grad(got.sum(1) @ weights, output)
    (wanted,) = torch.autograd.grad(want @ weights, output)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("term", ["semantic", "centre", "offset"])
def test_each_term_has_its_weight(term):
    scene = a_scene(GRID)
    output = an_output(scene)
    nothing = dict.fromkeys(("semantic", "centre", "offset"), 0.0)
    one, three = (
        a_task(weights=TermWeights(**nothing | {term: weight})).loss(output, scene)[0]
        for weight in (1.0, 3.0)
    )
    assert one.any()
    torch.testing.assert_close(three, 3 * one, rtol=1e-14, atol=0)
    assert one.any(0).tolist() == [term == other for other in nothing]


def test_the_loss_is_in_fp32_whatever_the_model_is_in():
    scene = a_scene(GRID)
    output = an_output(scene).bfloat16()
    sums, targets = a_task(hard=0.5).loss(output, scene)
    want, count = a_task(hard=0.5).loss(output.float(), scene)
    assert sums.dtype == torch.float32
    assert torch.equal(sums, want)
    assert torch.equal(targets, count)


def test_a_crowd_and_what_has_no_label_teach_nothing_of_instances():
    """A crowd its class alone, a pixel without a label nothing; and a strange label is none."""
    task, scene = a_task(), a_scene(GRID)
    output = an_output(scene).requires_grad_()
    scene.labels[0, 0, :3] = torch.tensor([THINGS[0], VOID, CLASSES])
    scene.instances[0, 0, :3] = torch.tensor([0, 9, 9])
    (gradient,) = torch.autograd.grad(task.loss(output, scene)[0].sum(), output)
    crowd, unlabelled, strange = gradient[0, 0, :3]
    assert crowd[:CLASSES].all()
    assert not crowd[CLASSES:].any()
    assert not unlabelled.any()
    assert not strange.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_hardest_are_the_largest(dtype):
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(3, 40, 5, generator=generator, dtype=dtype)
    valid = torch.rand(3, 40, 5, generator=generator) < 0.6
    valid[2] = False
    for share in (1e-9, 0.15, 0.5, 0.999):
        weights = hardest(losses, valid, share, Mesh())
        assert weights.dtype == dtype
        for image in range(2):
            values = sorted(losses[image][valid[image]].tolist(), reverse=True)
            count = max(1, int(share * len(values)))
            chosen = valid[image] & (losses[image] >= values[count - 1])
            assert chosen.sum() == count
            assert torch.equal(weights[image], chosen.to(dtype))
        assert not weights[2].any()


def test_those_tied_at_the_limit_share_what_is_left():
    losses = torch.tensor([[2.0, 1.0, 0.5, 1.0, -0.0, 1.0]])
    valid = torch.ones(1, 6, dtype=torch.bool)
    third = pytest.approx(1 / 3)
    assert hardest(losses, valid, 0.34, Mesh())[0].tolist() == [1, third, 0, third, 0, third]
    assert hardest(losses * 0, valid, 0.5, Mesh())[0].tolist() == [0.5] * 6
    # A loss that is not a number must not be left out: it says that the run is broken.
    losses[0, 2] = torch.nan
    assert hardest(losses, valid, 0.17, Mesh())[0].tolist() == [0, 0, 1, 0, 0, 0]


# --- On meshes ------------------------------------------------------------------------------------

MESHES = {
    "1x2": MeshConfig(col=2),
    "2x2": MeshConfig(row=2, col=2),
    "2x3": MeshConfig(row=2, col=3),
    "data 2, row 2": MeshConfig(data=2, row=2),
    "5x1": MeshConfig(row=5),
}


@functools.cache
def serial(grid: tuple[int, int], hard: float) -> Learned:
    (result,) = run_ranks(learned, 1, mesh=MeshConfig(), grid=grid, config=a_config(hard=hard))
    return result


def whole(parts: list[Learned], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(gradients, segments) of all images, put together; each pixel comes from one rank."""
    size = (IMAGES, grid[0] * PATCH, grid[1] * PATCH)
    gradient = torch.full((*size, CLASSES + 3), torch.nan, dtype=torch.float64)
    segments = torch.full(size, -2)
    for got in parts:
        for (images, *here), part, tile in zip(got.where, got.gradients, got.segments, strict=True):
            real = images >= 0
            assert not part[~real].any()
            assert (tile[~real] == -1).all()
            assert (segments[images[real], *here] == -2).all()
            gradient[images[real], *here] = part[real] / (got.replicas * len(got.losses))
            segments[images[real], *here] = tile[real]
    return gradient, segments


QUICK = ("2x2", GRID, 0.3), ("data 2, row 2", GRID, 0.3)
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(MESHES, (GRID, (9, 8)), (1.0, 0.3))
]


@pytest.mark.parametrize(("mesh", "grid", "hard"), CASES, ids=str)
def test_losses_and_segments_are_the_same_on_any_mesh(mesh, grid, hard):
    expected = serial(grid, hard)
    scene = a_scene(grid)
    output = an_output(scene).requires_grad_()
    loss = plain_loss(output, scene, a_config(hard=hard)).mean()
    loss.backward()

    mesh = MESHES[mesh]
    ranks = run_ranks(learned, mesh.size, mesh=mesh, grid=grid, config=a_config(hard=hard))
    mean = sum(sum(got.losses) / len(got.losses) for got in ranks) / mesh.size
    assert mean == pytest.approx(loss.item(), rel=1e-10)
    gradient, segments = whole(ranks, grid)
    torch.testing.assert_close(gradient, output.grad, rtol=1e-10, atol=1e-14)
    assert torch.equal(segments, whole([expected], grid)[1])
    for name, value in expected.scores.items():
        total = sum(got.scores[name] for got in ranks)
        assert value.any(), name
        torch.testing.assert_close(total, value, rtol=1e-12, atol=0)

    titles = [panel.title for panel in expected.panels[0]]
    assert titles == ["image", "truth", "prediction"]
    for number, panel in enumerate(expected.panels[0]):
        for got in ranks:
            images, rows, cols = got.where[0]
            if images[0] == 0:
                want = panel.pixels[rows, cols]
                np.testing.assert_array_equal(got.panels[0][number].pixels, want)


def test_an_instance_lies_on_several_ranks():
    """Or the test above would say little."""
    scene = a_scene(GRID)
    inside = scene.instances[0].where(torch.isin(scene.labels[0], torch.tensor(THINGS)), 0)
    first, second = (set(half.unique().tolist()) - {0} for half in inside.chunk(2, 1))
    assert first & second


# --- Scores and pictures --------------------------------------------------------------------------


def test_scores_add_up_and_know_no_fillers():
    task, scene = a_task(), a_scene(GRID)
    output = an_output(scene)
    scene.weight[2] = 0
    scores = task.scores(output, scene)
    known = scene.labels != VOID
    known[2] = False
    confusion = np.zeros((CLASSES, CLASSES))
    guesses = output[..., :CLASSES].argmax(-1)[known].tolist()
    for truth, guess in zip(scene.labels[known].tolist(), guesses, strict=True):
        confusion[truth, guess] += 1
    np.testing.assert_array_equal(scores["confusion"].numpy(), confusion)
    summary = task.summary(scores)
    assert tuple(summary) == task.metrics
    assert summary["accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum())
    assert 0 < summary["pq"] < summary["sq"] < 1
    for name in scores:
        parts = [task.scores(said[None], only(scene, i))[name] for i, said in enumerate(output)]
        torch.testing.assert_close(sum(parts), scores[name], rtol=1e-12, atol=0)


def only(scene: Batch, image: int) -> Batch:
    tensors = {name: value for name, value in vars(scene).items() if isinstance(value, Tensor)}
    return replace(scene, **{name: value[image : image + 1] for name, value in tensors.items()})


def test_the_truth_itself_has_the_best_scores():
    scene = a_scene(GRID)
    output = torch.zeros(*scene.labels.shape, CLASSES + 3, dtype=torch.float64)
    crowds = torch.isin(scene.labels, torch.tensor(THINGS)) & (scene.instances == 0)
    semantic = scene.labels.where((scene.labels != VOID) & ~crowds, 1).long()  # or they would vote
    output[..., :CLASSES] = F.one_hot(semantic, CLASSES)
    for image in range(IMAGES):
        labels, ids = scene.labels[image].numpy(), scene.instances[image].numpy()
        targets = plain_targets(labels, ids, SIGMA)
        output[image, ..., CLASSES] = torch.from_numpy(targets.heat)
        output[image, ..., CLASSES + 1 :] = torch.from_numpy(targets.offsets)
    task = a_task(merge=MergeConfig(threshold=0.9, nms=1, stuff_area=1))
    summary = task.summary(task.scores(output, scene))
    assert [summary[name] for name in ("pq", "sq", "rq")] == [1, 1, 1]


def test_panels_have_a_shade_for_each_instance_of_a_class():
    task, scene = a_task(), a_scene(GRID)
    scene.labels[0], scene.instances[0] = 1, 0
    scene.labels[0, :8, :8] = 2
    scene.instances[0, :8, :4], scene.instances[0, :8, 4:8] = 1, 2
    scene.labels[0, 20:, :] = VOID
    image, truth, prediction = task.panels(an_output(scene), scene, mean=0.4, std=0.1)
    assert [panel.title for panel in (image, truth, prediction)] == ["image", "truth", "prediction"]
    assert image.pixels.shape == truth.pixels.shape == prediction.pixels.shape == (28, 20, 3)
    pixels = truth.pixels
    assert (pixels[25, 5] == 90).all()
    assert (pixels[12, 12] == (255, 127, 14)).all(), "stuff, tab10's second colour"
    assert (pixels[2, 3] == 255).all(), "a border"
    one, two = pixels[2, 1].astype(int), pixels[2, 6].astype(int)
    assert np.abs(one - two).max() > 40
    for shade in (one, two):  # of green, tab10's third
        assert shade.argmax() == 1
    assert (pixels[:8, :3] == one).all(-1)[:7].all(), "one colour all over"
    assert (pixels[19, 12] == (255, 127, 14)).all(), "nothing drawn towards void"


# --- What is not allowed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PanopticConfig(classes=1), r"task\.classes=1: allowed are 2 to 254"),
        (lambda: PanopticConfig(classes=255), r"task\.classes=255: allowed are 2 to 254"),
        (lambda: PanopticConfig(things=[]), r"task\.things=\[\]: allowed are null and"),
        (lambda: PanopticConfig(things=[0, 0]), r"task\.things=\[0, 0\]: allowed"),
        (lambda: PanopticConfig(things=[6]), r"task\.things=\[6\]: allowed .* of 0 to 5"),
        (lambda: PanopticConfig(sigma=0.1), r"task\.sigma=0\.1: allowed are 0\.5 to 128"),
        (lambda: PanopticConfig(sigma=129), r"task\.sigma=129: allowed are"),
        (lambda: PanopticConfig(hard=0), r"task\.hard=0: allowed is above 0, to 1"),
        (lambda: TermWeights(centre=-1.0), r"task\.weights\.centre=-1\.0: allowed are"),
        (lambda: TermWeights(offset=float("nan")), r"task\.weights\.offset=nan: allowed are"),
        (lambda: MergeConfig(threshold=1.0), r"task\.merge\.threshold=1\.0: allowed is 0 to"),
        (lambda: MergeConfig(nms=4), r"task\.merge\.nms=4: allowed are odd numbers, 1 to 1023"),
        (lambda: MergeConfig(centres=0), r"task\.merge\.centres=0: allowed are 1 to 1048575"),
        (lambda: MergeConfig(stuff_area=-1), r"task\.merge\.stuff_area=-1: allowed are"),
    ],
)
def test_what_is_not_allowed_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_null_makes_things_of_all_classes():
    assert PanopticConfig(classes=3).thing_classes == [0, 1, 2]


def test_another_backbone_is_refused():
    with pytest.raises(ValueError, match=r"task=panoptic: model is an Identity, allowed is an Axi"):
        Panoptic(a_config()).build(nn.Identity())
