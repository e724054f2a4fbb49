"""Single tiles of shards: which are stored, and reading them while their blocks are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from axialtrain.data.block import Block
from axialtrain.data.damage import Damage
from axialtrain.data.painting import Region, block_damage, painted
from axialtrain.data.region import Shards
from axialtrain.data.store import BlockEntry, Head
from axialtrain.grid import Rect


@dataclass(frozen=True)
class TilePlace:
    """Where a stored tile lies. row, col: of the image's tile grid. rect: px, as it is stored; it
    reaches outside the image where the border cuts the tile."""

    image: str
    row: int
    col: int
    level: int
    rect: Rect


class StoredTiles:
    """All tiles of a folder of shards, numbered in the order in which they are stored.

    counts: int64 [blocks], the tiles of each block that has any. All heads are fetched for it,
    once. In shards of before empty tiles were recorded those are counted, too, and are read as
    missing pixels. ValueError as `Shards.head` has it, and if not a tile is stored.
    """

    def __init__(self, shards: Shards) -> None:
        image: list[int] = []
        entry: list[int] = []
        held: list[int] = []  # a bit for each tile number
        sizes: list[int] = []  # px, of the tiles of each block
        for index, row in enumerate(shards.images):
            head = shards.head(row.name)
            for at in sorted(range(len(head.blocks)), key=lambda i: head.blocks[i].offset):
                if bits := _held(head, head.blocks[at]):
                    image.append(index)
                    entry.append(at)
                    held.append(bits)
                    sizes.append(head.tile)
        if not held:
            raise ValueError(f"{shards.images[0].name} and all others: not a tile is stored")
        self._image, self._entry = np.array(image, np.int32), np.array(entry, np.int32)
        self._sizes = np.array(sizes, np.int32)
        self._held = np.array(held, np.uint64)
        self.counts = np.array([bits.bit_count() for bits in held], np.int64)
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def of_each_size(self) -> list[int]:
        """A tile of each size, px, that there is."""
        _, first = np.unique(self._sizes, return_index=True)
        return [int(self._ends[at] - self.counts[at]) for at in first]

    def place(self, number: int, shards: Shards) -> TilePlace:
        """Of tile `number`, in the same shards: its image's head is asked for."""
        if not 0 <= number < len(self):
            raise IndexError(f"tile is {number}, allowed is 0 to {len(self) - 1}")
        at = int(np.searchsorted(self._ends, number, side="right"))
        bits = int(self._held[at])
        for _ in range(number - int(self._ends[at] - self.counts[at])):
            bits &= bits - 1  # without its lowest bit
        inside = (bits & -bits).bit_length() - 1
        head = shards.head(shards.images[self._image[at]].name)
        block = head.blocks[self._entry[at]]
        row = block.row * head.block + inside // head.block
        col = block.col * head.block + inside % head.block
        rect = Rect(row, row + 1, col, col + 1).scaled(head.tile)
        return TilePlace(head.name, row, col, head.level, rect)


def _held(head: Head, entry: BlockEntry) -> int:
    bits = sum(1 << number for number in head.numbers_of(entry.row, entry.col))
    return bits & ~sum(1 << number for number in entry.empty)


class TileReader:
    """Reads single tiles; the blocks that were read last are kept. Safe for several threads.

    keep: how many blocks.
    """

    def __init__(self, shards: Shards, keep: int) -> None:
        self._shards = shards
        self._keep = keep
        self._blocks: OrderedDict[tuple[str, int, int], Future[Block]] = OrderedDict()
        self._lock = threading.Lock()

    def region(self, name: str, rect: Rect, *, spare: bool = False) -> Region:
        """As `Shards.region`, of a rectangle that lies in one block, but for what hangs over the
        image's border. bytes_read: 0 where its block was kept."""
        damaged: list[Damage] | None = [] if spare else None
        try:
            head = self._shards.head(name)
        except ValueError as error:
            if damaged is None:
                raise
            damaged.append(Damage(name, "image", 0, 0, 0, str(error)))
            return painted(self._shards.row(name), rect, [], damaged=damaged)
        side = head.block * head.tile
        key = (name, rect.top // side, rect.left // side)
        entry = head.block_at[key[1:]]
        try:
            block, bytes_read = self._block(key, entry)
        except ValueError as error:
            if damaged is None:
                raise
            damaged.append(block_damage(head, entry, error))
            return painted(head, rect, [], damaged=damaged)
        return replace(painted(head, rect, [block], damaged=damaged), bytes_read=bytes_read)

    def _block(self, key: tuple[str, int, int], entry: BlockEntry) -> tuple[Block, int]:
        """The block, and how many bytes were read for it."""
        with self._lock:
            found = self._blocks.get(key)
            mine: Future[Block] = Future()
            self._blocks[key] = found or mine
            self._blocks.move_to_end(key)
            while len(self._blocks) > self._keep:
                self._blocks.popitem(last=False)
        if found is not None:
            return found.result(), 0
        try:
            mine.set_result(self._shards.block(key[0], entry))
        except BaseException as error:
            with self._lock:  # it may pass: the next one tries again
                self._blocks.pop(key, None)
            mine.set_exception(error)
            raise
        return mine.result(), entry.length
