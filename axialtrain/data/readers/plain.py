"""Small images as one PNG or JPEG, decoded as a whole: bounded by what that takes."""

from __future__ import annotations

from pathlib import Path

from axialtrain.data.codec import (
    decode,
    decode_indices,
    indices_shape,
    jpeg_shape,
    png_bits,
    png_shape,
)
from axialtrain.data.kinds import Kind, Raster
from axialtrain.data.readers.reader import (
    TILE,
    Info,
    Tile,
    check_level,
    check_size,
    padded,
    window_of,
)

MAX_BYTES = 1 << 28  # of the pixels: 9,459 x 9,459 of RGB
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


class PlainSource:
    """A PNG of 1 to 4 bands of 8 or 16 bits, or a JPEG of 1 or 3. An opacity says what is there."""

    def __init__(self, path: Path, level: int, *, indices: bool) -> None:
        """indices: whether a palette's indices are what is wanted; its colours never are."""
        self._path = path
        try:
            size = path.stat().st_size
            if size > 2 * MAX_BYTES:
                raise ValueError(f"{path}: takes {size} bytes, allowed is up to {2 * MAX_BYTES}")
            self._data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: not an image that can be read ({error})") from error
        png = self._data.startswith(_PNG)
        if not png and not self._data.startswith(_JPEG):
            raise ValueError(f"{path}: is no PNG or JPEG, which is all that reader=image reads")
        try:
            bits = png_bits(self._data) if png else 8
            shape = indices_shape(self._data) if png and indices else None
            self._indices = shape is not None
            if shape is None:
                shape = png_shape(self._data, bits) if png else jpeg_shape(self._data)
            self._shape = shape
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        height, width, bands = self._shape
        check_size(path, height, width)
        if not png and bands not in (1, 3):
            raise ValueError(f"{path}: is a JPEG of {bands} bands, allowed is 3 or 1")
        check_level(path, level, 1)
        self._dtype = "uint16" if bits == 16 else "uint8"
        taken = height * width * Kind(bands, self._dtype).pixel_bytes
        if taken > MAX_BYTES:
            raise ValueError(
                f"{path}: is {height} x {width} px, which take {taken} bytes, allowed for a PNG or "
                f"JPEG is up to {MAX_BYTES}: convert it to a tiled TIFF"
            )
        self._alpha = png and bands in (2, 4)
        self._pixels: Raster | None = None
        kind = Kind(bands - self._alpha, self._dtype)
        self.info = Info(height, width, kind, TILE, masked=self._alpha, opacity=self._alpha)

    def tile(self, row: int, col: int) -> Tile | None:
        if self._pixels is None:
            try:
                if self._indices:
                    self._pixels = decode_indices(self._data, self._shape)
                else:
                    self._pixels = decode(self._data, self._shape, self._dtype)
            except ValueError as error:
                raise ValueError(f"{self._path}: {error}") from error
        rect = window_of(self.info, row, col)
        pixels = self._pixels[rect.top : rect.bottom, rect.left : rect.right]
        if not self._alpha:
            return padded(self.info, pixels)
        return padded(self.info, pixels[..., :-1], pixels[..., -1] != 0)

    def jpeg(self, row: int, col: int) -> bytes | None:
        raise AssertionError("a JPEG as a whole is no tile")

    def close(self) -> None:
        self._pixels = None
