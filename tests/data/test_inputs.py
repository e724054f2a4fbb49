"""What is checked of an image before anything is written, and images as narrow as can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from slides import write_aperio

from axialtrain.cli import main
from axialtrain.data.inputs import check_inputs
from axialtrain.data.listing import Entry
from axialtrain.data.readers.reader import MPP
from axialtrain.data.region import open_shards
from axialtrain.data.shard import make_shards, prepare, shard_images
from axialtrain.data.sharding import Sharding
from axialtrain.data.verify import verify

RNG = np.random.default_rng(8)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(RNG.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return path


@pytest.mark.parametrize("mpp", MPP)
def test_any_resolution_that_is_taken_is_read_back(image: Path, tmp_path: Path, mpp: float) -> None:
    how = Sharding()
    make_shards(
        prepare([Entry(image, mpp=mpp)], how), tmp_path / "out", how, jobs=1, progress=False
    )
    assert open_shards(str(tmp_path / "out")).head("a").mpp == mpp
    assert verify([str(tmp_path / "out")]).count == 0


def test_resolution_that_no_head_can_have_is_named(image: Path, tmp_path: Path) -> None:
    for mpp in (0.9 * MPP[0], 1.1 * MPP[1], float("nan")):
        with pytest.raises(
            ValueError, match=r"a\.png: mpp of what is stored is .*, allowed is 1e-09"
        ):
            check_inputs([Entry(image, mpp=mpp)], Sharding())
    path = tmp_path / "b.svs"
    write_aperio(path, [np.zeros((200, 200, 3), np.uint8), np.zeros((100, 100, 3), np.uint8)])
    with pytest.raises(ValueError, match=r"b\.svs: mpp of what is stored is 2e\+09, allowed"):
        check_inputs([Entry(path, mpp=MPP[1])], Sharding(level=1, reader="openslide"))


def test_tissue_of_what_is_no_slide_is_refused_before_anything_is_written(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = tmp_path / "grey.png"
    Image.fromarray(RNG.integers(0, 256, (20, 30), np.uint8)).save(grey)
    given = ["shard", str(image), str(grey), "--out", str(tmp_path / "out"), "--keep", "tissue"]
    for options in ([], ["--dry-run"]):
        assert main([*given, *options]) == 2
        error = capsys.readouterr().err
        assert f"{grey}: its pixels are 1 band of uint8, allowed for how='tissue'" in error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "grey.png"]


@pytest.mark.parametrize("size", [(300, 1), (1, 300), (1, 1)])
def test_images_of_one_column(tmp_path: Path, size: tuple[int, int]) -> None:
    pixels = RNG.integers(0, 256, (*size, 4), np.uint8)
    pixels[..., 3] = 255 * (np.arange(pixels[..., 3].size).reshape(size) % 3 == 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    labels = RNG.integers(0, 5, size, np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    rasters = [tmp_path / "labels.png"]
    out = str(tmp_path / "out")
    shard_images([tmp_path / "a.png"], out, labels=rasters, instances=rasters, progress=False)
    assert verify([out], mode="deep").count == 0
    shards = open_shards(out)
    region = shards.region("a", shards.head("a").rect)
    np.testing.assert_array_equal(region.present, pixels[..., 3] > 0)
    np.testing.assert_array_equal(region.pixels[region.present], pixels[region.present][:, :3])
    np.testing.assert_array_equal(region.labels, np.where(region.present, labels, 255))


def test_a_grid_of_features_of_one_column(tmp_path: Path) -> None:
    features = RNG.normal(size=(40, 8)).astype(np.float32)
    coords = np.stack([np.zeros(40, np.int64), 256 * np.arange(40)], 1)
    np.savez(tmp_path / "a.npz", coords=coords, features=features)
    out = str(tmp_path / "out")
    shard_images([tmp_path / "a.npz"], out, progress=False)
    assert verify([out], mode="deep").count == 0
    np.testing.assert_array_equal(open_shards(out).read("a", 0, 0, 40, 1)[:, 0], features)


def test_what_no_run_reads_as_one_set_is_told_of_before_it_is_made(
    image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(RNG.integers(0, 256, (20, 30), np.uint8)).save(tmp_path / "grey.png")
    check_inputs([Entry(image, labels=tmp_path / "grey.png", label=3)], Sharding())
    assert not caplog.messages
    both = [Entry(image, labels=tmp_path / "grey.png", label=3), Entry(tmp_path / "grey.png")]
    check_inputs(both, Sharding())
    assert caplog.messages == [
        "images of several kinds: 3 bands of uint8 ('a'), 1 band of uint8 ('grey'); a run reads "
        "shards of one kind",
        "1 of 2 images have no labels, 'grey' first: a run that needs it refuses the shards",
        "1 of 2 images have no class, 'grey' first: a run that needs it refuses the shards",
    ]
