"""Where a block lies, and what its head tells of its tiles: an entry of a head."""

from __future__ import annotations

import re
from dataclasses import dataclass

from axialtrain.data.checked import Record
from axialtrain.data.manifest import TAR_RECORD, UNLABELLED

CRC_MAX = 0xFFFFFFFF
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """Where a block lies in its shard: bytes [offset, offset + length), headers included.

    empty: numbers, in the block, of the tiles of the image that are not stored; in shards of before
    they were recorded, of none. labelled: how many pixels of each class its stored tiles have, as
    `labelled.written` has it; None without labels, in shards of before it was recorded, and
    where the head would be too large with it.
    """

    row: int
    col: int
    offset: int
    length: int
    crc32c: int
    empty: tuple[int, ...] = ()
    labelled: str | None = None


def entry_of(
    item: Record, grid: tuple[int, int], most: int, shard_bytes: int, block: int
) -> BlockEntry:
    """Check `item` as the entry of a block of `grid`, (rows, cols), with `block` tiles on a side.

    most: bytes of a block. shard_bytes: of its shard.
    """
    length = item.integer("length", TAR_RECORD, most)
    return BlockEntry(
        row=item.integer("row", 0, grid[0] - 1),
        col=item.integer("col", 0, grid[1] - 1),
        offset=item.integer("offset", 0, shard_bytes - length),
        length=length,
        crc32c=item.integer("crc32c", 0, CRC_MAX),
        empty=_empty(item, block * block) if "empty" in item.values else (),
        labelled=_labelled(item, block * block),
    )


def _empty(item: Record, most: int) -> tuple[int, ...]:
    numbers: list[int] = []
    for number in item.items("empty", most):
        least = numbers[-1] + 1 if numbers else 0
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number < most:
            raise item.wrong("empty", f"numbers from 0 to {most - 1}, each larger than the last")
        numbers.append(number)
    return tuple(numbers)


def _labelled(item: Record, tiles: int) -> str | None:
    if item.values.get("labelled") is None:
        return None
    text = item.text("labelled", _BASE64, "text in base64")
    # 6 bytes for each class in each tile, and what deflating may add.
    if len(text) > (most := 8 * UNLABELLED * tiles + 256):
        raise item.wrong("labelled", f"at most {most} characters")
    return text
