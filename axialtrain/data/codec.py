"""Encoded tiles: what their headers claim, and how they become pixels.

A header is read, and compared with what is expected, before a decoder is given the tile: a small
file must not be able to ask for a large amount of memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Instances = NDArray[np.uint16]  # numbers of instances, 0 where there is none

_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_APP0, _APP14 = 0xE0, 0xEE
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: what any decoder reads
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB = 0, 2  # PNG's colour types
_PNG_BANDS = {8: {_GREY: 1, _RGB: 3}, 16: {_GREY: 1}}  # bits -> colour type -> bands
_PNG_WORDS = {8: "8-bit grey or RGB", 16: "16-bit grey"}


def decode(data: bytes, shape: tuple[int, int, int]) -> Pixels:
    """The pixels of a stand-alone JPEG or PNG, uint8 [height, width, bands] = `shape`.

    ValueError if the header says anything but `shape`, or the data cannot be decoded.
    """
    png = data.startswith(_PNG)
    found = png_shape(data) if png else jpeg_shape(data)
    if found != shape:
        raise ValueError(f"is of shape {found} where {shape} belongs")
    return _decoded(imagecodecs.png_decode if png else imagecodecs.jpeg8_decode, data, shape)


def decode_instances(data: bytes, size: tuple[int, int]) -> Instances:
    """The numbers in a PNG of 16-bit grey, uint16 [height, width] = `size`.

    ValueError if the header says anything else, or the data cannot be decoded.
    """
    found = png_shape(data, bits=16)[:2]
    if found != size:
        raise ValueError(f"is of shape {found} where {size} belongs")
    return _decoded(imagecodecs.png_decode, data, size, np.uint16)


def _decoded(
    decoder: Callable[[bytes], NDArray[Any]],
    data: bytes,
    shape: tuple[int, ...],
    dtype: type[np.generic] = np.uint8,
) -> NDArray[Any]:
    try:
        pixels = decoder(data)
    except (RuntimeError, ValueError) as error:  # imagecodecs' own errors are RuntimeErrors
        raise ValueError(f"cannot be decoded ({error})") from error
    # The header promised both, but a chunk behind it (transparency, say) may add a band.
    if pixels.dtype != dtype or pixels.size != math.prod(shape):
        raise ValueError(f"decodes to {pixels.dtype} of shape {pixels.shape}, not {shape}")
    return pixels.reshape(shape)


def encode_png(pixels: Pixels | Instances) -> bytes:
    """`pixels` [h, w] or [h, w, 3] without loss. Level 6 halves label rasters against level 3."""
    return bytes(imagecodecs.png_encode(pixels, 6))


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(pixels, quality))


def png_shape(data: bytes, bits: int = 8) -> tuple[int, int, int]:
    """(height, width, bands) from the header of a PNG of 8 bits a band, or of 16 and one band."""
    if len(data) < 33 or not data.startswith(_PNG) or data[12:16] != b"IHDR":
        raise ValueError("is no PNG")
    depth, colour = data[24], data[25]
    if depth != bits or colour not in _PNG_BANDS[bits]:
        raise ValueError(
            f"is a PNG of {depth} bits and colour type {colour}, not {_PNG_WORDS[bits]}"
        )
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    return height, width, _PNG_BANDS[bits][colour]


def jpeg_shape(data: bytes) -> tuple[int, int, int]:
    """(height, width, bands) from the header of a JPEG of 8 bits a band."""
    for marker, start, stop in _segments(data):
        if marker in _FRAMES:
            if stop - start < 10 or data[start + 4] != 8:
                raise ValueError("is a JPEG that is not of 8 bits a band")
            height, width = (int.from_bytes(data[i : i + 2]) for i in (start + 5, start + 7))
            return height, width, data[start + 9]
        if marker in _OTHER_FRAMES:
            raise ValueError(f"is a JPEG of a kind (0x{marker:02X}) that few decoders read")
    raise ValueError("is a JPEG without a frame header")


def standalone_jpeg(data: bytes, tables: bytes | None, *, rgb: bool) -> bytes:
    """A tile of a TIFF as a JPEG that any decoder shows in the right colours. Nothing is decoded.

    tables: the TIFF's JPEGTables, which all its tiles share. rgb: whether the stored bands are
    R, G, B (Aperio does that) and not Y, Cb, Cr; a bare JPEG cannot say, the Adobe marker can.
    A JFIF marker would overrule it (JFIF is YCbCr by definition), so it goes.
    """
    transform = 0 if rgb else 1
    parts = [b"\xff\xd8", b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00", bytes([transform])]
    for stream in (tables, data):
        if stream is None:
            continue
        end = 2
        for marker, start, stop in _segments(stream):
            if marker in (_SCAN, _END):
                break
            end = stop
            if marker not in (_APP0, _APP14):
                parts.append(stream[start:stop])
        if stream is data:
            parts.append(data[end:])
    return b"".join(parts)


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
        length = int.from_bytes(data[at + 2 : at + 4])
        stop = at + 2 + length
        if length < 2 or stop > len(data):
            raise ValueError("is a JPEG that was cut short")
        found.append((marker, at, stop))
        if marker == _SCAN:
            return found
        at = stop
    raise ValueError("is a JPEG that was cut short")
