"""Looking at shards: what is in them, a region of one image, and what a mesh would read of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from axialtrain.data.facts import ImageFacts, SetFacts, image_facts, set_facts
from axialtrain.data.mesh_reads import MeshReads, mesh_of, mesh_reads
from axialtrain.data.picture import Picture, write_picture
from axialtrain.data.region import open_shards
from axialtrain.data.speed import Speed, measure
from axialtrain.data.whole import replacing
from axialtrain.grid import Rect

VERSION = 1  # of the record


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; None is what was not asked for."""

    facts: SetFacts | ImageFacts
    picture: Picture | None = None
    reads: MeshReads | None = None
    speed: Speed | None = None

    def __str__(self) -> str:
        parts = (self.facts, self.picture, self.reads, self.speed)
        return "\n".join(str(part) for part in parts if part is not None)

    def to_json(self) -> bytes:
        """The record for machines; the same shards give the same bytes, but for what is measured.

        Its keys are `version`; `set` or `image`; and, where they were asked for, `picture`, `mesh`
        and `bench`. Their keys are the fields of the classes here.
        """
        facts = asdict(self.facts)
        facts["tiles"]["empty_share"] = self.facts.tiles.empty_share
        record: dict[str, object] = {"version": VERSION}
        record["set" if isinstance(self.facts, SetFacts) else "image"] = facts
        if self.picture is not None:
            record["picture"] = asdict(self.picture)
        if self.reads is not None:
            record["mesh"] = asdict(self.reads) | {
                "bytes": self.reads.bytes,
                "over_read": self.reads.over_read,
                "imbalance": self.reads.imbalance,
                "tile_imbalance": self.reads.tile_imbalance,
            }
        if self.speed is not None:
            record["bench"] = asdict(self.speed)
        return json.dumps(record, indent=1).encode() + b"\n"

    def write(self, path: str | Path) -> None:
        """Write the record to `path`, whole or not at all."""
        with replacing(Path(path)) as file:
            file.write(self.to_json())


def inspect(
    url: str,
    image: str | None = None,
    *,
    patch: int = 16,
    region: Sequence[int] | None = None,
    png: str | Path | None = None,
    mesh: str | None = None,
    window: Sequence[int] | None = None,
    bench: bool = False,
    every: bool = False,
) -> Inspection:
    """Look at the shards in `url`, or at the one image `image` of them.

    patch: px of a token. region: (y, x, height, width) in px of what is written to `png`. mesh:
    "RxC", whose ranks' reading is told; window: (height, width) px at the centre that they share,
    None for the whole image. bench: measure how fast regions are read. every: look at every head
    and every block, however many there are.

    ValueError for a wrong argument, or where the shards are damaged.
    """
    if patch < 1:
        raise ValueError(f"patch is {patch}, allowed is at least 1")
    for key, value, other, there in (
        ("region", region, "an image and png", image is not None and png is not None),
        ("png", png, "an image and region", image is not None and region is not None),
        ("mesh", mesh, "an image", image is not None),
        ("window", window, "mesh", mesh is not None),
    ):
        if value is not None and not there:
            raise ValueError(f"{key} is {value}, allowed is only together with {other}")
    if window is not None and (len(window) != 2 or min(window) < 1):
        raise ValueError(f"window is {list(window)}, allowed is (height, width), each at least 1")
    if region is not None and len(region) != 4:
        raise ValueError(f"region is {list(region)}, allowed is (y, x, height, width)")
    shape = None if mesh is None else mesh_of(mesh)
    shards = open_shards(url)
    if image is None:
        speed = measure(shards) if bench else None
        return Inspection(set_facts(shards, url, patch, every=every), speed=speed)
    shards.row(image)  # there is one
    picture = reads = None
    if region is not None and png is not None:
        y, x, height, width = region
        picture = write_picture(shards, image, Rect(y, y + height, x, x + width), Path(png))
    if shape is not None:
        reads = mesh_reads(shards, image, shape, patch, window)
    speed = measure(shards, image) if bench else None
    return Inspection(image_facts(shards, image, patch, every=every), picture, reads, speed)
