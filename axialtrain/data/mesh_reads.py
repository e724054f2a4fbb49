"""What each rank of a mesh would read of an image, told without reading its pixels.

It is what the loader does: the same split of the tokens, the same blocks and merged ranges. So the
numbers are those that a run of one such sample writes to `reading.json`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from axialtrain.data.checked import shown
from axialtrain.data.region import Shards
from axialtrain.data.store import BlockIndex, Head
from axialtrain.grid import Place, Rect, tokens_across

MAX_RANKS = 4096
_MESH = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")


@dataclass(frozen=True)
class RankReads:
    """Of the rank at mesh coordinates (row, col).

    rect: its part, px of the image. tiles: that it decodes. bytes: that it reads, in `ranges`
    merged ranges. needed: bytes of the tiles that it decodes: of each block, as large a share as it
    decodes of the block's tiles. Labels and tar headers count with their tiles: the sizes of single
    tiles are in no index.
    """

    row: int
    col: int
    rect: Rect
    tiles: int
    bytes: int
    ranges: int
    needed: int


@dataclass(frozen=True)
class MeshReads:
    """Of all ranks of a mesh of `shape` = (rows, cols), in their order.

    window: what is spread over them, px of the image.
    """

    shape: tuple[int, int]
    patch: int
    window: Rect
    ranks: tuple[RankReads, ...]

    @property
    def bytes(self) -> int:
        return sum(rank.bytes for rank in self.ranks)

    @property
    def over_read(self) -> float | None:
        """Bytes read for a byte that is needed; None where none is."""
        needed = sum(rank.needed for rank in self.ranks)
        return self.bytes / needed if needed else None

    @property
    def imbalance(self) -> float | None:
        """The most bytes that a rank reads, over their mean; None where nothing is read."""
        return _imbalance([rank.bytes for rank in self.ranks])

    @property
    def tile_imbalance(self) -> float | None:
        """The most tiles that a rank decodes, over their mean; None where there are none."""
        return _imbalance([rank.tiles for rank in self.ranks])

    def __str__(self) -> str:
        rows, cols = self.shape
        lines = [
            f"mesh {rows}x{cols} of {_px(self.window)}, in tokens of {self.patch} px",
            f"  {'row':>4} {'col':>4}  {'tiles':>8} {'MB':>10} {'ranges':>6}  part",
        ]
        lines += [
            f"  {rank.row:>4} {rank.col:>4}  {rank.tiles:>8} {rank.bytes / 1e6:>10.3f} "
            f"{rank.ranges:>6}  {_px(rank.rect)}"
            for rank in self.ranks
        ]
        lines.append(
            f"  all read {self.bytes / 1e6:.3f} MB, {_times(self.over_read)} the bytes of the "
            f"tiles they need; the most of a rank is {_times(self.imbalance)} the mean in bytes, "
            f"{_times(self.tile_imbalance)} in tiles"
        )
        return "\n".join(lines)


def mesh_of(text: str) -> tuple[int, int]:
    """(rows, cols) of `text`, RxC; ValueError where it is none, or too large."""
    found = _MESH.fullmatch(text)
    shape = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= shape[0] * shape[1] <= MAX_RANKS:
        raise ValueError(
            f"mesh is {shown(text)}, allowed is RxC, like 2x3, of at most {MAX_RANKS} ranks"
        )
    return shape


def mesh_reads(
    shards: Shards,
    name: str,
    shape: tuple[int, int],
    patch: int,
    window: Sequence[int] | None = None,
) -> MeshReads:
    """What the ranks of a mesh of `shape` = (rows, cols) read of the image `name`.

    window: (height, width) in px of the sample at the image's centre, None for the whole image.
    patch: px of a token. Of each block that is touched the index is fetched. ValueError if the
    token grid is smaller than the mesh, and as `Shards.indexes` has it.
    """
    head = shards.head(name)
    height, width = (head.height, head.width) if window is None else (window[0], window[1])
    top, left = max(head.height - height, 0) // 2, max(head.width - width, 0) // 2
    sample = Rect(top, top + height, left, left + width)
    grid = (tokens_across(height, patch), tokens_across(width, patch))
    places = [
        Place(*grid, shape=shape, at=(row, col))
        for row in range(shape[0])
        for col in range(shape[1])
    ]
    touched = shards.fetch_for(head, sample).blocks
    indexes = dict(zip(touched, shards.indexes(name, touched), strict=True))
    ranks = []
    for place in places:
        rect = place.pixels(patch, height, width).shifted(top, left)
        fetch = shards.fetch_for(head, rect)
        tiles = needed = 0
        for entry in fetch.blocks:
            index = indexes[entry]
            some = _tiles_in(head, index, rect)
            tiles += some
            needed += entry.length * some // max(len(index.tiles), 1)
        ranks.append(RankReads(*place.at, rect, tiles, fetch.bytes, len(fetch.runs), needed))
    return MeshReads(shape, patch, sample, tuple(ranks))


def _tiles_in(head: Head, index: BlockIndex, rect: Rect) -> int:
    """How many of the tiles of a block `rect` meets, where the image is."""
    inside, size = rect.intersect(head.rect), head.tile
    rows = range(inside.top // size, -(-inside.bottom // size))
    cols = range(inside.left // size, -(-inside.right // size))
    return sum(1 for tile in index.tiles if tile.row in rows and tile.col in cols)


def _imbalance(values: list[int]) -> float | None:
    return max(values) * len(values) / sum(values) if any(values) else None


def _times(value: float | None) -> str:
    return "no times" if value is None else f"{value:.2f} times"


def _px(rect: Rect) -> str:
    return f"{rect.height} x {rect.width} px from ({rect.top}, {rect.left})"
