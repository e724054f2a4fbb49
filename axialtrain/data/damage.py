"""What is stored damaged, and what becomes of a run that meets it.

Damage lasts: the bytes will be as wrong the next time. So it may be left out, as if its pixels were
missing, and a run that is repeated leaves the same out. What passes, a server that is busy, is
tried again and then raised: leaving it out would make two runs differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from axialtrain.data.checked import Record, shown

POLICIES = ("raise", "mask", "skip_image")
PARTS = ("image", "block", "tile", "labels", "instances")
_MOST = 1 << 30


@dataclass
class DamageConfig:
    """What a run does where stored bytes are damaged: `data.damage`.

    policy: raise ends the run; mask leaves the tiles out, whose tokens become invalid; skip_image
        counts no sample that meets damage, on any rank.
    tiles, images: how many different tiles, and how many images that are skipped or cannot be read
        at all, a run may leave out; one more ends it.
    """

    policy: str = "raise"
    tiles: int = 100
    images: int = 10

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(
                f"data.damage.policy is {self.policy!r}, allowed are {', '.join(POLICIES)}"
            )
        for key in ("tiles", "images"):
            if getattr(self, key) < 0:
                raise ValueError(f"data.damage.{key} is {getattr(self, key)}, allowed is 0 or more")


@dataclass(frozen=True, order=True)
class Damage:
    """Something stored that cannot be read. The same on every rank that meets it.

    part: what of the image is lost: all of it, the pixels and rasters of a block, those of a tile,
    or a block's labels or instances. row, col: of that block or tile in the image; 0 for an image.
    tiles: whose pixels are lost; 0 where rasters are, and for an image, which counts as one.
    what: the shard, the byte and the member, and what is wrong there.
    """

    image: str
    part: str
    row: int
    col: int
    tiles: int
    what: str

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Says which it is."""
        return self.image, self.part, self.row, self.col

    @staticmethod
    def from_record(record: Record) -> Damage:
        """From a line of bad_tiles.jsonl; ValueError naming the key that is wrong."""
        texts = {}
        for key in ("image", "part", "what"):
            value = record.values.get(key)
            if not isinstance(value, str) or (key == "part" and value not in PARTS):
                raise record.wrong(key, " or ".join(PARTS) if key == "part" else "a text")
            texts[key] = value
        row, col, tiles = (record.integer(key, 0, _MOST) for key in ("row", "col", "tiles"))
        return Damage(texts["image"], texts["part"], row, col, tiles, texts["what"])

    def __str__(self) -> str:
        place = "" if self.part == "image" else f" ({self.row}, {self.col})"
        return f"image {shown(self.image)}: {self.part}{place}: {self.what}"
