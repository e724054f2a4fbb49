"""Panoptic segmentation: a class for each pixel, and an instance where the class is of things.

Source: Panoptic-DeepLab (arXiv 1911.10194). The model names classes, the heat of instances' centres
and each pixel's offset to the centre of its own; `merge` makes segments of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axialtrain.data.batch import Batch
from axialtrain.data.config import PerBand
from axialtrain.grid import Place, Rect
from axialtrain.mesh.exchange import fetch
from axialtrain.mesh.mesh import Mesh
from axialtrain.models.deeplab import AxialDeepLab, PanopticDeepLab
from axialtrain.tasks.instances import (
    SEGMENTS,
    VOID,
    centre_heat,
    centres_of_mass,
    instance_ids,
    offsets_to,
    true_segments,
)
from axialtrain.tasks.merge import MergeConfig, among, merged
from axialtrain.tasks.metrics import (
    STATES,
    confusion_of,
    mean_iou,
    panoptic_quality,
    segment_matches,
)
from axialtrain.tasks.objective import hardest, widened
from axialtrain.tasks.panels import Panel, image_panel
from axialtrain.tasks.segmentation import COLOURS, IGNORE

MIN_SIGMA, MAX_SIGMA = 0.5, 128  # px; the largest has a window of 771 px around each centre


@dataclass
class TermWeights:
    """What each term of the loss counts: cross-entropy of classes, squared error of the centre
    heat, absolute error of offsets in px. Those of the paper."""

    semantic: float = 1.0
    centre: float = 200.0
    offset: float = 0.01

    def __post_init__(self) -> None:
        for term in fields(self):
            value = getattr(self, term.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"task.weights.{term.name}={value}: allowed are numbers from 0")


@dataclass
class PanopticConfig:
    """classes: number of classes, labels 0..classes-1.

    things: those that have instances; null: all. sigma: px, of the Gaussian that is an instance's
    centre. hard: share of an image's pixels, those of largest loss, that the cross-entropy is over;
    1 is all, the public code has 0.2. weights: of the loss's terms. merge: how segments are made.
    """

    classes: int = 6
    things: list[int] | None = None
    sigma: float = 8.0
    hard: float = 1.0
    weights: TermWeights = field(default_factory=TermWeights)
    merge: MergeConfig = field(default_factory=MergeConfig)
    name: str = "panoptic"

    def __post_init__(self) -> None:
        if not 2 <= self.classes < IGNORE:
            raise ValueError(f"task.classes={self.classes}: allowed are 2 to {IGNORE - 1}")
        things = self.thing_classes
        if (
            not things
            or len(set(things)) < len(things)
            or not set(things) <= {*range(self.classes)}
        ):
            raise ValueError(
                f"task.things={things}: allowed are null and different classes, one or more, of 0 "
                f"to {self.classes - 1}"
            )
        if not MIN_SIGMA <= self.sigma <= MAX_SIGMA:
            raise ValueError(f"task.sigma={self.sigma}: allowed are {MIN_SIGMA} to {MAX_SIGMA}")
        if not 0 < self.hard <= 1:
            raise ValueError(f"task.hard={self.hard}: allowed is above 0, to 1")

    @property
    def thing_classes(self) -> list[int]:
        return list(range(self.classes)) if self.things is None else list(self.things)


@dataclass(frozen=True)
class _Truth:
    """What is known of this rank's pixels, each [B, h, w].

    labels: int64, IGNORE where there is none. known: where there is one. things: where it is of a
    thing. ids: of instances below `end`, 0: none. rect: the pixels, in the image.
    """

    labels: Tensor
    known: Tensor
    things: Tensor
    ids: Tensor
    end: int
    rect: Rect

    @property
    def segments(self) -> Tensor:
        return true_segments(self.labels, self.known, self.things, self.ids)


class Panoptic:
    """Cross-entropy of classes, squared error of centres, absolute error of offsets; PQ.

    A pixel without label is no target of anything. A thing without instance id (a crowd) is a
    target for its class alone. Offsets are learned in instances, centre heat in all other labelled
    pixels too.
    """

    def __init__(self, config: PanopticConfig) -> None:
        self.config = config
        # Of `summary`, the higher the better.
        self.metrics: tuple[str, ...] = ("pq", "sq", "rq", "miou", "accuracy")
        self.classes: int | None = config.classes  # labels it needs, below this
        self.image_classes: int | None = None  # of whole images it needs none
        self.instances = True  # it needs instance rasters
        self._of_mesh: Mesh | None = None

    def build(self, backbone: nn.Module) -> nn.Module:
        """Raises ValueError where the backbone has no decoders that could do this."""
        if not isinstance(backbone, AxialDeepLab):
            raise ValueError(
                f"task={self.config.name}: model is an {type(backbone).__name__}, allowed is an "
                "AxialDeepLab, like model=axial_deeplab_s"
            )
        return PanopticDeepLab(backbone, self.config.classes)

    def prepare(self, mesh: Mesh, device: torch.device) -> None:
        """Targets and segments are made over the mesh: an instance may lie on several ranks."""
        self._of_mesh = mesh

    def inputs(self, batch: Batch) -> tuple[object, ...]:
        """What the model of `build` takes."""
        return batch.pixels, batch.valid, batch.place

    def loss(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(weighted sums [B, 3], targets [B, 3]) of this rank's tile: semantic, centre, offset.

        output: [B, h * p, w * p, classes + 3], semantic logits, centre heat, offset (dy, dx) in px
        to the centre of the pixel's instance. Talks over the spatial ranks.
        """
        output, classes = widened(output), self.config.classes
        truth = self._truth(batch)
        logits = output[..., :classes].flatten(0, 2)
        semantic = F.cross_entropy(
            logits, truth.labels.flatten(), ignore_index=IGNORE, reduction="none"
        ).view_as(truth.labels)
        counted = truth.known.to(semantic)
        if self.config.hard < 1:
            counted = hardest(semantic.detach(), truth.known, self.config.hard, self._mesh)

        centres, exist = centres_of_mass(truth.ids, truth.end, truth.rect, self._mesh)
        heat = centre_heat(centres, exist, truth.rect, self.config.sigma).to(output)
        inside = truth.ids > 0
        judged = truth.known & (inside | ~truth.things)
        centre = (output[..., classes] - heat).square().where(judged, 0)
        offsets = offsets_to(centres, truth.ids, truth.rect).to(output)
        offset = (output[..., classes + 1 :] - offsets).abs().sum(-1).where(inside, 0)

        weights = self.config.weights
        sums = torch.stack(
            (
                (semantic * counted).sum((1, 2)) * weights.semantic,
                centre.sum((1, 2)) * weights.centre,
                offset.sum((1, 2)) * weights.offset,
            ),
            1,
        )
        targets = [mask.sum((1, 2)).to(sums) for mask in (counted, judged, inside)]
        return sums, torch.stack(targets, 1)

    def scores(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Statistics that add up over batches and ranks: the confusion matrix in pixels, before
        segments are made, and how many segments matched. Talks over the spatial ranks."""
        truth = self._truth(batch)
        known = truth.known & (batch.weight > 0)[:, None, None]
        guess = output[..., : self.config.classes].argmax(-1)
        scores = {"confusion": confusion_of(truth.labels[known], guess[known], self.config.classes)}
        return scores | segment_matches(
            self.segments(output, batch),
            truth.segments,
            batch.weight,
            self.config.classes,
            self._mesh,
        )

    def summary(self, scores: dict[str, Tensor]) -> dict[str, float]:
        """PQ, SQ and RQ (arXiv 1801.00868), mIoU, each over the classes that occur, and pixel
        accuracy."""
        confusion = scores["confusion"]
        return panoptic_quality({name: scores[name] for name in STATES}) | {
            "miou": mean_iou(confusion),
            "accuracy": float(confusion.trace() / confusion.sum().clamp_min(1)),
        }

    def segments(self, output: Tensor, batch: Batch) -> Tensor:
        """int64 [B, h * p, w * p], class * SEGMENTS + instance, or VOID: see `merged`."""
        config = self.config
        return merged(output, batch, config.thing_classes, config.merge, self._mesh)

    def panels(self, output: Tensor, batch: Batch, *, mean: PerBand, std: PerBand) -> list[Panel]:
        """Image, truth and prediction of the first image, its instances in shades of their class's
        colour, with borders; void is grey."""
        place = _pixel_place(batch)
        truth, guess = self._truth(batch).segments[:1], self.segments(output, batch)[:1]
        return [
            image_panel(batch.pixels[0], 1, "image", mean=mean, std=std),
            Panel("truth", _painted(truth, place, self._mesh)),
            Panel("prediction", _painted(guess, place, self._mesh)),
        ]

    @property
    def _mesh(self) -> Mesh:
        assert self._of_mesh is not None, "prepare() comes before training"
        return self._of_mesh

    def _truth(self, batch: Batch) -> _Truth:
        assert batch.labels is not None, "checked before the run started"
        assert batch.instances is not None, "checked before the run started"
        known = batch.labels < self.config.classes
        labels = batch.labels.long().where(known, IGNORE)
        things = among(self.config.thing_classes, IGNORE + 1, labels.device)[labels]
        ids, end = instance_ids(batch.instances, things, self._mesh)
        return _Truth(labels, known, things, ids, end, _pixel_place(batch).rect)


def _pixel_place(batch: Batch) -> Place:
    return batch.place.finer(batch.pixels.shape[1] // batch.valid.shape[1])


def _painted(segments: Tensor, place: Place, mesh: Mesh) -> np.ndarray:
    """[1, h, w] under `place` -> uint8 [h, w, 3], alike on every mesh."""

    def beyond(rect: Rect) -> Rect:
        return Rect(rect.top, rect.bottom + 1, rect.left, rect.right + 1)

    # VOID becomes 0, which also lies outside the image.
    wide = fetch(segments - VOID, place, beyond, mesh, across_rows=True, across_cols=True)[0]
    here = wide[:-1, :-1]
    border = torch.zeros_like(here, dtype=torch.bool)
    for neighbour in (wide[1:, :-1], wide[:-1, 1:]):
        border |= (here != neighbour) & (here > 0) & (neighbour > 0)
    classes, ids = (segments[0].cpu().numpy() // SEGMENTS, segments[0].cpu().numpy() % SEGMENTS)
    colours = np.resize(COLOURS, (IGNORE, 3))[classes].astype(np.float64)
    # Neighbouring ids get shades far apart: multiples of the golden ratio fill an interval evenly.
    shade = np.where(ids > 0, (ids * (math.sqrt(5) - 1) / 2) % 1 - 0.5, 0.0)[..., None]
    colours += np.where(shade > 0, 255 - colours, colours) * shade  # up to half white or black
    painted = np.where(border.cpu().numpy()[..., None], 255, colours)
    painted[classes < 0] = 90
    return painted.astype(np.uint8)
