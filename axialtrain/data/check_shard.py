"""All that can be wrong with one shard: every byte of it belongs to an image, and is as stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import google_crc32c

from axialtrain.data.check_block import Largest, check_block, padded
from axialtrain.data.codec import decode, jpeg_shape
from axialtrain.data.faults import COPY, COPY_EITHER, MADE_SO, MAX_FAULTS, Faults
from axialtrain.data.fetch import merge
from axialtrain.data.passing import without_secrets
from axialtrain.data.reading import ByteSource, Span
from axialtrain.data.store import (
    MANIFEST,
    TAR_RECORD,
    BlockEntry,
    Head,
    ImageRow,
    block_key,
    head_key,
)
from axialtrain.data.tar import is_file, is_sound, kind, parse_header

MAX_THUMBNAIL = 1 << 24  # bytes
MAX_THUMBNAIL_SIDE = 4096  # px
TAR_END = 2 * TAR_RECORD  # zero bytes at the end of an archive
_AT_ONCE = 1 << 24  # bytes of blocks that are asked for at once, over a network
_HEADERS = 1024  # asked for at once


@dataclass(frozen=True)
class Seen:
    """Of an image whose head is sound: what decides in which split it may be."""

    name: str
    group: str
    source_sha256: str


class ShardCheck:
    """Checks the images of one shard, `rows` of the manifest; `run` adds to `faults`.

    source: of the set, one for all of its shards. root: the set's folder there. mode: as `verify`
    has it. size: bytes of the shard, known after `measure`. seen: its images.
    """

    def __init__(
        self,
        source: ByteSource,
        root: str,
        faults: Faults,
        rows: list[ImageRow],
        mode: str,
    ) -> None:
        self.faults = faults
        self.size = 0
        self.seen: list[Seen] = []
        self._source = source
        self._path = f"{root}/{faults.shard}"
        self._rows = sorted(rows, key=lambda row: row.head_offset)
        self._mode = mode
        self._advance: Callable[[int], None] = _nothing
        self._spans: list[tuple[int, int, str]] = []  # of whose bytes are known
        self._unknown = 0  # images, or thumbnails, whose bytes are not known

    def measure(self) -> int:
        """The size of the shard; a fault, and 0, where it has none."""
        try:
            size = self._source.size(self._path)
            if size is None:
                raise ValueError("its server does not tell its size, which reading needs")
            self.size = size
        except FileNotFoundError:
            self.faults.add(f"{MANIFEST} names this shard, but it is not there")
        except (OSError, ValueError) as error:
            self._unreadable(error)
        return self.size

    def run(self, advance: Callable[[int], None]) -> None:
        """Check what `measure` found.

        advance: is called with the bytes that were dealt with; what it raises ends the check.
        """
        if self.faults.count:
            return
        self._advance = advance
        try:
            for row in self._rows:
                self._image(row)
            self._rest()
        except (OSError, ValueError) as error:  # a ValueError: it has become shorter
            self._unreadable(error)

    def _unreadable(self, error: Exception) -> None:
        self.faults.add(
            f"cannot be read ({str(error).removeprefix(f'{without_secrets(self._path)}: ')})",
            f"see that it can be read, and verify again; if it stays so, {COPY}",
        )

    def _image(self, row: ImageRow) -> None:
        head = self._head(row)
        if head is None:
            self._unknown += 1
            return
        self.seen.append(Seen(row.name, head.group, head.source_sha256))
        entries = sorted(head.blocks, key=lambda entry: entry.offset)
        runs = merge([(e.offset, e.offset + e.length) for e in entries], gap=0)
        self._spans += [(start, stop, f"blocks of {row.name!r}") for start, stop in runs]
        if self._mode == "quick":
            for at in range(0, len(entries), _HEADERS):
                self._first_headers(head, entries[at : at + _HEADERS])
            return
        largest = Largest() if self._mode == "deep" else None
        before = self.faults.count
        for some in _at_once(entries):
            spans = [Span(e.offset, e.offset + e.length, e.crc32c) for e in some]
            with closing(self._source.spans(self._path, spans)) as stored:
                for entry, data in zip(some, stored, strict=True):
                    check_block(data, head, entry, self.faults, largest)
                    self._advance(entry.length)
        if largest is not None and self.faults.count == before:
            self._check_largest(row, largest)

    def _check_largest(self, row: ImageRow, largest: Largest) -> None:
        for key, stored, found in (
            ("classes", row.classes, largest.classes),
            ("instances", row.instances, largest.instances),
        ):
            if stored is not None and stored != found:
                self.faults.add(
                    f"{key} is {stored} in {MANIFEST}, allowed is {found} as its rasters have it",
                    MADE_SO,
                    offset=row.head_offset,
                    member=f"{head_key(row.name)}.json",
                    image=row.name,
                )

    def _first_headers(self, head: Head, entries: list[BlockEntry]) -> None:
        """Compare the directory with the tar: a block's first member is where it says."""
        ranges = [(entry.offset, entry.offset + TAR_RECORD) for entry in entries]
        headers = self._source.fetch(self._path, ranges)
        for entry, header in zip(entries, headers, strict=True):
            prefix = f"{block_key(head.name, head.level, entry.row, entry.col)}."
            try:
                info = parse_header(header)
                if not info.name.startswith(prefix) or not is_file(info, entry.length - TAR_RECORD):
                    raise ValueError(
                        f"{kind(info)} of the name {info.name!r} stands there, allowed is a file "
                        "of this block"
                    )
            except ValueError as error:
                self.faults.add(
                    str(error), offset=entry.offset, member=prefix[:-1], image=head.name
                )

    def _head(self, row: ImageRow) -> Head | None:
        """The head of `row`; None, and a fault, where it is not as the manifest has it."""
        start, stop = row.head_bytes
        member = f"{head_key(row.name)}.json"

        def wrong(what: str, at: int = row.head_offset, name: str = member) -> None:
            self.faults.add(what, COPY_EITHER, offset=at, member=name, image=row.name)

        if stop > self.size:
            wrong(f"ends at byte {stop}, but the shard at byte {self.size}: it was cut short")
            return None

        def header_problem(data: bytes) -> str | None:
            return _not(data[:TAR_RECORD], member, row.head_length)

        def has_its_sum(data: bytes) -> bool:
            body = data[TAR_RECORD:][: row.head_length]
            return hashlib.sha256(body).hexdigest() == row.head_sha256

        data = self._read(start, stop, lambda came: not header_problem(came) and has_its_sum(came))
        body = data[TAR_RECORD:]
        head = None
        problem = header_problem(data)
        if problem is not None:
            wrong(problem, start)
        if not has_its_sum(data):
            wrong(f"is damaged (its SHA-256 is not the one in {MANIFEST})")
        else:
            try:
                head = Head.from_json(body[: row.head_length], row, self.size, "head")
            except ValueError as error:
                wrong(str(error).removeprefix("head: "))
        if self._mode != "quick" and body[row.head_length :].strip(b"\0"):
            wrong("the padding behind it is not zero", row.head_offset + row.head_length)
        if head is None:
            return None
        end = stop + self._thumbnail(row, head, stop)
        self._spans.append((start, end, f"the head of {row.name!r}"))
        self._advance(end - start)
        return head

    def _thumbnail(self, row: ImageRow, head: Head, start: int) -> int:
        """How many bytes the thumbnail takes whose header stands at byte `start`."""
        member = f"{head_key(row.name)}.thumbnail.jpg"

        def wrong(what: str, at: int = start + TAR_RECORD, remedy: str = COPY) -> None:
            self.faults.add(what, remedy, offset=at, member=member, image=row.name)

        header = self._read(
            start,
            min(start + TAR_RECORD, self.size),
            lambda came: _not(came, member, None) is None,
        )
        problem = _not(header, member, None)
        if problem is not None:
            wrong(problem, start)
            self._unknown += 1
            return 0
        size = parse_header(header).size
        stop = start + TAR_RECORD + padded(size)
        if size > MAX_THUMBNAIL or stop > self.size:
            wrong(
                f"has {size} bytes, allowed is {MAX_THUMBNAIL}, and up to the end of the shard",
                start,
            )
            self._unknown += 1
            return 0
        if self._mode != "quick":
            stored = head.thumbnail_crc32c

            def is_right(data: bytes) -> bool:
                return stored is None or google_crc32c.value(data[:size]) == stored

            data = self._read(start + TAR_RECORD, stop, is_right)
            if data[size:].strip(b"\0"):
                wrong("the padding behind it is not zero", start + TAR_RECORD + size)
            if not is_right(data):
                wrong("is damaged (its CRC-32C is not the stored one)")
            else:
                try:
                    _check_thumbnail(data[:size], whole=self._mode == "deep")
                except ValueError as error:
                    wrong(str(error), remedy=MADE_SO if stored is not None else COPY)
        return stop - start

    def _rest(self) -> None:
        """What belongs to no image: nothing but the end of the archive."""
        at = 0
        for start, stop, name in sorted(self._spans):
            if start < at:
                self.faults.add(
                    f"{name} start at byte {start}, inside what belongs to another image",
                    COPY_EITHER,
                    offset=start,
                )
            elif start > at and not self._unknown:
                self._strangers(at, start)
            at = max(at, stop)
        last = max(self.size - TAR_END, 0)
        end = self._read(last, self.size)
        if len(end) < TAR_END or end.strip(b"\0") or last < at:
            self.faults.add(
                f"the end of the archive, {TAR_END} zero bytes, is not there",
                offset=last if self._unknown else at,
            )
            last = self.size if self.size > at + TAR_END else at
        if not self._unknown:
            self._strangers(at, last)

    def _strangers(self, start: int, stop: int) -> None:
        """One fault for each member in bytes that belong to no image; one where there is none."""
        at = start
        for _ in range(MAX_FAULTS):
            if at >= stop:
                return
            try:
                info = parse_header(self._read(at, min(at + TAR_RECORD, self.size)))
            except ValueError:
                self.faults.add(
                    f"{stop - at} bytes belong to no image in {MANIFEST}", COPY_EITHER, offset=at
                )
                return
            self.faults.add(
                f"{kind(info)} that belongs to no image in {MANIFEST}",
                COPY_EITHER,
                offset=at,
                member=info.name,
            )
            at += TAR_RECORD + padded(max(info.size, 0))

    def _read(
        self, start: int, stop: int, is_right: Callable[[bytes], bool] | None = None
    ) -> bytes:
        """The bytes [start, stop), which are in the shard.

        is_right: what came over a network and is not, is fetched once more, as blocks are.
        """
        (data,) = self._source.fetch(self._path, [(start, stop)])
        if is_right is not None and not self._source.local and not is_right(data):
            (data,) = self._source.fetch(self._path, [(start, stop)])
        return data


def _nothing(done: int) -> None:
    pass


def _at_once(entries: Sequence[BlockEntry]) -> Iterator[list[BlockEntry]]:
    """`entries`, in order, in runs that take up to _AT_ONCE bytes; a larger one is a run alone."""
    run: list[BlockEntry] = []
    for entry in entries:
        if run and entry.offset + entry.length - run[0].offset > _AT_ONCE:
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def _not(header: bytes, member: str, size: int | None) -> str | None:
    """Why `header` is not that of the file `member` of `size` bytes; None where it is."""
    try:
        info = parse_header(header)
    except ValueError as error:
        return str(error)
    if info.name != member or not is_file(info, MAX_THUMBNAIL if size is None else size):
        return f"{kind(info)} of the name {info.name!r} stands there"
    if size is not None and info.size != size:
        return f"has {info.size} bytes, allowed are the {size} in {MANIFEST}"
    if not is_sound(header):
        return "its tar header is damaged"
    return None


def _check_thumbnail(data: bytes, *, whole: bool) -> None:
    height, width, bands = jpeg_shape(data)
    if max(height, width) > MAX_THUMBNAIL_SIDE or min(height, width) < 1:
        raise ValueError(f"is {height} x {width} px, allowed is 1 to {MAX_THUMBNAIL_SIDE}")
    if whole:
        decode(data, (height, width, bands))
