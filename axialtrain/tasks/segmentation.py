"""Semantic segmentation: a class per pixel, cross-entropy, mIoU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from axialtrain.data.batch import Batch
from axialtrain.data.config import PerBand
from axialtrain.mesh.mesh import Mesh
from axialtrain.models.deeplab import AxialDeepLab, SemanticDeepLab
from axialtrain.models.heads import Segmenter
from axialtrain.models.registry import Backbone
from axialtrain.tasks.metrics import confusion_of, mean_iou
from axialtrain.tasks.objective import widened
from axialtrain.tasks.panels import Panel, image_panel

IGNORE = 255  # the label of a pixel that is no target
COLOURS = np.array(  # matplotlib's tab10
    [
        (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
        (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207),
    ],
    np.uint8,
)  # fmt: skip


@dataclass
class SegmentationConfig:
    """classes: number of classes, labels 0..classes-1. cells: per token side, see `Segmenter`."""

    classes: int = 6
    cells: int = 1
    name: str = "segmentation"

    def __post_init__(self) -> None:
        if not 2 <= self.classes < IGNORE:
            raise ValueError(f"task.classes={self.classes}: allowed are 2 to {IGNORE - 1}")
        if self.cells < 1:
            raise ValueError(f"task.cells={self.cells}: allowed are whole numbers from 1")


class Segmentation:
    """Cross-entropy per pixel. Within a cell all pixels share one prediction, so the loss of its
    pixels is exact from how many of them have each class: tokens make no logits per pixel."""

    def __init__(self, config: SegmentationConfig) -> None:
        self.config = config
        self.metrics: tuple[str, ...] = ("miou", "accuracy")  # of `summary`, the higher the better
        self.classes: int | None = config.classes  # labels it needs, below this
        self.image_classes: int | None = None  # of whole images it needs none
        self.instances = False

    def build(self, backbone: Backbone) -> nn.Module:
        """Raises ValueError for cells that the model has none of."""
        if isinstance(backbone, AxialDeepLab):
            if self.config.cells != 1:
                raise ValueError(
                    f"task.cells={self.config.cells}: model=axial_deeplab names a class per pixel "
                    "already: allowed is 1"
                )
            return SemanticDeepLab(backbone, self.config.classes)
        return Segmenter(backbone, self.config.classes, self.config.cells)

    def prepare(self, mesh: Mesh, device: torch.device) -> None:
        """Nothing beside the model has to be on this rank."""

    def inputs(self, batch: Batch) -> tuple[object, ...]:
        """What the model of `build` takes."""
        return batch.pixels, batch.valid, batch.place

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(summed loss [B], number of valid pixels [B]) of this rank's tile.

        logits: [B, h * cells, w * cells, classes], cells being those of the model of `build`.
        """
        assert batch.labels is not None, "checked before the run started"
        if logits.shape[:-1] == batch.labels.shape:  # a cell is a pixel: no counts of one each
            known = batch.labels < self.config.classes
            targets = batch.labels.long().where(known, IGNORE).flatten()
            flat = widened(logits).flatten(0, 2)
            errors = F.cross_entropy(flat, targets, ignore_index=IGNORE, reduction="none")
            return errors.view(known.shape).sum((1, 2)), known.sum((1, 2))
        counts = self._counts(batch, logits)
        per_cell = -(counts * F.log_softmax(widened(logits), dim=-1))
        return per_cell.sum((1, 2, 3)), counts.sum((1, 2, 3))

    def scores(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Statistics that add up over batches and ranks: the confusion matrix, in pixels."""
        assert batch.labels is not None, "checked before the run started"
        if logits.shape[:-1] == batch.labels.shape:
            known = (batch.labels < self.config.classes) & (batch.weight > 0)[:, None, None]
            guess = logits.argmax(-1)[known]
            found = confusion_of(batch.labels.long()[known], guess, self.config.classes)
            return {"confusion": found}
        counts = self._counts(batch, logits) * batch.weight[:, None, None, None]
        classes = self.config.classes
        confusion = torch.zeros(classes, classes, dtype=torch.float64, device=logits.device)
        predicted = logits.argmax(-1).flatten()
        confusion.index_add_(0, predicted, counts.flatten(0, 2).double())
        return {"confusion": confusion.T}  # [truth, predicted]

    def summary(self, scores: dict[str, Tensor]) -> dict[str, float]:
        """mIoU over the classes that occur in truth or prediction, and pixel accuracy."""
        confusion = scores["confusion"]
        return {
            "miou": mean_iou(confusion),
            "accuracy": float(confusion.trace() / confusion.sum().clamp_min(1)),
        }

    def panels(self, logits: Tensor, batch: Batch, *, mean: PerBand, std: PerBand) -> list[Panel]:
        """Image, truth and prediction of the first image, at the cells' resolution; what has no
        target is grey in both."""
        counts = self._counts(batch, logits)[0]
        truth = torch.where(counts.sum(-1) > 0, counts.argmax(-1), IGNORE)
        predicted = logits[0].argmax(-1)
        side = batch.pixels.shape[1] // max(logits.shape[1], 1)
        return [
            image_panel(batch.pixels[0], side, "image", mean=mean, std=std),
            Panel("truth", _coloured(truth)),
            Panel("prediction", _coloured(torch.where(truth == IGNORE, IGNORE, predicted))),
        ]

    def _counts(self, batch: Batch, logits: Tensor) -> Tensor:
        """[B, h * cells, w * cells, classes]: how many pixels of each cell have each class."""
        assert batch.labels is not None, "checked before the run started"
        _, rows, cols, classes = logits.shape
        cells = rearrange(batch.labels, "B (h p) (w q) -> B h w p q", h=rows, w=cols)
        counts = [reduce((cells == c).float(), "B h w p q -> B h w", "sum") for c in range(classes)]
        return torch.stack(counts, dim=-1)


def _coloured(classes: Tensor) -> np.ndarray:
    """[h, w] -> uint8 [h, w, 3], pixels without a class in grey."""
    table = np.full((256, 3), 90, np.uint8)
    table[:IGNORE] = np.resize(COLOURS, (IGNORE, 3))
    return table[classes.cpu().numpy()]
