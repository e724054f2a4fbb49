"""`axialtrain bench shard`: how fast images become shards, and in how much memory.

A generated scene of a gigapixel, as a pyramid of JPEG tiles, becomes shards in several ways, each
in a process of its own whose time and largest memory count.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from axialtrain.bench.record import new_file, written
from axialtrain.data.codec import Pixels
from axialtrain.data.scene import TILE, draw_scene

DRAWN = 2048  # px, of the scene that is repeated
WAYS: dict[str, list[str]] = {
    "copied": ["--no-statistics"],
    "copied, statistics": [],
    "copied, tissue": ["--no-statistics", "--keep", "tissue"],
    "encoded without loss": ["--no-statistics", "--passthrough", "never"],
    "encoded as JPEG": ["--no-statistics", "--passthrough", "never", "--encode", "jpeg"],
}
_CHILD = """
import json, re, resource, sys, time
from pathlib import Path
from axialtrain.cli import main
started = time.monotonic()
status = main(sys.argv[2:])
seconds = time.monotonic() - started
# ru_maxrss of this process is also that of the one that started it, before it was this program.
own = int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
most = 1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
json.dump({"status": status, "seconds": seconds, "bytes": most}, open(sys.argv[1], "w"))
"""


def bench_shard(out: Path, *, side: int, jobs: int) -> str:
    """Run, measure, and write `out`, JSON. Returns the table.

    side: px of the scene. jobs: processes of each way.
    Raises ValueError where `out` is there already, or a way fails.
    """
    folder = new_file(out)
    if side < DRAWN or side % DRAWN:
        raise ValueError(f"--side {side}: allowed are multiples of {DRAWN} px")
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: allowed is at least 1")
    folder.mkdir(parents=True)
    try:
        print(f"drawing {side} x {side} px", flush=True)
        image = folder / "scene.tif"
        write_scene(image, side)
        results = {way: _measured(folder, image, options, jobs) for way, options in WAYS.items()}
    finally:
        shutil.rmtree(folder)
    base = results["copied"]["seconds"]
    record = {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("numpy", "tifffile", "imagecodecs")},
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "side": side,
        "jobs": jobs,
        "results": {
            way: result | {"over_copied": result["seconds"] / base}
            for way, result in results.items()
        },
    }
    lines = [f"{'way':<22}{'s':>8}{'Mpx/s':>9}{'MiB':>8}{'over copied':>13}"]
    for way, result in results.items():
        lines.append(
            f"{way:<22}{result['seconds']:>8.1f}{side**2 / 1e6 / result['seconds']:>9.0f}"
            f"{result['bytes'] / 2**20:>8.0f}{result['seconds'] / base:>13.2f}"
        )
    return written(out, record, "\n".join(lines))


def _measured(folder: Path, image: Path, options: list[str], jobs: int) -> dict[str, Any]:
    """seconds: without starting Python. bytes: the largest memory of the process, or of one that it
    started."""
    print(f"running: {' '.join(options)}", flush=True)
    shards, said = folder / "shards", folder / "said.json"
    command = ["shard", str(image), "--out", str(shards), "--jobs", str(jobs), *options]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(said), *command], stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode != 0 or not said.exists():
        raise ValueError(f"{' '.join(command)}: ended with status {done.returncode}")
    result = json.loads(said.read_bytes())
    if result.pop("status") != 0:
        raise ValueError(f"{' '.join(command)}: could not be run")
    shutil.rmtree(shards)
    said.unlink()
    return dict(result)


def write_scene(path: Path, side: int) -> None:
    """A scene of DRAWN px, repeated, as a pyramid of JPEG tiles down to one of them."""
    pixels = draw_scene(size=DRAWN, seed=0).pixels
    levels = [side]
    while levels[-1] > TILE:
        levels.append(levels[-1] // 2)
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for number, size in enumerate(levels):
            tiff.write(
                _tiles(pixels, size),
                shape=(size, size, 3),
                dtype=np.uint8,
                subifds=len(levels) - 1 if number == 0 else None,
                subfiletype=0 if number == 0 else 1,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 90},
                metadata=None,
            )
            if number < len(levels) - 1 and pixels.shape[0] > TILE:
                pixels = np.ascontiguousarray(pixels[::2, ::2])


def _tiles(pixels: Pixels, size: int) -> Iterator[Pixels]:
    """The tiles of `pixels`, repeated over size x size px."""
    side = pixels.shape[0]
    for top in range(0, size, TILE):
        for left in range(0, size, TILE):
            tile = pixels[top % side :, left % side :][:TILE, :TILE]
            yield np.resize(tile, (TILE, TILE, 3)) if tile.shape[:2] != (TILE, TILE) else tile
