"""Metrics of whole validation sets, from statistics that add up over batches and ranks.

The only file that knows torchmetrics, which makes the figures of the sums. It does not gather them:
one image is spread over many ranks here, and torchmetrics' own matching of panoptic segments wants
it whole, and took 23 s for each million pixels (measured, 2048 x 2048 px, one core). What it needs
of an image are the areas that pairs of segments share. Those are counted by each rank in its own
tile (0.2 s for a million pixels), and only the counts travel.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from axialtrain.mesh.collectives import gather_objects
from axialtrain.mesh.mesh import Mesh
from axialtrain.tasks.instances import SEGMENTS, VOID

STATES = ("iou_sum", "true_positives", "false_positives", "false_negatives")  # PanopticQuality's
_STRIDE = 2**30  # above what a segment of at most 255 classes can be


def confusion_of(truth: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """fp64 [classes, classes]: how often (truth, predicted) occurs among two alike shapes."""
    index = truth.flatten().long() * classes + predicted.flatten()
    return torch.bincount(index, minlength=classes**2).view(classes, classes).double()


def mean_iou(confusion: Tensor) -> float:
    """mIoU over the classes that occur in truth or prediction; 0 where none does.

    confusion: [classes, classes] of (truth, predicted). In fp32, as torchmetrics computes it.
    """
    if not confusion.any():
        return 0.0
    metric = _torchmetrics().classification.MulticlassJaccardIndex(
        len(confusion), sync_on_compute=False
    )
    return float(_computed(metric, {"confmat": confusion.cpu()}))


def segment_matches(
    predicted: Tensor, truth: Tensor, weight: Tensor, classes: int, mesh: Mesh
) -> dict[str, Tensor]:
    """The `STATES` of PanopticQuality, fp64 [classes] each, summed over the images of this batch.

    predicted, truth: int64 [B, h, w], the segments of this rank's tile. weight: [B], 0 for images
    that do not count. They are those of whole images on the first of the ranks that share them, and
    zero on the others: summed over all ranks, each image counts once. To match segments that lie
    on several ranks, each sends the first one 24 bytes for every pair that overlaps in its tile.

    A pair of one class matches where its IoU is above 1/2, pixels without truth left out (arXiv
    1801.00868, section 4.1). A prediction that lies mostly there is no false positive. A pixel
    without prediction is a miss, as in the paper's own code, and not, as torchmetrics has it, left
    out: else a model would gain by not answering.
    """
    mine = []
    for index in weight.nonzero()[:, 0].tolist():
        keys = (predicted[index] - VOID) * _STRIDE + (truth[index] - VOID)
        mine.append([x.cpu().numpy() for x in torch.unique(keys, return_counts=True)])
    sums = np.zeros((len(STATES), classes))
    gathered = gather_objects(mine, mesh.spatial)
    for parts in zip(*gathered, strict=True) if mesh.spatial.rank == 0 else ():
        pairs, inverse = np.unique(np.concatenate([p for p, _ in parts]), return_inverse=True)
        area = np.bincount(inverse, np.concatenate([n for _, n in parts]))
        sums += _matches(pairs // _STRIDE + VOID, pairs % _STRIDE + VOID, area, classes)
    states = torch.from_numpy(sums).to(predicted.device)
    return dict(zip(STATES, states, strict=True))


def _matches(
    predicted: NDArray[Any], truth: NDArray[Any], shared: NDArray[Any], classes: int
) -> NDArray[Any]:
    """[4, classes], the `STATES` of an image.

    predicted, truth: [N], pairs of segments that overlap, or VOID; shared: [N], in how many pixels.
    """
    guesses, guess = np.unique(predicted, return_inverse=True)
    segments, segment = np.unique(truth, return_inverse=True)
    unjudged = np.bincount(guess, shared * (truth == VOID))  # of each guess
    area = np.bincount(guess, shared)
    union = (area - unjudged)[guess] + np.bincount(segment, shared)[segment] - shared
    alike = (predicted != VOID) & (truth != VOID) & (predicted // SEGMENTS == truth // SEGMENTS)
    hit = alike & (2 * shared > union)
    wrong = (guesses != VOID) & (2 * unjudged <= area)
    wrong[guess[hit]] = False
    missed = segments != VOID
    missed[segment[hit]] = False

    def by_class(of: NDArray[Any], counts: NDArray[Any] | None = None) -> NDArray[Any]:
        return np.bincount(of // SEGMENTS, counts, minlength=classes)

    return np.stack(
        (
            by_class(truth[hit], shared[hit] / union[hit]),
            by_class(truth[hit]),
            by_class(guesses[wrong]),
            by_class(segments[missed]),
        )
    )


def panoptic_quality(scores: dict[str, Tensor]) -> dict[str, float]:
    """PQ, SQ and RQ, means over the classes that occur in truth or prediction; 0 where none does.

    scores: the `STATES`, [classes] each.
    """
    states = {name: scores[name].cpu() for name in STATES}
    if not any(value.any() for value in states.values()):
        return {"pq": 0.0, "sq": 0.0, "rq": 0.0}
    # Which classes are things makes no difference to sums, or to a mean over all classes.
    metric = _torchmetrics().detection.PanopticQuality(
        set(range(len(states["iou_sum"]))), set(), return_sq_and_rq=True, sync_on_compute=False
    )
    return dict(zip(("pq", "sq", "rq"), _computed(metric, states).tolist(), strict=True))


def _computed(metric: Any, states: dict[str, Tensor]) -> Tensor:
    """What `metric` makes of states that were summed here, over all ranks."""
    metric.merge_state(states)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it was told before it was shown
        return metric.compute()


@functools.cache
def _torchmetrics() -> ModuleType:
    """torchmetrics, imported when the first figure is made: it takes a second.

    It is told that there is no torchvision, which it would import for metrics that nobody needs
    here: that takes seconds more, and fails where torchvision was built for another torch.
    """
    from lightning_utilities.core.imports import RequirementCache

    there = RequirementCache.__bool__

    def without_torchvision(package: RequirementCache) -> bool:
        return package.requirement != "torchvision" and there(package)

    with patch.object(RequirementCache, "__bool__", without_torchvision):
        import torchmetrics.classification
        import torchmetrics.detection
    return torchmetrics
