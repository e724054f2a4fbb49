"""Tiles that no PNG holds (more than 4 bands, or float32) as TIFF: deflate with a predictor.

What is written is a plain TIFF of one strip, which any tool opens. What is read is only that: every
field is compared with what it must be, and the pixels are inflated into memory of their own size,
so that a file can ask for no more.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from axialtrain.data.checked import shown
from axialtrain.data.kinds import Raster

TIFF = b"II*\0"
_MAX_ENTRIES = 64
_DEFLATE, _HORIZONTAL, _FLOATING = 8, 2, 3
_FORMATS = {"uint8": (8, 1), "uint16": (16, 1), "float32": (32, 3)}  # bits, SampleFormat
_LEVEL = 6


def encode_tiff(pixels: Raster) -> bytes:
    """`pixels` [h, w, bands] without loss; the same pixels give the same bytes."""
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        pixels[..., 0] if pixels.shape[2] == 1 else pixels,
        byteorder="<",
        photometric="minisblack",
        planarconfig="contig" if pixels.shape[2] > 1 else None,
        rowsperstrip=pixels.shape[0],
        compression="zlib",
        compressionargs={"level": _LEVEL},
        predictor=True,
        metadata=None,
        software=False,
    )
    return file.getvalue()


def decode_tiff(data: bytes, shape: tuple[int, int, int], dtype: str) -> NDArray[Any]:
    """The pixels of a TIFF as `encode_tiff` writes it, `dtype` [height, width, bands] = `shape`.

    ValueError if the header says anything else, or the data cannot be decoded.
    """
    height, width, bands = shape
    bits, kind = _FORMATS[dtype]
    fields = _fields(data, max(bands, _MAX_ENTRIES))
    for name, tag, expected in (
        ("ImageWidth", 256, (width,)),
        ("ImageLength", 257, (height,)),
        ("BitsPerSample", 258, (bits,) * bands),
        ("Compression", 259, (_DEFLATE,)),
        ("SamplesPerPixel", 277, (bands,)),
        ("RowsPerStrip", 278, (height,)),
        ("Predictor", 317, (_FLOATING if dtype == "float32" else _HORIZONTAL,)),
        ("SampleFormat", 339, (kind,) * bands),
    ):
        # An absent SampleFormat means unsigned integers.
        found = fields.get(tag, (1,) * bands if tag == 339 else None)
        if found != expected:
            raise ValueError(
                f"is a TIFF whose {name} is {shown(found)} where {shown(expected)} belongs"
            )
    if fields.get(284, (1,)) != (1,):
        raise ValueError("is a TIFF whose bands are not interleaved")
    offset, length = fields.get(273, (0,)), fields.get(279, (0,))
    if len(offset) != 1 or len(length) != 1 or not 0 < length[0] <= len(data) - offset[0]:
        raise ValueError("is a TIFF whose strip does not end in it")
    strip = data[offset[0] : offset[0] + length[0]]
    pixels = np.empty(shape, dtype)
    try:
        raw = imagecodecs.zlib_decode(strip, out=pixels.nbytes)
        if len(raw) != pixels.nbytes:
            raise ValueError(f"inflates to {len(raw)} bytes where {pixels.nbytes} belong")
        stored = np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).reshape(shape)
        undo = imagecodecs.floatpred_decode if dtype == "float32" else imagecodecs.delta_decode
        undone: NDArray[Any] = undo(stored, axis=-2, out=pixels)
    except (RuntimeError, ValueError) as error:  # imagecodecs' own errors are RuntimeErrors
        raise ValueError(f"cannot be decoded ({error})") from error
    return undone


def _fields(data: bytes, most: int) -> dict[int, tuple[int, ...]]:
    """The numbers of the first directory, of its entries of up to `most` SHORT or LONG."""
    try:
        (at,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, at)
        if count > _MAX_ENTRIES:
            raise ValueError(f"is a TIFF of {count} entries, allowed is up to {_MAX_ENTRIES}")
        fields = {}
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from("<HHI", data, entry)
            letter = {3: "H", 4: "I"}.get(kind)
            if letter is None or values > most:
                continue
            size = struct.calcsize(f"<{values}{letter}")
            place = entry + 8 if size <= 4 else struct.unpack_from("<I", data, entry + 8)[0]
            fields[tag] = struct.unpack_from(f"<{values}{letter}", data, place)
    except struct.error as error:
        raise ValueError(f"is a TIFF that was cut short ({error})") from error
    return fields
