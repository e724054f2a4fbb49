"""The gigapixel experiments on small windows, and their ways to save memory on a mesh."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from axialtrain.data.scene import draw_scenes
from axialtrain.data.shard import shard_images

pytestmark = pytest.mark.slow

FEW = ["model.dim=32", "model.depth=3", "model.heads=2", "train.precision=fp32"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes of 512 px, of a class each."""
    folder = tmp_path_factory.mktemp("gigapixel")
    scenes = [image for image, *_ in draw_scenes(folder / "scenes", count=2, size=512, seed=0)]
    shard_images(scenes, folder / "shards", image_labels=[0, 1], progress=False)
    return folder / "shards"


def losses(
    axialtrain, shards: Path, folder: Path, *overrides: str, name: str = "gigapixel_h200"
) -> list[float]:
    done = axialtrain(
        "train", f"experiment={name}", f"data.shards={shards}", "data.window=[512,512]",
        "train.steps=2", "checkpoint.every=0", "logger=none", f"hydra.run.dir={folder}", *overrides,
        cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_its_layers_train_on_a_small_window(axialtrain, shards, tmp_path):
    """16 x 16 tokens of 512 channels in bf16, 4 layers of the 12 (all of them take a minute), in
    bands of 4 lines: two layers at a time, whose inputs wait on the host."""
    small = ["data.window=[256,256]", "model.depth=4", "train.recompute_band=64"]
    found = losses(axialtrain, shards, tmp_path / "run", *small, name="four_gigapixels_h200")
    assert len(found) == 2
    assert all(math.isfinite(loss) for loss in found)
    assert found[0] != found[1]


def test_what_it_saves_and_how_tokens_travel_changes_no_number(axialtrain, shards, tmp_path):
    plain = ["train.recompute_band=0", "model.mlp_chunk=null"]
    want = losses(axialtrain, shards, tmp_path / "plain", *FEW, *plain)
    kept = ["train.recompute_band=0", "train.recompute=1", "train.offload=0.5"]
    bands = ["mesh=2x2", "mesh.overlap=3", "zero=3", "zero.persistence_threshold=0"]
    got = losses(axialtrain, shards, tmp_path / "mesh", *FEW, *kept, *bands, "model.mlp_chunk=50")
    assert got == pytest.approx(want, rel=1e-5)
    bands = ["mesh=1x2", "zero=2", "train.recompute_band=100"]
    got = losses(axialtrain, shards, tmp_path / "bands", *FEW, *bands, name="four_gigapixels_h200")
    assert got == pytest.approx(want, rel=1e-5)
