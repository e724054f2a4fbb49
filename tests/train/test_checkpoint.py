"""Weights on disk are the engine's, whole or not there at all, and foreign ones are not trusted."""

import json

import pytest
import torch
from distributed.engine_ranks import TOY, build_toy, save_fails_on_one, save_to, train_steps
from distributed.launcher import run_ranks
from safetensors.torch import save_file

from axialtrain.mesh.mesh import MeshConfig
from axialtrain.train.checkpoint import INDEX, STATE, _deal, read_weights
from axialtrain.train.engine import OptimConfig, ZeroConfig


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_saved_is_what_the_engine_has(stage, tmp_path):
    folder = tmp_path / "step-1"
    results = run_ranks(
        train_steps,
        4,
        task=TOY,
        mesh=MeshConfig(col=2, tensor=2),
        zero=ZeroConfig(stage, persistence_threshold=50),
        optim=OptimConfig("sgd", lr=0.1),
        rates=[0.1],
        folder=folder,
    )
    saved = read_weights(folder)
    for got in results:
        assert got.weights.keys() == saved.keys()
        assert all(torch.equal(got.weights[name], saved[name]) for name in saved)
    build_toy().load_state_dict(saved)  # has exactly the names and shapes of the serial model
    assert json.loads((folder / STATE).read_text()) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]

    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in saved.values())
    files = {path.name: path for path in folder.glob("*.safetensors")}
    assert sorted(files) == [f"model-0000{k}-of-00004.safetensors" for k in (1, 2, 3, 4)]
    assert set(index["weight_map"].values()) == set(files)


def test_tensors_are_dealt_out_by_size():
    assert _deal({"a": 5, "b": 4, "c": 3, "d": 2}, 2) == {"a": 0, "b": 1, "c": 1, "d": 0}


def test_ranks_that_write_are_the_first_ones():
    assert _deal({"a": 5, "empty": 0, "b": 1}, 4) == {"a": 0, "b": 1, "empty": 2}


@pytest.mark.parametrize(("rank", "what"), [(1, "save_file"), (0, "save_file"), (0, "_write_json")])
def test_a_rank_that_cannot_write_stops_all_and_leaves_nothing(rank, what, tmp_path):
    raised = run_ranks(save_fails_on_one, 2, folder=tmp_path / "step-1", rank=rank, what=what)
    assert "planted" in raised[rank]
    assert "another rank" in raised[1 - rank]
    assert read_weights(tmp_path / "step-1").keys() == build_toy().state_dict().keys()


def test_a_checkpoint_is_not_written_over(tmp_path):
    assert run_ranks(save_to, 2, folder=tmp_path / "step-1") == ["", ""]
    before = read_weights(tmp_path / "step-1")
    raised = run_ranks(save_to, 2, folder=tmp_path / "step-1")
    assert raised[0].startswith("FileExistsError")
    assert raised[1].startswith("OSError")
    assert read_weights(tmp_path / "step-1").keys() == before.keys()


def test_a_folder_that_cannot_be_made_raises_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("in the way")
    raised = run_ranks(save_to, 2, folder=tmp_path / "file" / "step-1")
    assert raised[0].startswith("NotADirectoryError")
    assert raised[1].startswith("OSError")


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    partial = tmp_path / ".step-1.partial"
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_text("half")
    assert run_ranks(save_to, 2, folder=tmp_path / "step-1") == ["", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert not (tmp_path / "step-1" / "model-00001-of-00009.safetensors").exists()


# --- Reading what may come from anyone ------------------------------------------------------------


def a_checkpoint(folder, weight_map):
    save_file({"x": torch.arange(3.0)}, folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_a_foreign_checkpoint_is_read(tmp_path):
    read = read_weights(a_checkpoint(tmp_path, {"x": "a.safetensors"}))
    assert read["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "file",
    [
        "../a.safetensors",
        "/etc/a.safetensors",
        "b/a.safetensors",
        "b\\a.safetensors",
        "..",
        "",
        "a.safetensors\0",
        "a.pt",
        7,
        None,
    ],
)
def test_a_file_outside_the_folder_is_refused(file, tmp_path):
    with pytest.raises(ValueError, match=rf"{INDEX}.*is not"):
        read_weights(a_checkpoint(tmp_path, {"x": file}))


def test_a_missing_tensor_file_or_index_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.safetensors.*y"):
        read_weights(a_checkpoint(tmp_path, {"y": "a.safetensors"}))
    with pytest.raises(ValueError, match=r"b\.safetensors"):
        read_weights(a_checkpoint(tmp_path, {"x": "b.safetensors"}))
    (tmp_path / INDEX).unlink()
    with pytest.raises(ValueError, match=INDEX):
        read_weights(tmp_path)


def test_a_shard_that_is_cut_is_named(tmp_path):
    folder = a_checkpoint(tmp_path, {"x": "a.safetensors"})
    whole = (folder / "a.safetensors").read_bytes()
    for size in (len(whole) - 1, 9, 0):
        (folder / "a.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            read_weights(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000, "\udcff"])
def test_an_index_that_is_none_is_named(text, tmp_path):
    (tmp_path / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=INDEX):
        read_weights(tmp_path)
