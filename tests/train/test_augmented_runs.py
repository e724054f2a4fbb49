"""What a run says about augmentation and bands: only what training reads is changed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from axialtrain.data.augment import AugmentConfig
from axialtrain.data.region import open_shards
from axialtrain.data.shard import shard_images
from axialtrain.train.check import check, loader_of
from axialtrain.train.compose import compose_run
from axialtrain.train.config import RunConfig

MODEL = ("task=reconstruction", "model.dim=16", "model.depth=1", "model.heads=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`high` and `square`: shards of one image each, of 4 bands, 96 x 32 and 64 x 64 px."""
    path = tmp_path_factory.mktemp("bands")
    rng = np.random.default_rng(0)
    for name, size in (("high", (96, 32)), ("square", (64, 64))):
        pixels = rng.integers(0, 256, (*size, 4), np.uint8)
        tifffile.imwrite(
            path / f"{name}.tif", pixels, tile=(16, 16), photometric="minisblack",
            planarconfig="contig",
        )  # fmt: skip
        shard_images([path / f"{name}.tif"], path / name, progress=False)
    return path


def composed(folder: Path, *overrides: str) -> tuple[RunConfig, Path]:
    config, run, _ = compose_run(
        [*MODEL, f"data.shards={folder / 'square'}", f"data.validation={folder / 'high'}",
         f"hydra.run.dir={folder / 'run'}", *overrides]
    )  # fmt: skip
    return config, run


def test_bands_of_the_model_are_those_that_are_named(folder: Path) -> None:
    check(*composed(folder, "model.bands=4"), None)
    check(*composed(folder, "model.bands=3", "data.bands=[2,1,0]", "data.augment.hed=0.1"), None)
    with pytest.raises(ValueError, match=r"^model\.bands=3: the shards hold 4 bands"):
        check(*composed(folder), None)
    with pytest.raises(ValueError, match=r"^model\.bands=4: data\.bands names 1 bands"):
        check(*composed(folder, "model.bands=4", "data.bands=[3]"), None)
    with pytest.raises(
        ValueError, match=r"^data\.augment\.hed is 0\.1, allowed is 0 for .*4 bands"
    ):
        check(*composed(folder, "model.bands=4", "data.augment.hed=0.1"), None)


def test_validation_is_not_augmented(folder: Path) -> None:
    """Its image of 6 x 2 tokens fits a mesh of 6 x 1; turned, it would not."""
    turned = ("model.bands=4", "data.augment.quarter_turns=true", "mesh=4x1")
    config, run = composed(folder, *turned)
    check(config, run, None)
    high = open_shards(str(folder / "high"))
    one = loader_of(config, high, at=(0, 0), data_rank=0, held_out=True)
    assert one.config.augment == AugmentConfig()
    assert one.grids == [(6, 2)]
    with pytest.raises(ValueError, match="a grid of 2 x 6 tokens is smaller than mesh row=4"):
        loader_of(config, high, at=(0, 0), data_rank=0)


@pytest.mark.slow
def test_augmented_training_takes_the_same_steps_on_any_mesh(axialtrain, folder: Path) -> None:
    losses = {}
    for mesh in ("1x1", "2x1"):
        done = axialtrain(
            "train", *MODEL, f"mesh={mesh}", "data.shards=square", "data.window=[40,48]",
            "data.bands=[2,0,1]", "data.augment.quarter_turns=true", "data.augment.shift=8",
            "data.augment.hed=0.2", "data.augment.noise=0.1", "train.steps=2", "train.batch=2",
            "optim=sgd", "logger=none", f"hydra.run.dir={folder / mesh}", cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (folder / mesh / "metrics.jsonl").read_text().splitlines()
        losses[mesh] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["1x1"]) == 2
    assert losses["2x1"] == pytest.approx(losses["1x1"], rel=1e-5)
