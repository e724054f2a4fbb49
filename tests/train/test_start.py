"""`init=`: a run starts from weights of ours wherever they lie, and from no others."""

from __future__ import annotations

import json
import os
import pickle
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import a_model, a_run, checkpointed

from axialtrain.tasks.classification import ClassificationConfig
from axialtrain.tasks.reconstruction import ReconstructionConfig
from axialtrain.tasks.segmentation import SegmentationConfig
from axialtrain.train.export import export
from axialtrain.train.start import pinned, start_of

RELATIVE = {"positions": "relative"}
VIT = {"prefix_tokens": 1, "grid": [4, 6], "grid_embedding": True}
MODELS = {
    "rope": {},
    "a ViT": VIT | {"axial_config": {"positions": "none"}},
    "registers, no bias, layer scale": VIT
    | {"prefix_tokens": 4, "qkv_bias": False, "layer_scale": 0.1},
    "relative tables": {"grid": [4, 6], "axial_config": RELATIVE | {"pattern": ["row+col+global"]}},
    "factorised": {"prefix_tokens": 2, "grid": [4, 6], "axial_config": {"positions": "axial"}},
    "both embeddings": VIT | {"axial_config": {"positions": "axial"}},
    "some separate projections": {
        "axial_config": {"pattern": ["row", "col+window"], "window": 2, "share_projections": False}
    },
}


@pytest.fixture
def put(tmp_path):
    """put(config, model, how): `init=` of a place where these weights then are."""
    places = {"run": str(tmp_path / "run"), "URL": f"memory://{tmp_path.name}/run"}

    def put(config, model, how="axialtrain") -> str:
        checkpointed(places["URL" if how == "URL" else "run"], config, model.state_dict())
        if how in places:
            return places[how]
        out = tmp_path / f"{how}.safetensors"
        out.unlink(missing_ok=True)
        export(places["run"], out, names=how)
        return str(out)

    return put


def model_and_config(axial_config=None, task=None, **options):
    config = a_run(task=task, axial_config=axial_config, **options)
    return a_model(config), config


def start(init, model, config):
    config.init = init
    with torch.device("meta"):
        hollow = a_model(config)
    hollow_start, real = start_of(hollow, config), start_of(model, config)
    assert hollow_start[1:] == real[1:], "as the check before a run sees it"
    return real


# --- What fits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["axialtrain", "timm", "run", "URL"])
@pytest.mark.parametrize("which", MODELS)
def test_weights_of_ours_are_taken_as_they_are(put, which, how):
    model, config = model_and_config(**MODELS[which])
    given, fresh, unused = start(put(config, model, how), model, config)
    assert (fresh, unused) == ([], [])
    assert given.keys() == model.state_dict().keys()
    assert all(torch.equal(given[name], value) for name, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("which", ["a ViT", "factorised", "both embeddings"])
def test_a_model_of_another_image_size_starts_with_what_it_gave_for_that_size(put, which):
    """The oracle: the model that the weights are of, on such an image."""
    model, config = model_and_config(**MODELS[which])
    for grid in ([9, 5], [2, 3], [4, 7]):
        larger, other = model_and_config(**MODELS[which] | {"grid": grid})
        given, fresh, _ = start(put(config, model), larger, other)
        assert fresh == []
        larger.load_state_dict(given)
        pixels = torch.randn(1, 4 * grid[0], 4 * grid[1], 3)
        (got, prefix), (want, of_prefix) = (one.backbone(pixels) for one in (larger, model))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        torch.testing.assert_close(prefix, of_prefix, rtol=0, atol=1e-5)
        moved = larger.backbone(pixels.flip(1, 2))[0].flip(1, 2)
        assert (got - moved).abs().max() > 0.01, "positions count"


@pytest.mark.parametrize("options", [{"grid": [9, 3]}, {"span": 11}, {"span": 2}], ids=str)
def test_relative_tables_are_stretched_with_the_image(put, options):
    model, config = model_and_config(**MODELS["relative tables"])
    attention = RELATIVE | {"pattern": ["row+col+global"]}
    if "span" in options:
        attention, options = attention | options, {}
    other, wanted = model_and_config(**{"axial_config": attention, "grid": [4, 6]} | options)
    given, fresh, _ = start(put(config, model), other, wanted)
    assert fresh == []
    for name, value in model.state_dict().items():
        if name.endswith(("bias_h", "bias_w")):
            old, new = ((table.shape[1] + 1) // 2 for table in (value, given[name]))
            assert given[name].shape == other.state_dict()[name].shape
            assert old != new
            at = np.arange(1 - new, new) * old / new
            for had, has in zip(value.numpy(), given[name].numpy(), strict=True):
                want = np.interp(at, np.arange(1 - old, old), had)
                np.testing.assert_allclose(has, want, rtol=0, atol=1e-6)
            assert torch.equal(given[name][:, new - 1], value[:, old - 1]), "no distance"
        else:
            assert torch.equal(given[name], value), name


def test_relative_tables_on_top_start_anew(put):
    model, config = model_and_config(**VIT, axial_config={"positions": "none"})
    other, wanted = model_and_config(**VIT, axial_config=RELATIVE)
    for how in ("axialtrain", "timm"):
        given, fresh, unused = start(put(config, model, how), other, wanted)
        tables = [f"backbone.blocks.{n}.attn.bias_{axis}" for n in (0, 1) for axis in "hw"]
        assert (sorted(fresh), unused) == (tables, [])
        assert given.keys() | fresh == other.state_dict().keys()


HEAD = ["head.weight", "head.bias"]
CLASSES = ClassificationConfig(classes=3, pool="mean")
TASKS = {  # the weights' task, the run's, what starts anew, what is not used
    "more classes": (None, SegmentationConfig(classes=4), HEAD, []),
    "the same shape, other cells": (
        SegmentationConfig(classes=2, cells=4),
        SegmentationConfig(classes=8, cells=2),
        HEAD,
        [],
    ),
    "of another task": (None, CLASSES, HEAD, []),
    "pretrained on pixels": (ReconstructionConfig(), None, HEAD, ["mask_token"]),
    "pooled by attention": (
        CLASSES,
        ClassificationConfig(classes=3, pool="attention"),
        [f"attn_pool.{name}" for name in ("latent", "q.weight", "kv.bias", "mlp.fc2.bias")],
        [],
    ),
    "with a second head": (
        ClassificationConfig(classes=3, distilled=True),
        ClassificationConfig(classes=3),
        [],
        ["head_dist.bias", "head_dist.weight"],
    ),
}


@pytest.mark.parametrize("how", ["axialtrain", "timm", "run"])
@pytest.mark.parametrize(("before", "after", "anew", "left"), TASKS.values(), ids=TASKS)
def test_heads_of_another_task_start_anew(put, before, after, anew, left, how):
    model, config = model_and_config(task=before, prefix_tokens=2)
    other, wanted = model_and_config(task=after, prefix_tokens=2)
    given, fresh, unused = start(put(config, model, how), other, wanted)
    assert set(anew) <= set(fresh)
    assert all(name.startswith(("head", "attn_pool", "mask_token")) for name in fresh)
    assert not anew or fresh[0].split(".")[0] == anew[0].split(".")[0]
    assert sorted(unused) == left
    assert given.keys() | fresh == other.state_dict().keys()
    assert not given.keys() & set(fresh)


def test_weights_of_half_precision_are_taken(put):
    model, config = model_and_config()
    half = {name: value.bfloat16() for name, value in model.state_dict().items()}
    source = put(config, model)
    meta = {"names": "axialtrain", "model": json.dumps(asdict(config.model))}
    save_file(half, source, metadata=meta)
    model.load_state_dict(start(source, model, config)[0])
    assert all(torch.equal(v, half[n].float()) for n, v in model.state_dict().items())


def test_all_ranks_start_from_the_checkpoint_that_one_found(put, tmp_path):
    model, config = model_and_config()
    file = put(config, model)
    for init in (None, "timm:deit_tiny_patch16_224", file, "nowhere.pth"):
        config.init = init
        assert pinned(config) == init
    for how in ("run", "URL"):
        run = put(config, model, how)
        config.init = run
        config.init = pinned(config)
        assert config.init == f"{run}/checkpoints/step-00000017"
        newer = {name: value + 1 for name, value in model.state_dict().items()}
        checkpointed(run, config, newer, step=18)
        given, _, _ = start_of(model, config)
        assert all(torch.equal(given[name], value) for name, value in model.state_dict().items())
        config.init = run
        assert torch.equal(start_of(model, config)[0]["head.bias"], newer["head.bias"])


# --- What does not fit ----------------------------------------------------------------------------

SEPARATE = {"share_projections": False}
MISMATCHED = {  # the weights', the model's, what is said
    "width": (
        {"dim": 32},
        {},
        "patch_embed.proj.weight of (32, 48), and the model has one of (16,",
    ),
    "fewer layers": ({"depth": 1}, {}, "no backbone.blocks.1.norm1.weight, and the model has one"),
    "more layers": ({"depth": 3}, {}, "blocks.2.attn.proj.bias of (16,), and the model has none"),
    "heads": ({"heads": 4}, {}, "has heads=4, and model.heads=2"),
    "mlp": (
        {"mlp_ratio": 3.0},
        {},
        "mlp.fc1.weight of (48, 16), and the model has one of (32, 16)",
    ),
    "patch": ({"patch": 8}, {}, "proj.weight of (16, 192), and the model has one of (16, 48)"),
    "patches of as many values": ({"patch": 2, "bands": 12}, {}, "has patch=2, and model.patch=4"),
    "tokens": ({"prefix_tokens": 1}, {}, "backbone.prefix of (1, 16), and the model has none"),
    "no tokens": ({}, {"prefix_tokens": 2}, "no backbone.prefix, and the model has one of (2, 16)"),
    "positions": (
        VIT,
        {"prefix_tokens": 1},
        "grid_embed.table of (4, 6, 16), and the model has none",
    ),
    "no positions": ({"prefix_tokens": 1}, VIT, "no backbone.prefix_embed, and the model has one"),
    "layer scale": (
        {"layer_scale": 0.1},
        {},
        "blocks.0.ls1.gamma of (16,), and the model has none",
    ),
    "no bias": ({"qkv_bias": False}, {}, "no backbone.blocks.0.attn.qkv.bias, and the model has"),
    "tables": (
        MODELS["relative tables"],
        {},
        "blocks.0.attn.bias_h of (2, 7), and the model has none",
    ),
    "projections of its own": ({"axial_config": SEPARATE}, {}, "no backbone.blocks.0.norm1.weight"),
    "the other pass first": (
        {"axial_config": SEPARATE},
        {"axial_config": SEPARATE | {"pattern": ["col+row"]}},
        "has the projections of row+col in layer 0, and model.axial_config.pattern has col+row",
    ),
}


@pytest.mark.parametrize("how", ["axialtrain", "run"])
@pytest.mark.parametrize(("own", "wanted", "message"), MISMATCHED.values(), ids=MISMATCHED)
def test_weights_of_another_model_are_refused(put, own, wanted, message, how):
    model, config = model_and_config(**own)
    assert message in refused(put(config, model, how), **wanted)


def refused(init, **options) -> str:
    model, config = model_and_config(**options)
    config.init = str(init)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"^init=") as caught:
        start_of(model, config)
    assert time.monotonic() - started < 5
    said = str(caught.value)
    assert said.startswith(f"init={init}: ")
    assert "\n" not in said
    assert len(said) < 1000
    return said


def test_a_place_without_whole_weights_is_refused(put, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", "memory://empty", "nothing://here"):
        assert refused(place).startswith(f"init={place}: ")
    run = put(*reversed(model_and_config()), "run")
    (shard,) = tmp_path.glob("run/checkpoints/*/model*-of-*")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "model-00001-of-00001.safetensors: has" in refused(run)
    for place in (tmp_path / "nothing", "nowhere.safetensors"):
        said = refused(place)
        assert "no such file: allowed are a file of weights, a run or checkpoint, and timm:" in said


# --- Files from anyone ----------------------------------------------------------------------------

PLAIN = asdict(a_run().model)
STRANGE = {
    "no JSON": ("model", "{", "does not describe its model"),
    "nothing": ("model", "null", "does not describe its model"),
    "a list": ("model", "[]", "does not describe its model"),
    "too deep": ("model", "[" * 60_000, "does not describe its model"),
    "too long": ("model", json.dumps(PLAIN) + " " * 70_000, "characters, allowed are 65536"),
    "a class": ("model", json.dumps(PLAIN | {"_target_": "os.system"}), "by '_target_': allowed"),
    "a class inside": (
        "model",
        json.dumps(PLAIN | {"axial_config": {"_target_": "os.system"}}),
        "axial_config: unknown key '_target_': allowed are",
    ),
    "no numbers": ("model", json.dumps(PLAIN | {"dim": "16"}), "model.dim='16': allowed are"),
    "no number": ("model", json.dumps(PLAIN | {"mlp_ratio": "2"}), "does not describe its model"),
    "NaN": ("model", json.dumps(PLAIN | {"mlp_ratio": float("nan")}), "model.mlp_ratio=nan"),
    "a number beyond all": ("model", json.dumps(PLAIN | {"dim": 10**18 + 1}), "does not describe"),
    "digits": ("model", '{"dim": 1' + "0" * 10_000 + "}", "does not describe its model"),
    "many layers": ("model", json.dumps(PLAIN | {"depth": 10**6}), "model.depth=1000000: allowed"),
    "no attention": ("model", json.dumps(PLAIN | {"axial_config": 3}), "does not describe its"),
    "groups in groups": (
        "model",
        json.dumps(PLAIN | {"axial_config": {"pattern": [{"a": 1}]}}),
        "does not describe its model",
    ),
    "names": ("names", "torch", "has the names of 'torch': allowed are ['axialtrain', 'timm']"),
    "a task": ("task", "[" * 60_000, "does not describe its model"),
}


@pytest.mark.parametrize(("key", "text", "message"), STRANGE.values(), ids=STRANGE)
def test_what_a_file_says_of_itself_is_data(put, key, text, message):
    model, config = model_and_config()
    source = put(config, model)
    said = {"names": "axialtrain", "model": json.dumps(PLAIN), "task": "null", key: text}
    save_file(load_file(source), source, metadata=said)
    assert message in refused(source)


def test_a_key_that_nobody_knows_is_said_in_short(put):
    model, config = model_and_config()
    source = put(config, model)
    said = {"names": "axialtrain", "model": json.dumps({"x" * 5000: 1})}
    save_file(load_file(source), source, metadata=said)
    assert "does not describe its model" in refused(source)


def test_tensors_of_no_numbers_are_refused(put):
    model, config = model_and_config()
    source = put(config, model)
    state = load_file(source)
    meta = {"names": "axialtrain", "model": json.dumps(asdict(config.model))}
    name = "backbone.norm.weight"
    save_file(state | {name: state[name].long()}, source, metadata=meta)
    assert f"has {name} of torch.int64, and the model of torch.float32" in refused(source)
    save_file({"x": torch.zeros(3)}, source, metadata=meta)
    assert "has no backbone.patch_embed.proj.weight" in refused(source)
    save_file({"backbone.norm.weight": torch.zeros(3)}, source)  # ours, and nothing said
    assert "allowed are weights of timm's ViT and DeiT" in refused(source)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("patch_embed.proj.weight", (16, 48)),
        ("blocks.0.attn.qkv.weight", (48,)),
        ("blocks.1.attn.qkv.bias", ()),
        ("pos_embed", (1, 24, 16)),
        ("pos_embed", (25, 16)),
        ("cls_token", (1, 16)),
        ("cls_token", ()),
        ("cls_token", (1, 1, 8)),
    ],
)
def test_a_tensor_under_timms_name_is_what_the_file_describes(put, name, shape):
    model, config = model_and_config(**VIT)
    source = put(config, model, "timm")
    meta = {"names": "timm", "model": json.dumps(asdict(config.model))}
    save_file(load_file(source) | {name: torch.zeros(shape)}, source, metadata=meta)
    assert f"has {name} of {shape}, and describes one of (" in refused(source, **VIT)


def test_positions_of_an_absurd_grid_are_not_resampled(put):
    """Their matrix alone would take terabytes."""
    model, config = model_and_config(**VIT)
    source = put(config, model)
    name = "backbone.grid_embed.table"
    state = load_file(source) | {name: torch.zeros(10**6, 1, 16, dtype=torch.uint8).bfloat16()}
    meta = {"names": "axialtrain", "model": json.dumps(asdict(config.model))}
    save_file(state, source, metadata=meta)
    said = refused(source, **VIT)
    assert f"has {name} of (1000000, 1, 16), and the model has one of (4, 6, 16)" in said


class Shout:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_code_in_a_file_does_not_run(tmp_path, suffix):
    path, proof = tmp_path / f"weights.{suffix}", tmp_path / "it ran"
    path.write_bytes(pickle.dumps({"model": Shout(str(proof))}, protocol=2))
    assert "is no file of plain weights" in refused(path)
    assert not proof.exists()
    pickle.loads(path.read_bytes())
    assert proof.exists(), "the file is as harmful as meant"
