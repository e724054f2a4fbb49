"""Checkpoints are written by all ranks, count when whole, and go when there are too many."""

import json
import socket
from pathlib import Path

import pytest
import torch
from distributed.launcher import run_ranks
from distributed.save_ranks import NAMES, Stub, save_that_fails_on_one, save_together
from safetensors import safe_open

from axialtrain.mesh.mesh import Group
from axialtrain.train.alike import NotSavedError, RefusedError
from axialtrain.train.checkpoint import (
    MARKER,
    STATE,
    Owner,
    folder_name,
    newest,
    owner_of,
    steps_in,
)
from axialtrain.train.config import CheckpointConfig
from axialtrain.train.save import Checkpoints, deal, kept
from axialtrain.train.storage import PARTIAL, Folder


def checkpoints_in(folder, resumed=None, **config):
    checkpoints = Checkpoints(Folder(folder), CheckpointConfig(**config), Group())
    checkpoints.start(resumed)
    return checkpoints


def save(checkpoints, step, best=None):
    checkpoints.begin(Stub(step), step, {"step": step, "updates": step}, best)
    return checkpoints.commit()


def test_what_a_checkpoint_is_on_disk(tmp_path):
    where = Path(save(checkpoints_in(tmp_path), 12))
    assert where == tmp_path / "step-00000012"
    marker = json.loads((where / MARKER).read_text())
    assert {path.name for path in where.iterdir()} == {*marker["files"], MARKER}
    assert sorted(marker["files"]) == [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "optimizer-00001-of-00001.safetensors",
        "optimizer.safetensors.index.json",
        STATE,
    ]
    for kind, names in (("model", NAMES), ("optimizer", [f"exp_avg/{name}" for name in NAMES])):
        index = json.loads((where / f"{kind}.safetensors.index.json").read_text())
        shard = f"{kind}-00001-of-00001.safetensors"
        assert index["weight_map"] == dict.fromkeys(names, shard)
        with safe_open(where / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert sorted(file.keys()) == sorted(names)
            size = sum(file.get_tensor(name).nbytes for name in names)
        assert index["metadata"] == {"total_size": size}
    saved = newest(tmp_path)
    assert (saved.step, saved.state) == (12, {"step": 12, "updates": 12})
    assert all(
        torch.equal(value, dict(Stub(12).weights())[n]) for n, value in saved.weights().items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_rank_writes_its_share(asynchronous, tmp_path):
    run_ranks(save_together, 2, folder=tmp_path, asynchronous=asynchronous)
    saved = newest(tmp_path)
    weights = dict(Stub(1).weights())
    assert all(torch.equal(value, weights[name]) for name, value in saved.weights().items())
    shards = [f"model-0000{rank}-of-00002.safetensors" for rank in (1, 2)]
    for shard in shards:
        with safe_open(Path(saved.where) / shard, "pt") as file:
            assert file.keys()
    assert set(shards) < set(saved.files)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("rank", "name"), [(1, "model-"), (0, "optimizer-"), (0, MARKER)])
def test_a_rank_that_cannot_write_is_named_by_all(rank, name, asynchronous, tmp_path):
    """Nothing is left of it, the one before stays, and the next one is written."""
    said = run_ranks(
        save_that_fails_on_one, 2, folder=tmp_path, rank=rank, name=name, asynchronous=asynchronous
    )
    assert said[0] == said[1]
    assert "No space left" in said[0]
    assert "step 2 is not saved (the checkpoint before it: step-00000001)" in said[0]
    if name != MARKER:
        assert f"rank {rank} on {socket.gethostname()}" in said[0]
    assert steps_in(Folder(tmp_path)) == [1, 3]
    newest(tmp_path).check()


@pytest.mark.parametrize(
    ("config", "best", "stay"),
    [
        ({"keep_last": 1}, None, {9}),
        ({"keep_last": 3}, None, {5, 8, 9}),
        ({"keep_last": 99}, None, {1, 2, 4, 5, 8, 9}),
        ({"keep_last": 1, "keep_every": 4}, None, {4, 8, 9}),
        ({"keep_last": 1}, 2, {2, 9}),
        ({"keep_last": 1}, 3, {9}),
        ({"keep_last": 1, "keep_every": 5}, 1, {1, 5, 9}),
    ],
)
def test_which_stay(config, best, stay):
    assert kept([9, 1, 2, 8, 4, 5], CheckpointConfig(**config), best) == stay


def test_only_those_stay_on_disk(tmp_path):
    checkpoints = checkpoints_in(tmp_path, keep_last=1, keep_every=4)
    for step in range(1, 7):
        save(checkpoints, step, best=min(step, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        folder_name(step) for step in (3, 4, 6)
    ]
    assert newest(tmp_path).step == 6


def test_a_run_that_goes_on_thins_out_what_it_found(tmp_path):
    for step in (1, 2):
        save(checkpoints_in(tmp_path, keep_last=9), step)
    checkpoints = checkpoints_in(tmp_path, resumed=2, keep_last=2)
    assert not checkpoints.empty
    save(checkpoints, 3)
    assert steps_in(Folder(tmp_path)) == [2, 3]


def test_half_written_and_damaged_ones_are_cleared_away(tmp_path):
    for step in (1, 2, 3):
        save(checkpoints_in(tmp_path, keep_last=9), step)
    (tmp_path / folder_name(2) / MARKER).unlink()
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000004" / f".model{PARTIAL}").write_bytes(b"half")
    (tmp_path / "notes").mkdir()  # none of ours
    checkpoints_in(tmp_path, resumed=1)  # 3 was passed over: it is damaged
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", folder_name(1)]
    assert checkpoints_in(tmp_path / "new").empty


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file/checkpoints cannot hold checkpoints"):
        checkpoints_in(tmp_path / "file" / "checkpoints")


# --- Another run in the folder --------------------------------------------------------------------

ONE, TWO = Owner("1" * 32, "runs/one"), Owner("2" * 32, "runs/two")


def of(owner, folder, resumed=None):
    checkpoints = checkpoints_in(folder, resumed, keep_last=9)
    checkpoints.belong_to(owner)
    return checkpoints


def test_a_checkpoint_says_whose_it_is(tmp_path):
    save(of(ONE, tmp_path), 1)
    assert newest(tmp_path).owner == owner_of(Folder(tmp_path / folder_name(1))) == ONE
    assert of(None, tmp_path, resumed=1).begun_by == ONE
    save(checkpoints_in(tmp_path / "older"), 1)
    assert newest(tmp_path / "older").owner is None
    assert of(ONE, tmp_path / "older", resumed=1).begun_by is None


def content(where):
    return {path.name: path.read_bytes() for path in Path(where).iterdir()}


@pytest.mark.parametrize("step", [3, 4])
def test_nothing_is_written_where_another_run_has_saved(step, tmp_path):
    """Two that began together, where no lock keeps one of them out: the slower one is told."""
    one, two = of(ONE, tmp_path), of(TWO, tmp_path)
    where = save(one, 3)
    before = content(where)
    with pytest.raises(RefusedError, match=f"{tmp_path}: the run in runs/one has saved there, too"):
        two.begin(Stub(9), step, {"step": step}, None)
    assert content(where) == before
    assert [path.name for path in tmp_path.iterdir()] == [folder_name(3)]
    save(one, 4)
    with pytest.raises(RefusedError, match="allowed is a folder that no other run has"):
        of(TWO, tmp_path)
    save(of(ONE, tmp_path, resumed=4), 5)


def test_it_is_asked_again_before_a_checkpoint_counts(tmp_path):
    one, two = of(ONE, tmp_path), of(TWO, tmp_path)
    two.begin(Stub(4), 4, {"step": 4}, None)
    save(one, 3)
    with pytest.raises(RefusedError, match="runs/one"):
        two.commit()
    assert steps_in(Folder(tmp_path)) == [3]
    assert of(ONE, tmp_path, resumed=3)._complete == [3]


def test_what_was_cleared_away_meanwhile_does_not_count(tmp_path):
    """By a second start of the run, at a URL."""
    url = f"memory://{tmp_path.name}/run"
    one = of(ONE, url)
    one.begin(Stub(1), 1, {"step": 1}, None)
    of(ONE, url)
    with pytest.raises(NotSavedError, match=r"model-00001.* is gone"):
        one.commit()
    assert steps_in(Folder(url)) == []
    save(one, 2)
    newest(url).check()
    Folder(url).remove_all()


def test_tensors_are_dealt_out_by_size():
    assert deal({"a": 5, "b": 4, "c": 3, "d": 2}, 2) == {"a": 0, "b": 1, "c": 1, "d": 0}
    assert deal({"a": 5, "empty": 0, "b": 1}, 4) == {"a": 0, "b": 1, "empty": 2}


# --- The folder that they lie in ------------------------------------------------------------------


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    url = tmp_path / "a" if request.param == "local" else f"memory://{tmp_path.name}/a"
    found = Folder(url)
    yield found
    found.remove_all()


def test_a_folder_does_what_it_says(folder):
    assert folder.names() == []
    folder.remove("x")
    folder.make()
    folder.write("x", b"first")
    folder.write("x", b"second")
    folder.within("b").make()
    folder.within("b").write("y", b"")
    assert folder.names() == ["b", "x"]
    assert folder.has("x")
    assert not folder.has("y")
    assert (folder.size("x"), folder.read("x", 99), folder.within("b").read("y", 9)) == (
        6,
        b"second",
        b"",
    )
    folder.remove("x")
    assert folder.names() == ["b"]
    with pytest.raises(FileNotFoundError):
        folder.read("x", 9)
    folder.remove_all()
    folder.remove_all()
    assert folder.names() == []


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    folder.write("x", b"before")
    seen = []

    def full(handle):
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("axialtrain.train.storage.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write("x", b"after")
    assert seen == [[f".x{PARTIAL}", "x"]], "under another name until it is synced"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert folder.read("x", 99) == b"before"


def test_a_protocol_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match="nowhere"):
        Folder("nowhere://bucket/run")
