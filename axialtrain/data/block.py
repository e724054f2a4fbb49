"""A block as it was fetched: its tar members, checked, and painted into a rectangle of pixels.

The block's CRC-32C covers headers, index, tiles and rasters at once, so those of the single members
are compared only to say which of them is damaged. They are stored for other readers, which take
the shards apart without our directory of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

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
    block_key,
    count_classes,
    tile_number,
)
from axialtrain.data.tar import is_file, parse_header, plain_file
from axialtrain.grid import Rect

TileDecoder = Callable[[memoryview], Raster]  # of a stored tile, [tile, tile, bands]

_INDEX = "json"  # the member


@dataclass(frozen=True)
class Block:
    """One block of an image: `entry` of its `head`. path: of its shard, for messages.

    data: its bytes. members: where in them each starts and stops.
    """

    head: Head
    path: str
    entry: BlockEntry
    data: memoryview
    members: dict[str, tuple[int, int]]
    _rasters: dict[str, NDArray[Any]] = field(default_factory=dict, compare=False)

    @staticmethod
    def parse(data: bytes, head: Head, entry: BlockEntry, path: str) -> Block:
        """The block of `entry` from its bytes; ValueError naming shard and offset.

        Where it can be told it names the member, too.
        """
        prefix = f"{block_key(head.name, head.level, entry.row, entry.col)}."
        sound = google_crc32c.value(data) == entry.crc32c
        members = _members(data, prefix, path, entry.offset, sound=sound)
        if _INDEX not in members:
            raise ValueError(f"{path}: byte {entry.offset}: block has no member {prefix}{_INDEX}")
        block = Block(head, path, entry, memoryview(data), members)
        if not sound:
            where = block._damaged() or f"{path}: byte {entry.offset}: block {prefix[:-1]}"
            raise ValueError(f"{where}: is damaged (its CRC-32C is not the stored one)")
        return block

    @cached_property
    def index(self) -> BlockIndex:
        """What its JSON tells; ValueError as `parse` has it. Painting mostly does without: the
        names of the members tell what is stored."""
        where, data = self._where(_INDEX), bytes(self.member(_INDEX))
        return BlockIndex.from_json(data, self.head, self.entry.row, self.entry.col, where)

    def member(self, name: str) -> memoryview:
        """The bytes of the member `name`; KeyError where the block has none."""
        start, stop = self.members[name]
        return self.data[start:stop]

    @property
    def rect(self) -> Rect:
        """Its pixels in the image."""
        return self.head.block_rect(self.entry.row, self.entry.col)

    def tiles(self, rect: Rect) -> Iterator[tuple[int, int, str]]:
        """(row, col, member) of the stored tiles that `rect` meets, by rows."""
        size, side, names = self.head.tile, self.head.block, self.head.tile_members
        meet, members, empty = self.rect.intersect(rect), self.members, self.entry.empty
        if not self._is_told:
            _ = self.index  # damage of it must not depend on what of the block is asked for
        for row in range(meet.top // size, -(-meet.bottom // size)):
            for col in range(meet.left // size, -(-meet.right // size)):
                number = tile_number(row, col, side)
                # What is neither a member nor empty, as the head has it, is told by the index:
                # older heads do not say what is empty. What it lists then is missing.
                if names[number] in members or (
                    number not in empty and self._is_listed(names[number])
                ):
                    yield row, col, names[number]

    def is_whole(self, rect: Rect, tiles: Sequence[tuple[int, int, str]]) -> bool:
        """Whether all its pixels in `rect` are there; tiles: those that `rect` meets."""
        size, meet = self.head.tile, self.rect.intersect(rect)
        rows = -(-meet.bottom // size) - meet.top // size
        cols = -(-meet.right // size) - meet.left // size
        return self.mask is None and len(tiles) == rows * cols

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """Which of the block's pixels are there, [h, w]; None: all those of its tiles."""
        if not self.head.masked or MASK not in self.members:
            return None
        return self._once(MASK, lambda data: decode_mask(data, self.rect))

    @property
    def labels(self) -> Pixels:
        """The block's label raster, uint8 [h, w]; only where the image has labels."""
        return self._once(LABELS, lambda data: decode_labels(data, self.head, self.rect))

    @property
    def instances(self) -> Instances:
        """The block's instance raster, uint16 [h, w]; only where the image has instances."""
        return self._once(INSTANCES, lambda data: decode_numbers(data, self.head, self.rect))

    def _once(self, name: str, decoded: Callable[[bytes], NDArray[Any]]) -> NDArray[Any]:
        """The raster in the member `name`, decoded once. (functools.cached_property has one lock
        for all blocks before Python 3.12: threads would decode one after the other.)"""
        if name not in self._rasters:
            self._rasters[name] = self._decoded(name, lambda data: decoded(bytes(data)))
        return self._rasters[name]

    def paint_pixels(
        self,
        pixels: Raster,
        present: NDArray[np.bool_] | None,
        rect: Rect,
        tiles: Sequence[tuple[int, int, str]],
        decode: TileDecoder,
        *,
        damaged: list[Damage] | None = None,
    ) -> int:
        """Decode `tiles`, which `rect` meets, into `pixels` and `present`; how many they were.

        All of both is set where there is a tile, to 0 where a mask leaves something out. present:
        None where `is_whole`, and it need not be told. damaged: where tiles that cannot be decoded
        are noted, which count as missing, and not with None for present; None: they are raised.
        """
        count, meet = 0, self.rect.intersect(rect)
        down = _cuts(meet.top, meet.bottom, rect.top, self.head.tile)
        across = _cuts(meet.left, meet.right, rect.left, self.head.tile)
        for row, col, member in tiles:
            (y, of_y), (x, of_x) = down[row], across[col]
            there: NDArray[np.bool_] | bool = True
            try:
                decoded = self._decoded(member, decode)
                if self.head.masked and present is not None:
                    part = Rect(y.start, y.stop, x.start, x.stop)
                    there = self._present(part.shifted(rect.top, rect.left))
            except ValueError as error:
                if damaged is None or present is None:
                    raise
                damaged.append(Damage(self.head.name, "tile", row, col, 1, str(error)))
                pixels[y, x], present[y, x] = 0, False
                continue
            if present is not None:
                present[y, x] = there
            if isinstance(there, bool):
                pixels[y, x] = decoded[of_y, of_x]
            else:  # a copy under a mask takes ten times as long
                pixels[y, x] = 0
                np.copyto(pixels[y, x], decoded[of_y, of_x], where=there[..., None])
            count += 1
        return count

    def paint_present(self, present: NDArray[np.bool_], rect: Rect) -> None:
        """Set `present` where `rect` meets a pixel; no tile is decoded for it."""
        for part in self._parts(rect):
            present[part.slices(rect)] = self._present(part)

    def paint_labels(self, labels: Pixels, rect: Rect) -> None:
        """Copy the labels that `rect` meets into `labels`; an absent tile has none."""
        if self.head.classes is not None:
            self._copy(self.labels, labels, rect)

    def paint_instances(self, instances: Instances, rect: Rect) -> None:
        """Copy the instances that `rect` meets into `instances`; an absent tile has none."""
        if self.head.instances is not None:
            self._copy(self.instances, instances, rect)

    def _copy(self, raster: NDArray[Any], out: NDArray[Any], rect: Rect) -> None:
        """What `rect` meets of the block's `raster` into `out`, where there are pixels."""
        for part in self._parts(rect):
            np.copyto(
                out[part.slices(rect)], raster[part.slices(self.rect)], where=self._present(part)
            )

    def _parts(self, rect: Rect) -> Iterator[Rect]:
        """What the stored tiles, the image and `rect` have in common."""
        meet = self.rect.intersect(rect)
        for row, col, _ in self.tiles(rect):
            yield Rect(row, row + 1, col, col + 1).scaled(self.head.tile).intersect(meet)

    def _present(self, part: Rect) -> NDArray[np.bool_] | bool:
        """Which pixels of `part`, which lies in a stored tile, are there."""
        return True if self.mask is None else self.mask[part.slices(self.rect)]

    @property
    def _is_told(self) -> bool:
        """Whether the head and the members tell of each tile whether it is stored."""
        rows, cols = self.head.tiles_of_block(self.entry.row, self.entry.col)
        beside = sum(name in self.members for name in (_INDEX, LABELS, INSTANCES, MASK))
        stored = len(self.members) - beside
        return stored + len(self.entry.empty) == (rows[1] - rows[0]) * (cols[1] - cols[0])

    def _is_listed(self, member: str) -> bool:
        """Whether the index has the tile of that name."""
        return any(tile.member == member for tile in self.index.tiles)

    def _damaged(self) -> str | None:
        """Where the first member is whose CRC-32C is not the one in the index."""
        stored = {tile.member: tile.crc32c for tile in self.index.tiles}
        stored |= self.index.rasters
        for name in self.members:
            if name in stored and google_crc32c.value(bytes(self.member(name))) != stored[name]:
                return self._where(name)
        return None

    def _decoded(self, name: str, decoder: Callable[[memoryview], NDArray[Any]]) -> NDArray[Any]:
        """What the member `name` holds; where it proves wrong, the error says where it lies."""
        lies = self.members.get(name)
        if lies is None:
            raise ValueError(f"{self.path}: member {self._key}.{name} is missing from its block")
        try:
            return decoder(self.data[lies[0] : lies[1]])
        except ValueError as error:
            raise ValueError(f"{self._where(name)}: {error}") from error

    @property
    def _key(self) -> str:
        return block_key(self.head.name, self.head.level, self.entry.row, self.entry.col)

    def _where(self, name: str) -> str:
        at = self.entry.offset + self.members[name][0]
        return f"{self.path}: byte {at}: member {self._key}.{name}"


def _cuts(start: int, stop: int, origin: int, size: int) -> dict[int, tuple[slice, slice]]:
    """Of the tiles of `size` px that start..stop meets, by their number: where what they have in
    common lies in an array that begins at `origin`, and where in the tile."""
    found = {}
    for number in range(start // size, -(-stop // size)):
        at = number * size
        low, high = max(at, start), min(at + size, stop)
        found[number] = slice(low - origin, high - origin), slice(low - at, high - at)
    return found


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


def tile_decoder(head: Head) -> TileDecoder:
    """Decodes the tiles of an image, one after the other: what it gives may be the same memory."""
    if head.encoding == "jpg":
        return JpegTiles(head.tile, head.bands)
    return lambda data: decode_tile(bytes(data), head)


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


def _members(
    data: bytes, prefix: str, path: str, offset: int, *, sound: bool
) -> dict[str, tuple[int, int]]:
    """Where in `data`, which starts at byte `offset` of the shard, each file starts and stops, by
    its name behind `prefix`, which all have. sound: see `plain_file`."""
    found: dict[str, tuple[int, int]] = {}
    end, at = len(data), 0
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
        if not name.startswith(prefix):
            raise ValueError(
                f"{path}: byte {offset + at}: member {name!r} stands there, allowed are members "
                f"that start with {prefix!r}"
            )
        found[name[len(prefix) :]] = at, at + size
        at += -(-size // TAR_RECORD) * TAR_RECORD
    return found
