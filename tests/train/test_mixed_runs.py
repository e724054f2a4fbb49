"""Runs of several sets by weight, of overlapping windows that are drawn, on manifest statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from axialtrain.cli import main
from axialtrain.data.listing import Entry
from axialtrain.data.normalise import normalisation
from axialtrain.data.scene import draw_scenes
from axialtrain.data.shard import make_shards, prepare
from axialtrain.data.sharding import Sharding
from axialtrain.train.check import check, data_of, loader_of, with_statistics
from axialtrain.train.compose import compose_run

pytestmark = pytest.mark.slow

SMALL = [
    "experiment=quickstart", "model.dim=16", "model.depth=1", "logger=none", "train.batch=2",
    "checkpoint.every=2", "data.window=[128,128]", "data.cut.overlap=64",
    "data.sample.by=weighted", "data.sample.weights={scene_0000: 1, scene_0001: 3}",
    "data.mean=manifest", "data.std=manifest",
]  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards in one/ and two/, of 2 and 1 scenes, in bare/ without labels, and in
    part/ of two scenes of which the first has some."""
    folder = tmp_path_factory.mktemp("sets")
    made = (("one", 2, 0, 2), ("two", 1, 5, 1), ("bare", 1, 6, 0), ("part", 2, 7, 1))
    for name, count, seed, labelled in made:
        scenes = draw_scenes(folder / f"{name}-scenes", count=count, size=256, seed=seed)
        entries = [
            Entry(image, labels if number < labelled else None)
            for number, (image, labels, _) in enumerate(scenes)
        ]
        how = Sharding(statistics=True)
        work = prepare(entries, how)
        make_shards(work, folder / name, how, jobs=1, keep=False, progress=False)
    return folder


def given(folder: Path, one: float = 2, *overrides: str) -> list[str]:
    shards = f"data.shards={{{folder}/one: {one}, {folder}/two: 1}}"
    return [*SMALL, shards, f"data.validation={folder}/two", *overrides]


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_mixed_run_goes_on_elsewhere_as_if_it_had_not_ended(
    axialtrain, sets, tmp_path, monkeypatch, capsys
):
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    for folder, steps, mesh, more in (
        (whole, 4, "single", ()),
        (begun, 2, "single", ()),
        (begun, 4, "1x2", ("resume=auto",)),
    ):
        overrides = given(sets, 2, f"train.steps={steps}", f"mesh={mesh}", *more)
        done = axialtrain("train", *overrides, f"hydra.run.dir={folder}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert losses(begun) == pytest.approx(losses(whole), rel=1e-4)

    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    plain = "data.sample={by: uniform, weights: null}"
    config, _, _ = compose_run(given(sets))
    mean, std = normalisation(data_of(config)["data.shards"], config.data)
    for overrides, key in (
        # Those of the manifests are of another mix then.
        (given(sets, 3, f"data.mean={mean}", f"data.std={std}"), "data.shards"),
        (given(sets, 2, "data.sample.weights={scene_0000: 1, scene_0001: 2}"),
         "data.sample.weights"),
        (given(sets, 2, plain), "data.sample"),
        (given(sets, 2, "data.cut.overlap=32"), "data.cut.stride"),
    ):  # fmt: skip
        assert main(["train", *overrides, "mesh=single", f"resume={begun}"]) == 2
        said = capsys.readouterr().err
        assert f"{key} is not what the saved run had" in said, said
        assert "checkpoint.new_data=true" in said


def test_validation_takes_each_window_once_and_the_training_statistics(sets):
    config, _, _ = compose_run(given(sets))
    shards = data_of(config)
    config = with_statistics(config, shards["data.shards"])
    mean, std = normalisation(shards["data.shards"], compose_run(given(sets))[0].data)
    assert (config.data.mean, config.data.std) == (mean, std)
    assert len(mean) == 3
    train = loader_of(config, shards["data.shards"], at=(0, 0), data_rank=0)
    held_out = loader_of(config, shards["data.validation"], at=(0, 0), data_rank=0, held_out=True)
    assert len(train.windows) == 3 * 9
    assert len(held_out.windows) == 4


def test_labels_that_a_set_lacks_are_named_with_both_sets(sets, tmp_path):
    overrides = [f"data.shards={{{sets}/one: 1, {sets}/bare: 1}}", "data.validation=null"]
    config, _, _ = compose_run(["experiment=quickstart", "mesh=single", *overrides])
    with pytest.raises(ValueError, match="has no labels, which task=segmentation needs") as caught:
        check(config, tmp_path / "run", None)
    assert f"({sets}/one has labels, {sets}/bare has none" in str(caught.value)


def test_images_that_have_no_labels_are_counted_and_the_first_is_named(sets, tmp_path):
    overrides = [f"data.shards={sets}/part", "data.validation=null"]
    config, _, _ = compose_run(["experiment=quickstart", "mesh=single", *overrides])
    with pytest.raises(ValueError, match=r"\(1 of its 2 images have none: '[^']*1' first\)$"):
        check(config, tmp_path / "run", None)


def test_classes_that_no_pixel_has_are_told_of(sets, tmp_path):
    overrides = [f"data.shards={sets}/one", "data.validation=null", "task.classes=9"]
    config, _, _ = compose_run(["experiment=quickstart", "mesh=single", *overrides])
    with pytest.warns(
        UserWarning, match=r"task\.classes=9, and the largest label of data\.shards="
    ):
        check(config, tmp_path / "run", None)
