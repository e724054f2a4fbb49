"""What is to be sharded: opened and compared, all of it, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from axialtrain.data.checked import shown
from axialtrain.data.readers import Reader, open_image, open_raster
from axialtrain.data.store import (
    MAX_BLOCKS,
    MAX_LABEL,
    MAX_LEVEL,
    MAX_NAME_WITH_INSTANCES,
    block_grid,
    image_name,
)


@dataclass(frozen=True)
class Input:
    """An image that has been checked, and what it is stored as.

    labels, instances: paths of its rasters. label: the class of the whole image. level: of its
    pyramid. blocks: how many it makes. reader, why: which one reads it, and how that was chosen.
    """

    name: str
    image: Path
    labels: Path | None
    instances: Path | None
    label: int | None
    level: int
    blocks: int
    reader: str
    why: str


def check_inputs(
    images: Sequence[str | Path],
    labels: Sequence[str | Path] | None,
    instances: Sequence[str | Path] | None,
    image_labels: Sequence[int] | None,
    level: int,
    reader: str,
) -> list[Input]:
    """Open every input once, so that what is wrong with the last is said before the first.

    The arguments are those of `shard_images`. ValueError naming file or argument.
    """
    if not images:
        raise ValueError("images is empty, allowed is at least one path")
    for key, rasters in (("labels", labels), ("instances", instances)):
        if rasters is not None and len(rasters) != len(images):
            raise ValueError(
                f"{key} has {len(rasters)} paths, allowed is one for each of the {len(images)} "
                "images"
            )
    if instances is not None and labels is None:
        raise ValueError(
            f"instances has {len(instances)} paths and labels is missing, allowed are instances "
            "of images that have labels"
        )
    if image_labels is not None:
        _check_image_labels(image_labels, len(images))
    if not 0 <= level <= MAX_LEVEL:
        raise ValueError(f"level is {level}, allowed is 0 to {MAX_LEVEL}")
    inputs: dict[str, Input] = {}
    for index, image in enumerate(images):
        label_raster = None if labels is None else Path(labels[index])
        instance_raster = None if instances is None else Path(instances[index])
        label = None if image_labels is None else int(image_labels[index])
        name = image_name(image)
        if name in inputs:
            raise ValueError(
                f"{image}: would be stored as {name!r}, and so would {inputs[name].image}"
            )
        if instance_raster is not None and len(name) > MAX_NAME_WITH_INSTANCES:
            raise ValueError(
                f"{image}: its name in the shards has {len(name)} characters, allowed with "
                f"instances is {MAX_NAME_WITH_INSTANCES}"
            )
        with open_image(image, level, reader) as opened:
            rows, cols = block_grid(opened.height, opened.width, opened.tile)
            if rows * cols > MAX_BLOCKS:
                raise ValueError(f"{image}: makes {rows * cols} blocks, allowed is {MAX_BLOCKS}")
            if label_raster is not None:
                with open_raster(label_raster) as raster:
                    _check_raster(raster, opened, "labels")
            if instance_raster is not None:
                with open_raster(instance_raster) as raster:
                    _check_raster(raster, opened, "instances")
                    if raster.jpeg:
                        raise ValueError(
                            f"{instance_raster}: its compression is JPEG, allowed for instances "
                            "is one without loss"
                        )
        inputs[name] = Input(
            name,
            Path(image),
            label_raster,
            instance_raster,
            label,
            level,
            rows * cols,
            opened.name,
            opened.why,
        )
    return list(inputs.values())


def _check_image_labels(labels: Sequence[int], images: int) -> None:
    if len(labels) != images:
        raise ValueError(
            f"image_labels has {len(labels)} classes, allowed is one for each of the {images} "
            "images"
        )
    for index, label in enumerate(labels):
        whole = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
        if not whole or not 0 <= label <= MAX_LABEL:
            raise ValueError(
                f"image_labels[{index}] is {shown(label)}, allowed is a class from 0 to {MAX_LABEL}"
            )


def _check_raster(raster: Reader, image: Reader, kind: str) -> None:
    allowed = {"labels": ("uint8",), "instances": ("uint8", "uint16")}[kind]
    if raster.dtype not in allowed:
        raise ValueError(
            f"{raster.path}: its pixels are {raster.dtype}, allowed is {' or '.join(allowed)} "
            f"for {kind}"
        )
    if raster.bands != 1:
        raise ValueError(f"{raster.path}: has {raster.bands} bands, allowed for {kind} is 1")
    if (raster.height, raster.width) != (image.height, image.width):
        raise ValueError(
            f"{raster.path}: is {raster.height} x {raster.width} px, allowed for {kind} is the "
            f"size of {image.path}, {image.height} x {image.width}"
        )
