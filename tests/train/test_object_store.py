"""Checkpoints on an S3-compatible server on loopback: another mesh goes on from there, an upload
that was killed does not count, and a server that goes away does not hurt what it has."""

from __future__ import annotations

import os
import socket
from functools import partial

import pytest
import torch
from distributed.keep_ranks import die_in_upload, stop_server, train_with_faults
from distributed.launcher import RankError, run_ranks
from s3_server import SECRET, s3_server

from axialtrain.mesh.mesh import MeshConfig
from axialtrain.train.checkpoint import newest, steps_in
from axialtrain.train.config import CheckpointConfig
from axialtrain.train.storage import Folder

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture
def server(monkeypatch):
    with s3_server(monkeypatch) as server:
        yield server


def run(server, folder, mesh, stage=1, **options):
    return run_ranks(
        train_with_faults,
        mesh.size,
        mesh=mesh,
        stage=stage,
        steps=STEPS,
        folder=folder,
        environment=server.environment,
        **options,
    )


def test_another_mesh_goes_on_after_a_kill_in_an_upload(server, tmp_path):
    config = CheckpointConfig(every=2, folder="s3://bucket/run")
    with pytest.raises(RankError, match="died"):
        run(
            server,
            tmp_path / "killed",
            MeshConfig(row=2),
            checkpoint=config,
            before=partial(die_in_upload, at=4, rank=1),
        )
    there = Folder("s3://bucket/run")
    assert there.names() == ["step-00000002", "step-00000004"]
    assert steps_in(there) == [2], "the second is not complete"
    assert newest("s3://bucket/run").step == 2

    # Another machine, that has nothing of the run but where its checkpoints are.
    after = run(
        server, tmp_path / "after", MeshConfig(col=2, row=2), stage=3, checkpoint=config,
        resume=True,
    )  # fmt: skip
    assert [got.raised for got in after] == [""] * 4
    assert steps_in(there) == [4, 6]
    assert there.names() == ["step-00000004", "step-00000006"]
    (tmp_path / "whole").mkdir()
    whole = run(server, tmp_path / "whole" / "run", MeshConfig(), checkpoint=CheckpointConfig())
    got = newest("s3://bucket/run").weights()
    away = moved = 0.0
    start = newest("s3://bucket/run/step-00000004").weights()
    for name, weight in whole[0].weights.items():
        away += float((got[name] - weight).square().sum())
        moved += float((start[name] - weight).square().sum())
    assert away**0.5 <= 1e-4 * moved**0.5


def test_a_server_that_goes_away(server, tmp_path):
    """In mid-run: warned of while the run goes on, an error at its end, and no secret is told."""
    config = CheckpointConfig(every=2, folder="s3://bucket/run")
    gone = partial(stop_server, at=3, pid=server.process.pid)
    (got,) = run(server, tmp_path / "run", MeshConfig(), checkpoint=config, before=gone)
    assert got.progress["step"] == STEPS
    assert got.warned[0].startswith("step 4 is not saved (the checkpoint before it: step-00000002)")
    for text in (*got.warned, got.raised):
        assert f"on {socket.gethostname()}" in text
        assert SECRET not in text
    assert "step 6 is not saved" in got.raised


def test_the_command_line(server, axialtrain, small_shards, tmp_path):
    done = axialtrain(
        "train", "experiment=quickstart", "mesh=single", "model.dim=16", "model.depth=1",
        f"data.shards={small_shards}", "data.validation=null", "train.steps=2",
        "checkpoint.folder=s3://bucket/mine", "resume=auto", "hydra.run.dir=run",
        cwd=tmp_path, **server.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 2: s3://bucket/mine" in done.stdout
    assert newest("s3://bucket/mine").step == 2
    assert not (tmp_path / "run" / "checkpoints").exists()
    texts = [path.read_text(errors="replace") for path in (tmp_path / "run").glob("*.[yj]*")]
    assert not any(SECRET in text for text in (*texts, done.stdout, done.stderr))
    assert all(torch.isfinite(w).all() for w in newest("s3://bucket/mine").weights().values())
    server.stop()
    again = axialtrain(
        "train", "experiment=quickstart", f"data.shards={small_shards}", "data.validation=null",
        "mesh=single", "checkpoint.folder=s3://bucket/mine", "resume=auto", "hydra.run.dir=two",
        cwd=tmp_path, **server.environment,
    )  # fmt: skip
    assert again.returncode == 2, "what cannot be asked is not what is not there"
    assert "s3://bucket/mine" in again.stderr
    assert len(again.stderr.splitlines()) == 1, again.stderr
    assert os.listdir(tmp_path) == ["run"]
