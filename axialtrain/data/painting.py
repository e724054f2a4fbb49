"""What blocks of an image hold, painted into a rectangle of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.block import Block, TileDecoder, tile_decoder
from axialtrain.data.codec import Instances, Pixels
from axialtrain.data.damage import Damage
from axialtrain.data.kinds import Raster
from axialtrain.data.store import UNLABELLED, BlockEntry, Head, ImageRow
from axialtrain.grid import Rect


@dataclass(frozen=True)
class Region:
    """A rectangle of an image.

    pixels: [h, w, bands] of the image's dtype, 0 where missing. labels: uint8 [h, w], 255 where
    missing or no target; None where the image has none. instances: uint16 [h, w], 0 where missing
    or none; None where the image has no raster of them. bytes_read, tiles_decoded: what it took.
    damaged: what was left out, as missing. _present: see `present`; None where all of it is true.
    """

    pixels: Raster
    labels: Pixels | None
    instances: Instances | None
    _present: NDArray[np.bool_] | None
    bytes_read: int
    tiles_decoded: int
    damaged: tuple[Damage, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether all of `present` is known to be true, without writing it."""
        return self._present is None

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """bool [h, w], false outside the image, in tiles that its source leaves out, and in pixels
        that hold no data. Mostly all is true: it is written when it is first asked for."""
        if self._present is None:
            return np.ones(self.pixels.shape[:2], np.bool_)
        return self._present


@contextmanager
def _spared(block: Block, part: str, damaged: list[Damage] | None) -> Iterator[None]:
    """Note in `damaged`, unless it is None, that this raster of the block cannot be read."""
    try:
        yield
    except ValueError as error:
        if damaged is None:
            raise
        entry, name = block.entry, block.head.name
        damaged.append(Damage(name, part, entry.row, entry.col, 0, str(error)))


def painted(
    image: ImageRow | Head,
    rect: Rect,
    blocks: Iterable[Block],
    *,
    covered: bool = False,
    rasters: bool = True,
    damaged: list[Damage] | None = None,
) -> Region:
    """`rect` of the image from the blocks that it touches; bytes_read is left 0.

    covered: whether they cover all of it, so that zeros below them, and what is present, would
    mostly be written for nothing; not with `damaged`. rasters: labels, instances, too. damaged:
    what is left out already, to which what cannot be decoded is added; None: it is raised.
    """
    size = (rect.height, rect.width)
    pixels = (np.empty if covered else np.zeros)((*size, image.bands), image.kind.numpy)
    present = None if covered else np.zeros(size, np.bool_)
    labels = instances = None
    if rasters and image.classes is not None:
        labels = np.full(size, UNLABELLED, np.uint8)
    if rasters and image.instances is not None:
        instances = np.zeros(size, np.uint16)
    decoded = 0
    decode: TileDecoder | None = None
    for block in blocks:
        decode = decode or tile_decoder(block.head)
        try:
            tiles, _ = list(block.tiles(rect)), block.mask
        except ValueError as error:
            if damaged is None:
                raise
            damaged.append(block_damage(block.head, block.entry, error))
            continue
        if covered and not block.is_whole(rect, tiles):
            present = np.ones(size, np.bool_) if present is None else present
            here = block.rect.intersect(rect).slices(rect)
            pixels[here], present[here] = 0, False
        decoded += block.paint_pixels(pixels, present, rect, tiles, decode, damaged=damaged)
        if labels is not None:
            with _spared(block, "labels", damaged):
                block.paint_labels(labels, rect)
        if instances is not None:
            with _spared(block, "instances", damaged):
                block.paint_instances(instances, rect)
    if damaged and present is not None:
        # A tile's rasters lie elsewhere than its pixels, and may be whole.
        if labels is not None:
            labels[~present] = UNLABELLED
        if instances is not None:
            instances[~present] = 0
    return Region(pixels, labels, instances, present, 0, decoded, tuple(damaged or ()))


def block_damage(head: Head, entry: BlockEntry, error: ValueError) -> Damage:
    """All of a block, for what is wrong with it."""
    stored = len(head.numbers_of(entry.row, entry.col)) - len(entry.empty)
    return Damage(head.name, "block", entry.row, entry.col, stored, str(error))
