"""From a command line of overrides to a checked config."""

import shutil
from dataclasses import asdict

import pytest
import yaml

from axialtrain.data.config import DataConfig
from axialtrain.data.reading import ReadConfig
from axialtrain.mesh.mesh import MeshConfig
from axialtrain.models.registry import KINDS, build_backbone
from axialtrain.models.transformer import AxialTransformerConfig
from axialtrain.train.check import task_of
from axialtrain.train.compose import _resumed, compose_run, config_folder
from axialtrain.train.config import RunConfig

SHARDS = "data.shards=somewhere"
EXPERIMENTS = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))


def composed(*overrides):
    return compose_run([SHARDS, *overrides])[0]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_builds(name):
    needed = ["init=weights.pth"] if name == "finetune_deit" else []
    config, folder, text = compose_run([f"experiment={name}", SHARDS, *needed])
    assert config.name == name
    assert folder.parent.name == name
    assert config.data.shards == "somewhere"
    task_of(config).build(build_backbone(config.model))
    assert yaml.safe_load(text)["model"] == asdict(config.model)


def test_there_are_experiments():
    assert {"quickstart", "reconstruct"} <= set(EXPERIMENTS)


def test_fine_tuning_asks_what_to_start_from():
    with pytest.raises(ValueError, match="init is not set: give init=timm:NAME, init=FILE"):
        compose_run(["experiment=finetune_deit", SHARDS])


def test_without_an_experiment_the_defaults_stand():
    config = composed()
    assert config.mesh == MeshConfig()
    assert (config.zero.stage, config.optim.name, config.task.name) == (1, "adamw", "segmentation")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["mesh=2x2"], MeshConfig(row=2, col=2)),
        (["mesh=3x5"], MeshConfig(row=3, col=5)),
        (["mesh=1x17"], MeshConfig(row=1, col=17)),
        (["mesh=2x3", "mesh.data=2", "mesh.tensor=4"], MeshConfig(2, 2, 3, 4)),
        (["mesh.data=2", "mesh=2x3"], MeshConfig(2, 2, 3)),
        (["experiment=quickstart", "mesh=1x4"], MeshConfig(col=4)),
        (["experiment=quickstart", "mesh=single"], MeshConfig()),
    ],
    ids=str,
)
def test_any_mesh_is_rows_by_columns(overrides, expected):
    assert composed(*overrides).mesh == expected


@pytest.mark.parametrize(("processes", "data"), [(4, 1), (8, 2), (12, 3)])
def test_replicas_follow_from_the_processes(processes, data):
    config, _, text = compose_run([SHARDS, "mesh=2x2", "mesh.data=auto"], processes)
    assert config.mesh == MeshConfig(data, 2, 2)
    assert yaml.safe_load(text)["mesh"]["data"] == data


@pytest.mark.parametrize(
    ("processes", "message"),
    [
        (6, "mesh.data=auto: 6 processes were started, allowed are multiples of 4"),
        (2, "mesh.data=auto: 2 processes were started, allowed are multiples of 4"),
        (None, "mesh.data=auto: needs torchrun or deepspeed, allowed is a whole number"),
    ],
)
def test_processes_that_make_no_whole_replicas(processes, message):
    with pytest.raises(ValueError, match=message):
        compose_run([SHARDS, "mesh=2x2", "mesh.data=auto"], processes)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_zero_stage_is_a_number(stage):
    config = composed(f"zero={stage}", "zero.persistence_threshold=7")
    assert (config.zero.stage, config.zero.persistence_threshold) == (stage, 7)


def test_groups_are_chosen_and_their_keys_set():
    config = composed("task=reconstruction", "task.hidden=0.5", "optim=sgd", "logger=none")
    assert (config.task.name, config.task.hidden) == ("reconstruction", 0.5)
    assert (config.optim.name, config.logger.mode) == ("sgd", "disabled")


def test_a_long_override_is_one_like_any_other():
    pattern = ["row+col"] * 40
    config = composed(f"model.axial_config.pattern=[{','.join(pattern)}]")
    assert config.model.axial_config.pattern == pattern


def test_how_shards_are_read_is_a_group_within_data():
    assert composed().data.read == ReadConfig()
    data = composed(
        "data.read.retries=8", "data.read.cache=/some/where", "data.read.timeout=5"
    ).data
    assert data.read == ReadConfig(retries=8, cache="/some/where", timeout=5.0)


def test_the_run_folder_is_hydras():
    assert compose_run([SHARDS, "hydra.run.dir=/some/where"])[1].as_posix() == "/some/where"
    _, folder, text = compose_run([SHARDS, "name=mine"])
    assert folder.is_absolute()
    assert folder.parts[-3:-1] == ("runs", "mine")
    assert "hydra" not in yaml.safe_load(text)


def a_run_in(folder, **config):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


GIVEN = [
    ["hydra.run.dir={}"],
    ["++hydra.run.dir={}"],
    ["hydra={{run:{{dir:{}}}}}"],
    ["experiment=there"],
]


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_the_newest_run_is_taken_where_no_folder_is_given(given, tmp_path, monkeypatch):
    """In whatever form it is: a key, a node of them, an experiment's file."""
    configs = tmp_path / "configs"
    shutil.copytree(config_folder(), configs)
    mine = tmp_path / "mine"
    there = f"# @package _global_\nname: mine\nhydra:\n  run:\n    dir: {mine}\n"
    (configs / "experiment" / "there.yaml").write_text(there)
    monkeypatch.setattr("axialtrain.train.compose.config_folder", lambda: configs)
    monkeypatch.chdir(tmp_path)
    newest = a_run_in(tmp_path / "runs" / "mine" / "2026-11-28_10-00-00")
    a_run_in(tmp_path / "runs" / "mine" / "2026-11-27_10-00-00")
    a_run_in(tmp_path / "zzz")  # beside the folder that is given
    common = [SHARDS, "resume=auto", "name=mine"]
    assert compose_run(common)[1] == newest
    assert compose_run([*common, *(one.format(mine) for one in given)])[1] == mine


def test_a_folder_with_the_time_in_it_is_another_one_at_each_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    newest = a_run_in(tmp_path / "out" / "mine" / "2026-11-28_10-00-00")
    own = "hydra.run.dir='out/${name}/${now:%Y-%m-%d_%H-%M-%S}'"
    assert compose_run([SHARDS, "resume=auto", "name=mine", own])[1] == newest


def test_with_what_a_run_was_begun_stays_in_its_folder(tmp_path, monkeypatch):
    """And the same command again, which `resume=auto` need not be, goes on by itself."""
    monkeypatch.chdir(tmp_path)
    run, other, s3 = tmp_path / "run", str(tmp_path / "other"), "s3://bucket/run"
    assert _resumed("auto", run) == ("auto", "auto")
    assert _resumed("other", run) == ("other", other), "for whoever reads it in another folder"
    assert _resumed(s3, run) == (s3, s3)
    a_run_in(run, resume=other)
    assert _resumed("auto", run) == ("auto", other)
    assert _resumed("other", run) == _resumed(other, run) == ("auto", other)
    assert _resumed("another", run) == ("another", str(tmp_path / "another"))
    config, _, text = compose_run([SHARDS, "resume=other", f"hydra.run.dir={run}"])
    assert (config.resume, yaml.safe_load(text)["resume"]) == ("auto", other)


def test_the_yaml_is_the_whole_config():
    text = compose_run([SHARDS, "mesh=2x3", "zero=2", "train.steps=7"])[2]
    values = yaml.safe_load(text)
    degrees = {"data": 1, "row": 2, "col": 3, "tensor": 1}
    assert values["mesh"] == degrees | {"exchange": "swap", "swap": "auto", "overlap": 1}
    assert (values["zero"]["stage"], values["train"]["steps"]) == (2, 7)
    assert "???" not in text
    assert "${" not in text


def test_composing_again_forgets_the_first():
    assert composed("mesh=3x5", "train.steps=7").train.steps == 7
    config = composed()
    assert (config.mesh, config.train.steps) == (MeshConfig(), 100)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=3", ["unknown key train.stepz", "allowed", "micro_batch", "steps"]),
        ("+train.stepz=3", ["unknown key train.stepz", "allowed", "micro_batch", "steps"]),
        ("++train.stepz=3", ["unknown key train.stepz", "allowed", "micro_batch", "steps"]),
        ("nonsense=3", ["unknown key nonsense", "allowed", "model", "mesh"]),
        ("data.read.retry=3", ["unknown key data.read.retry: allowed", "retries", "cache_gb"]),
        ("data.read.retries=-1", ["data.read.retries is -1, allowed is from 0"]),
        ("+nonsense=3", ["unknown key nonsense", "allowed", "model", "mesh"]),
        ("task.hidden=0.5", ["unknown key task.hidden: allowed", "cells"]),  # the other task's
        ("+task.hidden=0.5", ["unknown key task.hidden", "allowed", "classes", "cells"]),
        ("+model.axial_config.x=1", ["unknown key model.axial_config.x", "pattern", "positions"]),
        ("model.trunk.width=3", ["unknown key model.trunk: allowed", "axial_config", "patch"]),
        ("model.axial_config.windows=4", ["unknown key model.axial_config.windows", "'window'"]),
        ("model.depth.x=3", ["model.depth.x=3", "Integer"]),
        ("model=none_such", ["model/none_such", "Available", "axial_tiny", "axial_resnet50s"]),
        ("train.steps=many", ["train.steps", "'many'", "Integer"]),
        ("train.steps=1.5", ["train.steps", "'1.5'", "Integer"]),
        ("train.steps=0", ["train.steps=0", "allowed", "from 1"]),
        ("mesh.row=two", ["mesh.row", "'two'", "Integer"]),
        ("mesh.row=0", ["mesh.row=0", "allowed", "from 1"]),
        ("mesh=0x2", ["mesh.row=0", "allowed", "from 1"]),
        ("mesh=2by2", ["mesh=2by2", "allowed", "mesh=RxC"]),
        ("mesh=2x", ["mesh=2x", "allowed", "mesh=RxC"]),
        ("mesh=2x2x2", ["mesh=2x2x2", "allowed", "mesh=RxC"]),
        ("zero=4", ["zero/4", "Available", "0; 1; 2; 3"]),
        ("zero.stage=4", ["zero.stage=4", "allowed", "0, 1, 2, 3"]),
        ("experiment=none_such", ["experiment/none_such", "Available", *EXPERIMENTS]),
        ("optim=lion", ["optim/lion", "Available", "adamw", "sgd"]),
        ("optim.name=lion", ["optim.name='lion'", "allowed", "adamw", "sgd"]),
        ("task=none_such", ["task/none_such", "Available", "reconstruction", "segmentation"]),
        ("model.axial_config.pattern=[row+up]", ["axial_config.pattern", "'up'", "allowed", "col"]),
        ("data.window=[3]", ["data.window", "[3]", "allowed"]),
        ("seed=-1", ["seed=-1", "allowed"]),
        ("logger.mode=loud", ["logger.mode='loud'", "allowed", "offline"]),
        ("launcher.threads=0", ["launcher.threads=0", "allowed"]),
        ("schedule.name=linear", ["schedule.name='linear'", "allowed", "cosine"]),
        ("checkpoint.folder=", ["checkpoint.folder is empty: give", "checkpoint.folder=null"]),
        ("checkpoint.folder=' '", ["checkpoint.folder is empty: give", "checkpoint.folder=null"]),
        ("steps", ["'steps'"]),
    ],
)
def test_what_is_not_allowed_is_named_with_what_is(override, parts):
    assert_refused([override], parts)


def assert_refused(overrides, parts):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (all of its message is looked at)
        composed(*overrides)
    said = str(error.value)
    assert "\n" not in said
    for part in parts:
        assert part in said
    for noise in ("Traceback", "object_type", "provider=", "config_dir", "DictConfig", "_schema;"):
        assert noise not in said


RESNET, DEEPLAB = "model=axial_resnet50s", "model=axial_deeplab_s"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([RESNET, "model.patch=16"], ["unknown key model.patch: allowed", "'width'", "'layers'"]),
        ([RESNET, "+model.patch=16"], ["unknown key model.patch: allowed", "'width'", "'layers'"]),
        ([DEEPLAB, "model.width=1"], ["unknown key model.width: allowed", "'trunk'", "'aspp'"]),
        ([DEEPLAB, "+model.trunk.x=1"], ["unknown key model.trunk.x: allowed", "'layers'"]),
        ([RESNET, "model.width=wide"], ["model.width=wide", "'wide'", "Float"]),
        (["+model.mlp_width=3"], ["unknown key model.mlp_width: allowed", "'mlp_ratio'"]),
        ([RESNET, "model.layers=[1,a]"], ["model.layers=[1,a]", "'a'", "Integer"]),
        ([RESNET, "model.layers=[1,2]"], ["model.layers=[1, 2]: allowed are 4 numbers"]),
        ([RESNET, "model.image=null"], ["model.image=null needs model.span"]),
        ([RESNET, "model.name=axial_deeplab"], ["model.name='axial_deeplab': allowed"]),
        ([DEEPLAB, "model.trunk=3"], ["model.trunk=3", "int", "AxialResNetConfig"]),
        ([RESNET, "experiment=quickstart"], ["experiment/quickstart", "'patch'", "AxialResNet"]),
    ],
    ids=str,
)
def test_keys_are_those_of_the_models_kind(overrides, parts):
    assert_refused(overrides, parts)


@pytest.mark.parametrize("model", [None, {"patch": 16}, 3], ids=str)
def test_a_model_of_no_kind_is_refused(model):
    message = r"^model=.*: allowed is model=NAME .*axial_resnet_schema, axial_deeplab_schema$"
    with pytest.raises(ValueError, match=message):
        RunConfig(DataConfig(shards="x"), model=model)


def test_a_model_is_a_transformer_where_nothing_is_said():
    assert RunConfig(DataConfig(shards="x")).model == AxialTransformerConfig()
    assert composed().model == AxialTransformerConfig()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_says_which_kind_its_model_is(kind):
    """By a schema in its defaults, which is an option like any other."""
    assert composed(f"model={kind}_schema").model == KINDS[kind]()


@pytest.mark.parametrize("experiment", [None, "reconstruct"])
def test_without_shards_it_is_said_what_to_give(experiment):
    overrides = [] if experiment is None else [f"experiment={experiment}"]
    with pytest.raises(ValueError, match=r"^data\.shards is not set: give data\.shards="):
        compose_run(overrides)


def test_tiles_are_chosen_by_the_data_group():
    assert not composed().data.tiles.each
    data = composed("data=tiles", "data.tiles.mix=3", "data.mean=0.4").data
    assert (data.tiles.each, data.tiles.mix, data.mean, data.window) == (True, 3, 0.4, None)
    with pytest.raises(ValueError, match=r"data\.window is \[64, 64\], allowed is null with data="):
        composed("data=tiles", "data.window=[64,64]")
    with pytest.raises(ValueError, match=r"unknown key data\.tiles\.other"):
        composed("data=tiles", "data.tiles.other=1")


def test_sweeps_are_not_advised():
    with pytest.raises(ValueError, match=r"Ambiguous value .*; 3\. Sweeps are not offered") as told:
        compose_run(["experiment=quickstart,reconstruct"])
    assert "multirun" not in str(told.value)
