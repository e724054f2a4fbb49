"""A block as it was fetched: its tar members, checked, and painted into a rectangle of pixels.

The block's CRC-32C covers headers, index, tiles and rasters at once, so those of the single members
are compared only to say which of them is damaged. They are stored for other readers, which take
the shards apart without our directory of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from axialtrain.data.codec import Instances, JpegTiles, Pixels, decode, decode_instances
from axialtrain.data.damage import Damage
from axialtrain.data.kinds import Raster
from axialtrain.data.store import (
    INSTANCES,
    LABELS,
    MANIFEST,
    MASK,
    TAR_RECORD,
    BlockEntry,
    BlockIndex,
    Head,
    Tile,
    block_key,
    count_classes,
)
from axialtrain.data.tar import is_file, parse_header, plain_file
from axialtrain.grid import Rect


class Member(NamedTuple):
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
    _rasters: dict[str, NDArray[Any]] = field(default_factory=dict, compare=False)

    @staticmethod
    def parse(data: bytes, head: Head, entry: BlockEntry, path: str) -> Block:
        """The block of `entry` from its bytes; ValueError naming shard and offset.

        Where it can be told it names the member, too.
        """
        prefix = f"{block_key(head.name, head.level, entry.row, entry.col)}."
        sound = google_crc32c.value(data) == entry.crc32c
        members = {}
        for name, member in _tar_members(data, path, entry.offset, sound=sound):
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
        block = Block(head, path, index, members)
        if not sound:
            where = block._damaged() or f"{path}: byte {entry.offset}: block {prefix[:-1]}"
            raise ValueError(f"{where}: is damaged (its CRC-32C is not the stored one)")
        return block

    def tiles(self, rect: Rect) -> Iterator[tuple[Tile, Rect, Rect]]:
        """(tile, its rectangle, what it, the image and `rect` have in common) where they meet."""
        return tiles_in(self.head, self.index, rect)

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """Which of the block's pixels are there, [h, w]; None: all those of its tiles."""
        if self.index.mask_crc32c is None:
            return None
        return self._once(MASK, lambda data: decode_mask(data, self._rect))

    @property
    def labels(self) -> Pixels:
        """The block's label raster, uint8 [h, w]; only where the image has labels."""
        return self._once(LABELS, lambda data: decode_labels(data, self.head, self._rect))

    @property
    def instances(self) -> Instances:
        """The block's instance raster, uint16 [h, w]; only where the image has instances."""
        return self._once(INSTANCES, lambda data: decode_numbers(data, self.head, self._rect))

    def _once(self, name: str, decoded: Callable[[bytes], NDArray[Any]]) -> NDArray[Any]:
        """The raster in the member `name`, decoded once. (functools.cached_property has one lock
        for all blocks before Python 3.12: threads would decode one after the other.)"""
        if name not in self._rasters:
            self._rasters[name] = self._decoded(name, decoded)
        return self._rasters[name]

    def paint_pixels(
        self,
        pixels: Raster,
        present: NDArray[np.bool_],
        rect: Rect,
        tiles: Sequence[tuple[Tile, Rect, Rect]],
        *,
        covered: bool = False,
        damaged: list[Damage] | None = None,
    ) -> int:
        """Decode `tiles`, those that `rect` meets, into `pixels` and `present`; how many there are.

        All of both is set where there is a tile, to 0 where a mask leaves something out. covered:
        whether all of `present` is true already. damaged: where tiles that cannot be decoded are
        noted, which count as missing; None: they are raised.
        """
        count = 0
        decoder: Callable[[bytes], Raster] = partial(decode_tile, head=self.head)
        if self.head.encoding == "jpg":
            decoder = JpegTiles(self.head.tile, self.head.bands)
        for tile, whole, part in tiles:
            here = part.slices(rect)
            try:
                decoded = self._decoded(tile.member, decoder)
                there = self._present(part)
            except ValueError as error:
                if damaged is None:
                    raise
                name = self.head.name
                damaged.append(Damage(name, "tile", tile.row, tile.col, 1, str(error)))
                pixels[here], present[here] = 0, False
                continue
            found = decoded if part is whole else decoded[part.slices(whole)]
            if isinstance(there, bool):
                if not covered:
                    present[here] = there
                pixels[here] = found
            else:  # a copy under a mask takes ten times as long
                present[here], pixels[here] = there, 0
                np.copyto(pixels[here], found, where=there[..., None])
            count += 1
        return count

    def paint_present(self, present: NDArray[np.bool_], rect: Rect) -> None:
        """Set `present` where `rect` meets a pixel; no tile is decoded for it."""
        for _, _, part in self.tiles(rect):
            present[part.slices(rect)] = self._present(part)

    def paint_labels(self, labels: Pixels, rect: Rect) -> None:
        """Copy the labels that `rect` meets into `labels`; an absent tile has none."""
        if self.head.classes is not None:
            self._copy(self.labels, labels, rect)

    def paint_instances(self, instances: Instances, rect: Rect) -> None:
        """Copy the instances that `rect` meets into `instances`; an absent tile has none."""
        if self.head.instances is not None:
            self._copy(self.instances, instances, rect)

    @property
    def _rect(self) -> Rect:
        return self.head.block_rect(self.index.row, self.index.col)

    def _copy(self, raster: NDArray[Any], out: NDArray[Any], rect: Rect) -> None:
        """What `rect` meets of the block's `raster` into `out`, where there are pixels."""
        for _, _, part in self.tiles(rect):
            np.copyto(
                out[part.slices(rect)], raster[part.slices(self._rect)], where=self._present(part)
            )

    def _present(self, part: Rect) -> NDArray[np.bool_] | bool:
        """Which pixels of `part`, which lies in a stored tile, are there."""
        return True if self.mask is None else self.mask[part.slices(self._rect)]

    def _damaged(self) -> str | None:
        """Where the first member is whose CRC-32C is not the one in the index."""
        stored = {tile.member: tile.crc32c for tile in self.index.tiles}
        stored |= self.index.rasters
        for name, member in self.members.items():
            if name in stored and google_crc32c.value(bytes(member.data)) != stored[name]:
                return self._where(name)
        return None

    def _decoded(self, name: str, decoder: Callable[[bytes], NDArray[Any]]) -> NDArray[Any]:
        """What the member `name` holds; where it proves wrong, the error says where it lies."""
        if name not in self.members:
            key = block_key(self.head.name, self.head.level, self.index.row, self.index.col)
            raise ValueError(f"{self.path}: member {key}.{name} is missing from its block")
        try:
            return decoder(bytes(self.members[name].data))
        except ValueError as error:
            raise ValueError(f"{self._where(name)}: {error}") from error

    def _where(self, name: str) -> str:
        key = block_key(self.head.name, self.head.level, self.index.row, self.index.col)
        return f"{self.path}: byte {self.members[name].offset}: member {key}.{name}"


def tiles_in(head: Head, index: BlockIndex, rect: Rect) -> Iterator[tuple[Tile, Rect, Rect]]:
    """(tile, its rectangle, what it, the image and `rect` have in common) where they meet.

    A tile that lies in them has itself in common with them: the same object, so that it is known.
    """
    inside, size = rect.intersect(head.rect), head.tile
    top, bottom = inside.top // size, -(-inside.bottom // size)
    left, right = inside.left // size, -(-inside.right // size)
    for tile in index.tiles:
        if not (top <= tile.row < bottom and left <= tile.col < right):
            continue
        y, x = tile.row * size, tile.col * size
        whole = part = Rect(y, y + size, x, x + size)
        if (
            y < inside.top
            or x < inside.left
            or whole.bottom > inside.bottom
            or whole.right > inside.right
        ):
            part = whole.intersect(inside)
        yield tile, whole, part


def index_at_end(data: bytes, head: Head, entry: BlockEntry, path: str) -> BlockIndex | None:
    """The index of the block of `entry` from the last bytes of it; None where it is not in them.

    Only the rasters lie behind the index. It is held to no checksum: that is one of all the bytes.
    """
    name = f"{block_key(head.name, head.level, entry.row, entry.col)}.json"
    for at in range(len(data) % TAR_RECORD, len(data), TAR_RECORD):
        if not data.startswith(f"{name}\0".encode(), at):
            continue
        where = f"{path}: byte {entry.offset + entry.length - len(data) + at}: member {name}"
        start = at + TAR_RECORD
        try:
            info = parse_header(data[at:start])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not is_file(info, len(data) - start):
            raise ValueError(f"{where}: is no file that ends in its block")
        return BlockIndex.from_json(
            data[start : start + info.size], head, entry.row, entry.col, where
        )
    return None


def decode_tile(data: bytes, head: Head) -> Raster:
    """A tile of the image of `head`, [tile, tile, bands] of its dtype."""
    pixels = decode(data, (head.tile, head.tile, head.bands), head.dtype)
    if head.dtype == "float32" and not np.isfinite(pixels).all():
        raise ValueError("holds numbers that are not finite")
    return pixels


def decode_mask(data: bytes, block: Rect) -> NDArray[np.bool_]:
    """The mask of the block that covers `block` (px), [h, w]."""
    mask = decode(data, (block.height, block.width, 1))[..., 0]
    if not np.isin(mask, (0, 255)).all():
        raise ValueError("holds other values than 0 and 255")
    return mask == 255


def decode_labels(data: bytes, head: Head, block: Rect) -> Pixels:
    """The label raster of the block that covers `block` (px), uint8 [h, w]."""
    raster = decode(data, (block.height, block.width, 1))[..., 0]
    if head.classes is None or count_classes(raster) > head.classes:
        raise ValueError(
            f"has label {count_classes(raster) - 1}, allowed is below the {head.classes} classes "
            f"in {MANIFEST}"
        )
    return raster


def decode_numbers(data: bytes, head: Head, block: Rect) -> Instances:
    """The instance raster of the block that covers `block` (px), uint16 [h, w]."""
    raster = decode_instances(data, (block.height, block.width))
    if head.instances is None or raster.max() > head.instances:
        raise ValueError(
            f"has instance {raster.max()}, allowed is up to the {head.instances} in {MANIFEST}"
        )
    return raster


def _tar_members(
    data: bytes, path: str, offset: int, *, sound: bool
) -> Iterator[tuple[str, Member]]:
    """(name, member) of each file in `data`, which starts at byte `offset` of the shard.

    sound: see `plain_file`.
    """
    view, end, at = memoryview(data), len(data), 0
    while at < end:
        plain = plain_file(data, at, sound=sound)
        at += TAR_RECORD
        if plain is not None and plain[1] <= end - at:
            name, size = plain
        else:
            try:
                info = parse_header(data[at - TAR_RECORD : at])
            except ValueError as error:
                raise ValueError(f"{path}: byte {offset + at - TAR_RECORD}: {error}") from error
            name, size = info.name, info.size
            if not is_file(info, end - at):
                raise ValueError(
                    f"{path}: byte {offset + at}: member {name!r} is no file that ends in its block"
                )
        yield name, Member(offset + at, view[at : at + size])
        at += -(-size // TAR_RECORD) * TAR_RECORD
