"""Shards and images of people who mean harm: one clean error each, and no memory beyond measure."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forged
import numpy as np
import pytest
import tifffile

from axialtrain.data.codec import MAX_SCANS, decode, encode_jpeg, encode_png, jpeg_shape
from axialtrain.data.readers import open_image
from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.data.verify import MODES, verify
from axialtrain.data.whole import replacing
from axialtrain.grid import Rect

FUZZED = int(os.environ.get("AXIALTRAIN_FUZZ", "300"))  # inputs
SIDE = 1 << 31  # px that a header claims
ALL = Rect(0, 150, 0, 40)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labelled images of 2 blocks in one shard, the first of PNG tiles, with instances."""
    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    for name in "ab":
        pixels = rng.integers(0, 256, (150, 40, 3), np.uint8)
        tifffile.imwrite(folder / f"{name}.tif", pixels, tile=(16, 16), photometric="rgb")
    tifffile.imwrite(folder / "labels.tif", rng.integers(0, 6, (150, 40), np.uint8), tile=(16, 16))
    tifffile.imwrite(
        folder / "numbers.tif", rng.integers(0, 9, (150, 40), np.uint16), tile=(16, 16)
    )
    shard_images(
        [folder / "a.tif", folder / "b.tif"],
        folder / "shards",
        labels=[folder / "labels.tif"] * 2,
        instances=[folder / "numbers.tif"] * 2,
        progress=False,
    )
    return folder / "shards"


@pytest.fixture
def copy(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "copy"))


def refused(folder: Path, what: str, *, mode: str = "full", image: str = "a") -> None:
    """Reading `image` is a ValueError, and `verify` has a fault, that say `what`."""
    with pytest.raises(ValueError, match=what):
        open_shards(str(folder)).region(image, ALL)
    reported(folder, what, mode)


def reported(folder: Path, what: str, mode: str = "full") -> None:
    faults = verify([folder], mode=mode, jobs=1, progress=False).faults
    assert any(re.search(what, str(fault)) for fault in faults), faults


def test_forging_without_a_change_is_seen_by_nobody(copy: Path) -> None:
    forged.forge(copy, "a")
    for mode in MODES:
        assert verify([copy], mode=mode, progress=False).faults == []


NAMES = {
    "up": "../../etc/passwd",
    "absolute": "/etc/passwd",
    "up behind its key": "a/0/00000_00000.../../x",
    "not UTF-8": "a/0/00000_00000.\udcff.png",
    "another image's": "b/0/00000_00000.00.png",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_member_of_another_name(copy: Path, name: str) -> None:
    extra = forged.header(name, 3) + b"bad".ljust(512, b"\0")
    forged.forge(copy, "a", block=lambda data: data + extra)
    faults = verify([copy], jobs=1, progress=False).faults
    assert {fault.image for fault in faults} == {"a"}
    assert {fault.shard for fault in faults} == {"shard-00000.tar"}
    with pytest.raises(ValueError, match=r"shard-00000\.tar: byte \d+: "):
        open_shards(str(copy)).region("a", ALL)


KINDS = {
    "hard link": tarfile.LNKTYPE,
    "symbolic link": tarfile.SYMTYPE,
    "device": tarfile.CHRTYPE,
    "folder": tarfile.DIRTYPE,
    "pipe": tarfile.FIFOTYPE,
    "sparse file": tarfile.GNUTYPE_SPARSE,
    "type b'x'": tarfile.XHDTYPE,
    "type b'L'": tarfile.GNUTYPE_LONGNAME,
}


@pytest.mark.parametrize("kind", KINDS)
def test_member_that_is_no_file(copy: Path, kind: str) -> None:
    link = forged.header("a/0/00000_00000.00.png", 0, KINDS[kind], "../../etc/passwd")
    clean = copy.with_name("clean")
    shutil.copytree(copy, clean)
    forged.forge(copy, "a", block=lambda data: link + data)
    refused(copy, "stands there|is no file")
    reported(copy, kind)
    # Between two images, where no reader looks.
    data = (clean / "shard-00000.tar").read_bytes()
    (clean / "shard-00000.tar").write_bytes(data[:-1024] + link + bytes(1024))
    faults = verify([clean], jobs=1, progress=False).faults
    assert any(kind in fault.what and "belongs to no image" in fault.what for fault in faults)
    assert any(fault.offset == len(data) - 1024 for fault in faults)


def test_member_that_is_longer_than_its_block(copy: Path) -> None:
    header = forged.header("a/0/00000_00000.00.png", 8**11 - 1)
    forged.forge(copy, "a", block=lambda data: header + data[512:])
    refused(copy, "is no file that ends in its block|allowed is a file that ends in its block")


def test_member_of_a_negative_size(copy: Path) -> None:
    def negative(data: bytes) -> bytes:
        header = bytearray(data[:512])
        header[124:136] = (-512).to_bytes(12, "big", signed=True)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + data[512:]

    forged.forge(copy, "a", block=negative)
    refused(copy, "is no file that ends in its block|allowed is a file that ends in its block")


def overlapping(record: dict[str, Any]) -> None:
    record["blocks"][1] |= {key: record["blocks"][0][key] for key in ("offset", "length", "crc32c")}


def over_the_head(record: dict[str, Any]) -> None:
    record["blocks"][1]["offset"] = record["blocks"][0]["offset"] + 8 * 512


def negative(record: dict[str, Any]) -> None:
    record["blocks"][1]["offset"] = -512


def beyond(record: dict[str, Any]) -> None:
    record["blocks"][1]["length"] = 1 << 40


@pytest.mark.parametrize("change", [overlapping, over_the_head, negative, beyond])
def test_ranges_that_overlap_or_lie_outside(
    copy: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    forged.forge(copy, "a", head=change)
    refused(copy, "starts at byte|offset is|length is", mode="quick")


def test_blocks_of_another_image(copy: Path) -> None:
    """Of one image inside those of another: each head is right by itself."""
    shards = open_shards(str(copy))
    theirs = {(e.row, e.col): e for e in shards.head("a").blocks}

    def steal(record: dict[str, Any]) -> None:
        for entry in record["blocks"]:
            stolen = theirs[entry["row"], entry["col"]]
            entry |= {"offset": stolen.offset, "length": stolen.length, "crc32c": stolen.crc32c}

    forged.forge(copy, "b", head=steal)
    refused(copy, "stands there, allowed are members that start with 'b/0/", image="b")
    reported(copy, "inside what belongs to another image", "quick")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shard", "../shard-00000.tar"),
        ("shard", "/etc/passwd"),
        ("shard", "a/b.tar"),
        ("shard", "shard-\udcff.tar"),
        ("name", "../a"),
        ("name", "\x1b[2J"),
        ("head_offset", -1),
        ("head_length", 1 << 62),
        ("height", SIDE),
        ("width", 1e9),
    ],
)
def test_row_of_a_liar(copy: Path, key: str, value: object) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["images"][1][key] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused(copy, rf"manifest\.json: images\[1\]: {key} is ", mode="quick")


def test_heads_over_each_other(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    keys = ("head_offset", "head_length", "head_sha256")
    manifest["images"][1] |= {key: manifest["images"][0][key] for key in keys}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused(copy, "allowed is behind head of 'a'", mode="quick")


def claims(width: int, height: int, data: bytes) -> bytes:
    """A PNG or JPEG whose header says another size."""
    if data.startswith(b"\x89PNG"):
        header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    at = data.index(b"\xff\xc0")
    size = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    return data[: at + 5] + size + data[at + 9 :]


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def with_chunk(png: bytes, extra: bytes) -> bytes:
    """A PNG with a chunk behind its header."""
    return png[:33] + extra + png[33:]


def zeros(count: int) -> bytes:
    """`count` zeros, a multiple of a million, as zlib has them: a thousandth of that."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(10**6)) for _ in range(count // 10**6)) + packer.flush()


SMALL = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
PNG, JPEG = encode_png(SMALL), encode_jpeg(SMALL, 80)


@pytest.mark.parametrize("data", [PNG, JPEG], ids=["png", "jpeg"])
@pytest.mark.parametrize("size", [(SIDE - 1, SIDE - 1), (SIDE, SIDE), (65535, 65535), (0, 0)])
def test_tile_that_claims_a_size(copy: Path, data: bytes, size: tuple[int, int]) -> None:
    tile = claims(*size, data)
    with pytest.raises(ValueError, match="is of shape"):
        decode(tile, (16, 16, 3))
    forged.forge(copy, "a", member=lambda name, old: tile if name == "00.png" else old)
    with pytest.raises(ValueError, match=r"00\.png: is of shape"):
        open_shards(str(copy)).region("a", ALL)
    reported(copy, "is of shape", "deep")
    assert verify([copy], mode="full", progress=False).count == 0  # whole, if not good


@pytest.mark.parametrize("name", ["labels.png", "instances.png", "thumbnail.jpg"])
def test_other_members_that_claim_a_size(copy: Path, name: str) -> None:
    size = (SIDE - 1, SIDE - 1) if name.endswith("png") else (65535, 65535)
    forged.forge(copy, "a", member=lambda n, old: claims(*size, old) if n == name else old)
    reported(copy, "is of shape" if name.endswith("png") else "65535 x 65535 px", "deep")


def test_values_beyond_those_of_the_manifest(copy: Path) -> None:
    worse = {
        "labels.png": encode_png(np.full((128, 40), 9, np.uint8)),
        "instances.png": encode_png(np.full((128, 40), 99, np.uint16)),
    }
    for name, text in (("labels.png", "has label 9"), ("instances.png", "has instance 99")):
        folder = Path(shutil.copytree(copy, copy.with_name(name)))

        def member(n: str, old: bytes, name: str = name) -> bytes:
            return worse[name] if n == name and len(old) > 1000 else old

        forged.forge(folder, "a", member=member)
        refused(folder, text, mode="deep")


def test_hidden_members_and_bytes(copy: Path) -> None:
    """What no reader of ours looks at: a member in no index, and padding that is not zero."""
    stray = forged.sample("a/0/00000_00000", {"txt": b"hello"})
    folder = Path(shutil.copytree(copy, copy.with_name("stray")))
    forged.forge(folder, "a", block=lambda data: data + stray if b"00000_00000" in data else data)
    reported(folder, "is in no index of its block")
    folder = Path(shutil.copytree(copy, copy.with_name("padding")))
    forged.forge(folder, "a", block=lambda data: data[:-1] + b"!")
    reported(folder, "the padding behind it is not zero")


@pytest.mark.parametrize(
    ("name", "data", "size"),
    [("a.png", PNG, SIDE - 1), ("b.png", PNG, 100_000), ("c.jpg", JPEG, 65535)],
)
def test_image_that_claims_a_size(tmp_path: Path, name: str, data: bytes, size: int) -> None:
    (tmp_path / name).write_bytes(claims(size, size, data))
    with pytest.raises(ValueError, match=rf"{name}: is {size} x {size} px.*allowed .*up to"):
        open_image(tmp_path / name)


def test_jpeg_of_endless_scans() -> None:
    """Each scan goes over all pixels, and takes 12 bytes: a tile could take hours."""
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(SMALL).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    decode(data, (16, 16, 3))
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(ValueError, match=f"scans, allowed is {MAX_SCANS}"):
        decode(data[:-2] + scan * MAX_SCANS + data[-2:], (16, 16, 3))


@pytest.mark.parametrize("marker", [0x00, 0x01, 0xD0, 0xD7, 0xD8])
def test_jpeg_whose_segments_decoders_see_elsewhere(marker: int) -> None:
    """Behind a marker that has no length, others read on at once: what we took for the length of a
    segment would hide the frame that they see, and show us another, of any size and one scan."""
    data = encode_jpeg(np.zeros((16, 16, 3), np.uint8), 90)
    hidden = data[:2] + bytes((0xFF, marker)) + data[2:]
    with pytest.raises(ValueError, match=f"marker 0x{marker:02X} before its first scan"):
        jpeg_shape(hidden)


@pytest.mark.parametrize("bands", [1, 3])
def test_sequential_jpeg_has_one_scan(bands: int) -> None:
    """Scans of it are not counted, for the decoder refuses a second by itself, before it is read:
    as many as are here would take seconds."""
    side, times = 512, 2_000
    data = encode_jpeg(np.zeros((side, side, bands), np.uint8), 90)
    shape = jpeg_shape(data)
    scan = data[data.rindex(b"\xff\xda") : -2]
    several = data[:-2] + scan * times + data[-2:]
    assert jpeg_shape(several) == shape == (side, side, bands)
    started = time.process_time()
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(several, shape)
    assert time.process_time() - started < 1.0
    # Of one that has only its first band in its first scan they are.
    at = several.index(b"\xff\xda")
    partly = several[:at] + several[at : at + 4] + b"\x01" + several[at + 5 :]
    if bands == 3:
        with pytest.raises(ValueError, match="scans, allowed"):
            jpeg_shape(partly)


BOMBS = """
import resource, sys
from pathlib import Path
from axialtrain.data.codec import decode
from axialtrain.data.readers import open_image
from axialtrain.data.region import open_shards
from axialtrain.data.verify import verify
from axialtrain.grid import Rect

decode(Path(sys.argv[1]).read_bytes(), (16, 16, 3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[2:]:
    path = Path(name)
    try:
        if path.is_dir():
            verify([path], mode="deep", jobs=1, progress=False)
            for row in open_shards(name).images:
                open_shards(name).region(row.name, Rect(0, 150, 0, 40))
        elif path.suffix == ".tif":
            with open_image(path) as image:
                image.read(Rect(0, 16, 0, 16))
        else:
            decode(path.read_bytes(), (16, 16, 3))
    except ValueError as error:
        print(path.name, "refused:", str(error)[:200])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert grown < 50, f"{name} took {grown} MB"
print("ended")
"""


@pytest.mark.slow
def test_bombs_take_no_memory(copy: Path, tmp_path: Path) -> None:
    """Small files that unpack to 100 MB, in a process whose memory is looked at."""
    many = zeros(100 * 10**6)
    good = tmp_path / "good.png"
    good.write_bytes(PNG)
    files = {
        "pixels.png": PNG[:33] + chunk(b"IDAT", many) + chunk(b"IEND", b""),
        "text.png": with_chunk(PNG, chunk(b"zTXt", b"a\0\0" + many)),
        "international.png": with_chunk(PNG, chunk(b"iTXt", b"a\0\1\0\0\0" + many)),
        "colours.png": with_chunk(PNG, chunk(b"iCCP", b"a\0\0" + many)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    tif = tmp_path / "bomb.tif"
    tifffile.imwrite(tif, np.zeros((16, 16, 3), np.uint8), tile=(16, 16), photometric="rgb",
                     compression="zlib")  # fmt: skip
    with tifffile.TiffFile(tif) as file:
        page = file.pages[0]
        offsets, counts = page.tags["TileOffsets"], page.tags["TileByteCounts"]
        places = (offsets.valueoffset, counts.valueoffset)
    data = bytearray(tif.read_bytes())
    for at, value in zip(places, (len(data), 60_000), strict=True):
        data[at : at + 4] = struct.pack("<I", value)
    tif.write_bytes(data + many)
    bomb = files["pixels.png"]
    forged.forge(copy, "a", member=lambda n, old: bomb if n == "00.png" else old)
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, good, *(tmp_path / name for name in files), tif, copy],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ended\n")
    assert "Traceback" not in done.stderr


def test_what_is_no_file_is_not_opened(copy: Path, tmp_path: Path) -> None:
    """A pipe never ends, a device never does; a link to an ordinary file is as good as one."""
    tar = copy / "shard-00000.tar"
    elsewhere = tmp_path / "elsewhere.tar"
    tar.rename(elsewhere)
    tar.symlink_to(elsewhere)
    assert verify([copy], mode="deep", progress=False).count == 0
    for make in (
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.mkdir(),
    ):
        tar.unlink()
        make(tar)
        refused(copy, "allowed is a file")
        if tar.is_dir() and not tar.is_symlink():
            tar.rmdir()
        tar.touch()
    manifest = copy / "manifest.json"
    manifest.unlink()
    for make in (lambda: os.mkfifo(manifest), lambda: manifest.symlink_to("/dev/zero")):
        make()
        for read in (lambda: open_shards(str(copy)), lambda: verify([copy], progress=False)):
            with pytest.raises(ValueError, match="allowed is a file"):
                read()
        manifest.unlink()


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    """A stranger's folder holds the temporary name, as a link to a file of mine."""
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    (tmp_path / "manifest.json.tmp").symlink_to(mine)
    with replacing(tmp_path / "manifest.json") as file:
        file.write(b"new")
    assert (mine.read_bytes(), (tmp_path / "manifest.json").read_bytes()) == (b"mine", b"new")
    assert not (tmp_path / "manifest.json.tmp").is_symlink()


def test_sizes_are_bounded_before_a_manifest_is_read(copy: Path) -> None:
    with (copy / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # a hole: it takes no room
    with pytest.raises(ValueError, match=f"manifest.json has {1 << 40} bytes, allowed is"):
        open_shards(str(copy))


@pytest.mark.slow
@pytest.mark.timeout(120 + FUZZED)
def test_mutated_input_gives_a_result_or_a_clean_error() -> None:
    """AXIALTRAIN_FUZZ=10000 mutates so many; what goes wrong names its case and seed."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("fuzz.py"), str(FUZZED)],
        capture_output=True,
        text=True,
        timeout=60 + FUZZED,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["count"] == FUZZED
    assert sum(seen["gave a result"].values()) > FUZZED // 10
    assert seen["grown_mb"] < 300
