"""How images become shards: what is chosen once for all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from axialtrain.data.readers import AUTO, READERS
from axialtrain.data.store import BLOCK, BLOCKS, MAX_LEVEL, MAX_TILE, MIN_TILE, UNLABELLED
from axialtrain.data.tissue import ALL, HOW

PASSTHROUGH = ("auto", "never", "always")
ENCODE = ("lossless", "jpeg")


@dataclass(frozen=True)
class Sharding:
    """level: of each image's pyramid, 0 is the finest. mpp: micrometres per px to store instead.

    reader: of the images, one of READERS, or "auto". passthrough: whether tiles that the source
    holds as JPEG are copied: where it is possible, never, or always (others are refused). encode,
    quality: of the tiles that are not copied: without loss, or as JPEG of this quality where their
    pixels allow it. tile: px of the tiles that are not copied; None: as the source has them.
    block: tiles along each side of a block. keep, share: see `tissue.kept_tiles`; tiles that are
    not kept are recorded, not stored. background: the class of pixels that are in no polygon of
    GeoJSON labels; None: they are no target. statistics: of each band, into the manifest.
    shard_bytes: a shard is closed after the image with which it reaches this size.

    ValueError for what is not allowed.
    """

    level: int = 0
    mpp: float | None = None
    reader: str = AUTO
    passthrough: str = "auto"
    encode: str = "lossless"
    quality: int = 90
    tile: int | None = None
    block: int = BLOCK
    keep: str = ALL
    share: float = 0.0
    background: int | None = None
    statistics: bool = False
    shard_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for key, allowed in (
            ("reader", (AUTO, *READERS)),
            ("passthrough", PASSTHROUGH),
            ("encode", ENCODE),
            ("keep", HOW),
            ("block", BLOCKS),
        ):
            value = getattr(self, key)
            if value not in allowed:
                raise ValueError(
                    f"{key} is {value!r}, allowed are {', '.join(str(one) for one in allowed)}"
                )
        for key, low, high in (("level", 0, MAX_LEVEL), ("quality", 1, 100)):
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"{key} is {getattr(self, key)}, allowed is {low} to {high}")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes is {self.shard_bytes}, allowed is at least 1")
        if self.tile is not None and not MIN_TILE <= self.tile <= MAX_TILE:
            raise ValueError(f"tile is {self.tile}, allowed is {MIN_TILE} to {MAX_TILE} px")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}, allowed is 0 to 1")
        if self.background is not None and not 0 <= self.background < UNLABELLED:
            raise ValueError(
                f"background is {self.background}, allowed is a class from 0 to {UNLABELLED - 1}"
            )
        if self.mpp is not None:
            if not (self.mpp > 0 and math.isfinite(self.mpp)):
                raise ValueError(f"mpp is {self.mpp}, allowed are micrometres per px above 0")
            if self.level:
                raise ValueError(
                    f"level is {self.level} and mpp {self.mpp}, allowed is one of them"
                )
        if self.passthrough == "always" and self.tile is not None:
            raise ValueError(
                f"tile is {self.tile}, allowed is none where passthrough is always: tiles that are "
                "copied have the size that the source has"
            )
