"""`axialtrain bench data`: how fast regions are read, how much is read over, and who waits for it.

In one process. Regions of JPEG tiles are read from shards, the same tiles are decoded from memory
by nothing but the decoder (as anyone calls it, and each into the same memory, as regions are), and
the same region is read from the slide by OpenSlide: in turns, so that what else the machine does
meets them alike. What counts are medians of ratios within a round.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from axialtrain.bench.record import new_file, written
from axialtrain.bench.shard import DRAWN, write_scene
from axialtrain.bench.timing import ratio
from axialtrain.data.codec import memory_for
from axialtrain.data.config import DataConfig
from axialtrain.data.fetch import fetch_for
from axialtrain.data.hilbert import hilbert_order
from axialtrain.data.loader import Loader
from axialtrain.data.region import Shards, open_shards
from axialtrain.data.shard import shard_images
from axialtrain.data.store import BlockEntry, Head
from axialtrain.grid import Place, Rect, tokens_across

REGION = 4096  # px, the side of a region, or the most of it that an image has
IMAGES = 60  # of random sizes, whose over-read is counted
SIDES = (8_000, 100_000)  # px, of them
MESHES = ((1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (2, 4), (3, 3), (4, 4))
PATCH = 16  # px, of a token
STEP = 1.0  # seconds that a model takes
GOALS = {"of_bare": 0.85, "over_openslide": 3.5, "over_read": 1.3, "waiting": 0.03}

Way = Callable[[Rect], object]


def bench_data(out: Path, *, slide: Path | None, side: int, rounds: int, steps: int) -> str:
    """Run, measure, and write `out`, JSON. Returns the table.

    slide: one with JPEG tiles, which is read beside the drawn scene of `side` px; None: only that.
    rounds: regions that are read in all ways. steps: that a slow model takes.
    Raises ValueError where `out` is there already, or a number is not allowed.
    """
    folder = new_file(out)
    if side < DRAWN or side % DRAWN:
        raise ValueError(f"--side {side}: allowed are multiples of {DRAWN} px")
    for key, value in (("rounds", rounds), ("steps", steps)):
        if value < 1:
            raise ValueError(f"--{key} {value}: allowed is at least 1")
    if slide is not None and not slide.is_file():
        raise ValueError(f"--slide {slide}: is not there, allowed is a slide that OpenSlide reads")
    folder.mkdir(parents=True)
    try:
        print(f"drawing {side} x {side} px", flush=True)
        write_scene(folder / "scene.tif", side)
        reading = {}
        for path in [folder / "scene.tif"] + ([slide] if slide is not None else []):
            print(f"reading {path.name}", flush=True)
            shard_images([path], folder / path.stem, progress=False)
            reading[path.name] = _reading(path, open_shards(str(folder / path.stem)), rounds)
        print("counting what is read over", flush=True)
        over = _over_read()
        print(f"waiting for {steps} steps of {STEP} s", flush=True)
        waiting = _waiting(str(folder / "scene"), steps)
    finally:
        shutil.rmtree(folder)
    names = ["numpy", "imagecodecs", "fsspec", "google-crc32c", "torch"]
    names += ["openslide-python", "openslide-bin"] if find_spec("openslide") else []
    record = {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in names},
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "side": side,
        "rounds": rounds,
        "goals": GOALS,
        "reading": reading,
        "over_read": over,
        "waiting": waiting,
    }
    return written(out, record, "\n".join(_table(reading, over, waiting)))


def _table(
    reading: dict[str, dict[str, Any]], over: dict[str, Any], waiting: dict[str, Any]
) -> list[str]:
    lines = [f"{'':<36}{'wall':>9}{'cpu':>9}{'goal':>9}"]
    for name, result in reading.items():
        lines.append(f"{name}: {result['tiles_per_second']:.0f} tiles/s, {result['region']} px")
        of_bare, of_reused = result["of_bare"], result["of_reused"]
        over_openslide = result.get("over_openslide")
        lines.append(
            f"{'  of bare decoding':<36}{of_bare['wall']:>9.1%}{of_bare['cpu']:>9.1%}{'>= 85%':>9}"
        )
        same = "    into the same memory each time"
        lines.append(f"{same:<36}{of_reused['wall']:>9.1%}{of_reused['cpu']:>9.1%}")
        lines.append(f"{'  two threads, times one':<36}{result['two_threads']:>9.2f}")
        if over_openslide is not None:
            lines.append(
                f"{'  times OpenSlide':<36}{over_openslide['wall']:>9.2f}"
                f"{over_openslide['cpu']:>9.2f}{'>= 3.5':>9}"
            )
    sizes = f"over-read, {IMAGES} sizes, {len(MESHES)} meshes"
    lines.append(f"{sizes:<36}{over['mean']:>9.3f}{'':>9}{'<= 1.3':>9}")
    lines.append(f"{'  95th percentile':<36}{over['p95']:>9.3f}")
    share = f"waiting, steps of {STEP} s"
    lines.append(f"{share:<36}{waiting['share']:>9.2%}{'':>9}{'< 3%':>9}")
    return lines


def _reading(path: Path, shards: Shards, rounds: int) -> dict[str, Any]:
    """of_bare, of_reused, over_openslide: as fast as those, medians over rounds of other regions
    each."""
    (row,) = shards.images
    if shards.head(row.name).encoding != "jpg":
        raise ValueError(f"{path}: has no JPEG tiles that could be copied, allowed is one that has")
    size = (min(REGION, row.height * 7 // 8), min(REGION, row.width * 7 // 8))
    bare = _Bare(shards, row.name)
    ways: dict[str, Way] = {
        "region": lambda rect: shards.region(row.name, rect),
        "bare": bare,
        "reused": bare.reused,
        "openslide": _OpenSlide(path) if find_spec("openslide") else _nothing,
    }
    rng = np.random.Generator(np.random.Philox(key=0))
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    tiles, rects = [], []
    for number in range(rounds + 1):
        top = int(rng.integers(row.height - size[0] + 1))
        left = int(rng.integers(row.width - size[1] + 1))
        rect = Rect(top, top + size[0], left, left + size[1])
        rects.append(rect)
        tiles.append(bare.prepare(rect))
        order = list(ways) if number % 2 else list(ways)[::-1]
        for way in order:
            seconds[way].append(_seconds(ways[way], rect))
    seconds = {way: found[1:] for way, found in seconds.items()}  # the first warms up
    found: dict[str, Any] = {
        "region": f"{size[0]} x {size[1]}",
        "tiles": tiles[1:],
        "seconds": {way: [wall for wall, _ in pairs] for way, pairs in seconds.items()},
        "cpu_seconds": {way: [cpu for _, cpu in pairs] for way, pairs in seconds.items()},
        "tiles_per_second": median(
            count / wall for count, (wall, _) in zip(tiles[1:], seconds["region"], strict=True)
        ),
        "of_bare": _ratio(seconds["bare"], seconds["region"]),
        "of_reused": _ratio(seconds["reused"], seconds["region"]),
        "two_threads": _two_threads(shards, row.name, rects),
    }
    if find_spec("openslide"):
        found["over_openslide"] = _ratio(seconds["openslide"], seconds["region"])
    return found


def _two_threads(shards: Shards, name: str, rects: list[Rect]) -> float:
    """How many times as fast as one thread two are: what decodes holds no lock of Python's."""
    spent = []
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as pool:
            started = time.perf_counter()
            for _ in pool.map(lambda rect: shards.region(name, rect).tiles_decoded, rects):
                pass
            spent.append(time.perf_counter() - started)
    return spent[0] / spent[1]


def _ratio(other: list[tuple[float, float]], mine: list[tuple[float, float]]) -> dict[str, float]:
    """How many times as fast as the other: medians over the rounds, of wall and of CPU time."""
    return {
        key: ratio([one[i] for one in other], [one[i] for one in mine])
        for i, key in enumerate(("wall", "cpu"))
    }


def _seconds(way: Way, rect: Rect) -> tuple[float, float]:
    """(wall, CPU) time that it takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    way(rect)
    return time.perf_counter() - wall, time.process_time() - cpu


def _nothing(rect: Rect) -> None:
    """In the place of OpenSlide where it is not installed."""


class _Bare:
    """Decodes the tiles that a region touches, from memory, and does nothing else."""

    def __init__(self, shards: Shards, name: str) -> None:
        self._shards, self._name = shards, name
        self._tiles: list[bytes] = []
        head = shards.head(name)
        self._out = memory_for(head.tile, head.bands)

    def prepare(self, rect: Rect) -> int:
        """Take the tiles of `rect` into memory; how many there are."""
        self._tiles = []
        for entry in fetch_for(self._shards.head(self._name), rect).blocks:
            block = self._shards.block(self._name, entry)
            for _, _, member in block.tiles(rect):
                self._tiles.append(bytes(block.member(member)))
        return len(self._tiles)

    def __call__(self, rect: Rect) -> None:
        for data in self._tiles:
            imagecodecs.jpeg8_decode(data)

    def reused(self, rect: Rect) -> None:
        for data in self._tiles:
            imagecodecs.jpeg8_decode(data, out=self._out)


class _OpenSlide:
    """Reads regions of a slide's finest level as numpy, without tiles of the last one."""

    def __init__(self, path: Path) -> None:
        import openslide

        self._slide = openslide.OpenSlide(str(path))
        self._slide.set_cache(openslide.OpenSlideCache(0))

    def __call__(self, rect: Rect) -> None:
        np.asarray(self._slide.read_region((rect.left, rect.top), 0, (rect.width, rect.height)))


def _over_read() -> dict[str, Any]:
    """Bytes that ranks read for a byte of the tiles that they decode: of whole images of random
    sizes, whose tiles are as unequal as those of slides, on some meshes."""
    rng = np.random.Generator(np.random.Philox(key=1))
    found = []
    for _ in range(IMAGES):
        height, width = (
            int(np.exp(x)) for x in rng.uniform(math.log(SIDES[0]), math.log(SIDES[1]), 2)
        )
        head, sizes = _drawn_head(height, width, rng)
        found += [_over_read_of(head, sizes, mesh) for mesh in MESHES]
    return {
        "images": IMAGES,
        "sides": SIDES,
        "meshes": [f"{row}x{col}" for row, col in MESHES],
        "mean": fmean(found),
        "p95": quantiles(found, n=20)[-1],
    }


def _over_read_of(head: Head, sizes: NDArray[np.int64], mesh: tuple[int, int]) -> float:
    grid = tokens_across(head.height, PATCH), tokens_across(head.width, PATCH)
    read = needed = 0
    for at in product(range(mesh[0]), range(mesh[1])):
        rect = Place(*grid, shape=mesh, at=at).pixels(PATCH, head.height, head.width)
        read += fetch_for(head, rect).bytes
        rows = slice(rect.top // head.tile, -(-rect.bottom // head.tile))
        cols = slice(rect.left // head.tile, -(-rect.right // head.tile))
        needed += int(sizes[rows, cols].sum())
    return read / needed


def _drawn_head(
    height: int, width: int, rng: np.random.Generator
) -> tuple[Head, NDArray[np.int64]]:
    """The head of an image that is not there, and the bytes of each of its tiles."""
    none: dict[str, Any] = {"mpp": None, "classes": None, "source_sha256": "", "group": ""}
    head = Head(
        name="drawn", height=height, width=width, tile=256, level=0, downsample=1.0,
        encoding="jpg", blocks=(), **none,
    )  # fmt: skip
    sizes = np.exp(rng.normal(np.log(20_000), 0.6, head.tile_grid)).astype(np.int64)
    blocks, offset = [], 0
    for row, col in hilbert_order(*head.block_grid):
        (top, bottom), (left, right) = head.tiles_of_block(row, col)
        length = int(sizes[top:bottom, left:right].sum())
        blocks.append(BlockEntry(row, col, offset, length, 0))
        offset += length
    return Head(**{**vars(head), "blocks": tuple(blocks)}), sizes


def _waiting(url: str, steps: int) -> dict[str, Any]:
    """The share of its time that a rank waits for batches, whose model does nothing for a while.

    The first batch, for which nobody could have worked ahead, does not count.
    """
    config = DataConfig(url, window=[DRAWN, DRAWN])
    loader = Loader(
        open_shards(url), config, patch=PATCH, mesh_shape=(1, 1), at=(0, 0),
        data_rank=0, data_ranks=1, batch=1, micro_batch=1, seed=0,
    )  # fmt: skip
    waits = []
    batches = loader.steps(0, steps + 1)
    started = time.perf_counter()
    for number in range(steps + 1):
        asked = time.perf_counter()
        for _ in next(batches):
            pass
        if number == 0:
            started = time.perf_counter()
        else:
            waits.append(time.perf_counter() - asked)
        time.sleep(STEP)
    whole = time.perf_counter() - started
    batches.close()
    return {"window": DRAWN, "step_s": STEP, "waits": waits, "share": sum(waits) / whole}
