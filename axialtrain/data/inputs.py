"""What is to be sharded: opened and compared, all of it, before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from axialtrain.data.listing import Entry
from axialtrain.data.rasters import LabelSource, RasterInstances, open_instances, open_labels
from axialtrain.data.readers import Reader, open_image
from axialtrain.data.readers.reader import MPP, TILE
from axialtrain.data.readers.resampled import choose_level, resampled
from axialtrain.data.readers.retiled import retiled
from axialtrain.data.sharding import Sharding
from axialtrain.data.store import (
    MAX_BLOCKS,
    MAX_NAME_WITH_INSTANCES,
    NAME,
    NAME_WORDS,
    Head,
    image_name,
)
from axialtrain.data.tissue import check_kept

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Input:
    """An image that has been checked, and what it is stored as.

    head: all that is known of it before its blocks are: none of them, no checksums. reader, why:
    which one reads it, and how that was chosen. level: of its pyramid, that it is made from.
    copied: whether its tiles are. classes: numbers of the names of classes, for polygons.
    labelled: one line on its labels.
    """

    entry: Entry
    how: Sharding
    head: Head
    reader: str
    why: str
    level: int
    copied: bool
    classes: Mapping[str, int] | None
    labelled: str

    @property
    def name(self) -> str:
        return self.head.name

    @property
    def blocks(self) -> int:
        rows, cols = self.head.block_grid
        return rows * cols

    @property
    def tiles(self) -> int:
        rows, cols = self.head.tile_grid
        return rows * cols

    def open_labels(self) -> LabelSource | None:
        """Its labels, None where it has none; to be closed."""
        return _labels(self.entry, self.head, self.how, self.classes)

    def open_instances(self) -> RasterInstances | None:
        """Its instances, None where it has none; to be closed."""
        if self.entry.instances is None:
            return None
        return open_instances(self.entry.instances, self.head.height, self.head.width)


def open_stored(entry: Entry, how: Sharding) -> Reader:
    """The image as it is to be stored, by the tiles of the shards; those it holds as JPEG are
    copied. ValueError, naming the file, for what cannot be."""
    if how.mpp is None:
        image = open_image(entry.image, how.level, how.reader)
    else:
        image = resampled(
            entry.image, how.reader, how.mpp, own_mpp=entry.mpp, tile=how.tile or TILE
        )
    if how.passthrough == "always" and not image.jpeg:
        image.close()
        raise ValueError(
            f"{entry.image}: its tiles cannot be copied: passthrough is always, allowed is auto"
        )
    own = not image.jpeg or how.passthrough == "never"
    if own and (image.jpeg or how.tile not in (None, image.tile)):
        return retiled(image, how.tile or image.tile)
    return image


def check_inputs(
    entries: Sequence[Entry],
    how: Sharding,
    classes: Mapping[str, int] | None = None,
    refused: Callable[[Entry, ValueError], None] | None = None,
) -> list[Input]:
    """Open every image and raster once, so that what is wrong with the last is said before the
    first is stored.

    classes: see `Input`. refused: is told of an image that is left out; None: the first raises its
    ValueError, which names file or key.
    """
    if not entries:
        raise ValueError("images is empty, allowed is at least one path")
    inputs: dict[str, Input] = {}
    for entry in entries:
        try:
            name = image_name(entry.image)
            if name in inputs:
                raise ValueError(
                    f"{entry.image}: would be stored as {name!r}, and so would "
                    f"{inputs[name].entry.image}"
                )
            inputs[name] = _checked(entry, name, how, classes)
        except ValueError as error:
            if refused is None:
                raise
            refused(entry, error)
    found = list(inputs.values())
    _tell_of_mixes(found)
    return found


def _tell_of_mixes(inputs: Sequence[Input]) -> None:
    """Warn of what no run could read as one set."""
    first: dict[str, str] = {}
    for one in inputs:
        first.setdefault(str(one.head.kind), one.name)
    if len(first) > 1:
        kinds = ", ".join(f"{kind} ({name!r})" for kind, name in first.items())
        LOG.warning("images of several kinds: %s; a run reads shards of one kind", kinds)
    for what, has in (
        ("labels", [one.entry.labels is not None for one in inputs]),
        ("instances", [one.entry.instances is not None for one in inputs]),
        ("class", [one.entry.label is not None for one in inputs]),
    ):
        if any(has) and not all(has):
            LOG.warning(
                "%s of %s images have no %s, %r first: a run that needs it refuses the shards",
                has.count(False),
                len(has),
                what,
                inputs[has.index(False)].name,
            )


def _checked(entry: Entry, name: str, how: Sharding, classes: Mapping[str, int] | None) -> Input:
    if entry.instances is not None and len(name) > MAX_NAME_WITH_INSTANCES:
        raise ValueError(
            f"{entry.image}: its name in the shards has {len(name)} characters, allowed with "
            f"instances is {MAX_NAME_WITH_INSTANCES}"
        )
    if entry.group is not None and not NAME.fullmatch(entry.group):
        raise ValueError(f"{entry.image}: group is {entry.group!r}, allowed is {NAME_WORDS}")
    level = how.level
    if how.mpp is not None:
        level, _ = choose_level(entry.image, how.reader, how.mpp, entry.mpp)
    with open_stored(entry, how) as image:
        head = _head_of(image, entry, name, how, level)
        reader, why, copied = image.name, image.why, image.jpeg
    check_kept(entry.image, head.kind, how.keep)
    rows, cols = head.block_grid
    if rows * cols > MAX_BLOCKS:
        raise ValueError(f"{entry.image}: makes {rows * cols} blocks, allowed is {MAX_BLOCKS}")
    labelled = "none"
    labels = _labels(entry, head, how, classes)
    if labels is not None:
        with labels:
            labelled = labels.why
        head = replace(head, classes=0)
    if entry.instances is not None:
        with open_instances(entry.instances, head.height, head.width):
            head = replace(head, instances=0)
    return Input(entry, how, head, reader, why, level, copied, classes, labelled)


def _head_of(image: Reader, entry: Entry, name: str, how: Sharding, level: int) -> Head:
    encoding = image.kind.lossless
    if image.jpeg or (how.encode == "jpeg" and "jpg" in image.kind.encodings):
        encoding = "jpg"
    mpp = image.mpp
    if entry.mpp is not None and how.mpp is None:
        mpp = entry.mpp * image.downsample
    if mpp is not None and not MPP[0] <= mpp <= MPP[1]:
        raise ValueError(
            f"{entry.image}: mpp of what is stored is {mpp:g}, allowed is {MPP[0]:g} to {MPP[1]:g}"
        )
    return Head(
        name=name,
        height=image.height,
        width=image.width,
        tile=image.tile,
        mpp=mpp,
        level=level,
        downsample=image.downsample,
        encoding=encoding,
        classes=None,
        source_sha256="",
        group=entry.group or name,
        blocks=(),
        label=entry.label,
        bands=image.bands,
        dtype=image.dtype,
        crs=image.info.crs,
        transform=image.info.transform,
        block=how.block,
    )


def _labels(
    entry: Entry, head: Head, how: Sharding, classes: Mapping[str, int] | None
) -> LabelSource | None:
    if entry.labels is None:
        return None
    return open_labels(
        Path(entry.labels),
        head.height,
        head.width,
        downsample=head.downsample,
        transform=head.transform,
        crs=head.crs,
        classes=classes,
        background=how.background,
    )
