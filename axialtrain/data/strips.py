"""Large parts of an image, strip by strip: beside the batch that is made of one, little is held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from axialtrain.grid import Rect

# px of a strip, and what its rows are a multiple of: a block of 8 tiles of 256 px, as a block that
# two strips have a part of is read twice.
STRIP, BLOCK = 2**28, 2048


def strips(part: Rect) -> Iterator[Rect]:
    """`part`, in px, from its top to its bottom: about STRIP at a time, or one row of blocks."""
    rows = max(1, STRIP // (BLOCK * part.width)) * BLOCK
    for top in range(part.top, part.bottom, rows):
        yield replace(part, top=top, bottom=min(top + rows, part.bottom))


def put(pixels: Tensor, here: tuple[int, slice, slice], values: NDArray[np.float32]) -> None:
    """pixels[here] = values, rounded where pixels are of fewer bits. pixels: [B, h, w, bands]."""
    if pixels.dtype is torch.float32:
        pixels.numpy()[here] = values  # by this thread alone
    else:
        pixels[here] = torch.from_numpy(values)
