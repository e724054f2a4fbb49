"""Cross-entropy and mIoU from counts per cell are those of pixels, one by one."""

from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from distributed.launcher import run_ranks
from distributed.task_ranks import (
    CLASSES,
    IMAGES,
    Case,
    mean_of_the_labelled,
    per_pixel,
    plain_segmentation,
    validated,
    whole_images,
)

from axialtrain.mesh.mesh import MeshConfig
from axialtrain.tasks.segmentation import IGNORE, Segmentation, SegmentationConfig

PATCH = 4
GRID = (3, 5)


def a_batch(**options):
    return whole_images(GRID, PATCH, dtype=torch.float64, **options)


def some_logits(cells, classes=CLASSES):
    generator = torch.Generator().manual_seed(cells)
    shape = (IMAGES, GRID[0] * cells, GRID[1] * cells, classes)
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def a_task(cells=1, classes=CLASSES):
    return Segmentation(SegmentationConfig(classes, cells))


@pytest.mark.parametrize("cells", [1, 2, PATCH])
def test_loss_is_the_cross_entropy_of_pixels(cells):
    batch, logits = a_batch(), some_logits(cells)
    sums, targets = a_task(cells).loss(logits, batch)
    expected, count = plain_segmentation(logits, batch)
    assert targets.tolist() == count.tolist()
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    weights = torch.arange(1.0, IMAGES + 1)
    (gradient,) = torch.autograd.grad(sums @ weights.double(), logits)
    (wanted,) = torch.autograd.grad(expected @ weights.double(), logits)
    assert gradient.any()
    # Of each cell by its pixels' number, and so without a tolerance where there are none.
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cells", [1, 2, PATCH])
def test_scores_are_the_confusion_of_pixels(cells):
    batch, logits = a_batch(), some_logits(cells)
    filler = 1
    assert (batch.labels[filler] != IGNORE).any()
    batch.weight[filler] = 0
    task = a_task(cells)
    confusion = np.zeros((CLASSES, CLASSES))
    predicted = per_pixel(logits.argmax(-1), PATCH // cells)
    for image in range(IMAGES):
        for truth, guess in zip(
            batch.labels[image].flatten().tolist(), predicted[image].flatten().tolist(), strict=True
        ):
            if image != filler and truth != IGNORE:
                confusion[truth, guess] += 1
    scores = task.scores(logits, batch)
    np.testing.assert_array_equal(scores["confusion"].numpy(), confusion)
    assert not np.array_equal(confusion, confusion.T)

    ious = []
    for c in range(CLASSES):
        hit = confusion[c, c]
        ious.append(hit / (confusion[c].sum() + confusion[:, c].sum() - hit))
    summary = task.summary(scores)
    # torchmetrics computes it in fp32.
    assert summary["miou"] == pytest.approx(np.mean(ious), rel=1e-6)
    assert summary["accuracy"] == pytest.approx(np.trace(confusion) / confusion.sum(), rel=1e-12)


def test_scores_add_up_over_batches():
    task, first, second = a_task(), a_batch(), a_batch(step=1)
    logits = some_logits(1)
    both = replace(
        first,
        labels=torch.cat([first.labels, second.labels]),
        weight=torch.cat([first.weight, second.weight]),
    )
    one, other = (task.scores(logits, batch)["confusion"] for batch in (first, second))
    whole = task.scores(torch.cat([logits, logits]), both)["confusion"]
    assert torch.equal(one + other, whole)


def test_miou_is_over_the_classes_that_occur():
    confusion = torch.zeros(4, 4, dtype=torch.float64)
    task = a_task(classes=4)
    assert task.summary({"confusion": confusion}) == {"miou": 0.0, "accuracy": 0.0}
    confusion[0, 0], confusion[0, 1] = 6, 2  # of classes 0 and 1; 2 and 3 do not occur
    assert task.summary({"confusion": confusion}) == {"miou": 0.375, "accuracy": 0.75}


def test_a_label_that_is_no_class_is_no_target():
    """As 255 is: neither in the loss nor in the scores. (Nothing says so to the user, yet.)"""
    batch, logits = a_batch(), some_logits(1)
    strange = batch.labels.clone()
    strange[0, :PATCH] = CLASSES  # the first one that is none
    ignored = batch.labels.clone()
    ignored[0, :PATCH] = IGNORE
    task = a_task()
    for got, expected in zip(
        task.loss(logits, replace(batch, labels=strange)),
        task.loss(logits, replace(batch, labels=ignored)),
        strict=True,
    ):
        assert torch.equal(got, expected)
    got, expected = (task.scores(logits, replace(batch, labels=x)) for x in (strange, ignored))
    assert torch.equal(got["confusion"], expected["confusion"])


@pytest.mark.parametrize("cells", [1, 2, PATCH])
def test_panels_show_image_truth_and_prediction(cells):
    batch, logits = a_batch(), some_logits(cells)
    batch.labels[0, :PATCH, :PATCH] = 3
    batch.labels[0, :PATCH, -PATCH:] = IGNORE
    half = batch.labels[0, -PATCH:, :PATCH]  # the class of most pixels is shown
    half[:], half[0] = 2, 1
    panels = a_task(cells).panels(logits, batch, mean=0.4, std=0.1)
    assert [panel.title for panel in panels] == ["image", "truth", "prediction"]
    image, truth, prediction = (panel.pixels for panel in panels)
    for pixels in (image, truth, prediction):
        assert pixels.shape == (GRID[0] * cells, GRID[1] * cells, 3)
        assert pixels.dtype == np.uint8

    side = PATCH // cells
    tab10 = (np.array(mpl.colormaps["tab10"].colors) * 255).astype(np.uint8)
    assert (truth[0, 0] == tab10[3]).all()
    assert (truth[0, -1] == 90).all()
    assert (truth[-1, 0] == tab10[2]).all()
    grey = (truth == 90).all(-1)  # where there is no target
    targets = (batch.labels[0] != IGNORE).unflatten(0, (-1, side)).unflatten(2, (-1, side))
    np.testing.assert_array_equal(grey, ~targets.any(3).any(1).numpy())
    assert (prediction[grey] == 90).all()
    np.testing.assert_array_equal(prediction[~grey], tab10[logits[0].argmax(-1)][~grey])
    shown = batch.pixels[0].float() * 0.1 + 0.4  # as it was before normalisation
    mean = shown.unflatten(0, (-1, side)).unflatten(2, (-1, side)).mean((1, 3))
    assert np.abs(image.astype(int) - (mean.clamp(0, 1) * 255).int().numpy()).max() <= 1


def test_a_band_that_is_not_colour_is_grey():
    batch = a_batch(bands=2)
    (image, *_) = a_task().panels(some_logits(1), batch, mean=0.5, std=0.1)
    assert (image.pixels[..., 0] == image.pixels[..., 2]).all()
    assert image.pixels.std() > 0


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(row=2, col=2), MeshConfig(data=2, row=2), MeshConfig(col=2, tensor=2)],
    ids=str,
)
def test_validation_and_picture_are_the_same_on_any_mesh(mesh):
    case = Case("segmentation", (13, 10))
    (expected,) = run_ranks(validated, 1, case=case, mesh=MeshConfig())
    assert expected.metrics.keys() == {"val_loss", "miou", "accuracy"}
    ((by_hand, without),) = run_ranks(mean_of_the_labelled, 1, case=case)
    assert without > 0
    assert expected.metrics["val_loss"] == pytest.approx(by_hand, rel=1e-10)
    ranks = run_ranks(validated, 4, case=case, mesh=mesh)
    for got in ranks:
        assert got.metrics == ranks[0].metrics
        assert got.metrics == pytest.approx(expected.metrics, rel=1e-10)
    assert [got.picture is None for got in ranks] == [False, True, True, True]
    for got, panel in zip(ranks[0].picture, expected.picture, strict=True):
        assert got.title == panel.title
        np.testing.assert_array_equal(got.pixels, panel.pixels)


@pytest.mark.parametrize(("key", "value"), [("classes", 1), ("classes", 255), ("cells", 0)])
def test_what_is_not_allowed_is_named(key, value):
    with pytest.raises(ValueError, match=rf"task\.{key}={value}: allowed"):
        SegmentationConfig(**{key: value})
