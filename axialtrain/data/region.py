"""Any rectangle of any stored image, for the bytes of the blocks that it touches.

rectangle -> blocks -> their bytes, merged ranges of them through fsspec where they are not on this
machine -> the tar members in them -> the tiles that the rectangle meets, and only those decoded.
Each block is checked by its CRC-32C.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

import fsspec
import numpy as np
from numpy.typing import NDArray

from axialtrain.data.block import Block, index_at_end
from axialtrain.data.codec import Instances, Pixels
from axialtrain.data.damage import Damage
from axialtrain.data.fetch import Fetch, fetch_for
from axialtrain.data.kept_heads import KeptHeads
from axialtrain.data.kinds import Kind, Raster
from axialtrain.data.painting import Region, block_damage, painted
from axialtrain.data.passing import DeniedError, UnreachableError, without_secrets
from axialtrain.data.reading import ByteSource, ReadConfig, Span
from axialtrain.data.store import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    UNLABELLED,
    BlockEntry,
    BlockIndex,
    Head,
    ImageRow,
    Manifest,
)
from axialtrain.data.synchronous import alike
from axialtrain.grid import Rect

TAIL = 1 << 13  # bytes at the end of a block that hold its index, unless rasters lie behind it
TAILS = 1 << 24  # bytes of them that are fetched at once


def open_shards(url: str, read: ReadConfig | None = None) -> Shards:
    """The shards in the folder `url`: a path, or what fsspec reads (s3://, gs://, https://).

    read: how, over a network. ValueError, naming the url, if there are none, they must not be read,
    or they are of another version of the format; UnreachableError if there is no answer.
    """
    fs, root, data = read_manifest(url, read)
    return Shards(fs, root, Manifest.from_json(data, f"{root}/{MANIFEST}"), read)


def read_manifest(
    url: str, read: ReadConfig | None = None
) -> tuple[fsspec.AbstractFileSystem, str, bytes]:
    """What reads the folder `url`, the folder's path there, and the bytes of its manifest.

    Errors as `open_shards` has them.
    """
    try:
        fs, root = fsspec.core.url_to_fs(str(url))
        if not fs.async_impl:
            fs = alike(fs)  # which only these shards ask, and not from several threads
        root = root.rstrip("/")
        path = f"{root}/{MANIFEST}"
        source = ByteSource(fs, read)
        size = source.size(path)
        if size is not None and size > MAX_MANIFEST_BYTES:
            raise ValueError(f"{MANIFEST} has {size} bytes, allowed is {MAX_MANIFEST_BYTES}")
        if size is None:
            data = source.beginning(path, MAX_MANIFEST_BYTES + 1)
        else:  # not more than there is: a buffer is made for as much as is asked for
            (data,) = source.fetch(path, [(0, size)])
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{url}: no shards here, allowed is a folder with a {MANIFEST}") from None
    except UnreachableError:
        raise
    except (ImportError, ValueError, OSError) as error:  # an ImportError names what to install
        raise ValueError(f"{url}: no shards can be read here ({error})") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise ValueError(f"{path}: is over {MAX_MANIFEST_BYTES} bytes, too large for a manifest")
    return fs, root, data


class Shards:
    """The images of one folder of shards. Safe to read from several threads.

    Whatever reads raises UnreachableError where a network does not give what it should.

    images: one row each, in the order in which they were written. digest: of the manifest.
    has_labels: whether every image has a label raster. classes: the largest label of all images
    + 1, 0 where all is unlabelled, None where no image has a raster. has_instances: whether every
    image has an instance raster. has_image_labels: whether every image has a class of its own.
    image_classes: the largest of them + 1, None where no image has one. head_bytes_read: of the
    heads that were fetched, which the bytes of no region count.
    """

    def __init__(
        self,
        fs: fsspec.AbstractFileSystem,
        root: str,
        manifest: Manifest,
        read: ReadConfig | None = None,
    ) -> None:
        self.images = manifest.images
        self.digest = manifest.digest
        known = [row.classes for row in manifest.images if row.classes is not None]
        self.has_labels = len(known) == len(manifest.images)
        self.classes = max(known, default=None)
        self.has_instances = all(row.instances is not None for row in manifest.images)
        own = [row.label for row in manifest.images if row.label is not None]
        self.has_image_labels = len(own) == len(manifest.images)
        self.image_classes: int | None = max(own) + 1 if own else None
        kind = manifest.images[0].kind
        self._odd = next((row for row in manifest.images if row.kind != kind), None)
        self._source = ByteSource(fs, read)
        self._root = root
        self._rows = {row.name: row for row in manifest.images}
        self.head_bytes_read = 0
        self._heads = KeptHeads()
        self._lock = threading.Lock()

    @property
    def kind(self) -> Kind:
        """Of all images' pixels; ValueError, naming two, where they are not of one kind."""
        first, other = self.images[0], self._odd
        if other is not None:
            raise ValueError(
                f"{self._root}/{MANIFEST}: image {other.name!r} has {other.kind} and "
                f"{first.name!r} {first.kind}, allowed is one kind for all images of a set"
            )
        return first.kind

    @property
    def bands(self) -> int:
        """Of every image; ValueError as `kind` has it."""
        return self.kind.bands

    @property
    def dtype(self) -> str:
        """Of every image: uint8, uint16 or float32; ValueError as `kind` has it."""
        return self.kind.dtype

    def row(self, name: str) -> ImageRow:
        """The manifest's row of the image `name`."""
        if name not in self._rows:
            raise ValueError(f"image is {name!r}, allowed are {_some(list(self._rows))}")
        return self._rows[name]

    def head(self, name: str) -> Head:
        """The head of the image `name`; fetched once, then kept.

        Of very many images those that were asked for longest ago are fetched again (see
        `KeptHeads`), and so is one that several threads want at the same time.
        """
        if (kept := self._heads.get(name)) is not None:
            return kept
        row = self.row(name)
        path = self._path(name)
        stop = row.head_offset + row.head_length
        size = self._size(path)
        if stop > size:
            raise ValueError(
                f"{self._root}/{MANIFEST}: head_offset + head_length of {name!r} is {stop}, "
                f"allowed is up to the {size} bytes of {row.shard}"
            )
        span = Span(row.head_offset, stop, row.head_sha256)
        (data,) = self._source.spans(path, [span])
        where = f"{without_secrets(path)}: head of {name!r} at byte {row.head_offset}"
        if not span.is_right(data):
            raise ValueError(f"{where}: is damaged (its SHA-256 is not the one in {MANIFEST})")
        head = Head.from_json(data, row, size, where)
        with self._lock:
            self.head_bytes_read += len(data)
        self._heads.put(head)
        return head

    def read(self, name: str, y: int, x: int, height: int, width: int, level: int = 0) -> Raster:
        """Pixels of height x width px from (y, x), [height, width, bands]; 0 where missing.

        As they are stored: uint8, uint16 or float32. The rectangle may reach outside the image,
        where pixels are missing, too: `read_mask` says which are, and `region` gives both at once.
        level: of the stored ones, `ImageRow.levels`; ValueError, naming them, for another.
        """
        return self._region(
            name, self._rect(name, y, x, height, width, level), rasters=False
        ).pixels

    def read_mask(
        self, name: str, y: int, x: int, height: int, width: int, level: int = 0
    ) -> NDArray[np.bool_]:
        """Where there are pixels, bool [height, width]; arguments as in `read`.

        False outside the image, in tiles that its source leaves out, and in pixels without data.
        """
        rect = self._rect(name, y, x, height, width, level)
        present = np.zeros((height, width), np.bool_)
        head = self.head(name)
        with closing(self._blocks(head, self.fetch_for(head, rect))) as blocks:
            for block in blocks:
                block.paint_present(present, rect)
        return present

    def read_labels(
        self, name: str, y: int, x: int, height: int, width: int, level: int = 0
    ) -> Pixels:
        """Labels of height x width px from (y, x), uint8 [height, width]; 255 where there is none.

        Arguments as in `read`. ValueError if the image has no labels.
        """
        rect, head = self._rect(name, y, x, height, width, level), self.head(name)
        if head.classes is None:
            raise ValueError(f"image {name!r} has no labels: shard it with `labels=`")
        labels = np.full((height, width), UNLABELLED, np.uint8)
        with closing(self._blocks(head, self.fetch_for(head, rect))) as blocks:
            for block in blocks:
                block.paint_labels(labels, rect)
        return labels

    def read_instances(
        self, name: str, y: int, x: int, height: int, width: int, level: int = 0
    ) -> Instances:
        """Instances of height x width px from (y, x), uint16 [height, width]; 0 where none is.

        Arguments as in `read`. ValueError if the image has no instance raster.
        """
        rect, head = self._rect(name, y, x, height, width, level), self.head(name)
        if head.instances is None:
            raise ValueError(f"image {name!r} has no instances: shard it with `instances=`")
        instances = np.zeros((height, width), np.uint16)
        with closing(self._blocks(head, self.fetch_for(head, rect))) as blocks:
            for block in blocks:
                block.paint_instances(instances, rect)
        return instances

    def region(self, name: str, rect: Rect, *, spare: bool = False) -> Region:
        """All that is known of `rect`, in px of the image; it may reach outside.

        spare: what is damaged counts as missing, and is told in `Region.damaged`; otherwise it is a
        ValueError naming shard, offset and member.
        """
        return self._region(name, rect, rasters=True, spare=spare)

    def fetch_for(self, head: Head, rect: Rect) -> Fetch:
        """What is read for `rect` of the image of `head`; arithmetic, nothing is read.

        Of this machine's files without what lies between blocks: it has no requests to be saved.
        """
        return fetch_for(head, rect, gap=0) if self._source.local else fetch_for(head, rect)

    def block(self, name: str, entry: BlockEntry) -> Block:
        """One block of the image `name`, checked. ValueError as `region` has it."""
        path = self._path(name)
        (data,) = self._source.spans(path, _spans([entry]))
        return Block.parse(data, self.head(name), entry, without_secrets(path))

    def indexes(self, name: str, blocks: Sequence[BlockEntry]) -> list[BlockIndex]:
        """What each of `blocks` of the image `name` holds, for the last bytes of each.

        Where these do not reach back to the index, behind which rasters lie, more of them are
        fetched. An index read so is held to no checksum. ValueError as `region` has it.
        """
        head, path = self.head(name), self._path(name)
        shown = without_secrets(path)
        found: dict[BlockEntry, BlockIndex] = {}
        left, tail = list(blocks), TAIL
        while left:
            at_once = max(1, TAILS // tail)
            missed = []
            for start in range(0, len(left), at_once):
                some = left[start : start + at_once]
                ends = [entry.offset + entry.length for entry in some]
                ranges = [
                    (end - min(tail, e.length), end) for e, end in zip(some, ends, strict=True)
                ]
                for entry, data in zip(some, self._source.fetch(path, ranges), strict=True):
                    if len(data) == entry.length:
                        found[entry] = Block.parse(data, head, entry, shown).index
                    elif (index := index_at_end(data, head, entry, shown)) is not None:
                        found[entry] = index
                    else:
                        missed.append(entry)
            left, tail = missed, tail * 8
        return [found[entry] for entry in blocks]

    def shard_sizes(self) -> dict[str, int]:
        """Bytes of each shard by its name, in the order of the images; asked once."""
        names = dict.fromkeys(row.shard for row in self.images)
        return {name: self._size(f"{self._root}/{name}") for name in names}

    def _region(self, name: str, rect: Rect, *, rasters: bool, spare: bool = False) -> Region:
        _check_rect(rect)
        damaged: list[Damage] | None = [] if spare else None
        try:
            head = self.head(name)
        except ValueError as error:
            if damaged is None:
                raise
            damaged.append(Damage(name, "image", 0, 0, 0, str(error)))
            return painted(self.row(name), rect, [], rasters=rasters, damaged=damaged)
        fetch = self.fetch_for(head, rect)
        covered = damaged is None and fetch.covered
        with closing(self._blocks(head, fetch, damaged)) as blocks:
            region = painted(head, rect, blocks, covered=covered, rasters=rasters, damaged=damaged)
        return replace(region, bytes_read=fetch.bytes)

    def _blocks(
        self, head: Head, fetch: Fetch, damaged: list[Damage] | None = None
    ) -> Generator[Block, None, None]:
        """The blocks of `fetch`, one after the other; to be closed.

        damaged: where those that are damaged are noted, and left out; None: they are raised.
        """
        path = self._path(head.name)
        shown, left = without_secrets(path), deque(fetch.blocks)
        with closing(self._source.spans(path, _spans(fetch.blocks))) as stored:
            if damaged is None:
                for entry, data in zip(fetch.blocks, stored, strict=True):
                    yield Block.parse(data, head, entry, shown)
                return
            while left:
                try:
                    data = next(stored)
                except ValueError:  # of one of those that are left
                    break
                entry = left.popleft()
                try:
                    block = Block.parse(data, head, entry, shown)
                except ValueError as error:
                    damaged.append(block_damage(head, entry, error))
                else:
                    yield block
        for entry in left:  # one by one, to know which
            try:
                block = self.block(head.name, entry)
            except ValueError as error:
                damaged.append(block_damage(head, entry, error))
            else:
                yield block

    def _rect(self, name: str, y: int, x: int, height: int, width: int, level: int) -> Rect:
        """The rectangle that is asked for, in px of the stored level."""
        levels = self.row(name).levels
        if level not in range(len(levels)):
            sizes = ", ".join(f"{i} ({h} x {w} px)" for i, (h, w) in enumerate(levels))
            raise ValueError(f"level is {level}, allowed is what is stored of {name!r}: {sizes}")
        rect = Rect(y, y + height, x, x + width)
        _check_rect(rect)
        return rect

    def _path(self, name: str) -> str:
        """Of the shard that holds the image `name`."""
        return f"{self._root}/{self.row(name).shard}"

    def _size(self, path: str) -> int:
        """Bytes of the shard at `path`; asked once."""
        try:
            size = self._source.size(path)
        except FileNotFoundError:
            shown = without_secrets(path)
            raise ValueError(f"{shown}: {MANIFEST} names this shard, but it is not there") from None
        if size is None:
            raise DeniedError(
                f"{without_secrets(path)}: its server does not tell its size, which reading needs"
            )
        return size


def _spans(blocks: Sequence[BlockEntry]) -> list[Span]:
    return [Span(entry.offset, entry.offset + entry.length, entry.crc32c) for entry in blocks]


def _check_rect(rect: Rect) -> None:
    if rect.height < 0 or rect.width < 0:
        raise ValueError(f"height, width is {rect.height}, {rect.width}, allowed is 0 or more")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
