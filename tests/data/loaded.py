"""Small shards, and the stream that the loaders of all ranks of a mesh read of them together."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from axialtrain.data.batch import Batch
from axialtrain.data.config import DataConfig
from axialtrain.data.listing import entries_of
from axialtrain.data.loader import Loader
from axialtrain.data.mixing import open_sets
from axialtrain.data.normalise import Normalise, normalisation
from axialtrain.data.shard import make_shards, prepare
from axialtrain.data.sharding import Sharding
from axialtrain.data.windows import Window


def small_shards(
    folder: Path, sizes: Mapping[str, tuple[int, int]], seed: int = 0, **options: Any
) -> str:
    """Images of noise, px, in tiles of 16 px; the folder of their shards.

    options: bands, 3 unless told otherwise; levels, different values in them; labels, or classes of
    random ones; image_labels, statistics.
    """
    rng, bands = np.random.default_rng(seed), options.get("bands", 3)
    labels, others = options.get("labels"), np.random.default_rng(seed + 1)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        pixels = rng.integers(0, options.get("levels", 256), (*size, bands), np.uint8)
        photometric = "rgb" if bands == 3 else "minisblack"
        tifffile.imwrite(
            folder / f"{name}.tif",
            pixels,
            tile=(16, 16),
            photometric=photometric,
        )
    images = [folder / f"{name}.tif" for name in sizes]
    if "classes" in options:
        labels = [folder / f"{name}_labels.tif" for name in sizes]
        for path, size in zip(labels, sizes.values(), strict=True):
            raster = others.integers(0, options["classes"], size, np.uint8)
            tifffile.imwrite(path, raster, tile=(16, 16))
    entries = entries_of(images, labels, None, options.get("image_labels"))
    how = Sharding(statistics=options.get("statistics", False))
    make_shards(prepare(entries, how), folder / "shards", how, jobs=1, keep=False, progress=False)
    return str(folder / "shards")


def loader_of(config: DataConfig, **changes: Any) -> Loader:
    options: dict[str, Any] = {
        "patch": 16,
        "mesh_shape": (1, 1),
        "at": (0, 0),
        "data_rank": 0,
        "data_ranks": 1,
        "batch": 4,
        "micro_batch": 1,
        "seed": 7,
    }
    return Loader(open_sets(config.shards), config, **{**options, **changes})


def stream(
    config: DataConfig, first: int, last: int, *, data_ranks: int = 1, **options: Any
) -> Iterator[list[tuple[int, str, int]]]:
    """(index, window, CRC-32 of its pixels, which of them there are, and its labels) of the samples
    of each step first..last-1, by index.

    The ranks of the mesh are simulated one after the other, and their parts put together.
    """
    rows, cols = options.pop("mesh_shape", (1, 1))
    with ExitStack() as stack:
        ranks = {
            (d, r, c): loader_of(
                config, data_rank=d, data_ranks=data_ranks, mesh_shape=(rows, cols), at=(r, c),
                **options,
            )
            for d in range(data_ranks) for r in range(rows) for c in range(cols)
        }  # fmt: skip
        any_rank = ranks[0, 0, 0]
        steps = {
            at: stack.enter_context(closing(rank.steps(first, last))) for at, rank in ranks.items()
        }
        for _ in range(first, last):
            taken = {at: list(next(some)) for at, some in steps.items()}
            samples = {}
            for d in range(data_ranks):
                for a in range(any_rank.accumulation):
                    parts = [[taken[d, r, c][a] for c in range(cols)] for r in range(rows)]
                    whole = [joined(parts, name) for name in ("pixels", "present", "labels")]
                    batch = parts[0][0]
                    for b, index in enumerate(batch.samples.tolist()):
                        if not batch.weight[b]:
                            continue
                        window = any_rank.windows[any_rank.order[index]]
                        assert batch.ids[b] == window.id
                        assert index not in samples
                        inside = (b, slice(window.rect.height), slice(window.rect.width))
                        seen = [x[inside] for x in whole if x is not None]
                        samples[index] = (index, window.id, crc_of(seen))
            yield [samples[index] for index in sorted(samples)]


def joined(parts: list[list[Batch]], name: str) -> np.ndarray | None:
    """What the ranks' parts of a micro-batch, rows of columns, have of that name."""
    if getattr(parts[0][0], name) is None:
        return None
    lines = [np.concatenate([getattr(part, name).numpy() for part in line], 2) for line in parts]
    return np.concatenate(lines, 1)


def crc_of(arrays: list[np.ndarray]) -> int:
    return zlib.crc32(b"".join(array.tobytes() for array in arrays))


def serial(config: DataConfig, first: int, last: int, **options: Any) -> list[Any]:
    """The same stream, all in one list, as regions that are read one by one."""
    one = loader_of(config, **options)
    normalise = Normalise(one.shards.kind, *normalisation(one.shards, config), config.bands)
    found = []
    for index in range(first * one.batch, last * one.batch):
        window: Window = one.windows[one.order[index]]
        pixels = np.zeros((window.rect.height, window.rect.width, one.shards.bands), np.float32)
        region = one.shards.region(window.name, window.rect)
        pixels[...] = normalise(region.pixels, region.present)
        seen = [pixels, region.present]
        if one.shards.has_labels:
            seen.append(np.where(region.present, region.labels, np.uint8(255)))
        found.append((index, window.id, crc_of(seen)))
    return found
