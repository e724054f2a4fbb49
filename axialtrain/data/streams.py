"""What a run's configuration makes of shards: which windows, in which endless order."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.buckets import BucketedOrder, buckets_of
from axialtrain.data.config import DataConfig
from axialtrain.data.labelled import label_weights, must_have_labels
from axialtrain.data.mixing import MixedOrder, MixedShards, parts_of
from axialtrain.data.order import Order, Stream, short_digest
from axialtrain.data.region import Shards
from axialtrain.data.sampling import (
    BALANCED,
    IMAGE,
    TISSUE,
    WeightedOrder,
    classes_of,
    image_weights,
    window_weights,
)
from axialtrain.data.windows import Windows, cut_windows, tissue_shares, with_tissue


def windows_of(shards: Shards | MixedShards, config: DataConfig) -> Windows:
    """All windows that may be taken; of several sets, set after set.

    ValueError as `cut_windows` and `with_tissue` have it.
    """
    windows = cut_windows(shards.images, config.window, config.cut.stride_of(config.window))
    return with_tissue(windows, config.cut.tissue, shards.head)


def stream_of(
    shards: Shards | MixedShards,
    windows: Windows,
    config: DataConfig,
    *,
    seed: int,
    batch: int,
    patch: int,
) -> tuple[Stream, dict[str, str]]:
    """(the endless order of `windows`, the plan of it for its saved state).

    windows: as `windows_of` has them. batch: samples of an optimizer step; patch: px of a token.
    Both play a role where there are buckets. ValueError that names what cannot be drawn by.
    """
    plan: dict[str, object] = {}
    stride = config.cut.stride_of(config.window)
    if config.window is not None and stride != list(config.window):
        plan["data.cut.stride"] = stride
    if config.cut.tissue > 0:
        plan["data.cut.tissue"] = config.cut.tissue
    weights: NDArray[np.float64] | None = None
    if not config.sample.plain:
        weights = image_weights(shards.images, config.sample)
        sample = config.sample
        plan["data.sample"] = [sample.by, sample.per, sample.drawn, sample.weights == TISSUE]
        if sample.by_labels:
            must_have_labels(shards.images)
            plan["data.sample.classes"] = sample.classes
        if not (weights == 1).all():
            plan["data.sample.weights"] = short_digest(weights.astype("<f8").tobytes())
    streams: list[Stream] = []
    sizes: list[int] = []
    edges = np.searchsorted(windows.image, np.cumsum([0, *parts_of(shards)])).tolist()
    for part, (start, stop) in enumerate(pairwise(edges)):
        if start == stop:  # `windows_of` has refused the only set
            assert isinstance(shards, MixedShards)
            raise ValueError(
                f"data.cut.tissue is {config.cut.tissue}, which no window of "
                f"{shards.given[part].url} has, allowed is less"
            )
        some = windows.only(slice(start, stop))
        if weights is None:
            streams.append(Order(len(some), seed, part))
        else:
            streams.append(_weighted(shards, some, weights, config, seed, part))
        sizes.append(len(some))
    stream = streams[0]
    if isinstance(shards, MixedShards):
        stream = MixedOrder(streams, sizes, shards.shares)
        plan["data.shards"] = shards.shares
    if config.buckets is not None:
        stream = BucketedOrder(stream, buckets_of(windows, patch, config.buckets), batch)
        plan |= {"data.buckets": config.buckets, "train.batch": batch, "model.patch": patch}
    return stream, {key: short_digest(json.dumps(value).encode()) for key, value in plan.items()}


def _weighted(
    shards: Shards | MixedShards,
    windows: Windows,
    of_image: NDArray[np.float64],
    config: DataConfig,
    seed: int,
    part: int,
) -> WeightedOrder:
    """The order of the windows of one set."""
    sample = config.sample
    if sample.by_labels:
        weights = label_weights(windows, shards.head, per_image=sample.per == IMAGE)
        return WeightedOrder(weights, seed, part, drawn=sample.drawn)
    images, counts = np.unique(windows.image, return_counts=True)
    classes = None
    if sample.by == BALANCED:
        of_its = classes_of([shards.images[k] for k in images.tolist()])
        classes = np.repeat(of_its, counts)
    weights = (
        tissue_shares(windows, shards.head)
        if sample.weights == TISSUE
        else np.repeat(of_image[images], counts)
    )
    weights = window_weights(weights, counts, sample, classes)
    return WeightedOrder(weights, seed, part, drawn=sample.drawn, classes=classes)
