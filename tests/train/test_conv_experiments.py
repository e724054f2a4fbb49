"""The experiments of the convolutional models, from the command line: 20 steps with a falling loss.

As they are configured, but for the data: a few drawn scenes, whose windows are smaller, so that a
step takes a second or two. And a run that is taken on by another mesh is the same run.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from axialtrain.data.scene import draw_scenes
from axialtrain.data.shard import shard_images
from axialtrain.train.checkpoint import newest

pytestmark = pytest.mark.slow

STEPS = "train.steps=20"
PARCELS = (
    "experiment=scenes_panoptic",
    "mesh.data=1",
    "data.validation=null",
    "schedule=constant",
    "optim=sgd",
    "optim.lr=0.002",
    "train.batch=2",
    "train.micro_batch=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shards`: four scenes of 256 px with labels and instances. `fields`: dark and bright ones, of
    a class each."""
    path = tmp_path_factory.mktemp("scenes")
    scenes = draw_scenes(path / "scenes", count=4, size=256, seed=0, bands=(2, 3))
    images, labels, instances = (list(files) for files in zip(*scenes, strict=True))
    shard_images(
        images,
        path / "shards",
        labels=labels,
        instances=instances,
        progress=False,
    )
    rng, fields = np.random.default_rng(0), []
    for index, grey in enumerate((60, 190, 200, 70)):
        fields.append(path / f"field_{index}.tif")
        pixels = grey + rng.integers(-30, 31, (128, 128, 3))
        tifffile.imwrite(fields[-1], pixels.astype(np.uint8), tile=(128, 128), photometric="rgb")
    shard_images(fields, path / "fields", image_labels=[0, 1, 1, 0], progress=False)
    return path


def losses_of(
    axialtrain, folder: Path, run: str, *overrides: str, shards: str = "shards"
) -> list[float]:
    done = axialtrain(
        "train",
        *overrides,
        f"data.shards={shards}",
        f"hydra.run.dir={folder / run}",
        cwd=folder,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def assert_falling(losses: list[float]) -> None:
    assert len(losses) == 20
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.8 * first, losses


def test_axial_resnet(axialtrain, folder):
    """All of axial_resnet50s, in windows of 64 px of dark and of bright fields."""
    overrides = ["experiment=axial_resnet", STEPS, "data.window=[64,64]", "schedule.warmup=2"]
    overrides += ["train.batch=4", "train.micro_batch=4"]
    assert_falling(losses_of(axialtrain, folder, "resnet", *overrides, shards="fields"))


def test_axial_deeplab(axialtrain, folder):
    """All of axial_deeplab_s, in windows of 64 px."""
    overrides = ["experiment=axial_deeplab", STEPS, "data.window=[64,64]", "schedule.warmup=2"]
    overrides += ["train.batch=2", "train.micro_batch=2"]
    assert_falling(losses_of(axialtrain, folder, "deeplab", *overrides))
    assert (folder / "deeplab" / "prediction.png").exists()


def test_a_run_goes_on_on_another_mesh(axialtrain, folder):
    """Three steps on one process, then three on two: those of six on one, and so are statistics."""
    whole = losses_of(axialtrain, folder, "whole", *PARCELS, "train.steps=6")
    first = losses_of(axialtrain, folder, "first", *PARCELS, "train.steps=3")
    then = losses_of(
        axialtrain,
        folder,
        "then",
        *PARCELS,
        "train.steps=6",
        f"resume={folder / 'first'}",
        "mesh=2x1",
    )
    assert first + then == pytest.approx(whole, rel=1e-4)
    ends = [newest(folder / run).weights() for run in ("whole", "then")]
    starts = newest(folder / "first").weights()
    for name, want in ends[0].items():
        way = (want - starts[name]).norm()
        assert (ends[1][name] - want).norm() <= 1e-3 * way + 1e-6, name  # some stay at zero
        assert way > 0 or not name.endswith(("running_mean", "running_var")), name


def test_batch_norms_over_another_number_of_images_are_refused(axialtrain, folder):
    """Not another run of the same name: the one above, of two images at a time."""
    first = folder / "first"
    if not first.exists():  # where this test runs alone
        losses_of(axialtrain, folder, "first", *PARCELS, "train.steps=3")
    for change, seen in (("train.micro_batch=1", 1), ("mesh.data=2", 4)):
        done = axialtrain(
            "train",
            *PARCELS,
            "data.shards=shards",
            "train.steps=6",
            change,
            f"resume={first}",
            f"hydra.run.dir={folder / 'refused'}",
            cwd=folder,
        )
        assert done.returncode == 2
        said = f"see {seen} images at a time"
        assert said in done.stderr, done.stderr
        assert "was saved with 2: allowed are two numbers of that product" in done.stderr
        assert not (folder / "refused").exists()
