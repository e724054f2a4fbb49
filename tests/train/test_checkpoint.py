"""What is read of a checkpoint is what was written, and foreign or damaged ones are not trusted."""

import json
import pickle
from pathlib import Path

import google_crc32c
import pytest
import torch
from distributed.save_ranks import Stub
from safetensors.torch import save_file

from axialtrain.mesh.mesh import Group
from axialtrain.train import checkpoint
from axialtrain.train.checkpoint import (
    MARKER,
    MOMENTS,
    STATE,
    WEIGHTS,
    find,
    folder_name,
    index_of,
    newest,
)
from axialtrain.train.config import CheckpointConfig
from axialtrain.train.save import Checkpoints
from axialtrain.train.storage import Folder

SHARD = "model-00001-of-00001.safetensors"


def a_run(where, steps=(1, 2), **state):
    """A run's folder with these checkpoints; returns that of the last one."""
    folder = Folder(where).within("checkpoints")
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=9), Group())
    checkpoints.start(None)
    for step in steps:
        checkpoints.begin(Stub(step), step, {"step": step, **state}, None)
        checkpoints.commit()
    return folder.within(folder_name(steps[-1]))


def swap(where, name, content):
    """Another file, with a marker that goes with it."""
    path = Path(where.url)
    (path / name).write_bytes(content)
    marker = json.loads((path / MARKER).read_text())
    marker["files"][name] = [len(content), google_crc32c.value(content)]
    (path / MARKER).write_text(json.dumps(marker))


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_run_its_checkpoints_and_one_of_them_are_found(place, tmp_path):
    run = str(tmp_path) if place == "local" else f"memory://{tmp_path.name}/run"
    last = a_run(run)
    for where in (run, f"{run}/checkpoints", last.url):
        saved = newest(where)
        assert (saved.step, saved.folder.url) == (2, last.url)
        with saved.opened() as tensors:
            assert tensors.shape("other") == [5]
            assert torch.equal(tensors.moment("other", "exp_avg"), -tensors.weight("other"))
        assert torch.equal(saved.weights()["other"], torch.arange(5.0) + 2)
    assert newest(f"{run}/checkpoints/{folder_name(1)}").step == 1


def test_the_best_is_found(tmp_path):
    a_run(tmp_path, best_step=1)
    assert newest(tmp_path, best=True).step == 1
    a_run(tmp_path / "gone", best_step=7)
    with pytest.raises(ValueError, match="the best step, 7, is not there any more"):
        newest(tmp_path / "gone", best=True)
    a_run(tmp_path / "none")
    with pytest.raises(ValueError, match="no validation has found a best step"):
        newest(tmp_path / "none", best=True)


def test_where_there_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}.*holds no complete checkpoint"):
        newest(tmp_path)


def flip(where):
    path = Path(where.url) / SHARD
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(where):
    path = Path(where.url) / SHARD
    path.write_bytes(path.read_bytes()[:-1])


def unlink(where):
    (Path(where.url) / SHARD).unlink()


def half_marker(where):
    path = Path(where.url) / MARKER
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, f"{SHARD}: its checksum"),
        (cut, f"{SHARD}: has"),
        (unlink, f"{SHARD}: is not there"),
        (half_marker, MARKER),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_warning(damage, said, tmp_path, caplog):
    last = a_run(tmp_path)
    damage(last)
    assert newest(tmp_path).step == 1
    assert f"damaged, and passed over: {last}/{said}" in caplog.text
    with pytest.raises(ValueError, match=f"{folder_name(2)}/{said}"):
        newest(last.url)


def test_one_without_a_marker_does_not_count(tmp_path, caplog):
    last = a_run(tmp_path)
    (Path(last.url) / MARKER).unlink()
    assert newest(tmp_path).step == 1
    assert not caplog.text, "it was never complete"


def test_a_place_that_does_not_answer_is_not_damaged(tmp_path, monkeypatch):
    a_run(tmp_path)

    def silent(self, name, size):
        raise OSError("no answer")

    monkeypatch.setattr(Folder, "read", silent)
    with pytest.raises(OSError, match="no answer"):
        find(tmp_path)


# --- Reading what may come from anyone ------------------------------------------------------------

NOT_JSON = [b"", b"[]", b"7", b"{", b"[" * 100_000, b"\xff", b'{"a": \x00}']


@pytest.mark.parametrize("name", [MARKER, STATE])
@pytest.mark.parametrize("content", [*NOT_JSON, b"{}"])
def test_what_is_no_json_of_ours_is_named(name, content, tmp_path):
    last = a_run(tmp_path)
    (Path(last.url) / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder_name(2)}/{name}"):
        newest(last.url)


@pytest.mark.parametrize("content", [*NOT_JSON, b"{}", b'{"weight_map": []}'])
def test_an_index_that_is_none_is_named(content, tmp_path):
    last = a_run(tmp_path)
    swap(last, index_of(WEIGHTS), content)
    with pytest.raises(ValueError, match=index_of(WEIGHTS)):
        newest(last.url).weights()


@pytest.mark.parametrize("name", [MARKER, STATE, index_of(MOMENTS)])
def test_a_huge_json_is_not_read(name, tmp_path, monkeypatch):
    last = a_run(tmp_path)
    content = json.dumps({"files": {}, "x": "y" * 10_000}).encode()
    if name == MARKER:
        (Path(last.url) / name).write_bytes(content)
    else:
        swap(last, name, content)
    monkeypatch.setattr(checkpoint, "LARGEST_JSON", 8_000)
    with pytest.raises(ValueError, match=rf"{name}.*larger than 8000 bytes"):
        newest(last.url).weights()


OUTSIDE = ["../a.safetensors", "/etc/a.safetensors", "b/a.safetensors", "b\\a.safetensors", "..",
           "", "a.safetensors\0", "a.safetensors\n", "~.safetensors"]  # fmt: skip


@pytest.mark.parametrize("file", [*OUTSIDE, "a.pt", "model.safetensors.index.json", 7, None, []])
def test_an_index_that_points_elsewhere_is_refused(file, tmp_path):
    last = a_run(tmp_path)
    swap(last, index_of(WEIGHTS), json.dumps({"weight_map": {"other": file}}).encode())
    with pytest.raises(ValueError, match=rf"{index_of(WEIGHTS)}.*is not"):
        newest(last.url).weights()


@pytest.mark.parametrize(
    "files",
    [
        *({name: [1, 2]} for name in OUTSIDE),
        {STATE: [-1, 2]},
        {STATE: [1]},
        {STATE: [1, "2"]},
        {STATE: [1.5, 2]},
        {STATE: 7},
        [STATE],
        None,
    ],
)
def test_a_marker_that_lists_what_is_none_is_refused(files, tmp_path):
    last = a_run(tmp_path)
    path = Path(last.url) / MARKER
    marker = json.loads(path.read_text())
    marker["files"] = marker["files"] | files if isinstance(files, dict) else files
    path.write_text(json.dumps(marker))
    with pytest.raises(ValueError, match=f"{MARKER}: files is no list"):
        newest(last.url)


@pytest.mark.parametrize("needed", [STATE, index_of(WEIGHTS), index_of(MOMENTS)])
def test_a_marker_lists_what_every_checkpoint_has(needed, tmp_path):
    last = a_run(tmp_path)
    path = Path(last.url) / MARKER
    marker = json.loads(path.read_text())
    del marker["files"][needed]
    path.write_text(json.dumps(marker))
    with pytest.raises(ValueError, match=f"does not list {needed}"):
        newest(last.url)


@pytest.mark.parametrize("form", [0, 2, "1", None])
def test_another_format_is_refused(form, tmp_path):
    last = a_run(tmp_path)
    (Path(last.url) / MARKER).write_text(json.dumps({"format": form, "files": {}}))
    with pytest.raises(ValueError, match=f"format is {form!r}, allowed is 1"):
        newest(last.url)


@pytest.mark.parametrize("step", [-1, 1.5, "1", None, True])
def test_a_step_that_is_none_is_named(step, tmp_path):
    last = a_run(tmp_path)
    swap(last, STATE, json.dumps({"step": step}).encode())
    with pytest.raises(ValueError, match=f"{STATE}: step is {step!r}"):
        newest(last.url)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("went-off"),)


def test_a_pickle_in_the_place_of_tensors_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = a_run(tmp_path / "run")
    for content in (pickle.dumps(Bomb()), b"", b"\xff" * 64, (2**62).to_bytes(8, "little")):
        swap(last, SHARD, content)
        with pytest.raises(ValueError, match=SHARD):
            newest(last.url).weights()
    torch.save(Bomb(), tmp_path / "bomb")
    swap(last, SHARD, (tmp_path / "bomb").read_bytes())
    with pytest.raises(ValueError, match=SHARD):
        newest(last.url).weights()
    assert not Path("went-off").exists()


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path):
    last = a_run(tmp_path)
    save_file({"stranger": torch.zeros(1)}, tmp_path / "stranger")
    swap(last, SHARD, (tmp_path / "stranger").read_bytes())
    with newest(last.url).opened() as tensors:
        with pytest.raises(ValueError, match=rf"{SHARD}.*other"):
            tensors.weight("other")
        with pytest.raises(ValueError, match=rf"{index_of(WEIGHTS)}: has no stranger"):
            tensors.weight("stranger")
