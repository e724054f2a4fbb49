"""Which bytes of a shard a rectangle of an image takes. Arithmetic on its head; nothing is read."""

from __future__ import annotations

from dataclasses import dataclass

from axialtrain.data.readers import tiles_of
from axialtrain.data.store import BlockEntry, Head
from axialtrain.grid import Rect

GAP = 1 << 18  # bytes between two blocks that are rather read than skipped: a request costs more


@dataclass(frozen=True)
class Fetch:
    """What is fetched for a rectangle of an image.

    blocks: those that it touches, in the shard's order. runs: [start, stop) in the shard, apart
    and in order, which hold them. covered: whether all of it lies in `blocks`.
    """

    blocks: tuple[BlockEntry, ...]
    runs: tuple[tuple[int, int], ...]
    covered: bool

    @property
    def bytes(self) -> int:
        return sum(stop - start for start, stop in self.runs)


def fetch_for(head: Head, rect: Rect, *, gap: int = GAP) -> Fetch:
    """What is fetched for `rect`, in px of the image of `head`; it may reach outside.

    Blocks without a tile are not. gap: bytes between two blocks that are fetched along with them.
    """
    side = head.block * head.tile
    needed = {(r, c) for r, c, _ in tiles_of(rect, head.height, head.width, side)}
    entries = sorted(
        (
            entry
            for place in needed
            if (entry := head.block_at.get(place)) is not None and not head.is_empty(entry)
        ),
        key=lambda entry: entry.offset,
    )
    runs = merge([(entry.offset, entry.offset + entry.length) for entry in entries], gap)
    covered = len(entries) == len(needed) and rect.intersect(head.rect) == rect
    return Fetch(tuple(entries), tuple(runs), covered)


def merge(ranges: list[tuple[int, int]], gap: int = GAP) -> list[tuple[int, int]]:
    """Sorted half-open ranges, those at most `gap` apart joined."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged
