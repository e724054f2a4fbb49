"""`mesh.txt`: what it says, and that a run over two hosts writes it and warns."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from system_tools import program, root

from axialtrain.mesh.mesh import MeshConfig
from axialtrain.mesh.placement import placed
from axialtrain.train.mesh_text import mesh_text


def test_what_it_says() -> None:
    hosts = ["one"] * 4 + ["two"] * 4
    placement = placed({"data": 2, "row": 2, "tensor": 2}, hosts)
    lines = mesh_text(
        placement,
        [f"cuda:{rank % 4}" for rank in range(8)],
        MeshConfig(data=2, row=2, tensor=2, swap=placement.swap),
    ).splitlines()
    assert lines[0] == "mesh data=2 x row=2 x col=1 x tensor=2: 8 ranks on 2 hosts"
    assert lines[2].split() == [
        *("rank", "host", "device", "data", "row", "col", "tensor", "holds")
    ]
    assert lines[3 + 6].split(maxsplit=7) == [
        *("6", "two", "cuda:2", "1", "1", "0", "0"),
        "band 2 of 2 of the rows, all columns, of the images of replica 2 of 2, part 1 of 2 of "
        "the weights",
    ]
    assert lines[12:16] == [
        "data      2  crosses hosts",
        "row       2  inside a host",
        "col       1  of one rank",
        "tensor    2  inside a host",
    ]
    assert lines[17] == "No axis that talks much crosses hosts without need."
    assert len(lines) == 18


def test_what_it_says_of_one_rank() -> None:
    text = mesh_text(placed({}, ["one"]), ["cpu"], MeshConfig(swap="direct"))
    assert "1 rank on 1 host\n" in text
    assert text.splitlines()[3].endswith("all rows, all columns")


@pytest.mark.parametrize(
    ("hosts", "ending"),
    [
        (["one"] * 4, "in one exchange among all ranks of an image (mesh.swap=direct)."),
        (
            ["one"] * 2 + ["two"] * 2,
            "in two exchanges, along col and along row (mesh.swap=hierarchical).",
        ),
    ],
)
def test_it_says_how_rows_become_columns(hosts: list[str], ending: str) -> None:
    placement = placed({"row": 2, "col": 2}, hosts)
    config = MeshConfig(row=2, col=2, swap=placement.swap)
    line = f"Whole rows become whole columns {ending}"
    assert line in mesh_text(placement, ["cpu"] * 4, config).splitlines()
    gathered = MeshConfig(row=2, col=2, swap=placement.swap, exchange="gather")
    assert "whole columns" not in mesh_text(placement, ["cpu"] * 4, gathered)


@pytest.mark.slow
def test_a_run_over_two_hosts(small_shards: Path, tmp_path: Path) -> None:
    """Two host names on one machine; tensor crosses them, which rank 0 warns of once."""
    root()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path / "run"
    command = [
        sys.executable, "-m", "axialtrain.cli", "train", "experiment=quickstart", "mesh=1x1",
        "mesh.tensor=2", "train.steps=1", "train.batch=1", "model.dim=16", "model.depth=1",
        "model.heads=2", "logger=none", f"data.shards={small_shards}", "data.validation=null",
        f"hydra.run.dir={folder}",
    ]  # fmt: skip
    with ExitStack() as stack:
        ranks = []
        for rank in range(2):
            named = [program("unshare"), "--uts", "sh", "-c", f'hostname host{rank} && exec "$@"']
            process = subprocess.Popen(
                [*named, "sh", *command],
                cwd=tmp_path,
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
                | {"GLOO_SOCKET_IFNAME": "lo", "WANDB_MODE": "disabled"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.communicate, timeout=30)
            stack.callback(process.kill)
            ranks.append(process)
        errors = [process.communicate(timeout=240)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], errors
    warning = "tensor crosses hosts, and it sums activations twice in each layer. Better take "
    assert errors[0].count(warning) == 1
    assert warning not in errors[1]
    text = (folder / "mesh.txt").read_text()
    assert text.startswith("mesh data=1 x row=1 x col=1 x tensor=2: 2 ranks on 2 hosts\n")
    assert warning + "mesh=2x1 mesh.data=1 mesh.tensor=1" in text
    assert [line.split()[:3] for line in text.splitlines()[3:5]] == [
        ["0", "host0", "cpu"],
        ["1", "host1", "cpu"],
    ]
