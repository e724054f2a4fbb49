"""Small images on disk, and the sample images beside the repository where they are present."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile

from axialtrain.data.shard import shard_images

SAMPLES = Path(__file__).parents[2].parent / "shared" / "data"
SIZES = {"wide": (200, 300), "small": (70, 50), "tall": (257, 97)}


@dataclass(frozen=True)
class Source:
    """Images that were sharded without loss (16 px tiles), and what they hold."""

    url: str
    pixels: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


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
