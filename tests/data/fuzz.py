"""A seeded fuzzer of all that may come from strangers: manifests, shards and images.

`python fuzz.py COUNT` mutates COUNT inputs and reads each in every way there is. Each gives a
result or a ValueError; anything else ends it. The last line is a JSON object of what was seen.
"""

from __future__ import annotations

import faulthandler
import json
import resource
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forged
import numpy as np
import tifffile

from axialtrain.data.codec import decode, encode_jpeg, encode_png
from axialtrain.data.readers import open_image
from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.data.verify import MODES, verify
from axialtrain.grid import Rect

SECONDS = 20.0  # of one input, on a machine that has other things to do
MEMORY = 1 << 30  # bytes of addresses beyond what the imports take
_NASTY: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1.5, float("inf"), float("nan"), "", "..", "../x",
    "/etc/passwd", "a\x00b", "\udc80", "é" * 50, [], [[]], {}, [1] * 1000,
]  # fmt: skip
Generator = np.random.Generator


def mutate(data: bytes, rng: Generator, first: int | None = None) -> bytes:
    """One to four changes, in the `first` bytes where it is given: bits, bytes, runs, cuts."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not changed:
            break
        at = int(rng.integers(min(len(changed), first or len(changed))))
        length = int(rng.integers(1, 64))
        match rng.integers(7):
            case 0 | 1:
                changed[at] ^= 1 << rng.integers(8)
            case 2:
                changed[at : at + 4] = rng.choice([0, 0x7FFFFFFF, 0xFFFFFFFF]).tobytes()[:4]
            case 3:
                changed[at : at + length] = rng.bytes(length)
            case 4:
                changed[at:at] = changed[at : at + length]
            case 5:
                del changed[at : at + length]
            case 6:
                del changed[at:]
    return bytes(changed)


def nasty(record: dict[str, Any], rng: Generator) -> None:
    """Put a wrong value somewhere into a JSON object."""
    while True:
        key = str(rng.choice(sorted(record)))
        value = record[key]
        if isinstance(value, list) and value and rng.random() < 0.8:
            value = value[rng.integers(len(value))]
        if not isinstance(value, dict) or rng.random() < 0.1:
            break
        record = value
    if rng.random() < 0.2:
        del record[key]
    elif isinstance(record[key], int) and rng.random() < 0.5:
        record[key] += int(rng.choice([-512, -1, 1, 512, 1 << 20]))
    else:
        record[key] = _NASTY[rng.integers(len(_NASTY))]


def mended_png(data: bytes) -> bytes:
    """A PNG whose chunks have the right checksums again, so that what they say is believed."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + min(length, len(data))]
        parts.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts)


def of_manifest(folder: Path, image: str, rng: Generator) -> None:
    path = folder / "manifest.json"
    path.write_bytes(mutate(path.read_bytes(), rng))


def of_manifest_values(folder: Path, image: str, rng: Generator) -> None:
    path = folder / "manifest.json"
    record = json.loads(path.read_bytes())
    nasty(record, rng)
    path.write_text(json.dumps(record))


def of_shard(folder: Path, image: str, rng: Generator) -> None:
    path = folder / "shard-00000.tar"
    path.write_bytes(mutate(path.read_bytes(), rng))


def of_index(folder: Path, image: str, rng: Generator) -> None:
    forged.forge(folder, image, index=lambda record: nasty(record, rng))


def of_head(folder: Path, image: str, rng: Generator) -> None:
    forged.forge(folder, image, head=lambda record: nasty(record, rng))


def of_tar_headers(folder: Path, image: str, rng: Generator) -> None:
    forged.forge(folder, image, block=lambda data: mutate(data, rng, first=512))


def of_tiles(folder: Path, image: str, rng: Generator) -> None:
    def member(name: str, data: bytes) -> bytes:
        if rng.random() < 0.5:
            return data
        data = mutate(data, rng, first=60 if rng.random() < 0.7 else None)
        return mended_png(data) if data.startswith(b"\x89PNG") else data

    forged.forge(folder, image, member=member)


SHARDS: list[Callable[[Path, str, Generator], None]] = [
    of_manifest,
    of_manifest_values,
    of_shard,
    of_index,
    of_head,
    of_tar_headers,
    of_tiles,
]


def read_all(folder: Path) -> int:
    """Read shards in every way, whatever each says; how many of the ways gave a result."""
    results = 0
    try:
        shards = open_shards(str(folder))
    except ValueError:
        pass
    else:
        results += 1
        for row in shards.images[:4]:
            for read in (
                lambda row=row: shards.region(row.name, Rect(-5, 60, -5, 60)),
                lambda row=row: shards.read(row.name, 0, 0, 40, 200),
                lambda row=row: shards.read_labels(row.name, 0, 0, 20, 20),
            ):
                try:
                    read()
                    results += 1
                except ValueError:
                    pass
    for mode in MODES:
        verify([folder], mode=mode, jobs=1, progress=False)
    return results


def read_image(path: Path) -> int:
    try:
        with open_image(path) as image:
            image.read(Rect(0, min(image.height, 200), 0, min(image.width, 200)))
    except ValueError:
        return 0
    return 1


def decode_tile(path: Path) -> int:
    try:
        decode(path.read_bytes(), (32, 32, 3))
    except ValueError:
        return 0
    return 1


def sources(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """(folders of shards, TIFFs, tiles) to be mutated; small, of every encoding."""
    rng = np.random.default_rng(0)
    shards, images, tiles = [], [], []
    labels, numbers = folder / "labels.tif", folder / "numbers.tif"
    tifffile.imwrite(labels, rng.integers(0, 6, (150, 40), np.uint8), tile=(16, 16))
    tifffile.imwrite(numbers, rng.integers(0, 300, (150, 40), np.uint16), tile=(16, 16))
    pixels = np.repeat(rng.integers(0, 256, (150, 10, 3), np.uint8), 4, axis=1)
    for compression in (None, "jpeg", "lzw", "zlib", "zstd", "packbits"):
        image = folder / f"{compression}.tif"
        tifffile.imwrite(image, pixels, tile=(16, 16), photometric="rgb", compression=compression)
        images.append(image)
        if compression in (None, "jpeg"):
            out = folder / f"shards_{compression}"
            shard_images([image], out, labels=[labels], instances=[numbers], progress=False)
            shards.append(out)
    table, rows = folder / "features.npz", rng.random((150, 40)) > 0.3
    rows[0, 0] = rows[-1, -1] = True
    row, col = np.nonzero(rows)
    vectors = rng.normal(size=(len(row), 300)).astype(np.float16)
    np.savez(table, coords=np.stack([col, row], 1), features=vectors, patch_size=1)
    out = folder / "shards_features"
    shard_images([table], out, labels=[labels], instances=[numbers], progress=False)
    shards.append(out)
    for name, data in (
        ("tile.png", encode_png(pixels[:32, :32])),
        ("tile.jpg", encode_jpeg(pixels[:32, :32], 80)),
    ):
        (folder / name).write_bytes(data)
        tiles.append(folder / name)
    return shards, images, tiles


def run(count: int, seed: int = 0) -> dict[str, Any]:
    """Mutate and read `count` inputs."""
    faulthandler.enable()
    results: Counter[str] = Counter()
    slowest, slowest_case = 0.0, ""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shards, images, tiles = sources(work)
        for folder in shards:
            read_all(folder)  # what is imported late is imported before memory is counted
        for image in images:
            assert read_image(image) == 1
        baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        limit = MEMORY + int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for case in range(count):
            rng = np.random.default_rng([seed, case])
            kind = case % (len(SHARDS) + 2)
            began = time.monotonic()
            try:
                if kind < len(SHARDS):
                    what = SHARDS[kind].__name__
                    source = shards[rng.integers(len(shards))]
                    folder = Path(shutil.copytree(source, work / "case"))
                    SHARDS[kind](folder, source.name.replace("shards_", ""), rng)
                    results[what] += read_all(folder) > 0
                    shutil.rmtree(folder)
                else:
                    what, choice = ("of_images", images) if kind % 2 else ("of_tile", tiles)
                    source = choice[rng.integers(len(choice))]
                    data = mutate(source.read_bytes(), rng, 600 if rng.random() < 0.7 else None)
                    if what == "of_tile" and source.suffix == ".png":
                        data = mended_png(data)
                    path = work / f"case{source.suffix}"
                    path.write_bytes(data)
                    read = read_image if what == "of_images" else decode_tile
                    results[what] += read(path)
            except Exception as error:
                error.add_note(f"case {case} of seed {seed}: {what}")
                raise
            took = time.monotonic() - began
            if took > slowest:
                slowest, slowest_case = took, f"{case}: {what}"
            if took > SECONDS:
                raise TimeoutError(f"case {case} of seed {seed}, {what}, took {took:.0f} s")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline
    return {
        "count": count,
        "gave a result": dict(results),
        "slowest": [round(slowest, 2), slowest_case],
        "grown_mb": grown // 1024,
    }


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
