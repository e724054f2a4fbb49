"""A region of a stored image as a PNG, for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from axialtrain.data.checked import shown
from axialtrain.data.codec import encode_png
from axialtrain.data.region import Shards
from axialtrain.data.thumbnail import rgb_of
from axialtrain.data.whole import replacing
from axialtrain.grid import Rect

MAX_PIXELS_BYTES = 1 << 28  # of the region: 9,459 x 9,459 of RGB
MAX_READ = 1 << 30  # bytes of the shard
MISSING = (255, 0, 255)  # magenta, which stained tissue and land rarely are


@dataclass(frozen=True)
class Picture:
    """What was written. path: the file. rect: px of the image. missing: pixels that are magenta."""

    path: str
    rect: Rect
    missing: int
    stretched: bool

    def __str__(self) -> str:
        said = f"{self.path}: {self.rect.height} x {self.rect.width} px"
        if self.stretched:
            said += ", stretched to their own range"
        return said + (f", {self.missing} missing ones in magenta" if self.missing else "")


def write_picture(shards: Shards, name: str, rect: Rect, path: Path) -> Picture:
    """Write `rect`, in px of the image `name`, to the PNG `path`, whole or not at all.

    RGB of 8 bits as it is, other pixels stretched to their own range, band by band; of more than 3
    bands the first three, of fewer the first. Missing pixels, also those outside the image, are
    MISSING. ValueError, before anything is read, if the region has no pixel of the image, takes
    more memory than MAX_PIXELS_BYTES or more of the shard than MAX_READ, or has no folder to go to.
    """
    head = shards.head(name)
    where = f"region is {rect.top} {rect.left} {rect.height} {rect.width}, allowed is"
    if rect.empty or rect.intersect(head.rect).empty:
        raise ValueError(
            f"{where} Y X HEIGHT WIDTH with pixels of {shown(name)}, "
            f"which has {head.height} x {head.width}"
        )
    most = MAX_PIXELS_BYTES // head.kind.pixel_bytes
    if rect.area > most:
        raise ValueError(f"{where} at most {most} px of {head.kind}; it has {rect.area}")
    size = shards.fetch_for(head, rect).bytes
    if size > MAX_READ:
        raise ValueError(f"{where} what lies in at most {MAX_READ} bytes; it lies in {size}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"png is {path}, allowed is a file in a folder that is there")
    region = shards.region(name, rect)
    shown_pixels = rgb_of(region.pixels, region.present)
    pixels = np.where(region.present[..., None], shown_pixels, np.array(MISSING, np.uint8))
    with replacing(path) as file:
        file.write(encode_png(pixels))
    missing = int(np.count_nonzero(~region.present))
    return Picture(str(path), rect, missing, head.dtype != "uint8")
