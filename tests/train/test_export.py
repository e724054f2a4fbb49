"""`axialtrain export`: what a checkpoint has, in one file; under timm's names, timm loads it."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict
from pathlib import Path

import pytest

import torchvision_ops  # isort: skip  # noqa: F401 (before timm)
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_checkpoints import a_model, a_run, checkpointed, drawn

from axialtrain.cli import main
from axialtrain.models.registry import model_config
from axialtrain.models.transformer import AxialTransformer
from axialtrain.tasks.classification import ClassificationConfig, DistillConfig
from axialtrain.train.check import task_of
from axialtrain.train.checkpoint import newest
from axialtrain.train.export import export
from axialtrain.train.start import start_of


@pytest.fixture
def run(tmp_path_factory):
    """run(config, module): its only checkpoint is of step 17."""

    def run(config, module, **state) -> str:
        folder = tmp_path_factory.mktemp("runs") / "one"
        checkpointed(folder, config, module.state_dict(), **state)
        return str(folder)

    return run


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


# --- The file -------------------------------------------------------------------------------------


def test_a_file_has_every_tensor_and_says_what_it_is_of(run, tmp_path, capsys):
    config = a_run(prefix_tokens=2, grid=[3, 5], grid_embedding=True)
    model = a_model(config)
    where = run(config, model)
    out = tmp_path / "new" / "folder" / "weights.safetensors"
    assert main(["export", where, "--to", "safetensors", "--out", str(out)]) == 0
    written, state = load_file(out), model.state_dict()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())
    said = metadata_of(out)
    assert said.pop("model") == json.dumps(asdict(config.model))
    assert json.loads(said.pop("task")) == {"classes": 3, "cells": 1, "name": "segmentation"}
    assert said == {"format": "pt", "names": "axialtrain", "step": "17"}
    *_, last = capsys.readouterr().out.splitlines()
    count, size = len(written), sum(value.nbytes for value in written.values())
    assert last == (
        f"{where}/checkpoints/step-00000017, step 17: {count} tensors, {size} bytes, axialtrain "
        f"names, in {out}"
    )
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_which_checkpoint_it_is(run, tmp_path):
    """The newest of a run, the best one, one that is named, and the one before a damaged one."""
    config = a_run()
    where = run(config, a_model(config))
    for step, seed in ((18, 1), (19, 2)):
        checkpointed(where, config, a_model(config, seed).state_dict(), step=step, best_step=18)
    export(where, tmp_path / "new.safetensors")
    export(where, tmp_path / "best.safetensors", best=True)
    export(f"{where}/checkpoints/step-00000017", tmp_path / "named.safetensors")
    (Path(where) / "checkpoints/step-00000019/state.json").write_text("{")
    export(where, tmp_path / "before.safetensors")
    for name, step, seed in (("new", 19, 2), ("best", 18, 1), ("named", 17, 0), ("before", 18, 1)):
        path = tmp_path / f"{name}.safetensors"
        assert metadata_of(path)["step"] == str(step)
        assert torch.equal(load_file(path)["head.bias"], a_model(config, seed).head.bias)


def test_a_file_does_not_tell_who_taught_the_model(run, tmp_path):
    teacher = DistillConfig(teacher="/home/somebody/teacher.pth")
    task = ClassificationConfig(classes=3, distilled=True, distill=teacher)
    config = a_run(task=task, prefix_tokens=2)
    export(run(config, a_model(config)), tmp_path / "a.safetensors")
    assert b"somebody" not in (tmp_path / "a.safetensors").read_bytes()
    assert json.loads(metadata_of(tmp_path / "a.safetensors")["task"])["distilled"] is True


BAD = {
    "a file that is there": (["{run}", "--out", "there.safetensors"], "is there already"),
    "a folder": (["{run}", "--out", "folder.safetensors"], "is there already"),
    "a dangling link": (["{run}", "--out", "link.safetensors"], "is there already"),
    "another suffix": (["{run}", "--out", "a.pth"], "a.pth: allowed is the path of a new file"),
    "no name": (["{run}", "--out", ""], "allowed is the path of a new file, NAME.safetensors"),
    "a URL": (["{run}", "--out", "s3://bucket/a.safetensors"], "allowed is the path of a new"),
    "no checkpoint": (["nowhere", "--out", "a.safetensors"], "nowhere: holds no complete check"),
    "no best one": (["{run}", "--best", "--out", "a.safetensors"], "no validation has found a be"),
    "a file above it": (["{run}", "--out", "there.safetensors/a.safetensors"], "there.safetensors"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_refused(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    config = a_run()
    where = run(config, a_model(config))
    (tmp_path / "there.safetensors").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    assert main(["export", *(one.format(run=where) for one in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.safetensors").read_text() == "mine"


@pytest.mark.parametrize("option", [["--to", "onnx"], ["--names", "torch"]])
def test_another_form_is_refused(option, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", "run", "--out", "a.safetensors", *option])
    assert ended.value.code == 2
    assert f"argument {option[0]}: invalid choice: '{option[1]}'" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = a_run()
    where = run(config, a_model(config))
    monkeypatch.setattr("os.fsync", full)
    out = tmp_path / "a.safetensors"
    assert main(["export", where, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"--out {out}: cannot be written: " in said
    assert "No space left on device" in said
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_who_knows_what_is_refused(run, tmp_path):
    config = a_run()
    model = a_model(config)
    bad = {
        "does not describe its model": None,
        "describes its model by '_target_'": {"_target_": "os.system", "dim": 16},
        "allowed is up to 4096": asdict(config.model) | {"depth": 10**6},
        "model.heads=5 does not divide": asdict(config.model) | {"heads": 5},
    }
    for message, said in bad.items():
        where = run(config, model, model=said)
        with pytest.raises(ValueError, match=f"^{where}/checkpoints/step-00000017: .*{message}"):
            export(where, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


# --- timm's names ---------------------------------------------------------------------------------

VIT = {"prefix_tokens": 1, "grid": [4, 4], "grid_embedding": True}
CLASSES = 7
# (timm's, its options, options of our model, of our task)
TIMMS = {
    "deit": ("deit_tiny_patch16_224", {}, {}, {}),
    "distilled": (
        "deit_tiny_distilled_patch16_224",
        {},
        {"prefix_tokens": 2},
        {"distilled": True},
    ),
    "registers, layer scale": (
        "vit_tiny_patch16_224",
        {"reg_tokens": 3, "init_values": 0.1},
        {"prefix_tokens": 4, "layer_scale": 1.0},
        {},
    ),
    "no bias": (
        "vit_small_patch16_224",
        {"qkv_bias": False},
        {"dim": 384, "heads": 6, "qkv_bias": False},
        {},
    ),
    "one band": ("vit_tiny_patch16_224", {"in_chans": 1}, {"bands": 1}, {}),
    "mean": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "fc_norm": False},
        {},
        {"pool": "mean"},
    ),
    "no position embedding": (
        "vit_tiny_patch16_224",
        {"pos_embed": "none"},
        {"grid_embedding": False},
        {},
    ),
}
PATTERNS = [["global"], ["window", "row+col"]]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)
@pytest.mark.parametrize("which", TIMMS)
def test_timms_weights_come_back_bit_for_bit(run, tmp_path, which, pattern):
    """A timm model's file -> init -> a checkpoint -> export --names timm -> timm."""
    name, theirs, ours, task = TIMMS[which]
    options = {"depth": 2, "num_classes": CLASSES, "img_size": 64} | theirs
    start = drawn(timm.create_model(name, **options))
    torch.save(start.state_dict(), tmp_path / "timm.pth")
    attention = {"pattern": pattern, "window": 2}
    config = a_run(task=ClassificationConfig(classes=CLASSES, **task))
    config.model = model_config(
        "axial_vit_tiny_patch16", depth=2, axial_config=attention, **{"grid": [4, 4]} | ours
    )
    config.init = str(tmp_path / "timm.pth")
    model = task_of(config).build(AxialTransformer(config.model))
    if which == "no position embedding":  # a file of timm's must have one: start from our own
        model = drawn(model)
    else:
        given, fresh, unused = start_of(model, config)
        assert (fresh, unused) == ([], [])
        model.load_state_dict(given)
    said = export(run(config, model), tmp_path / "out.safetensors", names="timm")
    assert len(said.splitlines()) == 1, "every tensor is timm's"
    back = drawn(timm.create_model(name, **options), seed=1)
    back.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
    if which != "no position embedding":
        for key, value in start.state_dict().items():
            assert torch.equal(back.state_dict()[key], value), key
    if pattern == ["global"]:  # timm's own attention: the same logits
        bands = config.model.bands
        images = torch.randn(2, bands, 64, 64, generator=torch.Generator().manual_seed(0))
        got, want = back.eval()(images), model.eval()(images.movedim(1, -1))
        assert want.std() > 0.1
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_attention_pooling_is_timms_too(run, tmp_path):
    options = {"depth": 2, "num_classes": CLASSES, "img_size": 64, "global_pool": "map"}
    config = a_run(task=ClassificationConfig(classes=CLASSES, pool="attention"))
    config.model = model_config(
        "axial_vit_tiny_patch16", depth=2, axial_config={"pattern": ["global"]}, grid=[4, 4]
    )
    model = drawn(task_of(config).build(AxialTransformer(config.model))).eval()
    export(run(config, model), tmp_path / "out.safetensors", names="timm")
    theirs = timm.create_model("vit_tiny_patch16_224", **options).eval()
    theirs.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(images), model(images.movedim(1, -1)), rtol=0, atol=1e-5)


def test_what_timm_has_no_place_for_keeps_its_name_and_is_said(run, tmp_path, capsys):
    attention = {"pattern": ["row", "row+col"], "positions": "relative", "share_projections": False}
    config = a_run(axial_config=attention, grid=[4, 4])
    model = a_model(config)
    where, out = run(config, model), tmp_path / "a.safetensors"
    assert main(["export", where, "--names", "timm", "--out", str(out)]) == 0
    said, last = capsys.readouterr().out.splitlines()
    ours = {name.removeprefix("backbone."): value for name, value in model.state_dict().items()}
    separate = [name for name in ours if name.startswith(("blocks.1.attn", "blocks.1.norm1"))]
    names = [name for name in ours if name in ("blocks.0.attn.bias_w", *separate)]
    assert said == f"timm has no place for, names and packing are ours: {', '.join(names)}"
    assert "timm names" in last
    written = load_file(out)
    assert written.keys() == ours.keys(), "no other name changes, without tokens beside the image"
    for name, value in ours.items():
        if name.startswith("blocks.0.attn.qkv"):
            packed = value.unflatten(0, (2, 3, 8)).transpose(0, 1).flatten(0, 2)
            assert torch.equal(written[name], packed)
        elif name == "patch_embed.proj.weight":
            assert torch.equal(written[name], value.view(16, 3, 4, 4))
        else:
            assert torch.equal(written[name], value), name


def test_a_model_without_any_layer_of_timms_is_refused(run, tmp_path):
    config = a_run(axial_config={"share_projections": False})
    where = run(config, a_model(config))
    message = r"step-00000017: --names timm: each layer has .*allowed is --names axialtrain$"
    with pytest.raises(ValueError, match=message):
        export(where, tmp_path / "a.safetensors", names="timm")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_not_of_its_model_is_refused(run, tmp_path):
    """Weights of one, the config of another: nothing is packed by guess."""
    config, other = a_run(**VIT), a_run(**VIT | {"dim": 32, "grid": [4, 3], "prefix_tokens": 2})
    model, wrong = a_model(config), a_model(other).state_dict()
    for name in (
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "prefix",
        "grid_embed.table",
    ):
        state = model.state_dict() | {f"backbone.{name}": wrong[f"backbone.{name}"]}
        where = tmp_path / name
        checkpointed(where, config, state)
        with pytest.raises(ValueError, match=f"step-00000017: has {name} of .*, and describes one"):
            export(str(where), tmp_path / "a.safetensors", names="timm")


# --- From the command line ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_its_export_and_a_run_that_starts_from_it(axialtrain, small_shards, tmp_path):
    """Trained on 1 x 2; then another mesh, more classes, and an image of another size."""
    model = ["model.dim=16", "model.depth=2", "model.grid_embedding=true", "model.prefix_tokens=1"]
    base = [
        *("train", "experiment=quickstart", f"data.shards={small_shards}", "data.validation=null"),
        *(*model, "train.batch=2", "train.steps=2"),
    ]

    def done(*arguments):
        finished = axialtrain(*arguments, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    done(*base, "model.grid=[16,16]", "mesh=1x2", "hydra.run.dir=first")
    for names in ("axialtrain", "timm"):
        said = done("export", "first", "--names", names, "--out", f"{names}.safetensors")
        assert f"step 2: {len(load_file(tmp_path / f'{names}.safetensors'))} tensors" in said
    weights = newest(tmp_path / "first").weights()
    written = load_file(tmp_path / "axialtrain.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], value) for name, value in weights.items())

    smaller = [*base, "model.grid=[8,8]", "task.classes=7", "data.window=[256,256]", "optim.lr=0"]
    losses = []
    for number, init in enumerate(("first", "timm.safetensors")):
        out = f"after-{number}"
        said = done(*smaller, f"init={init}", f"mesh={number % 2 + 1}x1", f"hydra.run.dir={out}")
        assert "not in it, and drawn anew: head.weight, head.bias" in said
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if "grad_norm" in line])
        now = newest(tmp_path / out).weights()
        assert torch.equal(now["backbone.norm.weight"], weights["backbone.norm.weight"])
        assert now["backbone.grid_embed.table"].shape == (8, 8, 16)
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
