"""`axialtrain doctor` on several ranks: who is missing, differs, cannot be reached, or sees another
folder; and how fast the mesh is. Hosts are processes with a host name, mounts or a network of their
own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed.hosts import hosts
from system_tools import program, root

pytestmark = pytest.mark.slow

PATIENT = "60"  # s: on a busy machine one rank starts long after another
COMMAND = [sys.executable, "-m", "axialtrain.cli", "doctor"]


@contextmanager
def rank(
    number: int,
    arguments: Sequence[object],
    *,
    cwd: Path,
    world: int = 2,
    before: Sequence[object] = (),
    **environment: str,
) -> Iterator[subprocess.Popen[str]]:
    """`axialtrain doctor` as rank `number`, after the words `before`; ended by its id."""
    process = subprocess.Popen(
        [*map(str, before), *COMMAND, *map(str, arguments)],
        cwd=cwd,
        env=os.environ
        | {
            "RANK": str(number),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "TORCH_EXTENSIONS_DIR": str(cwd / "extensions"),
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def ended(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str]:
    out, errors = process.communicate(timeout=timeout)
    assert "Traceback" not in errors, errors
    return process.returncode, out


def troubles(record: Path) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(record.read_text())["troubles"]
    return found


def one(found: list[dict[str, str]], words: str) -> dict[str, str]:
    """The only trouble that speaks of `words`."""
    (match,) = [trouble for trouble in found if words in trouble["what"]]
    return match


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_local_ranks_measure_their_mesh(tmp_path: Path) -> None:
    record = tmp_path / "doctor.json"
    done = subprocess.run(
        [*COMMAND, "mesh=2x2", "--json", record, "--timeout", PATIENT],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 ranks came" in done.stdout
    assert "12 connections between ranks over TCP" in done.stdout
    assert done.stdout.endswith("\nAll is well.\n")
    found: dict[str, Any] = json.loads(record.read_text())
    assert found["mesh"] == {"data": 1, "row": 2, "col": 2, "tensor": 1}
    speeds = {(one["along"], one["operation"]): one for one in found["speed"]}
    assert set(speeds) == {(along, "all-to-all") for along in ("row", "col", "row x col")}
    for (along, _), speed in speeds.items():
        # Of 4 MiB a rank keeps its own part.
        size = 4 if along == "row x col" else 2
        assert speed["size"] == size
        assert speed["bytes"] == (4 << 20) * (size - 1) // size
        assert 0 < speed["latency"] < speed["seconds"] < 10
        assert speed["rate"] == pytest.approx(speed["bytes"] / speed["seconds"])
        line = (
            rf"{along}  +all-to-all +{size} +inside a host +\d+ us +\d\.\d MB +[\d.]+ ms +\d+ MB/s"
        )
        assert re.search(line, done.stdout), done.stdout


def test_two_hosts_that_differ(tmp_path: Path) -> None:
    """The second has another DeepSpeed, its own run folder, and the other half of the heads."""
    root()
    runs, record = tmp_path / "runs", tmp_path / "doctor.json"
    runs.mkdir()
    metadata = tmp_path / "old" / "deepspeed-0.1.2.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1.2\n")
    elsewhere = [
        program("unshare"), "--mount", "--uts", "sh", "-c",
        f'hostname other && mount -t tmpfs other {runs} && exec "$@"', "sh",
    ]  # fmt: skip
    asked = ["mesh=1x1", "mesh.tensor=2", f"hydra.run.dir={runs}/mine", "--json", record]
    asked += ["--timeout", PATIENT]
    path = f"{metadata.parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    port = free_port()
    with ExitStack() as stack:
        zero = stack.enter_context(rank(0, asked, cwd=tmp_path, MASTER_PORT=port))
        other = stack.enter_context(
            rank(1, asked, cwd=tmp_path, before=elsewhere, MASTER_PORT=port, PYTHONPATH=path)
        )
        status, printed = ended(zero)
        assert ended(other) == (1, "")
    assert status == 1
    found = troubles(record)
    host = socket.gethostname()

    differs = one(found, "on rank 0 on")
    assert differs["where"] == "rank 1 on other"
    assert re.fullmatch(
        rf"deepspeed is 0\.1\.2, on rank 0 on {host} it is \d+\.\d+\.\d+", differs["what"]
    )
    assert differs["fix"].startswith("install the same everywhere")
    old = one(found, "axialtrain needs")
    assert old["where"] == "rank 1 on other"
    assert old["what"].startswith("deepspeed is 0.1.2, axialtrain needs ")

    folder = one(found, "a file that rank 0")
    assert folder["where"] == "rank 1 on other"
    assert folder["what"].startswith(f"a file that rank 0 on {host} wrote into {runs} is not")
    assert folder["fix"].startswith(
        "put hydra.run.dir (or checkpoint.folder) on a file system that"
    )
    assert list(runs.iterdir()) == []

    crosses = one(found, "crosses hosts")
    assert crosses["what"] == "tensor crosses hosts, and it sums activations twice in each layer"
    assert crosses["fix"] == (
        "better take mesh=2x1 mesh.data=1 mesh.tensor=1: what then crosses hosts is row"
    )
    assert re.search(r"tensor +all-reduce +2 +crosses hosts +\d+ us", printed)
    assert f"axialtrain doctor: 2 ranks on 2 hosts ({host}, other)" in printed
    assert len(found) == 4


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    record = tmp_path / "doctor.json"
    started = time.monotonic()
    with rank(
        0, ["--json", record, "--timeout", "3"], cwd=tmp_path, MASTER_PORT=free_port()
    ) as zero:
        status, printed = ended(zero)
    assert status == 1
    assert time.monotonic() - started < 100
    (trouble,) = troubles(record)
    assert trouble["where"] == "rank 1"
    assert trouble["what"] == "rank 1 did not answer at all, within 3 s"
    assert trouble["fix"].startswith("see that its process was started and what it printed")
    assert "nothing was measured" in printed
    assert "write, fsync and rename work" in printed


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    record = tmp_path / "doctor.json"
    port = free_port()
    with rank(1, ["--json", record, "--timeout", "2"], cwd=tmp_path, MASTER_PORT=port) as alone:
        status, _ = ended(alone)
    assert status == 1
    (trouble,) = troubles(tmp_path / "doctor-rank-1.json")
    assert trouble["what"].startswith(
        f"cannot meet the other ranks (the store at 127.0.0.1:{port}: "
    )
    assert trouble["fix"].startswith("see that rank 0 runs, that MASTER_ADDR and MASTER_PORT name")


def test_a_rank_that_cannot_be_reached(tmp_path: Path) -> None:
    """It reaches the store, but tells others to find it at an interface that leads nowhere, as the
    bridge of a container engine does."""
    record = tmp_path / "doctor.json"
    asked = ["--json", record, "--timeout", PATIENT]
    with ExitStack() as stack:
        near, far = stack.enter_context(hosts(2, tmp_path))
        near.ip("route", "add", "unreachable", "10.231.8.0/24")
        far.ip("link", "add", "inner0", "type", "veth", "peer", "name", "inner1")
        far.ip("address", "add", "10.231.8.2/24", "dev", "inner0")
        for interface in ("inner0", "inner1"):
            far.ip("link", "set", interface, "up")
        shared = {"MASTER_ADDR": near.address, "MASTER_PORT": "29555"}
        zero = stack.enter_context(
            rank(0, asked, cwd=tmp_path, before=near.command([], tmp_path), **shared)
        )
        other = stack.enter_context(
            rank(
                1, asked, cwd=tmp_path, before=far.command([], tmp_path), **shared,
                GLOO_SOCKET_IFNAME="inner0",
            )
        )  # fmt: skip
        status, printed = ended(zero)
        assert ended(other)[0] == 1
    assert status == 1
    (trouble,) = troubles(record)
    assert trouble["where"] == "rank 1 on host1"
    assert trouble["what"].startswith(
        "rank 0 on host0 cannot reach it over TCP at 10.231.8.2, where its host says it is ("
    )
    assert trouble["fix"].startswith("let all TCP ports through between the hosts, and name the")
    assert "(No route to host)" in trouble["what"]
    assert "2 of 2 ranks came" in printed
    assert "no group was made and nothing was measured" in printed


def test_an_interface_that_one_rank_does_not_have(tmp_path: Path) -> None:
    record = tmp_path / "doctor.json"
    asked = ["--json", record, "--timeout", PATIENT]
    port = free_port()
    with ExitStack() as stack:
        zero = stack.enter_context(rank(0, asked, cwd=tmp_path, MASTER_PORT=port))
        other = stack.enter_context(
            rank(1, asked, cwd=tmp_path, MASTER_PORT=port, GLOO_SOCKET_IFNAME="ib7")
        )
        status, _ = ended(zero)
        ended(other)
    assert status == 1
    found = troubles(record)
    host = socket.gethostname()
    assert one(found, "names no interface")["where"] == f"rank 1 on {host}"
    assert one(found, "no address")["what"] == (
        "it has no address to be reached at (GLOO_SOCKET_IFNAME=ib7: No such device)"
    )
    assert len(found) == 2
