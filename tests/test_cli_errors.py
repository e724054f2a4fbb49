"""Bad input: one clear message and a non-zero exit, on every rank, at once."""

from __future__ import annotations

import time

import pytest

from axialtrain.cli import main
from axialtrain.data.scene import draw_scenes
from axialtrain.data.shard import shard_images

BASE = ["experiment=quickstart", "data.validation=null", "model.dim=16"]


def train(shards, *overrides):
    return ["train", *BASE, f"data.shards={shards}", *overrides]


BAD = {
    "init": (["init=nowhere.pth"], "init=nowhere.pth: no such file: allowed are a file of weights"),
    "experiment": (["experiment=nope"], "nope"),
    "key": (["train.stepz=3"], "unknown key train.stepz: allowed are"),
    "added key": (["+train.stepz=3"], "unknown key train.stepz: allowed are"),
    "value": (["train.steps=0"], "train.steps=0: allowed are"),
    "type": (["train.steps=many"], "train.steps=many"),
    "heads": (["mesh.tensor=3"], "mesh.tensor=3 does not divide model.heads=4"),
    "grid": (["mesh=1x17"], "16 x 16 tokens is smaller than mesh row=1 col=17"),
    "mesh": (["mesh=2by2"], "mesh=2by2: allowed are"),
    "cells": (["task.cells=5"], "task.cells=5 does not divide model.patch=32"),
    "pattern": (["model.axial_config.pattern=[diagonal]"], "unknown pass 'diagonal'"),
    "window": (["data.window=[0,4]"], "data.window"),
    "bands of the mean": (
        ["data.mean=[0.5,0.5]"],
        "data.mean is [0.5, 0.5], allowed is a number from 0 to 1, or a list of 3 of them",
    ),
    "attention key": (
        ["model.axial_config.windows=4"],
        "unknown key model.axial_config.windows: allowed are",
    ),
    "fusion": (
        ["model.axial_config.fusion=mean"],
        "axial_config.fusion='mean': allowed are ['sequential', 'sum']",
    ),
    "positions": (
        ["model.axial_config.positions=sinus"],
        "axial_config.positions='sinus': allowed are",
    ),
    "attention window": (
        ["model.axial_config.pattern=[window]", "model.axial_config.window=17"],
        "axial_config.window=17 is larger than the grid of 16 x 16 tokens: allowed are 1 to 16",
    ),
    "no span": (
        ["model.axial_config.positions=relative"],
        "axial_config.positions=relative needs to know its tables' size: give axial_config.span",
    ),
    "short tables": (
        ["model.axial_config.positions=relative", "model.grid=[16,15]"],
        "a grid of 16 x 16 tokens exceeds the relative positions, made for model.grid=[16, 15]",
    ),
    "rope": (
        ["model.dim=24", "model.heads=4", "model.axial_config.pattern=[row+global]"],
        "the head width must be a multiple of 4: got model.dim=24 / model.heads=4 = 6",
    ),
    "exchange": (["mesh.exchange=ring"], "mesh.exchange='ring': allowed are swap, heads, gather"),
    "swap": (["mesh.swap=fast"], "mesh.swap='fast': allowed are auto, direct, hierarchical"),
    "exchange of heads": (
        ["mesh=1x4", "mesh.tensor=2", "mesh.exchange=heads"],
        "row passes deal out the 4 heads over tensor x col = 2 x 4 ranks: allowed are multiples "
        "of 8, mesh.exchange=swap and mesh.exchange=gather",
    ),
    "shards": (["data.shards=nowhere"], "nowhere"),
    "mlp": (["model.mlp_ratio=0.01"], "model.mlp_ratio=0.01: allowed are"),
    "bands": (["model.bands=1"], "model.bands=1: the shards hold 3 bands"),
    "named bands": (["data.bands=[0,2]"], "model.bands=3: data.bands names 2 bands"),
    "no such band": (["data.bands=[0,1,3]"], "data.bands has 3, allowed are 0 to 2"),
    "hue": (
        ["data.augment.hue=0.1", "data.bands=[0]", "model.bands=1"],
        "data.augment.hue is 0.1, allowed is 0 for pixels of 1 band of uint8",
    ),
    "shift": (["data.augment.shift=9"], "data.augment.shift is 9, allowed is 0 where data.window"),
    "timeout": (["launcher.timeout=nan"], "launcher.timeout=nan: allowed are"),
    "device": (["launcher.device=tpu"], "launcher.device='tpu': allowed are"),
    "kernel of another device": (
        [
            "launcher.device=cpu",
            "model.heads=1",
            "model.axial_config.positions=relative",
            "model.axial_config.span=8",
            "model.axial_config.kernel=flex",
        ],
        "axial_config.kernel=flex: FlexAttention trains on cuda alone, and this run is on cpu",
    ),
    "classes": (["task.classes=3"], "task.classes=3: data.shards="),
    "run folder": (["hydra.run.dir={finished}/note/run"], "note is not a folder that can be"),
    "finished run": (["hydra.run.dir={finished}"], "holds the checkpoints of a run"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD.values(), ids=BAD)
def test_a_bad_override(
    small_shards, tmp_path, tmp_path_factory, monkeypatch, capsys, overrides, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    finished = tmp_path_factory.mktemp("finished")
    (finished / "checkpoints").mkdir()
    (finished / "note").touch()
    overrides = [override.format(finished=finished) for override in overrides]
    assert main(train(small_shards, *overrides)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("axialtrain: ")
    assert message in line
    assert not list(tmp_path.iterdir()), "nothing was started, so nothing is left"


def test_shards_without_labels(axialtrain, tmp_path):
    image, *_ = draw_scenes(tmp_path, count=1, size=512, seed=0)[0]
    shard_images([image], tmp_path / "shards", progress=False)
    refused(axialtrain, train("shards"), tmp_path, "data.shards=shards: has no labels")


def test_a_file_that_is_no_image(axialtrain, tmp_path):
    (tmp_path / "notes.tif").write_text("not an image")
    refused(axialtrain, ["shard", "notes.tif", "--out", "out"], tmp_path, "notes.tif")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_image_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["shard", "missing.tif", "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "missing.tif" in line
    assert not (tmp_path / "out").exists()


def test_a_class_for_each_image(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["shard", "a.tif", "b.tif", "--out", "out", "--image-labels"]
    for classes, message in (
        (["1"], "image_labels has 1 classes, allowed is one for each of the 2 images"),
        (["1", "-1"], "image_labels[1] is -1, allowed is a class from 0 to 65535"),
    ):
        assert main([*command, *classes]) == 2
        assert capsys.readouterr().err == f"axialtrain: {message}\n"
    assert not list(tmp_path.iterdir())


def test_an_error_that_only_one_rank_knows_is_said_by_it(
    small_shards, tmp_path, monkeypatch, capsys
):
    """As torchrun starts it; here the second rank finds a damaged shard while it trains."""

    def damaged(*_):
        raise ValueError("shard-00000.tar: byte 512: is damaged")

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("axialtrain.train.run.run", damaged)
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert main(train(small_shards, f"hydra.run.dir={tmp_path}")) == 2
    assert capsys.readouterr().err == "axialtrain: rank 1: shard-00000.tar: byte 512: is damaged\n"


@pytest.mark.parametrize(
    ("local", "said"), [("0", "axialtrain: rank 2: shards: "), ("1", "")], ids=["first", "second"]
)
def test_a_host_without_the_shards_says_so(monkeypatch, tmp_path, capsys, local, said):
    """By its first rank, for rank 0, on another host, may have them."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", "2"), ("LOCAL_RANK", local), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert main(train("shards", "mesh=single")) == 2
    heard = capsys.readouterr().err
    assert heard.startswith(said)
    assert bool(heard) == bool(said)


def test_an_empty_shard_folder(axialtrain, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(axialtrain, train("empty"), tmp_path, "manifest")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mesh_that_does_not_match_the_processes(axialtrain, small_shards, tmp_path, rank):
    """As torchrun starts it; each rank refuses by itself, without waiting for the others."""
    message = "needs 4 processes, 2 were started" if rank == 0 else ""
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    refused(axialtrain, train(small_shards, "mesh=2x2"), tmp_path, message, **environment)


def refused(axialtrain, command, folder, message, **environment):
    started = time.monotonic()
    done = axialtrain(*command, cwd=folder, timeout=60, **environment)
    assert time.monotonic() - started < 10
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    if message:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
