"""Keys of `data` that meet: bands and measured statistics, buckets and turns, names and numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from axialtrain.data.augment import AugmentConfig
from axialtrain.data.config import DataConfig
from axialtrain.data.listing import entries_of
from axialtrain.data.mixing import open_sets
from axialtrain.data.normalise import normalisation
from axialtrain.data.region import open_shards
from axialtrain.data.sampling import SampleConfig, image_weights
from axialtrain.data.shard import make_shards, prepare
from axialtrain.data.sharding import Sharding


@pytest.fixture(scope="module")
def opaque(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image, '12', of 4 bands, the last of which is 255 everywhere."""
    return _shards(tmp_path_factory.mktemp("opaque"), 4)


def _shards(folder: Path, bands: int) -> str:
    pixels = np.random.default_rng(bands).integers(0, 256, (64, 48, bands), np.uint8)
    pixels[..., 3:] = 255
    tifffile.imwrite(
        folder / "12.tif", pixels, tile=(16, 16), photometric="minisblack", planarconfig="contig"
    )
    how = Sharding(statistics=True)
    entries = prepare(entries_of([folder / "12.tif"], None, None, None), how)
    make_shards(entries, folder / "shards", how, jobs=1, keep=False, progress=False)
    return str(folder / "shards")


def test_statistics_are_of_the_bands_that_are_taken(opaque: str) -> None:
    shards = open_shards(opaque)
    pixels = shards.read("12", 0, 0, 64, 48) / 255
    config = DataConfig(opaque, mean="manifest", std="manifest", bands=[2, 0])
    mean, std = normalisation(shards, config)
    np.testing.assert_allclose(mean, pixels[..., [2, 0]].mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(std, pixels[..., [2, 0]].std((0, 1)), rtol=1e-3)
    with pytest.raises(ValueError, match="band 3 has one value alone"):
        normalisation(shards, DataConfig(opaque, mean="manifest", std="manifest", bands=[0, 3]))


def test_sets_of_other_bands_are_named(opaque: str, tmp_path: Path) -> None:
    other = _shards(tmp_path, 3)
    config = DataConfig({opaque: 1, other: 1}, mean="manifest", std="manifest")
    with pytest.raises(ValueError, match="allowed is one kind"):
        normalisation(open_sets(config.shards), config)


def test_a_name_that_is_a_number_has_a_weight(opaque: str) -> None:
    config = SampleConfig(by="weighted", weights={12: 3})
    assert image_weights(open_shards(opaque).images, config).tolist() == [3]


def test_buckets_and_quarter_turns_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"data\.buckets is 2 with data\.augment\.quarter_turns"):
        DataConfig("x", buckets=2, augment=AugmentConfig(quarter_turns=True))
