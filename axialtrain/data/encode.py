"""One image as it is stored: its blocks, in runs that are made one by one, and its head.

Tiles that the source holds as JPEG are copied without being decoded; others are stored without
loss, as PNG, or as TIFF where PNG cannot hold them, or as JPEG where that was asked for. Tiles
without a pixel, and those that are not kept, are left out, and recorded.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from axialtrain.data.codec import decode, encode_jpeg, encode_png, jpeg_shape
from axialtrain.data.hilbert import hilbert_order
from axialtrain.data.inputs import Input, open_stored
from axialtrain.data.kinds import MAX_BANDS, Raster
from axialtrain.data.labelled import count_labels, written
from axialtrain.data.readers import Reader
from axialtrain.data.readers.reader import Mask
from axialtrain.data.statistics import Statistics, sampled
from axialtrain.data.store import (
    INSTANCES,
    LABELS,
    MASK,
    MAX_HEAD_BYTES,
    TAR_RECORD,
    BlockEntry,
    BlockIndex,
    Head,
    ImageRow,
    Tile,
    block_key,
    count_classes,
    head_key,
    tile_member,
    tile_number,
)
from axialtrain.data.tar import file_header
from axialtrain.data.thumbnail import thumbnail
from axialtrain.data.tile_tiff import encode_tiff
from axialtrain.data.tissue import ALL, kept_tiles, overview
from axialtrain.grid import Rect

LOG = logging.getLogger(__name__)
RUN = 64  # blocks that are made at a time, and lost where a process is killed
_THUMBNAIL_QUALITY = 85


@dataclass(frozen=True)
class Look:
    """What is found out about an image before its blocks are made.

    kept: bool [rows, cols] of its tile grid, None where all are. thumbnail: a JPEG.
    source_sha256: of its file's bytes.
    """

    kept: NDArray[np.bool_] | None
    thumbnail: bytes
    source_sha256: str


@dataclass(frozen=True)
class Run:
    """Some blocks of an image in a row, and what was found in them.

    blocks: their offsets are from the start of the run. tiles: stored, of which `copied` are as
    they were. classes: the largest label + 1; instances: the largest number; 0 without a raster.
    """

    blocks: tuple[BlockEntry, ...]
    tiles: int
    copied: int
    classes: int
    instances: int
    masked: bool
    statistics: Statistics | None


def runs_of(head: Head) -> list[list[tuple[int, int]]]:
    """The (row, col) of the image's blocks, along a Hilbert curve, RUN at a time."""
    order = hilbert_order(*head.block_grid)
    return [order[first : first + RUN] for first in range(0, len(order), RUN)]


def look(job: Input) -> Look:
    """Everything about an image but its blocks."""
    digest, kept = _sha256(job.entry.image), None
    if job.how.keep != ALL:
        with open_stored(job.entry, job.how) as image:
            kept = kept_tiles(
                job.entry.image,
                job.level,
                job.reader,
                how=job.how.keep,
                share=job.how.share,
                stored=image.info,
            )
    picture = thumbnail(job.entry.image, job.level, job.reader)
    return Look(kept, encode_jpeg(picture, _THUMBNAIL_QUALITY), digest)


def write_run(job: Input, kept: NDArray[np.bool_] | None, number: int, file: BinaryIO) -> Run:
    """Write run `number` of the image's blocks into `file`, at its start. kept: see `Look`."""
    with ExitStack() as files:
        writer = _Writer(job, kept, file, files)
        blocks = tuple(writer.write(row, col) for row, col in runs_of(job.head)[number])
    return Run(
        blocks,
        writer.tiles,
        writer.copied,
        writer.classes,
        writer.instances,
        writer.masked,
        Statistics.joined(writer.statistics),
    )


class _Writer:
    """Writes blocks into a file, and counts what is in them: see `Run`."""

    def __init__(
        self, job: Input, kept: NDArray[np.bool_] | None, file: BinaryIO, files: ExitStack
    ) -> None:
        self._job, self._kept, self._file = job, kept, file
        self._stored = job.tiles if kept is None else max(1, int(kept.sum()))  # or fewer
        self._image: Reader = files.enter_context(open_stored(job.entry, job.how))
        labels, numbers = job.open_labels(), job.open_instances()
        self._labels = None if labels is None else files.enter_context(labels)
        self._numbers = None if numbers is None else files.enter_context(numbers)
        self.tiles = self.copied = self.classes = self.instances = 0
        self.masked = False
        self.statistics: list[Statistics] = []

    def write(self, row: int, col: int) -> BlockEntry:
        """Block (row, col), from where the file is."""
        head = self._job.head
        rect = head.block_rect(row, col)
        sample: dict[str, bytes] = {}
        tiles, empty = [], []
        present_of: dict[tuple[int, int], Mask | None] = {}
        for r in range(*head.tiles_of_block(row, col)[0]):
            for c in range(*head.tiles_of_block(row, col)[1]):
                data, present = self._tile(r, c)
                if data is None:
                    empty.append(tile_number(r, c, head.block))
                    continue
                member = tile_member(r, c, head.encoding, head.block)
                sample[member] = data
                tiles.append(Tile(r, c, member, google_crc32c.value(data)))
                present_of[r, c] = present
        self.tiles += len(tiles)
        rasters = self._rasters(rect)
        for name, raster in rasters.items():
            sample[name] = encode_png(raster)
        mask = None
        if any(present is not None for present in present_of.values()):
            self.masked = True
            mask = _mask(rect, head.tile, present_of)
            sample[MASK] = encode_png(mask)
        labelled = None
        if LABELS in rasters:
            labels = rasters[LABELS].astype(np.uint8, copy=False)
            there = None if mask is None else mask > 0
            stored = [tile_number(tile.row, tile.col, head.block) for tile in tiles]
            labelled = written(count_labels(labels, there, head, (row, col), stored))
        crcs = {
            name: google_crc32c.value(sample[name])
            for name in (LABELS, INSTANCES, MASK)
            if name in sample
        }
        index = BlockIndex(
            row, col, tuple(tiles), crcs.get(LABELS), crcs.get(INSTANCES), crcs.get(MASK)
        )
        sample["json"] = index.to_json()
        data = members(block_key(head.name, head.level, row, col), sample)
        offset = self._file.tell()
        self._file.write(data)
        crc = google_crc32c.value(data)
        return BlockEntry(row, col, offset, len(data), crc, tuple(empty), labelled)

    def _rasters(self, rect: Rect) -> dict[str, NDArray[np.uint8] | NDArray[np.uint16]]:
        found: dict[str, NDArray[np.uint8] | NDArray[np.uint16]] = {}
        if self._labels is not None:
            labels = self._labels.read(rect)
            self.classes = max(self.classes, count_classes(labels))
            found[LABELS] = labels
        if self._numbers is not None:
            numbers = self._numbers.read(rect)
            self.instances = max(self.instances, int(numbers.max()))
            found[INSTANCES] = numbers
        return found

    def _tile(self, row: int, col: int) -> tuple[bytes | None, Mask | None]:
        """Tile (row, col), None where it is not stored, and which pixels are there if not all."""
        image, head = self._image, self._job.head
        if self._kept is not None and not self._kept[row, col]:
            return None, None
        wanted = measured(self._job) and sampled(row, col, self._stored)
        present = None
        if image.info.masked or not image.jpeg:
            tile = image.tile_at(row, col)
            if tile is None:
                return None, None
            present = tile.present
            if wanted:
                self._measure(tile.pixels, present, row, col)
            if not image.jpeg:
                return self._encoded(tile.pixels), present
        data = image.tile_bytes(row, col)
        self.copied += data is not None
        if wanted and data is not None and not image.info.masked:
            pixels = decode(data, (head.tile, head.tile, head.bands), whole=False)  # as was checked
            self._measure(pixels, None, row, col)
        return data, present

    def _measure(self, pixels: Raster, present: Mask | None, row: int, col: int) -> None:
        """Take the statistics of what of a tile lies in the image."""
        head = self._job.head
        whole = Rect(row, row + 1, col, col + 1).scaled(head.tile)
        inside = whole.intersect(head.rect).slices(whole)
        there = None if present is None else present[inside]
        self.statistics.append(Statistics.of(pixels[inside], there))

    def _encoded(self, pixels: Raster) -> bytes:
        encoding = self._job.head.encoding
        if encoding == "jpg":
            return encode_jpeg(pixels, self._job.how.quality)
        return (encode_png if encoding == "png" else encode_tiff)(pixels)


def _mask(
    rect: Rect, tile: int, present_of: dict[tuple[int, int], Mask | None]
) -> NDArray[np.uint8]:
    """255 where a block has a pixel, else 0; [height, width] of its `rect`, in px.

    present_of: for each stored tile, (row, col) of the image, which pixels are there, None: all.
    """
    mask = np.zeros((rect.height, rect.width), np.uint8)
    for (row, col), present in present_of.items():
        whole = Rect(row, row + 1, col, col + 1).scaled(tile)
        part = whole.intersect(rect)
        mask[part.slices(rect)] = 255 if present is None else 255 * present[part.slices(whole)]
    return mask


def write_head(job: Input, seen: Look, runs: list[Run], starts: list[int], file: BinaryIO) -> Head:
    """Write the head of the image, whose runs stand in the same file from `starts` on."""
    blocks = [
        replace(entry, offset=start + entry.offset)
        for start, run in zip(starts, runs, strict=True)
        for entry in run.blocks
    ]
    head = replace(
        job.head,
        classes=None if job.head.classes is None else max(run.classes for run in runs),
        instances=None if job.head.instances is None else max(run.instances for run in runs),
        masked=any(run.masked for run in runs),
        blocks=tuple(blocks),
        source_sha256=seen.source_sha256,
        thumbnail_crc32c=google_crc32c.value(seen.thumbnail),
    )
    data = head.to_json()
    if len(data) > MAX_HEAD_BYTES:  # rather without that than not at all, after all that work
        LOG.warning(
            "%s: its head would take %d bytes with the pixels of its classes, allowed are %d: it "
            "is stored without them, and its windows cannot be balanced by labels; larger tiles "
            "(--passthrough never --tile) make heads smaller",
            job.entry.image, len(data), MAX_HEAD_BYTES,
        )  # fmt: skip
        head = replace(head, blocks=tuple(replace(entry, labelled=None) for entry in blocks))
        data = head.to_json()
    if len(data) > MAX_HEAD_BYTES:
        raise ValueError(
            f"{job.entry.image}: its head takes {len(data)} bytes, allowed are {MAX_HEAD_BYTES}: "
            "larger tiles (--passthrough never --tile) make it smaller"
        )
    file.write(members(head_key(head.name), {"json": data, "thumbnail.jpg": seen.thumbnail}))
    return head


def picture_of(seen: Look, head: Head) -> bytes:
    """The thumbnail with what is stored of the image drawn in, a JPEG."""
    kept = np.ones(head.tile_grid, np.bool_)
    for entry in head.blocks:
        for number in entry.empty:
            row, col = divmod(number, head.block)
            kept[entry.row * head.block + row, entry.col * head.block + col] = False
    small = decode(seen.thumbnail, jpeg_shape(seen.thumbnail))
    drawn = overview(small, kept, height=head.height, width=head.width, tile=head.tile)
    return encode_jpeg(drawn, _THUMBNAIL_QUALITY)


def measured(job: Input) -> bool:
    """Whether statistics of its bands are taken: not of vectors, too long for a manifest."""
    return job.how.statistics and job.head.bands <= MAX_BANDS


def row_of(head: Head, offset: int, shard: str, statistics: Statistics | None) -> ImageRow:
    """The manifest's row of an image whose head's sample stands at byte `offset` of `shard`."""
    data = head.to_json()
    return ImageRow(
        name=head.name,
        shard=shard,
        # Members are sorted by name: the JSON is the first, right behind its tar header.
        head_offset=offset + TAR_RECORD,
        head_length=len(data),
        head_sha256=hashlib.sha256(data).hexdigest(),
        height=head.height,
        width=head.width,
        classes=head.classes,
        label=head.label,
        instances=head.instances,
        bands=head.bands,
        dtype=head.dtype,
        statistics=statistics,
    )


def members(key: str, sample: dict[str, bytes]) -> bytes:
    """The sample's tar members, as webdataset writes them, without an end of archive.

    Made apart from the shard, so that a block's bytes, and their checksum, are known as a whole;
    and without webdataset, whose import brings torch and costs more than copying 10,000 tiles.
    """
    parts = []
    for name in sorted(sample):
        size = len(sample[name])
        parts += [file_header(f"{key}.{name}", size), sample[name], bytes(-size % TAR_RECORD)]
    return b"".join(parts)


def _sha256(path: Path) -> str:
    """Of a file's bytes; of a folder, of the names and bytes of all files in it."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for each in sorted(path.rglob("*")):
        if each.is_symlink():
            raise ValueError(f"{each}: is a link, allowed in the folder of an image are files")
        if each.is_file():
            whole.update(f"{each.relative_to(path).as_posix()}\0{_sha256(each)}\n".encode())
    return whole.hexdigest()
