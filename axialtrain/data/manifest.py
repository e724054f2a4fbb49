"""The manifest: one row for each image, all that is loaded of a whole data set."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from axialtrain.data.checked import Record
from axialtrain.data.kinds import Kind
from axialtrain.data.names import NAME, NAME_WORDS, SHARD, SHARD_WORDS
from axialtrain.data.records import absent_or, check_apart, dump, fields_of
from axialtrain.data.statistics import Statistics

FORMAT_VERSION = 1
UNLABELLED = 255  # label of a pixel that is no target

MAX_SIDE = 1 << 20  # px, of an image
MAX_IMAGES = 1 << 22
MAX_LABEL = (1 << 16) - 1  # the class of a whole image
MAX_INSTANCE = (1 << 16) - 1  # a number in an instance raster
MAX_BYTES = 1 << 50  # of a shard: beyond any file, within exact JSON numbers
MAX_HEAD_BYTES = 1 << 28
TAR_RECORD = 512  # bytes: a tar header, and what members are padded to
SHA256 = re.compile(r"[0-9a-f]{64}")
SHA256_WORDS = "64 hexadecimal digits"


@dataclass(frozen=True)
class ImageRow:
    """The manifest's row of one image.

    head_offset, head_length: the bytes of the head's JSON in `shard`; head_sha256: of those bytes.
    height, width: px. classes: the largest label of its raster + 1, 0 where all is unlabelled, None
    without a raster. label: the class of the whole image, None where it has none. instances: the
    largest number in its instance raster, None without one; only an image with labels has one.
    bands, dtype: of its pixels; absent in JSON for RGB of 8 bits. statistics: of its bands, None
    where they were not taken.
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
    bands: int = Kind.bands
    dtype: str = Kind.dtype
    statistics: Statistics | None = None

    @property
    def kind(self) -> Kind:
        return Kind(self.bands, self.dtype)

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each stored level, px; one for now, of whatever level of the source.

        `level` counts them from 0 where an image is read.
        """
        return ((self.height, self.width),)

    @property
    def head_bytes(self) -> tuple[int, int]:
        """[start, stop) in `shard` of the head's JSON, its tar header and padding included."""
        data = -(-self.head_length // TAR_RECORD) * TAR_RECORD
        return self.head_offset - TAR_RECORD, self.head_offset + data

    @staticmethod
    def from_record(item: Record) -> ImageRow:
        kind = Kind.from_record(item)
        row = ImageRow(
            name=item.text("name", NAME, NAME_WORDS),
            shard=item.text("shard", SHARD, SHARD_WORDS),
            head_offset=item.integer("head_offset", TAR_RECORD, MAX_BYTES),
            head_length=item.integer("head_length", 2, MAX_HEAD_BYTES),
            head_sha256=item.text("head_sha256", SHA256, SHA256_WORDS),
            height=item.integer("height", 1, MAX_SIDE),
            width=item.integer("width", 1, MAX_SIDE),
            classes=item.integer_or_none("classes", 0, UNLABELLED),
            label=absent_or(item, "label", MAX_LABEL),
            instances=absent_or(item, "instances", MAX_INSTANCE),
            bands=kind.bands,
            dtype=kind.dtype,
            statistics=_statistics(item, kind),
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

    @property
    def statistics(self) -> Statistics | None:
        """Of all images together; None where an image has none, or they are not of one kind."""
        known = [row.statistics for row in self.images if row.statistics is not None]
        if len(known) < len(self.images) or len({row.kind for row in self.images}) > 1:
            return None
        return Statistics.joined(known)

    def to_json(self) -> bytes:
        rows = [fields_of(row) for row in self.images]
        return dump({"version": FORMAT_VERSION, "images": rows})

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
            check_apart(f"{where}: {shard}", ranges)
        return Manifest(rows)


def _statistics(item: Record, kind: Kind) -> Statistics | None:
    given = item.values.get("statistics")
    if given is None:
        return None
    return Statistics.from_record(Record.of(given, f"{item.where}: statistics"), kind.bands)
