"""`experiment=finetune_deit`, from the command line: timm's weights in a file, and DeiT's teacher.

The models have two layers, the images are drawn. What is held against the runs is timm's model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import torchvision_ops  # isort: skip  # noqa: F401 (before timm)
import timm
import torch
import torch.nn.functional as F
from distributed.vit_ranks import randomised
from safetensors.torch import save_file

from axialtrain.cli import main
from axialtrain.data.scene import draw_scenes
from axialtrain.data.shard import shard_images
from axialtrain.models.axialize import axialize
from axialtrain.models.timm_weights import read_timm
from axialtrain.train.check import data_of, loader_of
from axialtrain.train.checkpoint import newest
from axialtrain.train.compose import compose_run

pytestmark = pytest.mark.slow

BASE = ["experiment=finetune_deit", "model.depth=2", "task.classes=3"]
DISTILLED = ["model.prefix_tokens=2", "task.distilled=true"]


def a_deit(name="deit_tiny_patch16_224", **options):
    options = {"depth": 2, "num_classes": 3} | options
    return randomised(timm.create_model(name, dynamic_img_size=True, **options)).eval()


def a_distilled_deit(**options):
    return a_deit("deit_tiny_distilled_patch16_224", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shards of three scenes of 896 px, each of another class, and of one of 512 px; weights."""
    folder = tmp_path_factory.mktemp("finetune")
    scenes = [image for image, *_ in draw_scenes(folder / "scenes", count=3, size=896, seed=0)]
    shard_images(scenes, folder / "shards", image_labels=[2, 0, 1], progress=False)
    ((small, *_),) = draw_scenes(folder / "small", count=1, size=512, seed=1)
    shard_images([small], folder / "held-out", image_labels=[1], progress=False)
    torch.save(a_deit(num_classes=5).state_dict(), folder / "deit.pth")
    save_file(a_distilled_deit().state_dict(), folder / "distilled.safetensors")
    torch.save({"model": a_teacher().state_dict()}, folder / "teacher.pth")
    torch.save(a_deit(patch_size=32).state_dict(), folder / "teacher32.pth")
    (folder / "damaged.pth").write_bytes((folder / "deit.pth").read_bytes()[:5000])
    torch.save({"model": {}, "args": Path("x")}, folder / "code.pth")
    return folder


def a_teacher():
    """Which of the classes it names depends on the image."""
    model = a_deit("vit_tiny_patch16_224", embed_dim=128, num_heads=2, img_size=96)
    with torch.no_grad():
        model.head.weight.mul_(8)
    return model


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_on(axialtrain, folder, tmp_path_factory):
    """run_on(mesh, *overrides): (what was said, the lines of metrics.jsonl, the run's folder)."""

    def run(mesh: str, *overrides: str) -> tuple[str, list[dict[str, float]], Path]:
        out = tmp_path_factory.mktemp("run") / "here"
        steps = ["train.steps=2", "train.batch=2", "data.shards=shards", f"mesh={mesh}"]
        done = axialtrain("train", *BASE, *steps, *overrides, f"hydra.run.dir={out}", cwd=folder)
        assert done.returncode == 0, done.stderr
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return done.stdout, [json.loads(line) for line in lines], out

    return run


def assert_alike(lines, others):
    """Steps of two meshes: losses and gradient norms, to rounding in fp32."""
    for name in ("loss", "grad_norm", "val_loss", "accuracy"):
        got, want = ([line[name] for line in run if name in line] for run in (lines, others))
        assert got == pytest.approx(want, rel=1e-5), name


@pytest.mark.slow
def test_four_times_the_resolution_on_any_mesh(run_on, folder):
    """896 px, as the experiment has it: weights made for 224 px, and a head of other classes."""
    said, expected, _ = run_on("1x1", "init=deit.pth")
    assert "init=deit.pth: not in it, and drawn anew: head.weight, head.bias" in said
    _, lines, out = run_on("2x2", "init=deit.pth")
    assert_alike(lines, expected)
    assert (out / "prediction.png").exists()
    weights, start = newest(out).weights(), read_timm(str(folder / "deit.pth"), "")
    for name in ("norm.weight", "blocks.1.mlp.fc1.weight"):  # it went on from there
        moved = (weights[f"backbone.{name}"] - start[name]).norm()
        assert 0 < moved < 0.01 * start[name].norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_teacher_in_a_file_on_any_mesh(run_on, folder, kind):
    overrides = [
        *DISTILLED,
        "init=distilled.safetensors",
        "data.window=[448,448]",
        "model.drop_path=0",
        "task.distill.teacher=teacher.pth",
        f"task.distill.kind={kind}",
    ]
    if kind == "hard":
        overrides.append("data.validation=held-out")
    _, expected, _ = run_on("1x1", *overrides)
    assert ("val_loss" in expected[-1]) == (kind == "hard")
    assert expected[0]["loss"] == pytest.approx(first_loss(folder, kind, overrides), rel=1e-5)
    if kind == "hard":  # soft on meshes: tests/tasks/test_classification.py
        _, lines, _ = run_on("2x2", *overrides)
        assert_alike(lines, expected)


@torch.no_grad()
def first_loss(folder, kind, overrides) -> float:
    """Of the first step: timm's student, turned axial, and timm's teacher, by DeiT's formulas."""
    shards = [f"data.shards={folder}/shards", "data.validation=null"]
    config, _, _ = compose_run([*BASE, *overrides, *shards, "train.batch=2"])
    loader = loader_of(config, data_of(config)["data.shards"], at=(0, 0), data_rank=0)
    student = axialize(a_distilled_deit().train(), {"pattern": ["row+col"]})
    student.set_distilled_training(True)
    losses = []
    for batch in next(loader.steps(0, 1)):
        images = batch.pixels.movedim(-1, 1)
        assert images.shape[2:] == (448, 448)
        by_label, by_teacher = student(images)
        taught = a_teacher()(images)
        loss = F.cross_entropy(by_label, batch.targets) / 2
        if kind == "hard":
            losses.append(loss + F.cross_entropy(by_teacher, taught.argmax(1)) / 2)
        else:
            p, q = (taught / 3).softmax(1), (by_teacher / 3).softmax(1)
            losses.append(loss + 9 * (p * (p / q).log()).sum(1).mean() / 2)
    return torch.stack(losses).mean().item()


# --- What is refused, in one line, before anything starts -----------------------------------------

TEACHER = "task.distill.teacher={folder}/teacher.pth"
STUDENT = [*DISTILLED, "init={folder}/distilled.safetensors"]
BAD = {
    "no init": ([], "init is not set: give init=timm:NAME, init=FILE or init=null"),
    "no file": (["init=nowhere.pth"], "init=nowhere.pth: no such file: allowed are a file of"),
    "an unknown name": (["init=timm:vit"], "init=timm:vit: cannot be had from timm's hub"),
    "a damaged file": (["init={folder}/damaged.pth"], "damaged.pth: is no file of plain weights"),
    "a file with code": (["init={folder}/code.pth"], "code.pth: is no file of plain weights"),
    "another depth": (
        ["init={folder}/deit.pth", "model.depth=3"],
        "has depth=2, and model.depth=3",
    ),
    "another model": (
        ["init={folder}/deit.pth", "model=axial_vit_small_patch16"],
        "has dim=192, and model.dim=384",
    ),
    "another patch": (["init={folder}/teacher32.pth"], "has patch=32, and model.patch=16"),
    "a distillation token": (
        ["init={folder}/distilled.safetensors"],
        "has prefix_tokens=2, and model.prefix_tokens=1",
    ),
    "separate projections": (
        ["init={folder}/deit.pth", "model.axial_config.share_projections=false"],
        "allowed is axial_config.share_projections=true",
    ),
    "factorised positions": (
        ["init={folder}/deit.pth", "model.axial_config.positions=axial"],
        "axial_config.positions=axial: the weights bring an embedding of their own, allowed are",
    ),
    "tables too short": (
        ["init={folder}/deit.pth", "model.axial_config.positions=relative"],
        "a grid of 56 x 56 tokens exceeds the relative positions, made for model.grid=[14, 14]",
    ),
    "too few classes": (
        ["init={folder}/deit.pth", "task.classes=2"],
        "task.classes=2: data.shards={folder}/shards has images of class 2; allowed are numbers",
    ),
    "no labels": (
        ["init={folder}/deit.pth", "data.shards={unlabelled}"],
        "its images have no class, which task=classification needs: shard them with --image-labels",
    ),
    "no labels to validate": (
        ["init={folder}/deit.pth", "data.validation={unlabelled}"],
        "data.validation={unlabelled}: its images have no class",
    ),
    "a teacher of nobody": (
        ["init={folder}/deit.pth", TEACHER],
        "teaches a distillation token: give task.distilled=true, and model.prefix_tokens=2",
    ),
    "one prefix token": (
        ["init={folder}/deit.pth", "task.distilled=true"],
        "the head reads 2 prefix token(s), and model.prefix_tokens=1: allowed are numbers from 2",
    ),
    "a teacher of other classes": (
        [*STUDENT, "task.distill.teacher={folder}/deit.pth"],
        "deit.pth: tells [5] classes apart, allowed are those of task.classes=3",
    ),
    "a teacher that is not there": (
        [*STUDENT, "task.distill.teacher=nowhere.pth"],
        "task.distill.teacher=nowhere.pth: no such file: allowed are",
    ),
    "a teacher of other patches": (
        [*STUDENT, "task.distill.teacher={folder}/teacher32.pth"],
        "teacher32.pth: has patch=32",
    ),
    "a kind of teaching": ([*STUDENT, TEACHER, "task.distill.kind=mild"], "'mild': allowed are"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD.values(), ids=BAD)
def test_a_bad_override(folder, small_shards, tmp_path, monkeypatch, capsys, overrides, message):
    def start(*_):
        raise AssertionError("it was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("axialtrain.launch.local.start", start)
    names = {"folder": folder, "unlabelled": small_shards}
    overrides = [override.format(**names) for override in overrides]
    assert main(["train", *BASE, f"data.shards={folder}/shards", *overrides]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1, said
    assert said.startswith("axialtrain: ")
    assert message.format(**names) in said
    assert not list(tmp_path.iterdir()), "nothing was started, so nothing is left"
