"""Small images on disk, and the sample images beside the repository where they are present."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tifffile

from axialtrain.data.shard import shard_images

SAMPLES = Path(__file__).parents[2].parent / "shared" / "data"
SIZES = {"wide": (200, 300), "small": (70, 50), "tall": (257, 97)}


@dataclass(frozen=True)
class Source:
    """Images that were sharded without loss (16 px tiles), and what they hold.

    instances: empty where none were sharded.
    """

    url: str
    pixels: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    instances: dict[str, np.ndarray] = field(default_factory=dict)


@pytest.fixture(scope="session")
def sample() -> Callable[[str], Path]:
    """Path of a sample image; skips where there is none."""

    def find(name: str) -> Path:
        if not (SAMPLES / name).exists():
            pytest.skip(f"the sample image {name} is not beside the repository")
        return SAMPLES / name

    return find


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Three labelled images of odd sizes, of 4, 1 and 3 blocks of 128 px, as shards."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    pixels, labels = {}, {}
    for name, size in SIZES.items():
        pixels[name] = rng.integers(0, 256, (*size, 3), np.uint8)
        labels[name] = rng.integers(0, 6, size, np.uint8)
        tifffile.imwrite(folder / f"{name}.tif", pixels[name], tile=(16, 16), photometric="rgb")
        tifffile.imwrite(folder / f"{name}_labels.tif", labels[name], tile=(32, 32))
    shard_images(
        [folder / f"{name}.tif" for name in SIZES],
        folder / "shards",
        labels=[folder / f"{name}_labels.tif" for name in SIZES],
        progress=False,
    )
    return Source(str(folder / "shards"), pixels, labels)


@pytest.fixture(scope="session")
def numbered(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The images of `source` with their labels and instances, from 8-bit and 16-bit rasters."""
    folder = tmp_path_factory.mktemp("numbered")
    images = Path(source.url).parent
    rng = np.random.default_rng(1)
    instances = {name: rng.integers(0, 1 << 16, size, np.uint16) for name, size in SIZES.items()}
    instances["wide"][:2, 0] = (0, 65535)
    instances["small"] %= 200
    for name, options in (
        ("wide", {"compression": "zlib", "predictor": True}),
        ("small", {"dtype": np.uint8}),
        ("tall", {"byteorder": ">"}),
    ):
        raster = instances[name].astype(options.pop("dtype", np.uint16))
        tifffile.imwrite(folder / f"{name}.tif", raster, tile=(32, 32), **options)
    shard_images(
        [images / f"{name}.tif" for name in SIZES],
        folder / "shards",
        labels=[images / f"{name}_labels.tif" for name in SIZES],
        instances=[folder / f"{name}.tif" for name in SIZES],
        progress=False,
    )
    return Source(str(folder / "shards"), source.pixels, source.labels, instances)


@pytest.fixture(scope="session")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """One image of 280 x 300 px, 'a', of 2 bands of uint16, with missing pixels, empty tiles, and
    blocks without a tile; 6 blocks of 128 px in 2 rows of 3, and 3 cut ones below.

    pixels: those of its file, in which 7 is nodata.
    """
    folder = tmp_path_factory.mktemp("masked")
    pixels = np.random.default_rng(2).integers(8, 1 << 16, (280, 300, 2), np.uint16)
    pixels[:130, 120:] = 7  # two whole blocks, and what is missing of their neighbours
    pixels[200:216, 20:70] = 7
    tifffile.imwrite(
        folder / "a.tif",
        pixels,
        tile=(16, 16),
        photometric="minisblack",
        planarconfig="contig",
        extratags=[(42113, "s", 0, "7", True)],  # GDAL's nodata value
    )
    shard_images([folder / "a.tif"], folder / "shards", progress=False)
    return Source(str(folder / "shards"), {"a": pixels}, {})
