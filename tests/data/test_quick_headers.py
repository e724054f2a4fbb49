"""Headers that are parsed by less work say what the thorough way says."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from axialtrain.data.codec import JpegTiles, decode, encode_jpeg, jpeg_shape
from axialtrain.data.tar import parse_header, plain_file

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=100)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")[:512]


@given(name=NAMES.filter(lambda name: not name.endswith("/")), size=st.integers(0, 8**11 - 1))
def test_plain_file_is_what_tarfile_says(name: str, size: int) -> None:
    data = header(name, size)
    info = parse_header(data)
    assert plain_file(data) == (info.name, info.size) == (name, size)
    assert plain_file(b"before" + data, 6, sound=True) == (name, size)


@settings(max_examples=300)
@given(at=st.integers(0, 511), value=st.integers(0, 255), size=st.integers(0, 1 << 20))
def test_any_changed_byte_is_left_to_tarfile_or_is_the_same(at: int, value: int, size: int) -> None:
    data = bytearray(header("a/0/00000_00000.07.jpg", size))
    data[at] = value
    found = plain_file(bytes(data))
    if found is not None:
        info = parse_header(bytes(data))
        assert found == (info.name, info.size)
        assert info.type == tarfile.REGTYPE


@settings(max_examples=300)
@given(at=st.integers(0, 511), value=st.integers(0, 255), size=st.integers(0, 1 << 20))
def test_a_sound_header_is_read_as_tarfile_reads_it(at: int, value: int, size: int) -> None:
    """With any byte changed, and the sum made right again."""
    data = bytearray(header("a/0/00000_00000.07.jpg", size))
    data[at] = value
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    found = plain_file(bytes(data), sound=True)
    if found is None:
        return
    try:
        info = parse_header(bytes(data))
    except ValueError:  # for a field that is none of name, size, type, magic
        read = (*range(100), *range(124, 136), 156, *range(257, 265))
        assert at not in read
    else:
        assert found == (info.name, info.size)
        assert info.type == tarfile.REGTYPE


@pytest.mark.parametrize(
    "data",
    [
        header("a", 3, tarfile.SYMTYPE),
        header("a", 0, tarfile.DIRTYPE),
        header("a/" * 60 + "b", 3),  # in two parts
        header("\xe9", 3),
        header("a", 3)[:-1],
        bytes(512),
    ],
    ids=["link", "folder", "long", "not ASCII", "short", "zeros"],
)
def test_what_is_not_plain_is_left_to_tarfile(data: bytes) -> None:
    assert plain_file(data) is plain_file(data, sound=True) is None


def test_remembered_jpeg_headers_are_those_of_the_tile() -> None:
    rng = np.random.default_rng(0)
    for height, width in [(16, 16), (24, 16), (16, 24), (16, 16)] * 2:
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        data = encode_jpeg(pixels, 90)
        assert jpeg_shape(data) == (height, width, 3)
        out = np.empty((height, width, 3), np.uint8)
        plain = decode(data, (height, width, 3))
        assert decode(data, (height, width, 3), out=out) is not plain
        np.testing.assert_array_equal(out, plain)


def test_two_bytes_like_those_of_a_scan_in_a_comment() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16), (9, 99, 200)).save(buffer, "JPEG", comment=b"\xff\xda\x00\x04" * 3)
    assert jpeg_shape(buffer.getvalue()) == (16, 32, 3)
    with pytest.raises(ValueError, match=r"cut short|no frame header|no marker"):
        jpeg_shape(buffer.getvalue()[:60])


def test_jpegs_one_after_the_other() -> None:
    """Of like headers and of others, in colour and in grey; what is none of them is refused."""
    rng = np.random.default_rng(1)
    colour = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
    tiles = [encode_jpeg(colour[i % 3], quality) for i, quality in enumerate([90, 90, 50, 50, 90])]
    buffer = io.BytesIO()
    Image.fromarray(colour[0]).save(buffer, "JPEG", progressive=True)
    tiles[3:3] = [buffer.getvalue(), buffer.getvalue()]
    decoder = JpegTiles(16, 3)
    for data in tiles:
        np.testing.assert_array_equal(decoder(data), decode(data, (16, 16, 3)))
    grey = encode_jpeg(np.ascontiguousarray(colour[0, ..., 0]), 90)
    with pytest.raises(ValueError, match=r"is of shape \(16, 16, 1\) where \(16, 16, 3\) belongs"):
        decoder(grey)
    with pytest.raises(ValueError, match="is a JPEG"):
        decoder(tiles[0][:100])
    for _ in range(2):
        np.testing.assert_array_equal(JpegTiles(16, 1)(grey), decode(grey, (16, 16, 1)))
