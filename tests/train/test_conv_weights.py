"""Weights and configs of Axial-ResNet and Axial-DeepLab: `init=`, export, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_checkpoints import a_model, a_run, checkpointed

from axialtrain.cli import main
from axialtrain.models.conv_config import AxialDeepLabConfig, AxialResNetConfig
from axialtrain.models.own_weights import described
from axialtrain.tasks.classification import ClassificationConfig
from axialtrain.tasks.segmentation import SegmentationConfig
from axialtrain.train.check import check
from axialtrain.train.checkpoint import newest
from axialtrain.train.compose import compose_run
from axialtrain.train.export import export
from axialtrain.train.resume import check_fits
from axialtrain.train.start import start_of

SMALL = {"layers": [1, 1, 1, 1], "width": 0.125, "heads": 2}
CLASSES = ClassificationConfig(classes=3, pool="mean")


def a_resnet(**options) -> AxialResNetConfig:
    return AxialResNetConfig(**SMALL | {"image": [64, 96]} | options)


def a_deeplab(trunk=None, **options) -> AxialDeepLabConfig:
    size = {"image": None, "span": 9, "output_stride": 16}
    decoders = {"aspp": [2], "semantic": 8, "instance": 8, "head": 8}
    return AxialDeepLabConfig(
        trunk=AxialResNetConfig(**SMALL | size | (trunk or {})),
        **decoders | {"low_semantic": [4, 4], "low_instance": [4, 4]} | options,
    )


def model_and_config(model, task=None):
    """Of that config; running statistics are drawn, too."""
    config = replace(a_run(task=task), model=model)
    built = a_model(config)
    generator = torch.Generator().manual_seed(1)
    for name, value in built.named_buffers():
        noise = torch.rand(value.shape, generator=generator)
        value.copy_(noise + 0.5 if name.endswith("var") else noise)
    return built, config


@pytest.fixture
def put(tmp_path):
    """put(config, model, how): `init=` of a run, or an exported file, with these weights."""

    def put(config, model, how="file") -> str:
        run, out = tmp_path / "run", tmp_path / "weights.safetensors"
        checkpointed(run, config, model.state_dict())
        if how == "run":
            return str(run)
        out.unlink(missing_ok=True)
        export(str(run), out)
        return str(out)

    return put


def start(init, model, config):
    return start_of(model, replace(config, init=init))


def refused(init, model_config, task=None) -> str:
    model, config = model_and_config(model_config, task)
    with pytest.raises(ValueError, match=r"^init=") as caught:
        start(init, model, config)
    said = str(caught.value)
    assert said.startswith(f"init={init}: ")
    assert "\n" not in said
    assert len(said) < 1000
    return said


# --- What fits ------------------------------------------------------------------------------------

MODELS = {
    "resnet that segments": (a_resnet(), SegmentationConfig(classes=3, cells=4)),
    "resnet that classifies": (a_resnet(), CLASSES),
    "deeplab": (a_deeplab(), SegmentationConfig(classes=3)),
}


@pytest.mark.parametrize("how", ["file", "run"])
@pytest.mark.parametrize("which", MODELS)
def test_weights_and_running_statistics_are_taken_as_they_are(put, which, how):
    model, config = model_and_config(*MODELS[which])
    given, fresh, unused = start(put(config, model, how), model, config)
    assert (fresh, unused) == ([], [])
    state = model.state_dict()
    assert given.keys() == state.keys()
    assert any(name.endswith("running_var") for name in given)
    assert all(torch.equal(given[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    "options",
    [{"image": [96, 64]}, {"image": [128, 160]}, {"image": [32, 32]}, {"span": 2}, {"span": 70}],
    ids=str,
)
def test_tables_are_cut_or_extended_about_their_middle(put, options):
    model, config = model_and_config(a_resnet())
    other, wanted = model_and_config(a_resnet(**options))
    given, fresh, _ = start(put(config, model), other, wanted)
    assert fresh == []
    changed = 0
    for name, old in model.state_dict().items():
        new = given[name]
        assert new.shape == other.state_dict()[name].shape
        if not name.endswith(".relative"):
            assert torch.equal(new, old), name
            continue
        changed += new.shape != old.shape
        reach, had = new.shape[1] // 2, old.shape[1] // 2
        for distance in range(-reach, reach + 1):
            kept = max(-had, min(had, distance))
            assert torch.equal(new[:, reach + distance], old[:, had + kept])
    assert changed


@torch.no_grad()
def test_a_model_of_larger_tables_gives_the_same_for_the_images_it_could_have_before(put):
    model, config = model_and_config(a_resnet())
    larger, wanted = model_and_config(a_resnet(span=40))
    larger.load_state_dict(start(put(config, model), larger, wanted)[0])
    pixels = torch.randn(1, 64, 96, 3, generator=torch.Generator().manual_seed(2))
    want, _ = model.backbone(pixels)
    assert want.std() > 0.1
    torch.testing.assert_close(larger.backbone(pixels)[0], want, rtol=1e-5, atol=1e-5)


def test_other_classes_leave_the_decoder_as_it_is(put):
    model, config = model_and_config(a_deeplab())
    other, wanted = model_and_config(a_deeplab(), SegmentationConfig(classes=7))
    given, fresh, unused = start(put(config, model), other, wanted)
    assert unused == []
    assert {name.split(".")[0] for name in fresh} == {"head"}
    assert {name.split(".")[0] for name in given} == {"backbone", "semantic"}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in given.items())


def test_an_exported_file_says_which_kind_it_is_of(tmp_path):
    for config in (a_resnet(), a_deeplab()):
        model, run_config = model_and_config(config)
        checkpointed(tmp_path / config.name, run_config, model.state_dict())
        out = tmp_path / f"{config.name}.safetensors"
        assert main(["export", str(tmp_path / config.name), "--out", str(out)]) == 0
        with safe_open(out, framework="pt") as file:
            said = json.loads(file.metadata()["model"])
        assert said == asdict(config)
        assert described(said, "here") == config


# --- What does not fit ----------------------------------------------------------------------------

SPAN = {"image": None, "span": 9}
MISMATCHED = {  # the weights', the model's, what is said
    "width": (a_resnet(width=0.25), a_resnet(), "conv1.weight of (16, 3, 7, 7), and the model has"),
    "more blocks": (
        a_resnet(layers=[2, 1, 1, 1]),
        a_resnet(),
        "has backbone.layer1.1.bn1.bias of (16,), and the model has none",
    ),
    "heads": (
        a_resnet(heads=4),
        a_resnet(),
        ".relative of (8, 31), and the model has one of (16, ",
    ),
    "stride": (
        a_resnet(**SPAN, output_stride=16),
        a_resnet(**SPAN),
        "has output_stride=16, and model.output_stride=32",
    ),
    "a transformer": (
        a_run().model,
        a_resnet(),
        "an axial_transformer, and the model is an axial_r",
    ),
    "a resnet": (a_resnet(), a_run().model, "an axial_resnet, and the model is an axial_transf"),
    "a deeplab": (
        a_deeplab(),
        a_resnet(),
        "an axial_deeplab, and the model is an axial_resnet: al",
    ),
    "dilations": (a_deeplab(aspp=[3]), a_deeplab(), "has aspp=[3], and model.aspp=[2]"),
    "a trunk's width": (
        a_deeplab(trunk={"width": 0.25}),
        a_deeplab(),
        "has backbone.trunk.conv1.weight of (16, 3, 7, 7), and the model has one of (8, 3, 7, 7)",
    ),
}


@pytest.mark.parametrize(("own", "wanted", "message"), MISMATCHED.values(), ids=MISMATCHED)
def test_weights_of_another_model_are_refused(put, own, wanted, message):
    model, config = model_and_config(own)
    assert message in refused(put(config, model), wanted)


@pytest.mark.parametrize("model", [a_resnet(), a_deeplab()], ids=["resnet", "deeplab"])
def test_timms_weights_are_refused_before_they_are_read(tmp_path, monkeypatch, model):
    def read(*_):
        raise AssertionError("nothing is fetched")

    monkeypatch.setattr("axialtrain.train.start.read_timm", read)
    (tmp_path / "weights.pth").write_bytes(b"")
    for init in ("timm:resnet50", str(tmp_path / "weights.pth")):
        said = refused(init, model)
        assert (
            f"names of timm's ViTs, and the model is an {model.name}: allowed are weights" in said
        )


@pytest.mark.parametrize("model", [a_resnet(), a_deeplab()], ids=["resnet", "deeplab"])
def test_timms_names_are_refused(put, tmp_path, capsys, model):
    where = put(*reversed(model_and_config(model)), "run")
    out = tmp_path / "timm.safetensors"
    assert main(["export", where, "--names", "timm", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no model of timm's is an {model.name}: allowed is --names axialtrain" in line
    assert not out.exists()


def test_a_file_that_claims_timms_names_is_refused(put):
    model, config = model_and_config(a_resnet())
    source = put(config, model)
    said = {"names": "timm", "model": json.dumps(asdict(config.model))}
    save_file(load_file(source), source, metadata=said)
    assert "has the names of timm's ViTs, and the model is an axial_resnet" in refused(
        source, config.model
    )


RESNET, DEEPLAB = asdict(a_resnet()), asdict(a_deeplab())
STRANGE = {
    "another name": (
        RESNET | {"name": "resnet"},
        "has model.name='resnet': allowed are ['axial_tr",
    ),
    "a list for a name": (RESNET | {"name": ["axial_resnet"]}, "has model.name=['axial_resnet']"),
    "no name": (
        {k: v for k, v in RESNET.items() if k != "name"},
        "describes its model by 'layers'",
    ),
    "another's key": (
        RESNET | {"depth": 3},
        "describes its model by 'depth': allowed are ['layers",
    ),
    "many blocks": (
        RESNET | {"layers": [1, 1, 1, 513]},
        "model.layers=[1, 1, 1, 513]: allowed are",
    ),
    "no list": (RESNET | {"layers": "1111"}, "model.layers='1111': allowed are"),
    "NaN": (RESNET | {"width": float("nan")}, "model.width=nan: allowed are"),
    "a wide one": (RESNET | {"width": 10**5}, "model.width=100000: allowed are"),
    "a number beyond all": (RESNET | {"span": 10**9}, "does not describe its model"),
    "no trunk": (DEEPLAB | {"trunk": 3}, "trunk: does not describe its model"),
    "a transformer's": (
        DEEPLAB | {"trunk": {"dim": 16, "heads": 2}},
        "a trunk of axial_transformer",
    ),
    "a deeplab's": (
        DEEPLAB | {"trunk": {"name": "axial_deeplab"}},
        "a trunk of axial_deeplab: allo",
    ),
    "a key in it": (
        DEEPLAB | {"trunk": {"_target_": "os.system"}},
        "trunk: describes its model by '",
    ),
    "trunks in trunks": (
        DEEPLAB | {"trunk": DEEPLAB | {"trunk": DEEPLAB}},
        "does not describe its",
    ),
}


@pytest.mark.parametrize(("said", "message"), STRANGE.values(), ids=STRANGE)
def test_what_a_file_says_of_itself_is_data(said, message):
    with pytest.raises(ValueError, match=r"^here: ") as caught:
        described(said, "here")
    assert message in str(caught.value)


def test_a_run_of_another_kind_is_not_gone_on_with(tmp_path):
    model, config = model_and_config(a_deeplab())
    where = checkpointed(tmp_path / "run", config, model.state_dict())
    other = replace(config, model=a_resnet())
    message = "model: is an axial_resnet, .* was saved with an axial_deeplab, allowed is the same"
    with pytest.raises(ValueError, match=message):
        check_fits(newest(where), other, loader=None)


# --- Before a run ---------------------------------------------------------------------------------

CHECKED = {
    "tensor": (["model=axial_resnet26s", "mesh.tensor=2"], "mesh.tensor=2: convolutional models"),
    "a larger image": (
        ["model=axial_resnet26s"],
        "data.shards: an image of up to 512 x 512 px exceeds model.image=[224, 224]",
    ),
    "a class token": (
        ["model=axial_resnet26s", "task=classification"],
        "pool='prefix': an Axial-ResNet has no prefix tokens",
    ),
    "classes of images": (
        ["model=axial_deeplab_s", "task=classification"],
        "task=classification names a class for each image, and model=axial_deeplab one for each",
    ),
    "hidden tokens": (
        ["model=axial_deeplab_s", "task=reconstruction"],
        "task=reconstruction hides tokens in front of the first layer, where model AxialDeepLab",
    ),
    "hidden tokens of a resnet": (
        ["model=axial_resnet26s", "task=reconstruction"],
        "where model AxialResNet has none: allowed are axial transformers",
    ),
    "cells": (
        ["model=axial_deeplab_s", "task.cells=4"],
        "task.cells=4: model=axial_deeplab names a",
    ),
    "cells of a resnet": (
        ["model=axial_resnet26s", "task.cells=5"],
        "does not divide model.patch=32",
    ),
    "instances": (
        ["model=axial_deeplab_s", "task=panoptic"],
        "its images have no instances, which task=panoptic needs: shard them with --instances",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), CHECKED.values(), ids=CHECKED)
def test_what_a_model_cannot_do_is_said_before_a_run(small_shards, tmp_path, overrides, message):
    config, _, _ = compose_run([f"data.shards={small_shards}", *overrides])
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its message is looked at)
        check(config, tmp_path / "run", None)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model", ["axial_resnet26s", "conv_stem_axial_resnet50s", "axial_deeplab_s"]
)
def test_what_fits_is_let_through(small_shards, tmp_path, model):
    size = ["data.window=[224,224]"] if model == "axial_resnet26s" else []
    overrides = [f"data.shards={small_shards}", f"model={model}", "mesh=2x2", *size]
    config, _, _ = compose_run(overrides)
    check(config, tmp_path / "run", None)
