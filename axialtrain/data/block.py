"""A block as it was fetched: its tar members, checked, and painted into a rectangle of pixels."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from axialtrain.data.codec import Pixels, decode
from axialtrain.data.store import (
    TAR_RECORD,
    BlockEntry,
    BlockIndex,
    Head,
    Tile,
    block_key,
)
from axialtrain.grid import Rect


@dataclass(frozen=True)
class Member:
    """A file in the tar. offset: of its data in the shard."""

    offset: int
    data: memoryview


@dataclass(frozen=True)
class Block:
    """One block of an image. path: of its shard, for messages."""

    head: Head
    path: str
    index: BlockIndex
    members: dict[str, Member]

    @staticmethod
    def parse(data: memoryview, head: Head, entry: BlockEntry, path: str) -> Block:
        """The block of `entry` from its bytes; ValueError naming shard, offset and member."""
        prefix = f"{block_key(head.name, head.level, entry.row, entry.col)}."
        members = {}
        for name, member in _tar_members(data, path, entry.offset):
            if not name.startswith(prefix):
                raise ValueError(
                    f"{path}: byte {member.offset}: member {name!r} stands there, allowed are "
                    f"members that start with {prefix!r}"
                )
            members[name.removeprefix(prefix)] = member
        if "json" not in members:
            raise ValueError(f"{path}: byte {entry.offset}: block has no member {prefix}json")
        where = f"{path}: byte {members['json'].offset}: member {prefix}json"
        index = BlockIndex.from_json(bytes(members["json"].data), head, entry.row, entry.col, where)
        return Block(head, path, index, members)

    def tiles(self, rect: Rect) -> Iterator[tuple[Tile, Rect, Rect]]:
        """(tile, its rectangle, what it, the image and `rect` have in common) where they meet."""
        for tile in self.index.tiles:
            whole = Rect(tile.row, tile.row + 1, tile.col, tile.col + 1).scaled(self.head.tile)
            part = whole.intersect(self.head.rect).intersect(rect)
            if not part.empty:
                yield tile, whole, part

    def paint_pixels(self, pixels: Pixels, present: NDArray[np.bool_], rect: Rect) -> int:
        """Decode the tiles that `rect` meets into `pixels` and `present`; how many there were."""
        shape = (self.head.tile, self.head.tile, 3)
        count = 0
        for tile, whole, part in self.tiles(rect):
            decoded = self._decode(tile.member, tile.crc32c, shape)
            pixels[part.slices(rect)] = decoded[part.slices(whole)]
            present[part.slices(rect)] = True
            count += 1
        return count

    def paint_labels(self, labels: Pixels, rect: Rect) -> None:
        """Copy the labels that `rect` meets into `labels`; an absent tile has none."""
        if self.index.labels_crc32c is None:
            return
        block = self.head.block_rect(self.index.row, self.index.col)
        shape = (block.height, block.width, 1)
        raster = self._decode("labels.png", self.index.labels_crc32c, shape)[..., 0]
        for _, _, part in self.tiles(rect):
            labels[part.slices(rect)] = raster[part.slices(block)]

    def _decode(self, name: str, crc32c: int, shape: tuple[int, int, int]) -> Pixels:
        key = block_key(self.head.name, self.head.level, self.index.row, self.index.col)
        if name not in self.members:
            raise ValueError(f"{self.path}: member {key}.{name} is missing from its block")
        member = self.members[name]
        where = f"{self.path}: byte {member.offset}: member {key}.{name}"
        data = bytes(member.data)
        if google_crc32c.value(data) != crc32c:
            raise ValueError(f"{where}: is damaged (its CRC-32C is not the stored one)")
        try:
            return decode(data, shape)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _tar_members(data: memoryview, path: str, offset: int) -> Iterator[tuple[str, Member]]:
    """(name, member) of each file in `data`, which starts at byte `offset` of the shard."""
    at = 0
    while at < len(data):
        try:
            header = bytes(data[at : at + TAR_RECORD])
            info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise ValueError(
                f"{path}: byte {offset + at}: no tar header where one belongs ({error})"
            ) from error
        at += TAR_RECORD
        if not info.isreg() or not 0 <= info.size <= len(data) - at:
            raise ValueError(
                f"{path}: byte {offset + at}: member {info.name!r} is no file that ends in its "
                f"block"
            )
        yield info.name, Member(offset + at, data[at : at + info.size])
        at += -(-info.size // TAR_RECORD) * TAR_RECORD
