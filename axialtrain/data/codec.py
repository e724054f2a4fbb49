"""Encoded tiles: what their headers claim, and how they become pixels.

A header is read, and compared with what is expected, before a decoder is given the tile: a small
file must not be able to ask for a large amount of memory.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from axialtrain.data.kinds import DTYPE, Raster
from axialtrain.data.tile_tiff import TIFF, decode_tiff

Pixels = NDArray[np.uint8]
Instances = NDArray[np.uint16]  # numbers of instances, 0 where there is none

_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_SCAN_MARKER = bytes((0xFF, _SCAN))
_APP0, _APP14 = 0xE0, 0xEE
_BARE = (0x00, 0x01, *range(0xD0, _START + 1))  # no marker, TEM, restarts, a second start
_PROGRESSIVE = 0xC2
_FRAMES = (0xC0, 0xC1, _PROGRESSIVE)  # baseline, extended and this: what any decoder reads
MAX_SCANS = 100  # of a JPEG; encoders make ten. Each goes over all pixels, and takes 16 bytes.
_SHORT = 1 << 12  # bytes of a header that is remembered
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_BANDS = {0: 1, 2: 3, 4: 2, 6: 4}  # PNG's colour types without a palette -> bands
_GREY = {0: 1}
_EOI = b"\xff\xd9"  # the marker of a JPEG's end
_LOST = bytes(32)  # zeros that few JPEGs have in a row, and all that a block of zeros is in
_PALETTE = 3  # PNG's colour type
_DATA, _LAST = b"IDAT", b"IEND"  # PNG's chunks
_BITS = {"uint8": 8, "uint16": 16}
_BYTES = np.dtype(np.uint8)


def decode(
    data: bytes,
    shape: tuple[int, int, int],
    dtype: str = DTYPE,
    out: Raster | None = None,
    *,
    whole: bool = True,
) -> Raster:
    """The pixels of a stand-alone JPEG, PNG or TIFF of ours, `dtype` [height, width, bands].

    out: of that shape and dtype, into which a JPEG of several bands is decoded. whole: whether a
    JPEG is held to `check_jpeg`, which takes half as long again.
    ValueError if the header says anything but `shape` and `dtype`, or the data cannot be decoded.
    """
    if data.startswith(TIFF):
        return decode_tiff(data, shape, dtype)
    if dtype not in _BITS:
        raise ValueError(f"is no TIFF, as pixels of {dtype} are stored")
    png = data.startswith(_PNG)
    if not png and dtype != "uint8":
        raise ValueError(f"is no PNG, as pixels of {dtype} are stored")
    found = png_shape(data, _BITS[dtype]) if png else jpeg_shape(data)
    if found != shape:
        raise ValueError(f"is of shape {found} where {shape} belongs")
    if png:
        return _decoded(imagecodecs.png_decode, data, shape, np.dtype(dtype))
    if whole:
        check_jpeg(data)
    into = out if shape[2] > 1 else None
    return _decoded(lambda data: imagecodecs.jpeg8_decode(data, out=into), data, shape, _BYTES)


def check_jpeg(data: bytes) -> None:
    """ValueError unless the scans of a JPEG end where its pixels do.

    libjpeg makes up what is missing and only warns, which imagecodecs does not pass on. `data` is
    one whose header has been read (`jpeg_shape`). It is decoded at an eighth of its size: all codes
    are read, and most of the arithmetic is left out.

    A whole scan without an end behind it lacks nothing, nor does one whose header leaves out that
    it is of all frequencies: some encoders write such.
    """
    try:
        _probe(data, strict=True)
    except ValueError as error:
        if "Invalid SOS parameters" in str(error):
            return
        with suppress(ValueError):
            _probe(data.rstrip(b"\0") + _EOI, strict=True)
            return
        try:
            _probe(data, strict=False)
        except ValueError:  # of a kind that this decoder does not read, or worse than a warning
            _decoded(imagecodecs.jpeg8_decode, data, jpeg_shape(data), _BYTES)
        else:
            raise ValueError(f"is a damaged JPEG ({error})") from error


def looks_whole(data: bytes) -> bool:
    """Whether nothing of a JPEG seems to be missing: its end is there, and no zeros in its midst,
    as of a file that was cut or has lost a block. What says no may be whole: see `check_jpeg`."""
    data = data.rstrip(b"\0")
    return data.endswith(_EOI) and _LOST not in data


def _probe(data: bytes, *, strict: bool) -> None:
    simplejpeg.decode_jpeg(
        data, "GRAY", fastdct=True, fastupsample=True,
        min_height=1, min_width=1, min_factor=8, strict=strict,
    )  # fmt: skip


def memory_for(tile: int, bands: int) -> Pixels:
    """Memory for a tile to be decoded into, uint8 [tile, tile, bands].

    It does not start at a multiple of 32 bytes: libjpeg-turbo writes rows that do past the cache
    (non-temporal stores of AVX2), from where a copy has to fetch them.
    """
    size = tile * tile * bands
    memory = np.empty(size + 32, np.uint8)
    start = (16 - memory.ctypes.data) % 32
    return memory[start : start + size].reshape(tile, tile, bands)


class JpegTiles:
    """`decode` for tiles that are JPEGs alike, uint8 [tile, tile, bands], one after the other, but
    for `check_jpeg`, which is for when they are stored, and for `verify --deep`.

    They are decoded into the same memory, from which each is copied before the next one comes.
    """

    def __init__(self, tile: int, bands: int) -> None:
        self._shape = (tile, tile, bands)
        self._out = memory_for(tile, bands)
        self._into: Callable[[Any], NDArray[Any]] = partial(
            imagecodecs.jpeg8_decode, out=self._out if bands > 1 else None
        )
        self._header: bytes | None = None  # of the last one, where no other scan can follow it

    def __call__(self, data: memoryview) -> Pixels:
        """As `decode` has it."""
        header = self._header
        # (A view is compared byte by byte, a copy of so little at once.)
        if header is not None and bytes(data[: len(header)]) == header:
            # `_decoded`, but for what this header promises: it is called for each tile.
            try:
                pixels = self._into(data)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"cannot be decoded ({error})") from error
            return pixels if pixels is self._out else pixels.reshape(self._shape)
        copy = bytes(data)
        pixels = decode(copy, self._shape, out=self._out, whole=False)
        header = _header(copy)
        self._header = header if _frame_in(header) == (self._shape, True) else None
        return pixels


def decode_instances(data: bytes, size: tuple[int, int]) -> Instances:
    """The numbers in a PNG of 16-bit grey, uint16 [height, width] = `size`.

    ValueError if the header says anything else, or the data cannot be decoded.
    """
    found = png_shape(data, 16, _GREY)[:2]
    if found != size:
        raise ValueError(f"is of shape {found} where {size} belongs")
    return _decoded(imagecodecs.png_decode, data, size, np.dtype(np.uint16))


def indices_shape(data: bytes) -> tuple[int, int, int] | None:
    """(height, width, 1) from the header of a PNG of a palette; None for any other PNG."""
    if png_bits(data) > 8 or data[25] != _PALETTE:
        return None
    return int.from_bytes(data[20:24]), int.from_bytes(data[16:20]), 1


def decode_indices(data: bytes, shape: tuple[int, int, int]) -> Pixels:
    """The indices of a PNG of a palette, uint8 of `shape`, which is that of `indices_shape`.

    The decoder gives the palette's colours. So it is given the same numbers as a PNG of grey, and
    stretches those of fewer than 8 bits to 255.
    """
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33]):
        raise ValueError("is a damaged PNG (the checksum of its header is wrong)")
    header = data[12:25] + b"\0" + data[26:29]
    parts = [data[:12], header, zlib.crc32(header).to_bytes(4)]
    at = 33
    while at < len(data):
        stop = at + 12 + int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] in (_DATA, _LAST):
            parts.append(data[at:stop])
        at = stop
    grey = _decoded(imagecodecs.png_decode, b"".join(parts), shape, _BYTES)
    indices: Pixels = grey // (255 // (2 ** data[24] - 1))
    return indices


def _decoded(
    decoder: Callable[[Any], NDArray[Any]],
    data: bytes | memoryview,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> NDArray[Any]:
    try:
        pixels = decoder(data)
    except (RuntimeError, ValueError) as error:  # imagecodecs' own errors are RuntimeErrors
        raise ValueError(f"cannot be decoded ({error})") from error
    if pixels.shape == shape and pixels.dtype == dtype:
        return pixels
    # The header promised both, but a chunk behind it (transparency, say) may add a band.
    if pixels.dtype != dtype or pixels.size != math.prod(shape):
        raise ValueError(f"decodes to {pixels.dtype} of shape {pixels.shape}, not {shape}")
    return pixels.reshape(shape)


def encode_png(pixels: Raster) -> bytes:
    """`pixels` [h, w] or [h, w, 1 to 4] of 8 or 16 bits, without loss.

    Level 6 halves label rasters against level 3.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]  # whose strides are plain, whatever a view has made of the band's
    return bytes(imagecodecs.png_encode(pixels, 6))


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    if 1 in pixels.shape:  # along which any stride is contiguous to numpy, and not to the encoder
        pixels = pixels.copy()
    return bytes(imagecodecs.jpeg8_encode(pixels, quality))


def png_bits(data: bytes) -> int:
    """Bits of a band, from the header of a PNG."""
    if len(data) < 33 or not data.startswith(_PNG) or data[12:16] != b"IHDR":
        raise ValueError("is no PNG")
    return data[24]


def png_shape(
    data: bytes, bits: int = 8, colours: Mapping[int, int] = _PNG_BANDS
) -> tuple[int, int, int]:
    """(height, width, bands) from the header of a PNG of `bits`, 8 or 16, a band.

    colours: PNG's colour types that are let in, and their bands.
    """
    depth = png_bits(data)
    if depth != bits or bits not in _BITS.values() or data[25] not in colours:
        words = "grey" if colours is _GREY else "grey or RGB, with or without opacity"
        raise ValueError(
            f"is a PNG of {depth} bits and colour type {data[25]}, not "
            f"{16 if bits == 16 else 8}-bit {words}"
        )
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    return height, width, colours[data[25]]


def jpeg_shape(data: bytes) -> tuple[int, int, int]:
    """(height, width, bands) from the header of a JPEG of 8 bits a band."""
    shape, one_scan = _frame_in(_header(data)) or _frame(data)
    if not one_scan:
        scans = data.count(_SCAN)  # at most, and found ten times as fast as with the byte before
        if scans > MAX_SCANS and (scans := data.count(_SCAN_MARKER)) > MAX_SCANS:
            raise ValueError(f"is a JPEG of {scans} scans, allowed is {MAX_SCANS}")
    return shape


def _header(data: bytes) -> bytes:
    """A JPEG up to the end of its first scan's header, unless that is no scan's."""
    first = data.find(_SCAN_MARKER)
    return data[: first + 2 + int.from_bytes(data[first + 2 : first + 4])]


def _frame_in(header: bytes) -> tuple[tuple[int, int, int], bool] | None:
    """`_frame`, looked up: tiles of an image mostly begin with the same tables. None where it must
    be looked for in all of the tile."""
    if len(header) <= _SHORT:
        with suppress(ValueError):  # no scan, but two bytes of something before, or it is damaged
            return _known_frame(header)
    return None


def _frame(data: bytes) -> tuple[tuple[int, int, int], bool]:
    """(height, width, bands) of a JPEG that is whole up to its first scan, and whether that must be
    its only one: a decoder refuses a second where the first has all bands, each of them whole."""
    shape, sequential = None, False
    for marker, start, stop in _segments(data):
        if marker in _FRAMES and shape is None:
            if stop - start < 10 or data[start + 4] != 8:
                raise ValueError("is a JPEG that is not of 8 bits a band")
            height, width = (int.from_bytes(data[i : i + 2]) for i in (start + 5, start + 7))
            shape, sequential = (height, width, data[start + 9]), marker != _PROGRESSIVE
        if marker in _OTHER_FRAMES and shape is None:
            raise ValueError(f"is a JPEG of a kind (0x{marker:02X}) that few decoders read")
        if marker == _SCAN and shape is not None:
            return shape, sequential and stop - start > 4 and data[start + 4] == shape[2]
    if shape is None:
        raise ValueError("is a JPEG without a frame header")
    return shape, False


_known_frame = lru_cache(maxsize=64)(_frame)


def standalone_jpeg(data: bytes, tables: bytes | None, *, rgb: bool) -> bytes:
    """A tile of a TIFF as a JPEG that any decoder shows in the right colours. Nothing is decoded.

    tables: the TIFF's JPEGTables, which all its tiles share. rgb: whether the stored bands are
    R, G, B (Aperio does that) and not Y, Cb, Cr; a bare JPEG cannot say, the Adobe marker can.
    A JFIF marker would overrule it (JFIF is YCbCr by definition), so it goes.
    """
    transform = 0 if rgb else 1
    start = b"\xff\xd8\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    shared = b"" if tables is None else _tables(tables)
    own, end = _before_scan(data)
    return b"".join((start, shared, own, data[end:]))


def _before_scan(data: bytes) -> tuple[bytes, int]:
    """The segments of a JPEG before its scan, without those that tell its colours, and where they
    end."""
    parts, end = [], 2
    for marker, start, stop in _segments(data):
        if marker in (_SCAN, _END):
            break
        end = stop
        if marker not in (_APP0, _APP14):
            parts.append(data[start:stop])
    return b"".join(parts), end


@lru_cache(maxsize=16)
def _tables(tables: bytes) -> bytes:
    return _before_scan(tables)[0]


def _segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, stop) of each segment of a JPEG, to the first scan or the end."""
    if len(data) < 4 or data[0] != 0xFF or data[1] != _START:
        raise ValueError("is no JPEG")
    found = []
    at = 2
    while at + 2 <= len(data):
        if data[at] != 0xFF:
            raise ValueError("is a damaged JPEG (no marker where one belongs)")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == _END:
            found.append((marker, at, at + 2))
            return found
        if marker in _BARE:  # has no length: what follows would be read as another's
            raise ValueError(f"is a damaged JPEG (marker 0x{marker:02X} before its first scan)")
        length = int.from_bytes(data[at + 2 : at + 4])
        stop = at + 2 + length
        if length < 2 or stop > len(data):
            raise ValueError("is a JPEG that was cut short")
        found.append((marker, at, stop))
        if marker == _SCAN:
            return found
        at = stop
    raise ValueError("is a JPEG that was cut short")
