"""Slide encoders on grids of features: shards -> training, on any mesh the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from axialtrain.data.shard import shard_images
from axialtrain.train.check import check
from axialtrain.train.compose import compose_run

D = 12
MODEL = ("model.patch=features", f"model.bands={D}", "model.dim=16", "model.depth=2")
TASK = ("model.heads=4", "task=classification", "task.classes=2", "task.pool=attention")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shards`: two slides of a class each, of other sizes, tissue on half of their grids.
    `images`: one that is no grid of features."""
    path = tmp_path_factory.mktemp("features")
    rng, tables = np.random.default_rng(0), []
    for name, size in (("a", (9, 7)), ("b", (6, 11))):
        there = rng.random(size) > 0.5
        there[0, 0] = there[0, 1] = there[-1, -1] = True
        row, col = np.nonzero(there)
        features = rng.normal(size=(len(row), D)).astype(np.float16)
        tables.append(path / f"{name}.npz")
        np.savez(tables[-1], coords=np.stack([col, row], 1) * 256, features=features)
    shard_images(tables, path / "shards", image_labels=[0, 1], progress=False)
    pixels = rng.integers(0, 256, (32, 32, D), np.uint8)
    tifffile.imwrite(
        path / "image.tif", pixels, tile=(32, 32), photometric="minisblack", planarconfig="contig"
    )
    shard_images([path / "image.tif"], path / "images", image_labels=[1], progress=False)
    return path


@pytest.mark.slow
def test_training_takes_the_same_steps_on_any_mesh(axialtrain, folder):
    losses = {}
    for mesh in ("1x1", "2x2"):
        done = axialtrain(
            "train", *MODEL, *TASK, f"mesh={mesh}", "data.shards=shards", "train.steps=2",
            "train.batch=2", "optim=sgd", "logger=none", f"hydra.run.dir={folder / mesh}",
            cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (folder / mesh / "metrics.jsonl").read_text().splitlines()
        losses[mesh] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["1x1"]) == 2
    assert losses["1x1"][1] != losses["1x1"][0]
    assert losses["2x2"] == pytest.approx(losses["1x1"], rel=1e-5)


def test_a_run_on_features_is_checked(folder):
    def refused(*overrides: str) -> None:
        config, run, _ = compose_run([*MODEL, *TASK, *overrides])
        check(config, run, None)

    refused(f"data.shards={folder / 'shards'}", f"hydra.run.dir={folder / 'new'}")  # is fine
    with pytest.raises(ValueError, match=r"^model\.bands=8: the shards hold 12 bands"):
        refused(f"data.shards={folder / 'shards'}", "model.bands=8")
    with pytest.raises(ValueError, match=r"^model\.patch=features: .* holds images of uint8, all"):
        refused(f"data.shards={folder / 'images'}")
