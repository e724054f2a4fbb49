"""How often each window is taken: once an epoch, or by weights. Drawn from counters alone.

A weight belongs to an image, or to a class of images, and counts for each of its windows. An epoch
has as many indices as there are windows, also where some of them are taken often and others never.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import shown
from axialtrain.data.listing import rows_of
from axialtrain.data.manifest import ImageRow
from axialtrain.data.order import Order, words

UNIFORM, BALANCED, WEIGHTED = BY = ("uniform", "balanced", "weighted")
WINDOW, IMAGE = PER = ("window", "image")
IMAGES, LABELS = CLASSES = ("images", "labels")
TISSUE = "tissue"
_OFFSET, _DRAWN, _SHUFFLED = 1, 2, 3  # uses of an epoch's words; the permutation has 0
_WORD = 2.0**64
_MOST = 1e12  # of a weight: sums of ten million stay exact enough to draw by


@dataclass
class SampleConfig:
    """The `data.sample` group: how often each window is taken.

    by: "uniform", all alike; "balanced", each class as often as any other; "weighted", as `weights`
        says.
    classes: of "balanced": those of whole "images", or of pixels in their "labels" (`labelled`).
    weights: a table (CSV with the columns image and weight) or a mapping, with a weight from 0 for
        each image by its name; or "tissue": the share of a window that is stored.
    per: what has the weight, each "window", so that an image with more of them is seen more often,
        or each "image", whose windows share it.
    replacement: true draws each index by itself, as torch's WeightedRandomSampler does unless told
        otherwise. false deals an epoch out: each window is taken as often as its weight makes it in
        one epoch, rounded up or down. null is false for uniform, true for the others.
    """

    by: str = UNIFORM
    classes: str = IMAGES
    weights: Any = None
    per: str = WINDOW
    replacement: bool | None = None

    def __post_init__(self) -> None:
        for key, allowed in (("by", BY), ("classes", CLASSES), ("per", PER)):
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"data.sample.{key} is {shown(getattr(self, key))}, allowed is "
                    f"{', '.join(allowed)}"
                )
        if self.classes != IMAGES and self.by != BALANCED:
            raise ValueError(
                f"data.sample.classes is {self.classes} with data.sample.by={self.by}, allowed is "
                f"{IMAGES} unless it is {BALANCED}"
            )
        if (self.weights is not None) != (self.by == WEIGHTED):
            raise ValueError(
                f"data.sample.weights is {shown(self.weights)} with data.sample.by={self.by}, "
                f"allowed is a table, a mapping or {TISSUE} for {WEIGHTED}, null for the others"
            )
        if self.weights is not None and not isinstance(self.weights, (str, Mapping)):
            raise ValueError(
                f"data.sample.weights is {shown(self.weights)}, allowed is the path of a table, a "
                f"mapping from names of images to numbers from 0, or {TISSUE}"
            )

    @property
    def plain(self) -> bool:
        """Whether each window is taken once an epoch."""
        return self.by == UNIFORM and self.per == WINDOW and not self.replacement

    @property
    def by_labels(self) -> bool:
        """Whether classes of pixels are balanced."""
        return self.by == BALANCED and self.classes == LABELS

    @property
    def drawn(self) -> bool:
        """Whether with replacement."""
        return self.by != UNIFORM if self.replacement is None else self.replacement


class WeightedOrder(Order):
    """order[i]: one of the windows, as often as its weight says.

    weights: [size], of any sum above 0. drawn: each index by itself, with replacement. Otherwise in
    each epoch a window is taken size * weight / sum times, rounded up or down, and so are those of
    one class all together; which are rounded up differs by epoch. classes: int [size], None where
    there is no such thing.
    """

    def __init__(
        self,
        weights: NDArray[np.float64],
        seed: int,
        part: int = 0,
        *,
        drawn: bool,
        classes: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(len(weights), seed, part)
        # Places at one distance, over windows side by side: so those of a class stand together.
        self._windows = None if classes is None else np.argsort(classes, kind="stable")
        weights = weights if self._windows is None else weights[self._windows]
        self._edges = np.cumsum(weights)
        self._edges *= self.size / self._edges[-1]
        self._last = int(np.flatnonzero(weights)[-1])
        self._drawn = drawn

    def of_epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._drawn:
            at = words(self.size, self.seed, epoch, self.part, _DRAWN) * (self.size / _WORD)
            return self._window_at(at)
        (word,) = words(1, self.seed, epoch, self.part, _OFFSET)
        taken = self._window_at(np.arange(self.size) + float(word) / _WORD)
        shuffled = words(self.size, self.seed, epoch, self.part, _SHUFFLED)
        return taken[np.argsort(shuffled, kind="stable")]

    def _window_at(self, at: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        # Rounding may put a place beyond the last edge.
        found = np.minimum(np.searchsorted(self._edges, at, side="right"), self._last)
        return found if self._windows is None else self._windows[found]


def image_weights(images: Sequence[ImageRow], config: SampleConfig) -> NDArray[np.float64]:
    """The weight of each image, but for its class: 1, or what the table or mapping says.

    ValueError naming an image that has none, or a weight that is none.
    """
    if config.by != WEIGHTED or config.weights == TISSUE:
        return np.ones(len(images))
    if isinstance(config.weights, Mapping):  # of YAML, in which an image may be a number
        table, where = {str(name): weight for name, weight in config.weights.items()}, ""
    else:
        table, where = table_of(config.weights), f" {config.weights}"
    weights = np.empty(len(images))
    for number, row in enumerate(images):
        name = row.name.rpartition("/")[2]  # of one of several sets, whose number leads
        if name not in table:
            raise ValueError(
                f"data.sample.weights{where} has no image {name!r}, allowed is a weight for each"
            )
        weights[number] = _weight(table[name], f"data.sample.weights{where}: {name}")
    return weights


def classes_of(images: Sequence[ImageRow]) -> NDArray[np.int64]:
    """The class of each image; ValueError, naming one, where it has none."""
    for row in images:
        if row.label is None:
            raise ValueError(
                f"data.sample.by is {BALANCED}, but image {row.name!r} has no class: shard the "
                f"images with --image-labels, or set data.sample.classes={LABELS}"
            )
    return np.array([row.label for row in images], np.int64)


def window_weights(
    weights: NDArray[np.float64],
    counts: NDArray[np.int64],
    config: SampleConfig,
    classes: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """How often each window of one set is to be taken, in any unit.

    weights: of each window. counts: of the windows of each image, which stand beside each other.
    classes: of each window, those that are to be taken equally often. ValueError if all are 0.
    """
    weights = weights.copy()
    if config.per == IMAGE:
        weights /= np.repeat(counts, counts)
    if classes is not None:
        weights /= np.bincount(classes, weights)[classes]
    if not weights.any():
        raise ValueError("data.sample.weights are 0 for all windows, allowed is a sum above 0")
    return weights


def table_of(path: str | Path) -> dict[str, str]:
    """The weight of each image, as text, of a CSV file with the columns image and weight.

    Other columns are left alone. ValueError naming the line that is wrong.
    """
    try:
        rows = rows_of(Path(path))
    except ValueError as error:
        raise ValueError(f"data.sample.weights: {error}") from error
    header = [name.strip() for name in rows[0]] if rows else []
    if header.count("image") != 1 or header.count("weight") != 1:
        raise ValueError(
            f"{path}: columns are {shown(header)}, allowed are image and weight once, and others"
        )
    image, weight = header.index("image"), header.index("weight")
    table: dict[str, str] = {}
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise ValueError(
                f"{path}: line {number} has {len(row)} cells, allowed are {len(header)}"
            )
        name = row[image].strip()
        if name in table:
            raise ValueError(f"{path}: line {number}: image {shown(name)} stands there twice")
        table[name] = row[weight].strip()
    return table


def _weight(value: object, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= _MOST:
        raise ValueError(f"{where} is {shown(value)}, allowed is a number from 0 to {_MOST:g}")
    return number
