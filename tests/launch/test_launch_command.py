"""`axialtrain launch`: what it refuses, warns of, prints, writes and hands on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml

from axialtrain.cli import main
from axialtrain.launch.launch_command import check_hostfile, check_placement, prepared
from axialtrain.mesh.mesh import MeshConfig
from axialtrain.train.compose import compose_run

EXPERIMENT = ["experiment=quickstart"]
HOSTS = "node0 slots=2\n# comment\n\nnode1   slots=2 \n"


def launch(*arguments: str, launcher: str = "torchrun", nodes: int = 2, processes: int = 2) -> int:
    counts = ["--nodes", str(nodes), "--gpus-per-node", str(processes)]
    return main(["launch", "--with", launcher, *counts, *arguments, *EXPERIMENT])


@pytest.mark.parametrize(
    ("mesh", "nodes", "processes", "said"),
    [
        (MeshConfig(row=2, col=2), 2, 8, "has 4 processes, 2 nodes of 8 have 16: .* mesh.data=4"),
        (MeshConfig(row=2, col=3), 1, 4, "6 processes.*--nodes 3 --gpus-per-node 2"),
        (MeshConfig(tensor=4), 2, 2, "`tensor` inside a node.*mesh=2x1 .*mesh.tensor=2"),
        (MeshConfig(row=2, tensor=3), 3, 2, "`tensor` inside a node"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, nodes, processes, said):
    with pytest.raises(ValueError, match=said):
        check_placement(mesh, nodes, processes)


def test_what_is_allowed_instead_is_taken():
    assert check_placement(MeshConfig(data=4, row=2, col=2), 2, 8) is None
    assert check_placement(MeshConfig(row=2, tensor=2), 2, 2) is None
    assert check_placement(MeshConfig(data=64, row=2, col=4), 64, 8) is None


def test_files_and_folders_that_are_missing_are_named(tmp_path, capsys):
    assert launch("--hostfile", str(tmp_path / "nope"), "mesh=2x2") == 2
    assert f"--hostfile {tmp_path}/nope is not there: allowed is" in capsys.readouterr().err
    assert launch("--out", str(tmp_path / "nope" / "file"), "mesh=2x2") == 2
    assert f"--out {tmp_path}/nope/file: allowed is a file in a" in capsys.readouterr().err


def test_what_is_written_is_for_its_owner_alone(tmp_path):
    """A URL among the overrides may hold a password."""
    for launcher, mode in (("torchrun", 0o700), ("kubernetes", 0o600)):
        assert launch("--out", str(tmp_path / launcher), "mesh=2x2", launcher=launcher) == 0
        assert (tmp_path / launcher).stat().st_mode & 0o777 == mode


def test_another_file_is_not_written_over(tmp_path, capsys):
    out, given = tmp_path / "run.sh", ("mesh=2x2", "hydra.run.dir=runs/mine")
    assert launch("--out", str(out), *given) == 0
    written = out.read_bytes()
    assert launch("--out", str(out), *given) == 0  # the same once more
    out.write_bytes(written + b"# mine\n")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("run.sh", "link"):
        assert launch("--out", str(tmp_path / name), *given) == 2
        assert f"--out {tmp_path / name}: is there already" in capsys.readouterr().err
    assert out.read_bytes() == written + b"# mine\n"


def test_columns_across_nodes_are_warned_of():
    warning = check_placement(MeshConfig(row=1, col=4), 2, 2)
    assert warning is not None
    assert "col crosses hosts" in warning
    assert "mesh=2x2" in warning
    assert check_placement(MeshConfig(row=2, col=2), 2, 2) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node0 slots=2\n", "node0 slots=2: allowed are 2 hosts with slots=2"),
        ("node0 slots=2\nnode1 slots=4\n", "node1 slots=4: allowed are 2 hosts"),
        ("node0 slots=2\nnode0 slots=2\n", ":2 is 'node0 slots=2': allowed is HOST slots=N"),
        ("node0 2\n", ":1 is 'node0 2'"),
        ("", "no host"),
    ],
)
def test_a_hostfile_of_other_hosts_is_refused(text, said, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text(text)
    with pytest.raises(ValueError, match=said):
        check_hostfile(hosts, 2, 2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"nodes": 0}, "--nodes is 0: allowed are whole numbers from 1"),
        ({"processes": -1}, "--gpus-per-node is -1"),
        ({"launcher": "slurm", "hostfile": "hosts"}, "--hostfile is for torchrun and deepspeed"),
        ({"launcher": "deepspeed"}, "on 2 nodes needs --hostfile"),
        ({"name": "A_b"}, "--name is 'A_b': allowed are"),
        ({"overrides": ["mesh=2x2", "optim.lrr=1"]}, "unknown key optim.lrr"),
    ],
)
def test_what_cannot_be_launched_is_refused(changed, said):
    given = {"launcher": "torchrun", "overrides": ["mesh=2x2"], "nodes": 2, "processes": 2}
    given |= changed
    overrides = [*EXPERIMENT, *given.pop("overrides")]
    with pytest.raises(ValueError, match=said):
        prepared(given.pop("launcher"), overrides, **given)


def test_every_start_of_a_script_is_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "name='it''s (1), $(x): # {y}'".replace("''", "\\'")
    given = [*EXPERIMENT, "mesh=2x2", name]
    run, _ = prepared("kubernetes", given, nodes=1, processes=4)
    assert run.name == "axialtrain-it-s-1-x-y"
    assert run.overrides[1:] == ["resume=auto", *given]
    config, folder, _ = compose_run(run.overrides, 4)
    assert folder.parent == tmp_path / "runs" / config.name
    assert not run.overrides[0].startswith(f"hydra.run.dir={tmp_path}"), "the nodes have their own"

    own = [*EXPERIMENT, "mesh=2x2", "hydra.run.dir=/runs/mine", "resume=/runs/other"]
    run, _ = prepared("kubernetes", own, nodes=1, processes=4)
    assert run.overrides == own


def test_the_mesh_fills_the_nodes(capsys):
    assert launch("mesh=1x2", "mesh.data=auto", nodes=3, launcher="kubeflow") == 0
    (job,) = yaml.safe_load_all(capsys.readouterr().out)
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 3


def test_it_prints_with_a_warning_beside(capsys):
    assert launch("mesh=1x4") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("#!/usr/bin/env bash\n")
    assert "export NODES=2 PROCESSES=2\n" in printed.out
    assert sys.executable in printed.out
    assert printed.err.startswith("axialtrain: col crosses hosts")


def test_a_refusal_is_one_sentence(capsys):
    assert launch("mesh=1x2") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("axialtrain: mesh data=1 x row=1 x col=2 x tensor=1 has 2")


def test_it_writes_a_script_that_can_be_started(tmp_path, capsys):
    hosts, out = tmp_path / "hosts", tmp_path / "run.sh"
    hosts.write_text(HOSTS)
    given = ["--hostfile", str(hosts), "--out", str(out), "mesh=2x2"]
    assert launch(*given, launcher="deepspeed") == 0
    assert str(out) in capsys.readouterr().out
    assert f"export HOSTFILE={hosts}\n" in out.read_text()
    assert os.access(out, os.X_OK)
    assert launch("--out", str(tmp_path / "job.yaml"), "mesh=2x2", launcher="kubernetes") == 0
    assert not os.access(tmp_path / "job.yaml", os.X_OK)


@pytest.mark.parametrize(
    ("launcher", "program"),
    [("slurm", "sbatch"), ("kubernetes", "kubectl"), ("kubeflow", "kubectl")],
)
def test_it_hands_on_what_it_would_print(launcher, program, tmp_path, monkeypatch, capsys):
    (tmp_path / program).write_text('#!/bin/bash\necho "$@" > given; cat > taken; exit 3\n')
    (tmp_path / program).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    given = ["mesh=2x2", "hydra.run.dir=runs/mine", "resume=auto"]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert launch("--submit", *given, launcher=launcher) == 2
    assert f"--submit needs {program}" in capsys.readouterr().err
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert launch("--submit", *given, launcher=launcher) == 3
    assert launch(*given, launcher=launcher) == 0
    assert (tmp_path / "taken").read_text() == capsys.readouterr().out


@pytest.mark.slow
def test_it_starts_what_nothing_else_starts(tmp_path):
    (tmp_path / "python3").write_text(
        f"#!{sys.executable} -S\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
    )
    (tmp_path / "python3").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "axialtrain.cli", "launch", "--with", "torchrun", "--nodes", "1",
         "--gpus-per-node", "4", "--submit", *EXPERIMENT, "mesh=2x2", "name='a b'"],
        env=os.environ | {"PYTHON": str(tmp_path / "python3")}, capture_output=True, text=True,
        timeout=300, check=True,
    )  # fmt: skip
    given = json.loads(done.stdout)
    assert given[-4:] == ["resume=auto", *EXPERIMENT, "mesh=2x2", "name='a b'"]
    assert "--nproc-per-node=4" in given
