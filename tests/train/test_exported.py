"""What `axialtrain export` wrote is a model again, and gives what it gave in its run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_checkpoints import a_model, a_run, checkpointed

from axialtrain.data.region import open_shards
from axialtrain.data.scene import draw_scenes
from axialtrain.grid import Rect
from axialtrain.models.heads import MaskedReconstructor
from axialtrain.models.registry import model_config
from axialtrain.tasks.classification import ClassificationConfig
from axialtrain.tasks.panoptic import PanopticConfig
from axialtrain.tasks.reconstruction import ReconstructionConfig
from axialtrain.tasks.segmentation import SegmentationConfig
from axialtrain.train.export import export
from axialtrain.train.exported import load_exported

DATA = {"mean": [0.5, 0.4, 0.3], "std": 0.25, "bands": None, "order": {}, "windows": []}
NARROW = {"layers": [1, 1, 1, 1], "width": 0.125, "heads": 2}
CONV = model_config("axial_resnet26s", **NARROW, image=None, span=8)
DEEPLAB = model_config("axial_deeplab_s", trunk={**NARROW, "span": 8}, aspp=[])
# (task, backbone where it is no transformer, what the model gives of 64 x 64 px)
TASKS = {
    "segmentation": (SegmentationConfig(classes=3, cells=2), None, (1, 32, 32, 3)),
    "classification": (ClassificationConfig(3, "mean"), None, (1, 3)),
    "reconstruction": (ReconstructionConfig(), None, (1, 16, 16, 16)),
    "convolutions": (SegmentationConfig(classes=3), CONV, (1, 2, 2, 3)),
    "panoptic": (PanopticConfig(classes=3, things=[1]), DEEPLAB, (1, 64, 64, 3 + 1 + 2)),
}


def exported(tmp_path, config, model, *, names: str = "axialtrain", **state):
    checkpointed(tmp_path / "run", config, model.state_dict(), **({"data": DATA} | state))
    out = tmp_path / "weights.safetensors"
    export(str(tmp_path / "run"), out, names=names)
    return out


@pytest.mark.parametrize(("task", "backbone", "shape"), TASKS.values(), ids=TASKS)
def test_the_model_is_the_runs(tmp_path, task, backbone, shape):
    config = a_run(task=task)
    if backbone is not None:
        config.model = backbone
    model = a_model(config)
    before = torch.random.get_rng_state()
    found = load_exported(exported(tmp_path, config, model))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not found.model.training
    assert (found.step, found.config, found.task["name"]) == (17, config.model, task.name)
    state = found.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    inputs = found.inputs(np.zeros((64, 64, 3), np.uint8))
    with torch.no_grad():
        hides = isinstance(found.model, MaskedReconstructor)
        output = found.model.backbone(*inputs)[0] if hides else found.model(*inputs)
    assert output.shape == shape


def test_timms_names_are_read_too(tmp_path):
    config = a_run(prefix_tokens=2, grid=[3, 5], grid_embedding=True)
    model = a_model(config)
    state = load_exported(exported(tmp_path, config, model, names="timm")).model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_pixels_become_what_they_were_in_training(tmp_path):
    config = a_run()
    found = load_exported(exported(tmp_path, config, a_model(config)))
    stored = np.random.default_rng(0).integers(0, 256, (10, 9, 3), np.uint8)
    present = np.ones((10, 9), np.bool_)
    present[:, :4], stored[0, 5] = False, 0
    pixels, valid, place = found.inputs(stored, present)
    assert pixels.shape == (1, 12, 12, 3)  # whole tokens of 4 px
    assert (place.height, place.width) == (3, 3)
    assert valid.tolist() == [[[False, True, True]] * 3]
    mean = np.array(DATA["mean"])
    wanted = np.where(present[..., None], (stored / 255 - mean) / 0.25, 0).astype(np.float32)
    assert torch.equal(pixels[0, :10, :9], torch.from_numpy(wanted))
    assert not pixels[0, 10:].any()
    assert not pixels[0, :, 9:].any()
    assert found.model(pixels, valid, place).shape == (1, 3, 3, 3)
    assert found.inputs(stored)[1].all()


def test_the_bands_that_the_run_chose_are_taken(tmp_path):
    config = a_run(bands=2)
    data = {"data": DATA | {"mean": 0.5, "bands": [3, 0]}}
    found = load_exported(exported(tmp_path, config, a_model(config), **data))
    stored = np.arange(4 * 4 * 4, dtype=np.uint16).reshape(4, 4, 4) * 1000
    pixels, *_ = found.inputs(stored)
    wanted = ((stored[..., [3, 0]] / 65535 - 0.5) / 0.25).astype(np.float32)
    assert torch.equal(pixels[0], torch.from_numpy(wanted))


GRID = np.zeros((8, 8, 3), np.uint8)
WRONG = {
    "no bands": (
        (GRID[..., 0],),
        r"pixels are uint8 \[8, 8\]: allowed is \[height, width, bands\]",
    ),
    "a type": (
        (GRID.astype(np.int64),),
        "pixels are int64 .*: allowed is .*uint8, uint16, float32",
    ),
    "bands": ((GRID[..., :1],), "data.mean is .*, or a list of 1 of them"),
    "a mask": ((GRID, np.ones((8, 7), np.bool_)), r"present is bool \[8, 7\]: .*bool \[8, 8\]"),
    "no mask": ((GRID, np.ones((8, 8))), "present is float64 .*: allowed is bool"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_other_pixels_are_refused(tmp_path, given, message):
    config = a_run()
    found = load_exported(exported(tmp_path, config, a_model(config)))
    with pytest.raises(ValueError, match=message):
        found.inputs(*given)


def test_what_is_no_number_is_no_pixel(tmp_path):
    config = a_run()
    found = load_exported(
        exported(tmp_path, config, a_model(config), data={"mean": 0, "std": 1, "bands": None})
    )
    whole = np.ones((8, 8, 3), np.float32)
    whole[:4, :, 1] = np.nan
    pixels, valid, _ = found.inputs(whole)
    assert pixels.isfinite().all()
    assert valid.any()
    assert not valid.all()


def test_as_many_bands_as_the_model_has(tmp_path):
    config = a_run()
    data = {"data": DATA | {"mean": 0.5}}
    found = load_exported(exported(tmp_path, config, a_model(config), **data))
    with pytest.raises(ValueError, match="pixels have 1 bands: allowed are the 3 of the model"):
        found.inputs(GRID[..., :1])


def test_a_file_that_does_not_say_how_pixels_were_normalised(tmp_path):
    config = a_run()
    found = load_exported(exported(tmp_path, config, a_model(config), data=None))
    assert found.data is None
    with pytest.raises(
        ValueError, match=r"weights\.safetensors: does not say how pixels were normal"
    ):
        found.inputs(GRID)


BAD = {
    "no file": ({}, "no such file"),
    "of anybody": ({"model": None}, "does not say what its weights are of"),
    "other names": ({"names": "torch"}, "does not say what its weights are of"),
    "no JSON": ({"model": "{"}, "does not describe its model"),
    "no task": ({"task": "null"}, "is of the task None: allowed are segmentation, "),
    "another task": ({"task": '{"name": "os.system"}'}, "is of the task 'os.system'"),
    "a key": ({"task": '{"name": "segmentation", "path": 1}'}, "does not describe its task"),
    "half a class": ({"task": '{"name": "segmentation", "classes": 2.5}'}, "describes no model"),
    "another size": (
        {"task": '{"name": "segmentation", "classes": 7}'},
        r"has head.bias: \[3\], and describes a model with \[7\]",
    ),
    "no token": (
        {"task": '{"name": "classification"}'},
        "describes no model: the head reads 1 prefix token",
    ),
    "no number": ({"data": '{"mean": "x", "std": 1, "bands": null}'}, "data.mean is 'x'"),
    "shards' own": (
        {"data": '{"mean": "manifest", "std": "manifest", "bands": null}'},
        "are manifest, which only shards have",
    ),
    "no spread": ({"data": '{"mean": 0.5, "std": 1e-320, "bands": null}'}, "data.std is 1e-320"),
    "no mean": ({"data": "[]"}, "does not say how pixels were normalised"),
    "no step": ({"step": "-1"}, "is of step '-1': allowed is a whole number"),
}


@pytest.mark.parametrize(("said", "message"), BAD.values(), ids=BAD)
def test_what_a_stranger_says_is_held_to_the_tensors(tmp_path, said, message):
    config = a_run()
    path = exported(tmp_path, config, a_model(config))
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in (file.metadata() | said).items() if value}
    save_file(load_file(path), path, metadata=metadata)
    if not said:
        path.unlink()
    with pytest.raises(ValueError, match=rf"^{path}: .*{message}"):
        load_exported(path)


def test_a_model_that_is_claimed_takes_no_memory(tmp_path):
    """Its 2^20 x 2^22 weights would be 16 TiB."""
    config = a_run()
    path = exported(tmp_path, config, a_model(config))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    model = json.loads(metadata["model"]) | {"dim": 2**20, "heads": 2**18}
    save_file(load_file(path), path, metadata=metadata | {"model": json.dumps(model)})
    with pytest.raises(ValueError, match="describes a model with"):
        load_exported(path)


@pytest.mark.slow
def test_a_run_that_is_exported_has_the_loss_of_its_validation(axialtrain, tmp_path):
    """The numbers of a mesh of two, from the file alone; pixels normalised as shards measured."""
    images, rasters, _ = zip(*draw_scenes(tmp_path, count=2, size=512, seed=0), strict=True)
    done = axialtrain("shard", *images, "--labels", *rasters, "--out", "s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = axialtrain(
        "train", "experiment=quickstart", "data.shards=s", "data.validation=s", "mesh=1x2",
        "data.mean=manifest", "data.std=manifest", "train.steps=2", "model.dim=16", "model.depth=1",
        "logger=none", "hydra.run.dir=run", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = axialtrain("export", "run", "--out", "a.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()

    found, losses = load_exported(tmp_path / "a.safetensors"), []
    shards = open_shards(str(tmp_path / "s"))
    for row in shards.images:
        region = shards.region(row.name, Rect(0, row.height, 0, row.width))
        with torch.no_grad():
            logits = found.model(*found.inputs(region.pixels, region.present))
        side = row.height // logits.shape[1]
        each = logits.repeat_interleave(side, 1).repeat_interleave(side, 2)
        labels = torch.from_numpy(region.labels).long()[None]
        losses.append(
            torch.nn.functional.cross_entropy(each.movedim(-1, 1), labels, ignore_index=255)
        )
    assert float(sum(losses)) / len(losses) == pytest.approx(json.loads(last)["val_loss"], rel=1e-5)
