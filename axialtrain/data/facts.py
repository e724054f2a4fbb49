"""What is stored: of a whole set from its manifest, of an image from its head.

What only heads tell (mpp, the size of tiles) and what only blocks tell (which tiles are stored) is
looked up in some of them, evenly spaced, where there are many: a set of a million blocks would take
a million requests. How many were looked at is told with what was found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from axialtrain.data.checked import shown
from axialtrain.data.kinds import Kind
from axialtrain.data.region import Shards
from axialtrain.data.store import BlockEntry, Head
from axialtrain.grid import tokens_across

MOST_HEADS = 256  # that are looked at
MOST_BLOCKS = 4096
_LABELS = 12  # classes of whole images that are listed for people


@dataclass(frozen=True)
class Spread:
    """Of some numbers; the median is one of them, the lower of two."""

    min: float
    median: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(min(values), median_low(values), max(values))

    def __str__(self) -> str:
        return f"{self.min:.10g} / {self.median:.10g} / {self.max:.10g}"


@dataclass(frozen=True)
class Tiles:
    """Which tiles are stored. blocks: all there are; blocks_seen: those that were looked at.

    all, stored: tiles of the latter, and those of them that their source did not leave out.
    """

    blocks: int
    blocks_seen: int
    all: int
    stored: int

    @property
    def empty_share(self) -> float:
        return 1 - self.stored / self.all

    def __str__(self) -> str:
        found = f"{self.all - self.stored} of {self.all} empty ({self.empty_share:.1%})"
        if self.blocks_seen == self.blocks:
            return found
        return f"{found}, in {self.blocks_seen} of {self.blocks} blocks"


@dataclass(frozen=True)
class KindFacts:
    """How many images have pixels of this kind."""

    bands: int
    dtype: str
    images: int


@dataclass(frozen=True)
class SetFacts:
    """Of a folder of shards.

    digest: of its manifest. bytes: of the shards. tokens: of all images, of patch x patch px, those
    cut by the border included. height, width: px. rasters, instances: images with a raster of
    labels, of instances; classes: the largest label in any + 1, None without. image_labels: how
    many whole images each class has. heads_seen: images whose heads were looked at; mpp: of those
    that tell it, None where none does; mpp_unknown: how many do not. tiles: of their blocks.
    """

    url: str
    digest: str
    images: int
    shards: int
    bytes: int
    pixels: int
    patch: int
    tokens: int
    kinds: tuple[KindFacts, ...]
    height: Spread
    width: Spread
    rasters: int
    classes: int | None
    instances: int
    image_labels: dict[int, int]
    heads_seen: int
    mpp: Spread | None
    mpp_unknown: int
    tiles: Tiles

    def __str__(self) -> str:
        kinds = ", ".join(f"{Kind(k.bands, k.dtype)} ({k.images} images)" for k in self.kinds)
        some = self.heads_seen < self.images
        seen = f", of {self.heads_seen} of {self.images} images" if some else ""
        mpp = "unknown" if self.mpp is None else f"{self.mpp} (min / median / max)"
        if self.mpp is not None and self.mpp_unknown:
            mpp += f", unknown of {self.mpp_unknown}"
        counts = [f"{label}: {n}" for label, n in list(self.image_labels.items())[:_LABELS]]
        more = len(self.image_labels) - len(counts)
        return "\n".join(
            (
                f"{self.url}: {self.images} images in {self.shards} shards, "
                f"{self.bytes / 1e6:.1f} MB",
                f"  pixels    {self.pixels / 1e9:.6g} gigapixels: {kinds}",
                f"  height    {self.height} px (min / median / max)",
                f"  width     {self.width} px",
                f"  tokens    {self.tokens} of {self.patch} x {self.patch} px",
                f"  mpp       {mpp}{seen}",
                f"  tiles     {self.tiles}{seen}",
                f"  labels    rasters of {self.rasters} images"
                + (f", classes 0 to {self.classes - 1}" if self.classes else "")
                + f"; instances of {self.instances}",
                "  classes   of whole images: "
                + (", ".join(counts) + f" and {more} more" * (more > 0) if counts else "none"),
            )
        )


@dataclass(frozen=True)
class ImageFacts:
    """Of one image: what `Head` and `ImageRow` have, under their names.

    tokens: (rows, cols) of them, of patch x patch px. tile_grid, block_grid: (rows, cols). bytes:
    of its blocks.
    """

    name: str
    shard: str
    height: int
    width: int
    level: int
    downsample: float
    bands: int
    dtype: str
    mpp: float | None
    crs: str | None
    transform: tuple[float, ...] | None
    group: str
    classes: int | None
    instances: int | None
    label: int | None
    encoding: str
    masked: bool
    tile: int
    tile_grid: tuple[int, int]
    block_grid: tuple[int, int]
    tiles: Tiles
    bytes: int
    source_sha256: str
    patch: int
    tokens: tuple[int, int]

    def __str__(self) -> str:
        missing = "some pixels are missing" if self.masked else "no pixel of a tile is missing"
        labels = "no raster" if self.classes is None else f"a raster of {self.classes} classes"
        if self.instances is not None:
            labels += f", instances up to {self.instances}"
        label = "none" if self.label is None else str(self.label)
        return "\n".join(
            (
                f"{shown(self.name)} in {shown(self.shard)}",
                f"  size      {self.height} x {self.width} px, {Kind(self.bands, self.dtype)}",
                f"  level     {self.level} of its source, downsampled by {self.downsample:g}",
                f"  tokens    {_by(self.tokens)} of {self.patch} x {self.patch} px",
                f"  mpp       {'unknown' if self.mpp is None else f'{self.mpp:g}'}",
                f"  crs       {'unknown' if self.crs is None else shown(self.crs)}",
                *([] if self.transform is None else [f"  transform {self.transform}"]),
                f"  group     {shown(self.group)}",
                f"  labels    {labels}; of the whole image: {label}",
                f"  tiles     {_by(self.tile_grid)} of {self.tile} x {self.tile} px as "
                f"{self.encoding}; {self.tiles}; {missing}",
                f"  blocks    {_by(self.block_grid)}, {self.bytes / 1e6:.1f} MB",
                f"  source    sha256 {self.source_sha256}",
            )
        )


def set_facts(shards: Shards, url: str, patch: int, *, every: bool = False) -> SetFacts:
    """Of the whole set, which was opened at `url`. every: look at all heads and all blocks.

    ValueError as `Shards.head` and `Shards.indexes` have it.
    """
    images, sizes = shards.images, shards.shard_sizes()
    seen = images if every else images[:: _step(len(images), MOST_HEADS)]
    known: list[float] = []
    blocks = 0
    for row in seen:
        head = shards.head(row.name)
        blocks += len(head.blocks)
        known += [] if head.mpp is None else [head.mpp]
    step = 1 if every else _step(blocks, MOST_BLOCKS)
    before = looked_at = slots = stored = 0
    for row in seen:  # their heads are kept, unless they are all of a large set
        head = shards.head(row.name)
        some = head.blocks[-before % step :: step]
        before += len(head.blocks)
        looked_at += len(some)
        slots += sum(_slots(head, entry) for entry in some)
        stored += sum(len(index.tiles) for index in shards.indexes(row.name, some))
    kinds = Counter((row.bands, row.dtype) for row in images)
    labels = Counter(row.label for row in images if row.label is not None)
    return SetFacts(
        url=url,
        digest=shards.digest,
        images=len(images),
        shards=len(sizes),
        bytes=sum(sizes.values()),
        pixels=sum(row.height * row.width for row in images),
        patch=patch,
        tokens=sum(
            tokens_across(row.height, patch) * tokens_across(row.width, patch) for row in images
        ),
        kinds=tuple(KindFacts(*kind, count) for kind, count in sorted(kinds.items())),
        height=Spread.of([row.height for row in images]),
        width=Spread.of([row.width for row in images]),
        rasters=sum(row.classes is not None for row in images),
        classes=shards.classes,
        instances=sum(row.instances is not None for row in images),
        image_labels=dict(sorted(labels.items())),
        heads_seen=len(seen),
        mpp=Spread.of(known) if known else None,
        mpp_unknown=len(seen) - len(known),
        tiles=Tiles(blocks, looked_at, slots, stored),
    )


def image_facts(shards: Shards, name: str, patch: int, *, every: bool = False) -> ImageFacts:
    """Of the image `name`. every: look at all of its blocks. ValueError as `set_facts` has it."""
    head, row = shards.head(name), shards.row(name)
    some = head.blocks if every else head.blocks[:: _step(len(head.blocks), MOST_BLOCKS)]
    return ImageFacts(
        name=head.name,
        shard=row.shard,
        height=head.height,
        width=head.width,
        level=head.level,
        downsample=head.downsample,
        bands=head.bands,
        dtype=head.dtype,
        mpp=head.mpp,
        crs=head.crs,
        transform=head.transform,
        group=head.group,
        classes=head.classes,
        instances=head.instances,
        label=head.label,
        encoding=head.encoding,
        masked=head.masked,
        tile=head.tile,
        tile_grid=head.tile_grid,
        block_grid=head.block_grid,
        tiles=Tiles(
            blocks=len(head.blocks),
            blocks_seen=len(some),
            all=sum(_slots(head, entry) for entry in some),
            stored=sum(len(index.tiles) for index in shards.indexes(name, some)),
        ),
        bytes=sum(entry.length for entry in head.blocks),
        source_sha256=head.source_sha256,
        patch=patch,
        tokens=(tokens_across(head.height, patch), tokens_across(head.width, patch)),
    )


def _step(count: int, most: int) -> int:
    """Every how many of `count` things are looked at, so that it is at most `most`."""
    return -(-count // most)


def _slots(head: Head, entry: BlockEntry) -> int:
    """Tiles of a block that lie in the image, stored or not."""
    rect = head.block_rect(entry.row, entry.col)
    return tokens_across(rect.height, head.tile) * tokens_across(rect.width, head.tile)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
