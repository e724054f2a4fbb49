"""What a pixel is made of, and what its tiles are stored as."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from axialtrain.data.checked import Record

Raster = NDArray[Any]  # [h, w, bands] of one of DTYPES

BANDS, DTYPE = 3, "uint8"  # where nothing else is said: RGB
MAX_BANDS = 64  # of images
MAX_FEATURES = 4096  # bands of float32: vectors that an encoder made of patches
DTYPES = {"uint8": 1, "uint16": 2, "float32": 4}  # bytes of a number
MAX_TILE_PIXELS_BYTES = 1 << 24  # of a decoded tile: 64 bands of float32 at 256 px, 4096 at 32
_DTYPE = re.compile("|".join(DTYPES))
_JPEG_BANDS = (1, 3)
_PNG_MOST = 4  # bands: grey or RGB, alone or with one more


@dataclass(frozen=True)
class Kind:
    """Of the pixels of an image.

    bands: 1 to MAX_BANDS, of float32 up to MAX_FEATURES. dtype: a key of DTYPES.
    """

    bands: int = BANDS
    dtype: str = DTYPE

    @staticmethod
    def from_record(record: Record) -> Kind:
        """Of its `bands` and `dtype`, which are absent where they are RGB of 8 bits."""
        bands, dtype = BANDS, DTYPE
        if "dtype" in record.values:
            dtype = record.text("dtype", _DTYPE, f"one of {', '.join(DTYPES)}")
        if "bands" in record.values:
            most = MAX_FEATURES if dtype == "float32" else MAX_BANDS
            bands = record.integer("bands", 1, most)
        return Kind(bands, dtype)

    def __str__(self) -> str:
        return f"{self.bands} band{'s' * (self.bands > 1)} of {self.dtype}"

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def pixel_bytes(self) -> int:
        return self.bands * DTYPES[self.dtype]

    @property
    def lossless(self) -> str:
        """The encoding that keeps such pixels as they are: PNG where it can hold them."""
        return "png" if self.bands <= _PNG_MOST and self.dtype != "float32" else "tif"

    @property
    def encodings(self) -> tuple[str, ...]:
        """Those that a tile of such pixels may have."""
        jpeg = self.dtype == "uint8" and self.bands in _JPEG_BANDS
        return ("jpg", self.lossless) if jpeg else (self.lossless,)


def chosen(kind: Kind, bands: Sequence[int] | None) -> Kind:
    """What the model is given of images of `kind`: those of its bands, None for all.

    ValueError, naming `data.bands`, if there is no such band.
    """
    if bands is None:
        return kind
    if max(bands) >= kind.bands:
        raise ValueError(
            f"data.bands has {max(bands)}, allowed are 0 to {kind.bands - 1}, of images that have "
            f"{kind}"
        )
    return Kind(len(bands), kind.dtype)
