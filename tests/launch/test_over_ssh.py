"""What hosts get from torchrun.sh and deepspeed.sh, through every shell between, and how they end.

ssh is a stand-in that runs the command in a shell, as sshd does; tests of several hosts have sshd.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from repository import REPOSITORY
from system_tools import program

HOSTILE = [
    "experiment=quickstart",
    "data.shards={a: 2, b: 1}",
    """name='a"b $(touch broken) `touch broken` ${HOME} $$ \\ %n %h'""",
    "a=x\n;touch broken\n",
    "b=';touch${IFS}broken'",
    "hydra.run.dir=runs/${now:%Y}",
    "c=",
    "d=größer",
]
# What stands for Python on a host: writes down what it was given; ends with 75 when told to, with 3
# where the test says so, or at once.
PART = f"""#!{sys.executable} -S
import json, os, pathlib, signal, sys, time
import socket
def told(number, frame):
    sys.exit(75)
signal.signal(signal.SIGTERM, told)
names = ("GLOO_SOCKET_IFNAME", "MINE", "KEY", "MASTER_ADDR")
variables = {{name: os.environ[name] for name in names if name in os.environ}}
host = os.environ["HOST_OF_STAND_IN"]
what = json.dumps([os.getcwd(), variables, sys.argv[1:]])
pathlib.Path(os.environ["REPORTS"], host).write_text(what)
if host == os.environ.get("FAILING"):
    sys.exit(3)
time.sleep(float(os.environ.get("SECONDS_OF_PART", "0")))
"""
SSH = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do case $1 in -o | -l) shift 2 ;; *) shift ;; esac; done
export HOST_OF_STAND_IN=${1#*@} # pdsh takes the user away, and says it by -l
shift
# As sshd: a session of its own, which a signal to the client does not reach; one standard input.
exec setsid --wait "${SHELL:-bash}" -c "$*"
"""


@pytest.fixture
def folder(tmp_path):
    work = tmp_path / "a folder's"
    work.mkdir()
    for name, text in (("ssh", SSH), ("part", PART)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("# two\nnode0 slots=2\n\nme@node1   slots=2\n")
    return work


def environment(folder: Path, **more: str) -> dict[str, str]:
    above = folder.parent
    return os.environ | {
        "PATH": f"{above}:{os.environ['PATH']}",
        "HOSTFILE": str(above / "hosts"),
        "PYTHON": str(above / "part"),
        "REPORTS": str(above),
        "GLOO_SOCKET_IFNAME": "veth-0",
        "MINE": "a+b",
        "KEY": "secret",
        "FORWARD": "MINE",
        "SHELL": "/bin/bash",
    } | more  # fmt: skip


@contextmanager
def started(script: str, folder: Path, *arguments: str, **more: str) -> Iterator[subprocess.Popen]:
    command = [str(REPOSITORY / "launch" / script), *arguments]
    process = subprocess.Popen(command, cwd=folder, env=environment(folder, **more))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def reports(folder: Path) -> dict[str, tuple[str, dict[str, str], list[str]]]:
    """By host, what its part was given: its folder, variables and arguments."""
    end = time.monotonic() + 60
    paths = {name: folder.parent / name for name in ("node0", "node1")}
    while not all(path.exists() and path.read_text() for path in paths.values()):
        assert time.monotonic() < end, "a host was not started"
        time.sleep(0.05)
    return {name: json.loads(path.read_text()) for name, path in paths.items()}


def test_torchrun_is_started_on_all_hosts(folder):
    with started("torchrun.sh", folder, *HOSTILE, MINE="a 'b' $(touch broken)") as process:
        assert process.wait(60) == 0
    found = reports(folder)
    assert not (folder / "broken").exists()
    for host, first in (("node0", "true"), ("node1", "false")):
        where, variables, words = found[host]
        assert where == str(folder)
        assert variables["GLOO_SOCKET_IFNAME"] == "veth-0"
        assert variables["MINE"] == "a 'b' $(touch broken)"
        assert words[:2] == ["-m", "torch.distributed.run"]
        assert words[-len(HOSTILE) - 1 :] == ["train", *HOSTILE]
        assert {
            "--nnodes=2",
            "--nproc-per-node=2",
            "--rdzv-endpoint=node0",
            f"--rdzv-conf=join_timeout=900,is_host={first}",
            f"--local-addr={host}",
        } < set(words)


def test_deepspeed_is_started_on_all_hosts_by_ssh(folder):
    with started("deepspeed.sh", folder, *HOSTILE, RUNNER="ssh") as process:
        assert process.wait(60) == 0
    found = reports(folder)
    assert not (folder / "broken").exists()
    for rank, host in enumerate(("node0", "node1")):
        _, variables, words = found[host]
        assert variables["MASTER_ADDR"] == "node0"
        assert words[:2] == ["-m", "deepspeed.launcher.launch"]
        assert words[-len(HOSTILE) - 2 :] == ["axialtrain.cli", "train", *HOSTILE]
        assert {f"--node_rank={rank}", "--master_addr=node0", "--no_local_rank"} < set(words)


@pytest.mark.slow
def test_deepspeed_is_started_on_all_hosts_by_pdsh(folder):
    """deepspeed's runner and pdsh are the real ones: both put the arguments together anew."""
    program("pdsh")
    part, runner = folder.parent / "part", folder.parent / "runner"
    # The runner starts the interpreter that runs itself: on the hosts, ours is to be the stand-in.
    runner.write_text(
        f"#!{sys.executable}\nimport sys\nsys.executable = {str(part)!r}\n"
        "assert sys.argv[1:3] == ['-m', 'deepspeed.launcher.runner']\n"
        "from deepspeed.launcher.runner import main\nmain(sys.argv[3:])\n"
    )
    runner.chmod(0o755)
    more = {"PYTHON": str(runner), "RUNNER": "pdsh", "DS_ACCELERATOR": "cpu"}
    plain = folder.parent / "plain"  # deepspeed does not quote the folder that it goes to
    plain.mkdir()
    with started("deepspeed.sh", plain, *HOSTILE, **more) as process:
        assert process.wait(120) == 0
    found = reports(folder)
    assert not (plain / "broken").exists()
    for rank, host in enumerate(("node0", "node1")):
        where, variables, words = found[host]
        assert where == str(plain)
        assert variables["GLOO_SOCKET_IFNAME"] == "veth-0"
        assert variables["MINE"] == "a+b"
        assert words[:3] == ["-u", "-m", "deepspeed.launcher.launch"]
        assert words[-len(HOSTILE) - 2 :] == ["axialtrain.cli", "train", *HOSTILE]
        assert {f"--node_rank={rank}", "--master_addr=node0", "--no_local_rank"} < set(words)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_hosts_are_told_when_the_launching_side_ends(script, how, folder):
    with started(script, folder, RUNNER="ssh", SECONDS_OF_PART="50") as process:
        reports(folder)
        before = time.monotonic()
        process.send_signal(how)
        status = process.wait(20)
        end = before + 20
        while any(running(folder)):
            assert time.monotonic() < end, "a host goes on"
            time.sleep(0.1)
    if how == signal.SIGTERM:
        assert status in (75, 128 + how)


@pytest.mark.slow
def test_the_status_is_that_of_the_host_that_failed(folder):
    with started("torchrun.sh", folder, FAILING="node1", SECONDS_OF_PART="2") as process:
        assert process.wait(30) == 3


@pytest.mark.slow
def test_deepspeed_ends_all_hosts_when_one_fails(folder):
    more = {"RUNNER": "ssh", "FAILING": "node0", "SECONDS_OF_PART": "50"}
    with started("deepspeed.sh", folder, **more) as process:
        assert process.wait(30) == 3


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_a_hostfile_with_other_lines_is_refused(script, folder):
    (folder.parent / "hosts").write_text("node0 slots=2\nnode1:2\n")
    done = subprocess.run(
        [str(REPOSITORY / "launch" / script)], cwd=folder, env=environment(folder),
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "2:node1:2" in done.stderr


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_a_hostfile_without_a_host_is_refused(script, folder):
    hostfile = folder.parent / "hosts"
    for change in (hostfile.unlink, lambda: hostfile.write_text("# none\n")):
        change()
        done = subprocess.run(
            [str(REPOSITORY / "launch" / script)], cwd=folder, env=environment(folder),
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.endswith("names no host\n")


def test_deepspeed_refuses_what_a_shell_would_change(folder):
    done = subprocess.run(
        [str(REPOSITORY / "launch" / "deepspeed.sh")], cwd=folder,
        env=environment(folder, MINE="a b"), capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "only RUNNER=ssh can take MINE=a b" in done.stderr


def running(folder: Path) -> Iterator[int]:
    """The parts that still run on the stand-ins of hosts."""
    part = str(folder.parent / "part").encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and part in (entry / "cmdline").read_bytes():
                yield int(entry.name)
        except OSError:
            continue  # it ended meanwhile
