"""Whole runs on single tiles: with any number of data ranks the same steps."""

from __future__ import annotations

import json

import pytest


@pytest.mark.slow
def test_tiles_train_alike_on_any_number_of_data_ranks(axialtrain, small_shards, tmp_path):
    losses = {}
    for data in (1, 2):
        folder = tmp_path / str(data)
        done = axialtrain(
            "train", "experiment=quickstart", "data=tiles", f"data.shards={small_shards}",
            f"data.validation={small_shards}", "mesh=single", f"mesh.data={data}", "train.steps=2",
            "train.batch=4", "train.micro_batch=2", "model.dim=16", "model.depth=1",
            "model.heads=2", "optim=sgd", "logger=none", f"hydra.run.dir={folder}", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[data] = [line["loss"] for line in lines] + [lines[-1]["val_loss"]]
    assert len(losses[1]) == 3
    assert losses[1][0] != losses[1][1]
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
