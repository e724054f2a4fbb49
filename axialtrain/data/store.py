"""The format of the shards: names, the order of blocks, and the three JSON records.

A folder of plain WebDataset tars and one `manifest.json`. An image is a run of samples in one tar:

    {image}/{level}/{row:05d}_{col:05d}    one block of 8 x 8 tiles, along a Hilbert curve
        .00.jpg ... .63.jpg                its tiles, number = row in the block * 8 + column
        .json                              which tiles are there, CRC-32C of each   -> BlockIndex
        .labels.png                        its label raster, cut at the image's border
        .instances.png                     its instance raster, likewise
    {image}/head                           the last sample
        .json                              size, class, where each block lies       -> Head
        .thumbnail.jpg

The manifest has one row per image and is all that is loaded for a whole data set; a head is
fetched when its image is first read. Whatever comes from disk is checked before it is used:
wrong values raise a ValueError that names file, key and value.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import Record
from axialtrain.grid import Rect

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BLOCK = 8  # tiles along each side of a block
LABELS = "labels.png"  # a block's member
INSTANCES = "instances.png"  # and another
UNLABELLED = 255  # label of a pixel that is no target
BANDS = 3  # of a stored image: RGB

MAX_SIDE = 1 << 20  # px, of an image
MIN_TILE, MAX_TILE = 16, 2048  # px
MAX_LEVEL = 64
MAX_BLOCKS = 1 << 20  # of an image
MAX_IMAGES = 1 << 22
MAX_LABEL = (1 << 16) - 1  # the class of a whole image
MAX_INSTANCE = (1 << 16) - 1  # a number in an instance raster
MAX_BYTES = 1 << 50  # of a shard: beyond any file, within exact JSON numbers
MAX_HEAD_BYTES = 1 << 28
MAX_MANIFEST_BYTES = 1 << 30
TAR_RECORD = 512  # bytes: a tar header, and what members are padded to

ENCODINGS = ("jpg", "png")
# A member of more than 100 characters gets a header of another kind, which is in no directory.
MAX_NAME = 100 - len(f"/{MAX_LEVEL}/00000_00000.{LABELS}")
MAX_NAME_WITH_INSTANCES = MAX_NAME - (len(INSTANCES) - len(LABELS))
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
_NAME_WORDS = f"a name of at most {MAX_NAME} of A-Z a-z 0-9 . _ - that does not start with . or -"
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,120}\.tar")
_SHARD_WORDS = "the name of a .tar in the same folder"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA256_WORDS = "64 hexadecimal digits"
_ENCODING = re.compile("|".join(ENCODINGS))
_CRC_MAX = 0xFFFFFFFF


def image_name(path: str | Path) -> str:
    """The name of the image at `path` in the shards: its stem, other characters replaced by _."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(path).stem).lstrip(".-")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{path}: no image name can be made of it (it would have {len(name)} characters), "
            f"allowed is {_NAME_WORDS}"
        )
    return name


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.tar"


def block_key(image: str, level: int, row: int, col: int) -> str:
    return f"{image}/{level}/{row:05d}_{col:05d}"


def head_key(image: str) -> str:
    return f"{image}/head"


def tile_member(row: int, col: int, encoding: str) -> str:
    """Name, within its block's sample, of the tile at (row, col) of the image."""
    return f"{row % BLOCK * BLOCK + col % BLOCK:02d}.{encoding}"


def count_classes(labels: NDArray[np.uint8]) -> int:
    """The largest label + 1; 0 where all is unlabelled."""
    return int((labels + np.uint8(1)).max())  # UNLABELLED, 255, becomes 0


def max_tile_bytes(tile: int) -> int:
    """The most that an encoded RGB tile may take: far more than any sane encoder needs."""
    return tile * tile * 6 + (1 << 16)


def max_block_bytes(tile: int, *, instances: bool) -> int:
    """The most that a block may take, labels, index and tar headers included."""
    rasters = tile * tile * (2 + 4 * instances)  # twice what they take in memory
    return BLOCK * BLOCK * (max_tile_bytes(tile) + rasters + 2 * TAR_RECORD) + (1 << 20)


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
    no such raster.
    """

    row: int
    col: int
    tiles: tuple[Tile, ...]
    labels_crc32c: int | None
    instances_crc32c: int | None = None

    def to_json(self) -> bytes:
        return _dump(_fields(self))

    @staticmethod
    def from_json(data: bytes, head: Head, row: int, col: int, where: str) -> BlockIndex:
        """Check `data` as the index of block (row, col) of the image of `head`."""
        record = Record.parse(data, where)
        record.integer("row", row, row)
        record.integer("col", col, col)
        rows, cols = head.tile_grid
        tiles: dict[tuple[int, int], Tile] = {}
        for item in record.records("tiles", BLOCK * BLOCK):
            r = item.integer("row", row * BLOCK, min(row * BLOCK + BLOCK, rows) - 1)
            c = item.integer("col", col * BLOCK, min(col * BLOCK + BLOCK, cols) - 1)
            member = tile_member(r, c, head.encoding)
            item.text("member", re.compile(re.escape(member)), f"{member!r} for this tile")
            if (r, c) in tiles:
                raise ValueError(f"{item.where}: tile row={r} col={c} stands there twice")
            tiles[r, c] = Tile(r, c, member, item.integer("crc32c", 0, _CRC_MAX))
        labels = instances = None
        if head.classes is not None:
            labels = record.integer("labels_crc32c", 0, _CRC_MAX)
        if head.instances is not None:
            instances = record.integer("instances_crc32c", 0, _CRC_MAX)
        return BlockIndex(row, col, tuple(tiles.values()), labels, instances)


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """Where a block lies in its shard: bytes [offset, offset + length), headers included."""

    row: int
    col: int
    offset: int
    length: int
    crc32c: int


@dataclass(frozen=True)
class Head:
    """All there is to know about one stored image.

    height, width: px of the stored level. tile: px. mpp: micrometres per px of the stored level.
    level, downsample: which level of the source's pyramid this is, and its px per px of level 0.
    encoding: of the tiles, "jpg" or "png". classes, label, instances: as in ImageRow.
    group: images that belong in the same split. thumbnail_crc32c: None in shards of before it was
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

    @property
    def rect(self) -> Rect:
        return Rect(0, self.height, 0, self.width)

    @property
    def tile_grid(self) -> tuple[int, int]:
        """(rows, cols) of tiles, those cut by the border included."""
        return -(-self.height // self.tile), -(-self.width // self.tile)

    @property
    def block_grid(self) -> tuple[int, int]:
        return block_grid(self.height, self.width, self.tile)

    def block_rect(self, row: int, col: int) -> Rect:
        """The pixels of block (row, col) that lie in the image."""
        return Rect(row, row + 1, col, col + 1).scaled(BLOCK * self.tile).intersect(self.rect)

    def to_json(self) -> bytes:
        return _dump({"version": FORMAT_VERSION, "block": BLOCK, **_fields(self)})

    @staticmethod
    def from_json(data: bytes, row: ImageRow, shard_bytes: int, where: str) -> Head:
        """Check `data` as the head of the manifest's `row`, in a shard of `shard_bytes` bytes."""
        record = Record.parse(data, where)
        record.integer("version", FORMAT_VERSION, FORMAT_VERSION)
        record.text("name", re.compile(re.escape(row.name)), f"{row.name!r}, as in {MANIFEST}")
        height = record.integer("height", row.height, row.height)
        width = record.integer("width", row.width, row.width)
        tile = record.integer("tile", MIN_TILE, MAX_TILE)
        record.integer("block", BLOCK, BLOCK)
        mpp = None if record.values.get("mpp") is None else record.number("mpp", 1e-9, 1e9)
        if record.integer_or_none("classes", 0, UNLABELLED) != row.classes:
            raise record.wrong("classes", f"{row.classes}, as in {MANIFEST}")
        if _absent_or(record, "label", MAX_LABEL) != row.label:
            raise record.wrong("label", f"{row.label}, as in {MANIFEST}")
        if _absent_or(record, "instances", MAX_INSTANCE) != row.instances:
            raise record.wrong("instances", f"{row.instances}, as in {MANIFEST}")
        rows, cols = block_grid(height, width, tile)
        if rows * cols > MAX_BLOCKS:
            raise record.wrong("tile", f"a size that makes at most {MAX_BLOCKS} blocks")
        most = min(max_block_bytes(tile, instances=row.instances is not None), shard_bytes)
        blocks: dict[tuple[int, int], BlockEntry] = {}
        for item in record.records("blocks", rows * cols):
            entry = _block_entry(item, (rows, cols), most, shard_bytes)
            blocks[entry.row, entry.col] = entry
        if len(blocks) != rows * cols:
            raise ValueError(
                f"{where}: blocks names {len(blocks)} different blocks, allowed is each of the "
                f"{rows} x {cols} blocks once"
            )
        _check_apart(
            where,
            [(e.offset, e.offset + e.length, f"block {e.row}, {e.col}") for e in blocks.values()]
            + [(*row.head_bytes, "the head")],
        )
        return Head(
            name=row.name,
            height=height,
            width=width,
            tile=tile,
            mpp=mpp,
            level=record.integer("level", 0, MAX_LEVEL),
            downsample=record.number("downsample", 1, MAX_SIDE),
            encoding=record.text("encoding", _ENCODING, f"one of {', '.join(ENCODINGS)}"),
            classes=row.classes,
            source_sha256=record.text("source_sha256", _SHA256, _SHA256_WORDS),
            group=record.text("group", _NAME, _NAME_WORDS),
            blocks=tuple(blocks.values()),
            label=row.label,
            instances=row.instances,
            thumbnail_crc32c=_absent_or(record, "thumbnail_crc32c", _CRC_MAX),
        )


def _check_apart(where: str, ranges: list[tuple[int, int, str]]) -> None:
    """ValueError if two of the (start, stop, name) share a byte.

    Otherwise a small shard could be read as a large image, the same bytes again and again.
    """
    ranges.sort()
    for (_, stop, before), (start, _, after) in pairwise(ranges):
        if start < stop:
            raise ValueError(
                f"{where}: {after} starts at byte {start}, allowed is behind {before}, which ends "
                f"at byte {stop}"
            )


def _block_entry(item: Record, grid: tuple[int, int], most: int, shard_bytes: int) -> BlockEntry:
    length = item.integer("length", TAR_RECORD, most)
    return BlockEntry(
        row=item.integer("row", 0, grid[0] - 1),
        col=item.integer("col", 0, grid[1] - 1),
        offset=item.integer("offset", 0, shard_bytes - length),
        length=length,
        crc32c=item.integer("crc32c", 0, _CRC_MAX),
    )


def block_grid(height: int, width: int, tile: int) -> tuple[int, int]:
    """(rows, cols) of blocks of an image of height x width px."""
    side = BLOCK * tile
    return -(-height // side), -(-width // side)


@dataclass(frozen=True)
class ImageRow:
    """The manifest's row of one image.

    head_offset, head_length: the bytes of the head's JSON in `shard`; head_sha256: of those bytes.
    height, width: px. classes: the largest label of its raster + 1, 0 where all is unlabelled, None
    without a raster. label: the class of the whole image, None where it has none. instances: the
    largest number in its instance raster, None without one; only an image with labels has one.
    """

    name: str
    shard: str
    head_offset: int
    head_length: int
    head_sha256: str
    height: int
    width: int
    classes: int | None
    label: int | None = None
    instances: int | None = None

    @property
    def head_bytes(self) -> tuple[int, int]:
        """[start, stop) in `shard` of the head's JSON, its tar header and padding included."""
        data = -(-self.head_length // TAR_RECORD) * TAR_RECORD
        return self.head_offset - TAR_RECORD, self.head_offset + data

    @staticmethod
    def from_record(item: Record) -> ImageRow:
        row = ImageRow(
            name=item.text("name", _NAME, _NAME_WORDS),
            shard=item.text("shard", _SHARD, _SHARD_WORDS),
            head_offset=item.integer("head_offset", TAR_RECORD, MAX_BYTES),
            head_length=item.integer("head_length", 2, MAX_HEAD_BYTES),
            head_sha256=item.text("head_sha256", _SHA256, _SHA256_WORDS),
            height=item.integer("height", 1, MAX_SIDE),
            width=item.integer("width", 1, MAX_SIDE),
            classes=item.integer_or_none("classes", 0, UNLABELLED),
            label=_absent_or(item, "label", MAX_LABEL),
            instances=_absent_or(item, "instances", MAX_INSTANCE),
        )
        if row.instances is not None and row.classes is None:
            raise item.wrong("instances", "none where there are no labels (classes is null)")
        return row


@dataclass(frozen=True)
class Manifest:
    """All images of a folder of shards, in the order in which they were written."""

    images: tuple[ImageRow, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest: says whether two runs read the same data."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        rows = [_fields(row) for row in self.images]
        return _dump({"version": FORMAT_VERSION, "images": rows})

    @staticmethod
    def from_json(data: bytes, where: str) -> Manifest:
        record = Record.parse(data, where)
        version = record.values.get("version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise record.wrong("version", f"{FORMAT_VERSION}: shard the images again")
        rows = tuple(ImageRow.from_record(item) for item in record.records("images", MAX_IMAGES))
        if not rows:
            raise record.wrong("images", "at least one image")
        names: set[str] = set()
        for row in rows:
            if row.name in names:
                raise ValueError(f"{where}: images has the name {row.name!r} twice")
            names.add(row.name)
        by_shard: dict[str, list[tuple[int, int, str]]] = {}
        for row in rows:
            by_shard.setdefault(row.shard, []).append((*row.head_bytes, f"head of {row.name!r}"))
        for shard, ranges in by_shard.items():
            _check_apart(f"{where}: {shard}", ranges)
        return Manifest(rows)


def _absent_or(record: Record, key: str, most: int) -> int | None:
    """The integer at `key`; None also where there is no such key, as in older shards."""
    return None if record.values.get(key) is None else record.integer(key, 0, most)


def _fields(record: BlockIndex | Head | ImageRow) -> dict[str, object]:
    """What of `record` its JSON holds. Of what came later, None is no key: older digests stay."""
    later = ("label", "instances", "instances_crc32c", "thumbnail_crc32c")
    return {k: v for k, v in asdict(record).items() if k not in later or v is not None}


def _dump(value: object) -> bytes:
    """JSON of one spelling only, so that the same data gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
