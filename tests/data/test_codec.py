"""JPEGs whose scans do not end where they should: decoders make up what is missing."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from axialtrain.cli import main
from axialtrain.data.codec import JpegTiles, check_jpeg, decode, encode_jpeg, looks_whole
from axialtrain.data.readers import open_image
from axialtrain.data.readers import tiff as tiff_reader
from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.data.verify import verify

SIDE = 64
PIXELS = np.asarray(
    Image.fromarray(np.random.default_rng(4).integers(0, 256, (9, 9, 3), np.uint8)).resize(
        (SIDE, SIDE)
    )
)


def saved(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "JPEG", **options)  # type: ignore[arg-type]
    return buffer.getvalue()


KINDS = {
    **{name: bytes(imagecodecs.jpeg8_encode(PIXELS, 90, subsampling=name))
       for name in ("444", "422", "420", "411", "440")},
    "RGB": bytes(imagecodecs.jpeg8_encode(PIXELS, 90, colorspace="rgb", outcolorspace="rgb")),
    "grey": encode_jpeg(np.ascontiguousarray(PIXELS[..., 0]), 90),
    "progressive": saved(progressive=True),
    "own tables": saved(optimize=True),
    "restarts": saved(restart_marker_blocks=3),
}  # fmt: skip


def half_zero(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "cut, with an end": lambda data: data[: len(data) // 2] + b"\xff\xd9",
    "zeros": half_zero,
    "zeros, with an end": lambda data: half_zero(data)[:-2] + b"\xff\xd9",
    "without the last codes": lambda data: data[:-12],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_that_does_not_end_where_it_should_is_refused(kind: str) -> None:
    data = KINDS[kind]
    shape = (SIDE, SIDE, 1 if kind == "grey" else 3)
    np.testing.assert_array_equal(decode(data, shape), decode(data, shape, whole=False))
    check_jpeg(data + bytes(7))  # as files are padded
    for end in (b"", bytes(7)):  # some encoders leave it out, and lose nothing
        np.testing.assert_array_equal(
            decode(data[:-2] + end, shape), decode(data, shape, whole=False)
        )
    for damage in DAMAGED.values():
        assert damage(data) != data
        with pytest.raises(ValueError, match=r"is a damaged JPEG \(.*(Premature|premature|marker)"):
            decode(damage(data), shape)


def test_what_only_the_decoder_of_the_pixels_reads_is_left_to_it() -> None:
    """Its colours are sampled in a way that the other one has no name for."""
    data = bytearray(KINDS["444"])
    at = data.index(b"\xff\xc0")
    data[at + 11] = 0x31
    check_jpeg(bytes(data))
    data[at + 11] = 0x44
    with pytest.raises(ValueError, match="cannot be decoded"):
        check_jpeg(bytes(data))


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A TIFF of four JPEG tiles, of which the second half of one is zeros."""
    path = tmp_path / "cut.tif"
    pixels = np.tile(PIXELS, (2, 2, 1))
    tifffile.imwrite(path, pixels, tile=(SIDE, SIDE), photometric="rgb", compression="jpeg")
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, size = page.dataoffsets[1], page.databytecounts[1]
    data = bytearray(path.read_bytes())
    data[offset + size // 2 : offset + size] = bytes(size - size // 2)
    path.write_bytes(data)
    return path


def test_an_image_with_a_damaged_jpeg_is_not_stored(
    cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    why = f"{cut}: tile row=0 col=1 is a damaged JPEG"
    Image.fromarray(PIXELS).save(tmp_path / "sound.png")
    given = [str(cut), str(tmp_path / "sound.png")]
    for options in (["--level", "0"], ["--passthrough", "never"], ["--keep", "tissue"]):
        to = str(tmp_path / options[1])
        assert main(["shard", *given, "--out", to, *options]) == 2
        assert why in capsys.readouterr().err
    assert main(["shard", *given, "--out", str(out), "--skip-errors"]) == 0
    assert why in (out / "skipped.csv").read_text()
    assert [row.name for row in open_shards(str(out)).images] == ["sound"]


def test_a_damaged_jpeg_as_a_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(half_zero(KINDS["444"]))
    with open_image(path) as image, pytest.raises(ValueError, match=r"a\.jpg: is a damaged JPEG"):
        image.tile_at(0, 0)


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_jpeg_of_strips_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    """Which GDAL decodes, and only warns."""
    path = tmp_path / "a.tif"
    pixels = np.tile(PIXELS, (2, 2, 1))
    tifffile.imwrite(path, pixels, rowsperstrip=SIDE, photometric="rgb", compression="jpeg")
    with open_image(path) as image:
        assert image.name == "rasterio"
        image.tile_at(0, 0)
    with tifffile.TiffFile(path) as file:
        offset, size = file.pages[0].dataoffsets[1], file.pages[0].databytecounts[1]
    data = path.read_bytes()
    strip = DAMAGED[damage](data[offset : offset + size])
    path.write_bytes(data[:offset] + strip + bytes(size - len(strip)) + data[offset + size :])
    with (
        open_image(path) as image,
        pytest.raises(ValueError, match=r"a\.tif: tile .* damaged JPEG"),
    ):
        image.tile_at(0, 0)
    assert capfd.readouterr().err == ""


def test_a_damaged_jpeg_that_was_stored_is_found(
    cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksums are right: it was damaged before."""
    with monkeypatch.context() as patched:
        patched.setattr(tiff_reader, "check_jpeg", lambda data: None)
        patched.setattr(tiff_reader, "decode", lambda *args: decode(*args, whole=False))
        shard_images([cut], tmp_path / "out", progress=False)
    out = str(tmp_path / "out")
    assert verify([out], mode="full").count == 0
    faults = verify([out], mode="deep").faults
    assert [(fault.member, "is a damaged JPEG" in fault.what) for fault in faults] == [
        ("cut/0/00000_00000.01.jpg", True)
    ]
    shards = open_shards(out)  # which does not look: that would take half as long again
    assert shards.region("cut", shards.head("cut").rect).present.all()


def test_tiles_one_after_the_other_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axialtrain.data.codec.check_jpeg", lambda data: 1 / 0)
    decoder = JpegTiles(SIDE, 3)
    for kind in ("444", "444", "progressive", "420"):
        np.testing.assert_array_equal(
            decoder(memoryview(KINDS[kind])), imagecodecs.jpeg8_decode(KINDS[kind])
        )


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_seems_whole_is_copied_unread(kind: str, damage: str) -> None:
    """A scan that was cut, and ends in a marker all the same, is left to `verify --deep`."""
    data = KINDS[kind]
    assert looks_whole(data)
    assert looks_whole(data + bytes(7))
    assert looks_whole(DAMAGED[damage](data)) == (damage == "cut, with an end")
