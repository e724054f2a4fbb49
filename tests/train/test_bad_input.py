"""What a run must not go on from is refused before it starts, in one sentence that names it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import google_crc32c
import pytest
from safetensors.torch import load_file

from axialtrain.cli import main
from axialtrain.train.checkpoint import find, newest
from axialtrain.train.export import export
from axialtrain.train.progress import Progress

pytestmark = pytest.mark.slow

SMALL = ["experiment=quickstart", "model.dim=16", "model.depth=1", "mesh=single", "train.steps=4",
         "checkpoint.every=2", "logger=none", "data.validation=null"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(axialtrain, small_shards, tmp_path_factory):
    """A run of four steps, with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = axialtrain("train", *SMALL, f"data.shards={small_shards}", f"hydra.run.dir={folder}",
                      cwd=folder.parent)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def refused(finished, small_shards, tmp_path, monkeypatch, capsys):
    """refused(*overrides, folder=): the one message with which the command ends, as status 2."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def run(*overrides, resume=finished, shards=small_shards):
        command = ["train", *SMALL, f"data.shards={shards}", f"resume={resume}", *overrides]
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("axialtrain: ")
        assert not list(tmp_path.glob("runs*")), "nothing was started"
        return line

    return run


@pytest.mark.parametrize(
    ("override", "key", "here", "there"),
    [
        ("model.dim=32", "model.dim", "32", "16"),
        ("model.heads=2", "model.heads", "2", "4"),
        (
            "model.axial_config.pattern=[row]",
            "model.axial_config.pattern",
            "['row']",
            "['row+col']",
        ),
        ("model.drop_path=0.5", "model.drop_path", "0.5", "0.0"),
        ("task.classes=7", "task.classes", "7", "6"),
        ("optim=sgd", "optim.moments", "['momentum_buffer']", "['exp_avg', 'exp_avg_sq']"),
        ("seed=1", "seed", "1", "0"),
        ("data.mean=0.9", "data.mean", "0.9", "0.5"),
        ("data.bands=[2,1,0]", "data.bands", "[2, 1, 0]", "None"),
        ("train.batch=2", "train.batch", "2", "1"),
    ],
)
def test_another_run(refused, override, key, here, there):
    said = refused(override)
    assert f"{key}={here}: " in said
    assert f"was saved with {there}" in said
    assert "allowed is the same" in said


def test_other_windows(refused):
    said = refused("data.window=[256,256]")
    assert "data.window=[256, 256]" in said
    assert "was saved with None" in said
    assert "checkpoint.new_data=true" in said


def test_other_shards_unless_told(refused, axialtrain, small_shards, finished, tmp_path_factory):
    from axialtrain.data.scene import draw_scenes
    from axialtrain.data.shard import shard_images

    folder = tmp_path_factory.mktemp("others")
    ((image, label, _),) = draw_scenes(folder / "scenes", count=1, size=512, seed=7)
    shard_images([image], folder / "shards", labels=[label], progress=False)
    said = refused(shards=folder / "shards")
    assert "data.shards is not what the saved run read" in said
    assert "checkpoint.new_data=true" in said
    done = axialtrain(
        "train", *SMALL, "train.steps=5", f"data.shards={folder / 'shards'}",
        f"resume={finished}", "checkpoint.new_data=true", "hydra.run.dir=on", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "going on from step 4" in done.stdout
    assert newest(folder / "on").step == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resume=nowhere", "resume=nowhere: holds no complete checkpoint"),
        ("resume=what://is/this", "resume=what://is/this: Protocol not known: what"),
        ("resume=''", "resume is empty: give resume=auto"),
        ("checkpoint.best=miou", "checkpoint.best=miou: needs data.validation"),
        ("checkpoint.best=beauty", "checkpoint.best=beauty: allowed are val_loss, miou, accuracy"),
        ("train.patience=3", "train.patience=3: needs checkpoint.best"),
        ("train.validate_every=2", "train.validate_every=2: needs data.validation=SHARDS"),
        ("optim.momentum=0.5", "optim.momentum=0.5: is of sgd; allowed with optim=adamw is none"),
        ("data.window=1024", "Invalid value assigned: int, allowed is a list, [...]"),
        ("train.patience=-1", "train.patience=-1: allowed"),
        ("train.precision=fp8", "train.precision='fp8': allowed are fp32, bf16"),
        ("checkpoint.every=-1", "checkpoint.every=-1: allowed are whole numbers from 0"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last=0: allowed are whole numbers from 1"),
        ("checkpoint.on_error=cry", "checkpoint.on_error='cry': allowed are continue and stop"),
        ("checkpoint.folder=what://x", "checkpoint.folder=what://x: Protocol not known"),
        ("checkpoint.folder=memory://x", "checkpoint.folder=memory://x: is gone with the process"),
        ("checkpoint.folder=", "checkpoint.folder is empty: give checkpoint.folder=PATH"),
        ("+model._target_=os.system", "unknown key model._target_"),
        ("+_target_=os.system", "unknown key _target_"),
        ("+task._target_=os.system", "unknown key task._target_"),
    ],
)
def test_a_bad_override(refused, override, message):
    assert message in refused(override)


def test_a_folder_that_holds_a_run(refused, finished):
    said = refused(f"hydra.run.dir={finished}")
    assert "holds the metrics.jsonl of a run" in said
    assert "resume=auto" in said


def test_checkpoints_of_another_run(refused, finished):
    said = refused(f"checkpoint.folder={finished / 'checkpoints'}")
    assert f"checkpoint.folder={finished / 'checkpoints'}: holds checkpoints of a run" in said


@pytest.mark.parametrize("key", ["hydra.run.dir", "checkpoint.folder"])
def test_a_folder_that_cannot_be_written_to(refused, key, tmp_path_factory):
    """Mounted for reading only: it may be root who tests."""
    folder = tmp_path_factory.mktemp("readonly")
    options = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", folder]
    mounted = subprocess.run(options, capture_output=True, text=True, timeout=10, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    try:
        said = refused(f"{key}={folder}/run")
        assert f"{key}={folder}/run: {folder} is not a folder that can be written to" in said
    finally:
        subprocess.run(["umount", folder], timeout=10, check=True)


# --- Damage, and what strangers put there ---------------------------------------------------------


@pytest.fixture
def copy(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(finished, folder)
    return folder


def test_damage_falls_back_and_goes_on_to_the_same_end(
    axialtrain, small_shards, copy, finished, tmp_path
):
    """As after a disk that gave other bits back: nobody has to delete anything."""
    (weights,) = (copy / "checkpoints" / "step-00000004").glob("model-*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    (copy / "checkpoints" / "step-00000003").mkdir()  # half written
    done = axialtrain("train", *SMALL, f"data.shards={small_shards}", f"hydra.run.dir={copy}",
                      "resume=auto", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"damaged, and passed over: {weights}: its checksum" in done.stderr
    assert "going on from step 2" in done.stdout
    names = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert names == [".lock", "step-00000002", "step-00000004"]
    expected = finished / "checkpoints" / "step-00000004" / weights.name
    assert load_file(weights).keys() == load_file(expected).keys()
    assert all((load_file(expected)[n] == value).all() for n, value in load_file(weights).items())


def test_nothing_whole_is_not_nothing(axialtrain, small_shards, copy, tmp_path):
    for state in (copy / "checkpoints").glob("*/state.json"):
        state.write_bytes(state.read_bytes()[:-5])
    done = axialtrain("train", *SMALL, f"data.shards={small_shards}", f"hydra.run.dir={copy}",
                      "resume=auto", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2
    assert "is whole: to begin anew, give another hydra.run.dir" in done.stderr
    assert len(list((copy / "checkpoints").glob("step-*"))) == 2, "nothing was cleared away"


def goes_on(axialtrain, shards, cwd, *overrides, status=0):
    done = axialtrain("train", *SMALL, f"data.shards={shards}", *overrides, cwd=cwd)
    assert done.returncode == status, done.stderr
    return done


def test_a_state_with_another_bit_is_damage_too(copy):
    state = copy / "checkpoints" / "step-00000004" / "state.json"
    state.write_text(state.read_text().replace('"seed": 0', '"seed": 1'))
    saved, (problem,) = find(copy)
    assert saved.step == 2
    assert f"{state}: its checksum is not what was written" in problem


def test_what_another_version_wrote_is_no_damage(refused, copy):
    marker = copy / "checkpoints" / "step-00000004" / "checkpoint.json"
    marker.write_text(marker.read_text().replace('"format": 1', '"format": 2'))
    said = refused(f"hydra.run.dir={copy}", resume="auto")
    assert "format is 2, allowed is 1" in said
    assert marker.exists()


def test_files_larger_than_they_say_are_not_read(copy, monkeypatch):
    (weights,) = (copy / "checkpoints" / "step-00000004").glob("model-*.safetensors")
    with weights.open("r+b") as file:
        file.truncate(2**40)  # sparse
    saved, (problem,) = find(copy)
    assert saved.step == 2
    assert f"{weights}: has {2**40} bytes" in problem
    state = copy / "checkpoints" / "step-00000002" / "state.json"
    state.unlink()
    state.symlink_to("/dev/zero")
    assert find(copy)[0] is None


def test_checkpoints_in_another_place_than_before(refused, copy, tmp_path):
    said = refused(f"hydra.run.dir={copy}", "checkpoint.folder=elsewhere", resume="auto")
    assert f"checkpoint.folder={tmp_path / 'elsewhere'}: the run in {copy} keeps" in said
    assert f"its checkpoints in {copy / 'checkpoints'}, allowed is the same" in said


def test_a_run_from_another_has_its_first_checkpoint_at_once(
    axialtrain, small_shards, finished, tmp_path
):
    """Killed right then, it goes on by itself; and a best step of the other run is not its own."""
    goes_on(
        axialtrain, small_shards, tmp_path, f"resume={finished}", "hydra.run.dir=new",
        "checkpoint.every=0", "train.steps=5",
    )  # fmt: skip
    names = [path.name for path in (tmp_path / "new" / "checkpoints").iterdir()]
    assert sorted(names) == [".lock", "step-00000004", "step-00000005"]
    shutil.rmtree(tmp_path / "new" / "checkpoints" / "step-00000005")
    done = goes_on(
        axialtrain, small_shards, tmp_path, "resume=auto", "hydra.run.dir=new", "train.steps=5"
    )
    assert "going on from step 4" in done.stdout


def test_going_on_needs_nothing_of_what_it_began_with(axialtrain, small_shards, finished, tmp_path):
    assert "step 4" in export(str(finished), tmp_path / "start.safetensors")
    run = ["init=start.safetensors", "hydra.run.dir=new"]
    goes_on(axialtrain, small_shards, tmp_path, *run, "train.steps=2")
    (tmp_path / "start.safetensors").unlink()
    goes_on(axialtrain, small_shards, tmp_path, *run, "resume=auto")


def test_another_metric_begins_anew():
    progress = Progress(step=1)
    assert progress.judge("val_loss", 0.5)
    assert not progress.judge("val_loss", 0.6)
    assert progress.worse == 1
    assert progress.judge("miou", 0.1)
    assert (progress.best, progress.worse) == (0.1, 0)
    assert not progress.judge("miou", float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"_target_": "os.system"}}, "model._target_"),
        ({"model": None}, "model="),
        ({"task": "os.system"}, "task="),
        ({"updates": "many"}, "updates is 'many', allowed is 0 to 4"),
        ({"step": 2, "updates": 2}, "step 2 and its samples do not go together"),
        ({"best_step": [1]}, "does not say where its run stands"),
        ({"best": "x"}, "does not say where its run stands"),
        ({"losses": "none"}, "does not say where its run stands"),
        ({"metrics": [1]}, "does not say where its run stands"),
        ({"data": {"mean": 0.5, "std": 0.25}}, "does not say where its data stands"),
    ],
)
def test_a_state_of_strangers(refused, copy, change, message, tmp_path, monkeypatch):
    """Valid JSON under a valid checksum, but not what we write: never instantiated."""
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    state = copy / "checkpoints" / "step-00000004" / "state.json"
    content = json.dumps(json.loads(state.read_text()) | change).encode()
    state.write_bytes(content)
    marker = state.with_name("checkpoint.json")
    files = json.loads(marker.read_text())
    files["files"]["state.json"] = [len(content), google_crc32c.value(content)]
    marker.write_text(json.dumps(files))
    assert message in refused(resume=state.parent)
