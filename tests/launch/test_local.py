"""The local launcher: ranks find each other, and one that fails ends them all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from axialtrain.launch.local import processes_of_outer_launcher, start

pytestmark = pytest.mark.slow


def meet(total: int) -> None:
    dist.init_process_group("gloo")
    x = torch.ones(1)
    dist.all_reduce(x)
    dist.destroy_process_group()
    if int(x) != total:
        raise ValueError(f"met {int(x)} of {total}")


def refuse() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("planted")
    time.sleep(60)


def crash() -> None:
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("planted")
    time.sleep(60)


def die() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def wait_long() -> None:
    print("waiting", flush=True)
    time.sleep(60)


def test_ranks_meet():
    assert start(meet, (2,), 2) == 0


@pytest.mark.parametrize(
    ("fn", "status", "message"),
    [
        (refuse, 2, "axialtrain: rank 1: planted"),
        (crash, 1, "ZeroDivisionError: planted"),
        (die, 1, "axialtrain: rank 1 died: SIGKILL"),
    ],
    ids=["refuses", "crashes", "dies"],
)
def test_one_rank_that_fails_ends_all(capfd, fn, status, message):
    started = time.monotonic()
    assert start(fn, (), 2) == status
    assert time.monotonic() - started < 30
    assert message in capfd.readouterr().err


def test_an_interrupt_ends_all():
    code = "from launch.test_local import *; sys.exit(start(wait_long, (), 2))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": "tests"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "waiting\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to everybody
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors


def test_who_started_us(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes_of_outer_launcher() is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes_of_outer_launcher() == 4
