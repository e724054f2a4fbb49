"""`axialtrain doctor` on one machine finds what is planted there, and nothing where all is well."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from data.range_server import serving
from s3_server import SECRET, Server, s3_server
from system_tools import program, root

from axialtrain.cli import main

Doctor = Callable[..., tuple[int, str, list[str]]]
TOLD_BY_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
)


@pytest.fixture
def doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Doctor:
    """doctor(*arguments): status, what it printed, and what its record calls a trouble.

    On a machine that is well, whatever this one's environment is.
    """
    monkeypatch.chdir(tmp_path)
    for name in TOLD_BY_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        record = tmp_path / "doctor.json"
        status = main(["doctor", "--json", str(record), *map(str, arguments)])
        found = json.loads(record.read_text())
        troubles = [f"{one['what']}: {one['fix']}" for one in found["troubles"]]
        printed = capsys.readouterr().out
        assert found["well"] == (not troubles)
        assert status == (1 if troubles else 0)
        for trouble in troubles:
            assert trouble in printed
        return status, printed, troubles

    return run


def test_a_healthy_machine(doctor: Doctor) -> None:
    status, printed, troubles = doctor()
    assert (status, troubles) == (0, [])
    assert printed.endswith("\nAll is well.\n")
    for said in ("torch 2.", "deepspeed 0.", "cores, ", "file handles ", "/dev/shm ", "network"):
        assert said in printed
    assert "write, fsync and rename work in" in printed
    assert "builds of DeepSpeed's ops in" in printed


def test_a_stale_build_lock(doctor: Doctor, tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (lock.stat().st_mtime - 600,) * 2)
    status, _, (trouble,) = doctor()
    assert status == 1
    assert trouble == (
        f"{lock} is the lock of a build that no process here is doing, 10 min old; a run that "
        f"needs it waits for ever: rm {lock} (unless another host is building there now)"
    )


def test_a_build_that_is_running_is_no_trouble(doctor: Doctor, tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "py311_cpu" / "shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("x"):
        status, printed, _ = doctor()
        assert status == 0
        assert "shm_comm is being built now" in printed
    status, _, troubles = doctor()  # it was killed
    assert status == 1
    assert len(troubles) == 1


def test_too_few_file_handles(doctor: Doctor) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, before[1]))
    try:
        status, _, (trouble,) = doctor()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert status == 1
    assert trouble == (
        "a process may have 400 files and sockets open, one rank may take 528: "
        "ulimit -n 4096 before the ranks start"
    )


def test_an_interface_that_is_not_there(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    status, _, (trouble,) = doctor()
    assert status == 1
    assert trouble.startswith("GLOO_SOCKET_IFNAME=ib7 names no interface of this host: allowed are")
    assert "lo" in trouble.split("allowed are ")[1]


def test_a_gpu_that_is_asked_for_and_not_there(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    if torch.cuda.device_count() or list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    _, _, troubles = doctor("launcher.device=cuda")
    assert len(troubles) == 2
    assert troubles[0].startswith("launcher.device=cuda for 1 ranks, and 0 GPUs are here: start")
    assert troubles[1].startswith("CUDA_VISIBLE_DEVICES=3, and this host has no GPU: unset")
    # As the deepspeed launcher sets it, also where there is none.
    status, printed, _ = doctor()
    assert status == 0
    assert "CUDA_VISIBLE_DEVICES=3, which changes nothing without a GPU" in printed


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, in the mount namespace of a process that waits for our end: however
    the tests end, nothing of it is left."""
    root()
    mounted = tmp_path / "tiny"
    mounted.mkdir()
    mount = 'mount -t tmpfs -o size=256k tiny "$0" && echo there && exec cat'
    with subprocess.Popen(
        [program("unshare"), "--mount", "sh", "-c", mount, mounted],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "there\n"
        yield Path(f"/proc/{holder.pid}/root{mounted}")


def remount(tiny: Path, option: str) -> None:
    _, _, holder, _, *inside = tiny.parts
    subprocess.run(
        [
            program("nsenter"), "--target", holder, "--mount",
            program("mount"), "-o", f"remount,{option}", Path("/", *inside),
        ],
        check=True,
    )  # fmt: skip


def test_a_run_folder_on_a_full_disk(doctor: Doctor, tiny: Path) -> None:
    status, _, (trouble,) = doctor(f"hydra.run.dir={tiny}/runs/mine")
    assert status == 1
    assert trouble == (
        f"{tiny}/runs/mine cannot be written to (No space left on device): make room in {tiny} or "
        "make it writable, or give another hydra.run.dir"
    )
    assert list(tiny.iterdir()) == []


def test_a_run_folder_that_is_read_only(doctor: Doctor, tiny: Path) -> None:
    remount(tiny, "ro")
    _, _, (trouble,) = doctor(f"hydra.run.dir={tiny}/runs/mine")
    assert f"{tiny}/runs/mine cannot be written to (Read-only file system)" in trouble


def test_a_disk_with_little_room(doctor: Doctor, tiny: Path) -> None:
    remount(tiny, "size=4m")
    _, _, (trouble,) = doctor(f"hydra.run.dir={tiny}")
    assert trouble.startswith(f"{tiny} has 4 MB free, allowed is from 1000: make room there")


def test_troubles_do_not_hide_each_other(
    doctor: Doctor, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=ib7")
    lock = tmp_path / "extensions" / "shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    gone = tmp_path / "gone"
    _, printed, troubles = doctor(f"hydra.run.dir={tiny}", "--store", gone)
    assert len(troubles) == 4
    assert "4 troubles:" in printed
    for said in ("NCCL_SOCKET_IFNAME==ib7", str(lock), str(tiny), f"{gone} is not there"):
        assert sum(said in trouble for trouble in troubles) == 1


def test_a_folder_of_shards(doctor: Doctor, small_shards: Path) -> None:
    status, printed, _ = doctor(
        "experiment=quickstart", "mesh=1x1", f"data.shards={small_shards}", "data.validation=null"
    )
    assert status == 0
    size = min(1024, (small_shards / "manifest.json").stat().st_size)
    assert f"{small_shards}: {size} bytes of manifest.json read" in printed


def test_a_store_that_denies(doctor: Doctor, tmp_path: Path) -> None:
    """And passwords, or what signs a URL, are never printed."""
    with serving(tmp_path) as server:
        server.always["GET", "json"] = 403
        url = server.url.replace("http://", "http://me:hunter2@")
        status, printed, (trouble,) = doctor("--store", f"{url}/shards")
    assert status == 1
    assert trouble.startswith(f"{server.url}/shards/manifest.json cannot be read (DeniedError: ")
    assert "403" in trouble
    assert trouble.endswith("(to list and to read, and for checkpoints to write)")
    assert "hunter2" not in printed + trouble + (tmp_path / "doctor.json").read_text()


def test_a_store_of_an_unknown_kind(doctor: Doctor) -> None:
    _, _, (trouble,) = doctor("--store", "gopher://shards")
    assert trouble.startswith("gopher://shards cannot be opened (ValueError: Protocol not known")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mesh=2by2"], "mesh=2by2: allowed are mesh=single and mesh=RxC"),
        (["mesh.data=0"], "mesh.data=0: allowed are whole numbers from 1"),
        (["--timeout", "0"], "timeout is 0, allowed are seconds from 0.5 to 3600"),
        (["--json", "gone/doctor.json"], "json is gone/doctor.json, allowed is a file in a folder"),
        (["--json", "/proc/a.json"], "json is /proc/a.json: no file can be written there ("),
        (["--json", "/tmp"], "json is /tmp: no file can be written there (it is a folder)"),
    ],
)
def test_what_cannot_be_asked(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with s3_server(monkeypatch) as server:
        fsspec.filesystem("s3").pipe_file("bucket/shards/manifest.json", b"{}")
        yield server


@pytest.mark.slow
def test_an_object_store(doctor: Doctor, store: Server) -> None:
    """That answers, for shards and for checkpoints; without a bucket; and not at all."""
    checkpoints = "checkpoint.folder=s3://bucket/mine"
    status, printed, _ = doctor(checkpoints, "--store", "s3://bucket/shards")
    assert status == 0
    assert "s3://bucket/shards: 2 bytes of manifest.json read" in printed
    assert "s3://bucket/mine: wrote, listed, read and removed an object" in printed
    assert fsspec.filesystem("s3").ls("bucket", refresh=True) == ["bucket/shards"]

    _, _, troubles = doctor("checkpoint.folder=s3://gone/mine", "--store", "s3://gone/shards")
    assert len(troubles) == 2
    assert troubles[0].startswith("s3://gone/shards is not there, or is empty: name the folder")
    assert troubles[1].startswith("s3://gone/mine cannot be written to (")
    assert troubles[1].endswith("(to list and to read, and for checkpoints to write)")

    store.stop()
    _, printed, (trouble,) = doctor("--store", "s3://bucket/shards", "--timeout", "10")
    assert trouble.startswith("s3://bucket/shards/manifest.json cannot be read (UnreachableError: ")
    assert SECRET not in printed


@pytest.mark.slow
def test_shared_memory_of_a_small_container(tmp_path: Path) -> None:
    """Docker's way, with a tmpfs of its own there; and as a process of its own, with the status."""
    root()
    record = tmp_path / "doctor.json"
    done = subprocess.run(
        [
            program("unshare"), "--mount", "sh", "-c",
            'mount -t tmpfs -o size=8m shm /dev/shm && exec "$@"', "sh",
            sys.executable, "-m", "axialtrain.cli", "doctor", "--json", record,
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={k: v for k, v in os.environ.items() if k not in TOLD_BY_LAUNCHERS},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (trouble,) = json.loads(record.read_text())["troubles"]
    assert trouble["what"] == "/dev/shm has 8.4 MB free of 8.4 MB, allowed is from 16.8 MB"
    assert trouble["fix"].startswith("start the container with a larger one (docker --shm-size=8g")
    assert f"1. limits, {trouble['where']}: {trouble['what']}: {trouble['fix']}" in done.stdout
