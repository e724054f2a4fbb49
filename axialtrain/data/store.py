"""The format of the shards: names, the order of blocks, and the three JSON records.

A folder of plain WebDataset tars and one `manifest.json`. An image is a run of samples in one tar:

    {image}/{level}/{row:05d}_{col:05d}    one block of 8 x 8 tiles, along a Hilbert curve
        .00.jpg ... .63.jpg                its tiles, number = row in the block * 8 + column
        .json                              which tiles are there, CRC-32C of each   -> BlockIndex
        .labels.png                        its label raster, cut at the image's border
        .instances.png                     its instance raster, likewise
        .mask.png                          255 for each pixel, 0 for each missing one, if any is
    {image}/head                           the last sample
        .json                              size, class, where each block lies       -> Head
        .thumbnail.jpg

The manifest has one row per image and is all that is loaded for a whole data set; a head is
fetched when its image is first read. Whatever comes from disk is checked before it is used:
wrong values raise a ValueError that names file, key and value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import Record, shown
from axialtrain.data.entry import CRC_MAX, BlockEntry, entry_of
from axialtrain.data.georeference import georeference_of
from axialtrain.data.kinds import MAX_TILE_PIXELS_BYTES, Kind
from axialtrain.data.manifest import (  # noqa: F401 (they are part of the format)
    FORMAT_VERSION,
    MAX_BYTES,
    MAX_HEAD_BYTES,
    MAX_IMAGES,
    MAX_INSTANCE,
    MAX_LABEL,
    MAX_SIDE,
    SHA256,
    SHA256_WORDS,
    TAR_RECORD,
    UNLABELLED,
    ImageRow,
    Manifest,
)
from axialtrain.data.names import (  # noqa: F401 (they are part of the format)
    BLOCK,
    BLOCKS,
    INSTANCES,
    LABELS,
    MASK,
    MAX_LEVEL,
    MAX_NAME,
    MAX_NAME_WITH_INSTANCES,
    NAME,
    NAME_WORDS,
    block_key,
    head_key,
    image_name,
    is_shard_name,
    shard_name,
    tile_member,
    tile_number,
)
from axialtrain.data.records import absent_or, check_apart, dump, fields_of
from axialtrain.grid import Rect

MANIFEST = "manifest.json"

MIN_TILE, MAX_TILE = 16, 2048  # px
MAX_BLOCKS = 1 << 20  # of an image
MAX_MANIFEST_BYTES = 1 << 30

ENCODINGS = ("jpg", "png", "tif")
_ENCODING = re.compile("|".join(ENCODINGS))


def max_tile_bytes(tile: int, kind: Kind = Kind()) -> int:  # noqa: B008 (it is frozen)
    """The most that an encoded tile may take: far more than any sane encoder needs."""
    return tile * tile * kind.pixel_bytes * 2 + (1 << 16)


def max_block_bytes(
    tile: int,
    kind: Kind = Kind(),  # noqa: B008
    *,
    instances: bool,
    masked: bool = False,
    block: int = BLOCK,
) -> int:
    """The most that a block may take, labels, index and tar headers included."""
    rasters = tile * tile * (2 + 4 * instances + 2 * masked)  # twice what they take in memory
    return block * block * (max_tile_bytes(tile, kind) + rasters + 2 * TAR_RECORD) + (1 << 20)


def count_classes(labels: NDArray[np.uint8]) -> int:
    """The largest label + 1; 0 where all is unlabelled."""
    return int((labels + np.uint8(1)).max())  # UNLABELLED, 255, becomes 0


@dataclass(frozen=True)
class Tile:
    """A stored tile. row, col: of the image's tile grid; member: its name within the sample."""

    row: int
    col: int
    member: str
    crc32c: int


@dataclass(frozen=True)
class BlockIndex:
    """The JSON of a block.

    labels_crc32c, instances_crc32c: of `labels.png` and `instances.png`, None where the image has
    no such raster. mask_crc32c: of `mask.png`, None where no pixel of the block's tiles is missing.
    """

    row: int
    col: int
    tiles: tuple[Tile, ...]
    labels_crc32c: int | None
    instances_crc32c: int | None = None
    mask_crc32c: int | None = None

    @property
    def rasters(self) -> dict[str, int]:
        """The members beside tiles and index that the block has, and their CRC-32C."""
        found = {
            LABELS: self.labels_crc32c,
            INSTANCES: self.instances_crc32c,
            MASK: self.mask_crc32c,
        }
        return {name: crc for name, crc in found.items() if crc is not None}

    def to_json(self) -> bytes:
        return dump(fields_of(self))

    @staticmethod
    def from_json(data: bytes, head: Head, row: int, col: int, where: str) -> BlockIndex:
        """Check `data` as the index of block (row, col) of the image of `head`."""
        record = Record.parse(data, where)
        record.integer("row", row, row)
        record.integer("col", col, col)
        rows, cols = head.tiles_of_block(row, col)
        tiles: dict[tuple[int, int], Tile] = {}
        for number, item in enumerate(record.items("tiles", head.block * head.block)):
            at = f"{where}: tiles[{number}]"
            tile = _tile(item, at, rows, cols, head)
            if (tile.row, tile.col) in tiles:
                raise ValueError(f"{at}: tile row={tile.row} col={tile.col} stands there twice")
            tiles[tile.row, tile.col] = tile
        labels = instances = None
        if head.classes is not None:
            labels = record.integer("labels_crc32c", 0, CRC_MAX)
        if head.instances is not None:
            instances = record.integer("instances_crc32c", 0, CRC_MAX)
        mask = absent_or(record, "mask_crc32c", CRC_MAX) if head.masked else None
        return BlockIndex(row, col, tuple(tiles.values()), labels, instances, mask)


def _tile(
    item: object, where: str, rows: tuple[int, int], cols: tuple[int, int], head: Head
) -> Tile:
    """The tile, within rows and cols, that `item` of a block's index tells of.

    A Record, which says what is wrong, costs ten times as much as a look at what is right.
    """
    if isinstance(item, dict):
        r, c, crc = item.get("row"), item.get("col"), item.get("crc32c")
        if (
            type(r) is type(c) is type(crc) is int  # no bool
            and rows[0] <= r < rows[1]
            and cols[0] <= c < cols[1]
            and 0 <= crc <= CRC_MAX
            and item.get("member") == (member := tile_member(r, c, head.encoding, head.block))
        ):
            return Tile(r, c, member, crc)
    record = Record.of(item, where)
    r, c = (record.integer(key, a, b - 1) for key, (a, b) in (("row", rows), ("col", cols)))
    member = tile_member(r, c, head.encoding, head.block)
    if record.values.get("member") != member:
        raise record.wrong("member", f"{member!r} for this tile")
    return Tile(r, c, member, record.integer("crc32c", 0, CRC_MAX))


@dataclass(frozen=True)
class Head:
    """All there is to know about one stored image.

    height, width: px of the stored level. tile: px. mpp: micrometres per px of the stored level.
    level, downsample: which level of the source's pyramid this is, and its px per px of level 0.
    encoding: of the tiles, one of ENCODINGS. classes, label, instances, bands, dtype: as in
    ImageRow. masked: whether blocks may have a mask. crs, transform: as in `georeference`.
    group: images that belong in the same split. block: tiles along each side of a block.
    thumbnail_crc32c: None in shards of before it was
    stored.
    """

    name: str
    height: int
    width: int
    tile: int
    mpp: float | None
    level: int
    downsample: float
    encoding: str
    classes: int | None
    source_sha256: str
    group: str
    blocks: tuple[BlockEntry, ...]
    label: int | None = None
    instances: int | None = None
    thumbnail_crc32c: int | None = None
    bands: int = Kind.bands
    dtype: str = Kind.dtype
    masked: bool = False
    crs: str | None = None
    transform: tuple[float, ...] | None = None
    block: int = BLOCK

    @property
    def kind(self) -> Kind:
        return Kind(self.bands, self.dtype)

    @property
    def rect(self) -> Rect:
        return Rect(0, self.height, 0, self.width)

    @property
    def tile_grid(self) -> tuple[int, int]:
        """(rows, cols) of tiles, those cut by the border included."""
        return -(-self.height // self.tile), -(-self.width // self.tile)

    @property
    def block_grid(self) -> tuple[int, int]:
        return block_grid(self.height, self.width, self.tile, self.block)

    def tiles_of_block(self, row: int, col: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(first, end) row, and (first, end) column, of the tiles of block (row, col)."""
        rows, cols = self.tile_grid
        top, left = row * self.block, col * self.block
        return (top, min(top + self.block, rows)), (left, min(left + self.block, cols))

    def numbers_of(self, row: int, col: int) -> frozenset[int]:
        """The numbers, in block (row, col), of the tiles of the image."""
        rows, cols = self.tiles_of_block(row, col)
        return frozenset(tile_number(r, c, self.block) for r in range(*rows) for c in range(*cols))

    def is_empty(self, entry: BlockEntry) -> bool:
        """Whether none of the block's tiles is stored, as far as that was recorded."""
        (top, bottom), (left, right) = self.tiles_of_block(entry.row, entry.col)
        return len(entry.empty) == (bottom - top) * (right - left)

    @cached_property
    def block_at(self) -> dict[tuple[int, int], BlockEntry]:
        """The blocks by their (row, col)."""
        return {(entry.row, entry.col): entry for entry in self.blocks}

    @cached_property
    def tile_members(self) -> tuple[str, ...]:
        """Names of the tiles of a block, by their number."""
        side = range(self.block)
        return tuple(tile_member(r, c, self.encoding, self.block) for r in side for c in side)

    def block_rect(self, row: int, col: int) -> Rect:
        """The pixels of block (row, col) that lie in the image."""
        side = self.block * self.tile
        return Rect(row, row + 1, col, col + 1).scaled(side).intersect(self.rect)

    def to_json(self) -> bytes:
        blocks = [fields_of(entry) for entry in self.blocks]
        return dump({"version": FORMAT_VERSION, **fields_of(self), "blocks": blocks})

    @staticmethod
    def from_json(data: bytes, row: ImageRow, shard_bytes: int, where: str) -> Head:
        """Check `data` as the head of the manifest's `row`, in a shard of `shard_bytes` bytes."""
        record = Record.parse(data, where)
        record.integer("version", FORMAT_VERSION, FORMAT_VERSION)
        record.text("name", re.compile(re.escape(row.name)), f"{row.name!r}, as in {MANIFEST}")
        height = record.integer("height", row.height, row.height)
        width = record.integer("width", row.width, row.width)
        tile = record.integer("tile", MIN_TILE, MAX_TILE)
        block = record.integer("block", BLOCKS[0], BLOCKS[-1])
        if block not in BLOCKS:
            raise record.wrong("block", f"one of {', '.join(map(str, BLOCKS))}")
        mpp = None if record.values.get("mpp") is None else record.number("mpp", 1e-9, 1e9)
        if record.integer_or_none("classes", 0, UNLABELLED) != row.classes:
            raise record.wrong("classes", f"{row.classes}, as in {MANIFEST}")
        if absent_or(record, "label", MAX_LABEL) != row.label:
            raise record.wrong("label", f"{row.label}, as in {MANIFEST}")
        if absent_or(record, "instances", MAX_INSTANCE) != row.instances:
            raise record.wrong("instances", f"{row.instances}, as in {MANIFEST}")
        if Kind.from_record(record) != row.kind:
            key = "dtype" if record.values.get("bands", Kind.bands) == row.bands else "bands"
            raise record.wrong(key, f"that of {row.kind}, as in {MANIFEST}")
        masked = record.values.get("masked", False)
        if not isinstance(masked, bool):
            raise record.wrong("masked", "true or false")
        if tile * tile * row.kind.pixel_bytes > MAX_TILE_PIXELS_BYTES:
            raise record.wrong("tile", f"a size that takes at most {MAX_TILE_PIXELS_BYTES} bytes")
        encoding = record.text("encoding", _ENCODING, f"one of {', '.join(ENCODINGS)}")
        if encoding not in row.kind.encodings:
            raise record.wrong("encoding", f"{' or '.join(row.kind.encodings)} for {row.kind}")
        crs, transform = georeference_of(record)
        rows, cols = block_grid(height, width, tile, block)
        if rows * cols > MAX_BLOCKS:
            raise record.wrong("tile", f"a size that makes at most {MAX_BLOCKS} blocks")
        has_instances = row.instances is not None
        most = max_block_bytes(tile, row.kind, instances=has_instances, masked=masked, block=block)
        most = min(most, shard_bytes)
        blocks: dict[tuple[int, int], BlockEntry] = {}
        for item in record.records("blocks", rows * cols):
            entry = entry_of(item, (rows, cols), most, shard_bytes, block)
            blocks[entry.row, entry.col] = entry
        if len(blocks) != rows * cols:
            raise ValueError(
                f"{where}: blocks names {len(blocks)} different blocks, allowed is each of the "
                f"{rows} x {cols} blocks once"
            )
        check_apart(
            where,
            [(e.offset, e.offset + e.length, f"block {e.row}, {e.col}") for e in blocks.values()]
            + [(*row.head_bytes, "the head")],
        )
        head = Head(
            name=row.name,
            height=height,
            width=width,
            tile=tile,
            mpp=mpp,
            level=record.integer("level", 0, MAX_LEVEL),
            downsample=record.number("downsample", 1, MAX_SIDE),
            encoding=encoding,
            classes=row.classes,
            source_sha256=record.text("source_sha256", SHA256, SHA256_WORDS),
            group=record.text("group", NAME, NAME_WORDS),
            blocks=tuple(blocks.values()),
            label=row.label,
            instances=row.instances,
            thumbnail_crc32c=absent_or(record, "thumbnail_crc32c", CRC_MAX),
            bands=row.bands,
            dtype=row.dtype,
            masked=masked,
            crs=crs,
            transform=transform,
            block=block,
        )
        for entry in blocks.values():
            if entry.labelled is not None and row.classes is None:
                raise ValueError(
                    f"{where}: block {entry.row}, {entry.col}: labelled is "
                    f"{shown(entry.labelled)}, allowed is none where there are no labels"
                )
            if not head.numbers_of(entry.row, entry.col).issuperset(entry.empty):
                raise ValueError(
                    f"{where}: block {entry.row}, {entry.col}: empty names {entry.empty}, allowed "
                    "are tiles of the image"
                )
        return head


def block_grid(height: int, width: int, tile: int, block: int = BLOCK) -> tuple[int, int]:
    """(rows, cols) of blocks of an image of height x width px."""
    side = block * tile
    return -(-height // side), -(-width // side)
