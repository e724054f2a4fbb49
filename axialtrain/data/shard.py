"""Images into shards: one pass, in the format of `store`.

Tiles that the source holds as JPEG are copied without being decoded; others are stored without
loss, as PNG, or as TIFF where PNG cannot hold them. Tiles without a pixel are left out. A shard is
written under a temporary name, synced and renamed; the manifest comes last, so that a folder has
one only when everything else is there. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NoReturn

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from webdataset import TarWriter

from axialtrain.data.codec import encode_jpeg, encode_png
from axialtrain.data.hilbert import hilbert_order
from axialtrain.data.inputs import Input, check_inputs
from axialtrain.data.readers import AUTO, Reader, open_image, open_raster
from axialtrain.data.store import (
    BLOCK,
    INSTANCES,
    LABELS,
    MANIFEST,
    MASK,
    MAX_HEAD_BYTES,
    TAR_RECORD,
    UNLABELLED,
    BlockEntry,
    BlockIndex,
    Head,
    ImageRow,
    Manifest,
    Tile,
    block_key,
    count_classes,
    head_key,
    shard_name,
    tile_member,
)
from axialtrain.data.thumbnail import thumbnail
from axialtrain.data.tile_tiff import encode_tiff
from axialtrain.data.whole import replacing
from axialtrain.grid import Rect

_THUMBNAIL_QUALITY = 85
_TAR_END = bytes(2 * TAR_RECORD)


@dataclass(frozen=True)
class Summary:
    """What `shard_images` wrote. copied: tiles taken over without re-encoding, of `tiles`.

    readers: for each image its name in the shards, its reader, and how that was chosen.
    """

    out: Path
    images: int
    shards: int
    blocks: int
    tiles: int
    copied: int
    bytes: int
    readers: tuple[tuple[str, str, str], ...]

    def __str__(self) -> str:
        return (
            f"{self.out}: {self.images} images in {self.shards} shards, {self.blocks} blocks, "
            f"{self.tiles} tiles ({self.copied} copied as they were), {self.bytes / 1e6:.1f} MB"
        )


def shard_images(
    images: Sequence[str | Path],
    out: str | Path,
    *,
    labels: Sequence[str | Path] | None = None,
    instances: Sequence[str | Path] | None = None,
    image_labels: Sequence[int] | None = None,
    level: int = 0,
    reader: str = AUTO,
    shard_bytes: int = 1 << 30,
    progress: bool = True,
) -> Summary:
    """Write `images` (paths) as shards into the folder `out`.

    labels: paths of label rasters, one per image, of the size of the stored level, one uint8 band,
    255 where there is no target. instances: likewise of rasters of instance numbers, one uint16 or
    uint8 band, 0 where there is none; with labels only. image_labels: a class, 0 to 65535, for each
    whole image. level: of each image's pyramid. reader: of the images, one of
    READERS, or "auto", which chooses for each. shard_bytes: a shard is closed after the image with
    which it reaches this size. progress: show a bar.

    Everything is opened and compared before anything is written: ValueError names what is wrong.
    """
    out = Path(out)
    _check_out(out)
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}, allowed is at least 1")
    jobs = check_inputs(images, labels, instances, image_labels, level, reader)
    with _naming(out):
        out.mkdir(parents=True, exist_ok=True)
    rows: list[ImageRow] = []
    blocks = tiles = copied = size = shards = 0
    with tqdm(total=sum(job.blocks for job in jobs), unit="block", disable=not progress) as bar:
        while len(rows) < len(jobs):
            shard = shard_name(shards)
            with replacing(out / shard) as file:
                while len(rows) < len(jobs) and file.tell() < shard_bytes:
                    writer = _ImageWriter(jobs[len(rows)], shard, file, bar)
                    rows.append(writer.write())
                    blocks += jobs[len(rows) - 1].blocks
                    tiles += writer.tiles
                    copied += writer.copied
                file.write(_TAR_END)
            shards += 1
            size += (out / shard).stat().st_size
    with replacing(out / MANIFEST) as file:
        file.write(Manifest(tuple(rows)).to_json())
    readers = tuple((job.name, job.reader, job.why) for job in jobs)
    return Summary(out, len(rows), shards, blocks, tiles, copied, size, readers)


def _check_out(out: Path) -> None:
    """ValueError unless `out` is a folder without a manifest, or one that can be made."""
    with _naming(out):
        if (out / MANIFEST).exists():
            raise ValueError(
                f"{out}: has a {MANIFEST} already, allowed is a new or an empty folder"
            )
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"{out}: {there} is a file, allowed is a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"{out}: {there} cannot be written to")


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{out}: cannot be the folder of the shards ({error})") from error


class _ImageWriter:
    """Writes one image's blocks and head into an open tar, counting tiles, classes, instances."""

    def __init__(self, job: Input, shard: str, file: BinaryIO, bar: tqdm[NoReturn]) -> None:
        self._job = job
        self._shard = shard
        self._file = file
        self._bar = bar
        self.tiles = 0
        self.copied = 0
        self._classes = 0
        self._instances = 0
        self._masked = False

    def write(self) -> ImageRow:
        job = self._job
        with ExitStack() as files:
            image = files.enter_context(open_image(job.image, job.level, job.reader))
            labels = instances = None
            if job.labels is not None:
                labels = files.enter_context(open_raster(job.labels))
            if job.instances is not None:
                instances = files.enter_context(open_raster(job.instances))
            head = Head(
                name=job.name,
                height=image.height,
                width=image.width,
                tile=image.tile,
                mpp=image.mpp,
                level=job.level,
                downsample=image.downsample,
                encoding="jpg" if image.jpeg else image.kind.lossless,
                classes=None,
                source_sha256=_sha256(job.image),
                group=job.name,
                blocks=(),
                label=job.label,
                bands=image.bands,
                dtype=image.dtype,
                crs=image.info.crs,
                transform=image.info.transform,
            )
            blocks = []
            for row, col in hilbert_order(*head.block_grid):
                blocks.append(self._write_block(head, image, labels, instances, row, col))
                self._bar.update()
        head = replace(
            head,
            classes=None if job.labels is None else self._classes,
            instances=None if job.instances is None else self._instances,
            blocks=tuple(blocks),
            masked=self._masked,
        )
        return self._write_head(head)

    def _write_block(
        self,
        head: Head,
        image: Reader,
        labels: Reader | None,
        instances: Reader | None,
        row: int,
        col: int,
    ) -> BlockEntry:
        sample: dict[str, bytes] = {}
        tiles = []
        rect = head.block_rect(row, col)
        mask = np.zeros((rect.height, rect.width), np.uint8)
        masked = False
        rows, cols = head.tile_grid
        for r in range(row * BLOCK, min(row * BLOCK + BLOCK, rows)):
            for c in range(col * BLOCK, min(col * BLOCK + BLOCK, cols)):
                data, present = self._encoded(image, r, c, head.encoding)
                if data is None:
                    continue
                member = tile_member(r, c, head.encoding)
                sample[member] = data
                tiles.append(Tile(r, c, member, google_crc32c.value(data)))
                whole = Rect(r, r + 1, c, c + 1).scaled(head.tile)
                part = whole.intersect(rect)
                mask[part.slices(rect)] = (
                    255 if present is None else 255 * present[part.slices(whole)]
                )
                masked |= present is not None
        self.tiles += len(tiles)
        labels_crc = instances_crc = mask_crc = None
        if labels is not None:
            # A tile that a sparse raster leaves out is unlabelled, not class 0.
            raster = labels.read(rect, fill=UNLABELLED)[..., 0]
            self._classes = max(self._classes, count_classes(raster))
            sample[LABELS] = encode_png(raster)
            labels_crc = google_crc32c.value(sample[LABELS])
        if instances is not None:
            numbers = instances.read(rect)[..., 0].astype(np.uint16)
            self._instances = max(self._instances, int(numbers.max()))
            sample[INSTANCES] = encode_png(numbers)
            instances_crc = google_crc32c.value(sample[INSTANCES])
        if masked:
            self._masked = True
            sample[MASK] = encode_png(mask)
            mask_crc = google_crc32c.value(sample[MASK])
        index = BlockIndex(row, col, tuple(tiles), labels_crc, instances_crc, mask_crc)
        sample["json"] = index.to_json()
        data = _members(block_key(head.name, head.level, row, col), sample)
        offset = self._file.tell()
        self._file.write(data)
        return BlockEntry(row, col, offset, len(data), google_crc32c.value(data))

    def _encoded(
        self, image: Reader, row: int, col: int, encoding: str
    ) -> tuple[bytes | None, NDArray[np.bool_] | None]:
        """Tile (row, col), None where no pixel of it is there, and which are if some are not."""
        present = None
        if image.info.masked or not image.jpeg:
            tile = image.tile_at(row, col)
            if tile is None:
                return None, None
            present = tile.present
            if not image.jpeg:
                return (encode_png if encoding == "png" else encode_tiff)(tile.pixels), present
        data = image.tile_bytes(row, col)
        self.copied += data is not None
        return data, present

    def _write_head(self, head: Head) -> ImageRow:
        picture = encode_jpeg(
            thumbnail(self._job.image, head.level, self._job.reader), _THUMBNAIL_QUALITY
        )
        data = replace(head, thumbnail_crc32c=google_crc32c.value(picture)).to_json()
        if len(data) > MAX_HEAD_BYTES:
            raise ValueError(f"{self._job.image}: its head takes {len(data)} bytes")
        # Members are sorted by name: the JSON is the first, right behind its tar header.
        offset = self._file.tell() + TAR_RECORD
        sample = {"json": data, "thumbnail.jpg": picture}
        self._file.write(_members(head_key(head.name), sample))
        return ImageRow(
            name=head.name,
            shard=self._shard,
            head_offset=offset,
            head_length=len(data),
            head_sha256=hashlib.sha256(data).hexdigest(),
            height=head.height,
            width=head.width,
            classes=head.classes,
            label=head.label,
            instances=head.instances,
            bands=head.bands,
            dtype=head.dtype,
        )


def _members(key: str, sample: dict[str, bytes]) -> bytes:
    """The sample's tar members, as webdataset writes them, without an end of archive.

    Made apart from the shard, so that a block's bytes, and their checksum, are known as a whole.
    """
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0) as tar:
        tar.write({"__key__": key, **sample})
        length = tar.tarstream.offset
    return buffer.getvalue()[:length]


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
