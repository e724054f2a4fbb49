"""The local launcher: ranks find each other, and one that fails ends them all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from distributed.watch_ranks import small_run

from axialtrain.launch.errors import say_by_host, speaks, told_early
from axialtrain.launch.local import (
    can_fork,
    processes_of_outer_launcher,
    start,
    threads_each,
)
from axialtrain.train.signals import AGAIN

pytestmark = pytest.mark.slow

HOST = socket.gethostname()


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
    """Beside a rank that is stopped, which no SIGTERM ends."""
    if os.environ["RANK"] == "1":
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGSTOP)


def compute() -> None:
    """In several OpenMP threads; prints how many there are, and a name drawn at random."""
    torch.set_num_threads(3)
    torch.randn(2**20).exp().sum()
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group("gloo")
        dist.barrier()
        print(f"{torch.get_num_threads()} {os.path.basename(name)}\n", end="", flush=True)
        dist.destroy_process_group()


def told_again_and_again() -> None:
    rank = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # what a fork calls swallows it
    if os.fork() == 0:
        with suppress(ProcessLookupError):
            for _ in range(5000):
                os.kill(rank, signal.SIGINT)
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
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
        (die, 1, f"axialtrain: rank 1 on {HOST} died before its first step: SIGKILL"),
    ],
    ids=["refuses", "crashes", "dies"],
)
def test_one_rank_that_fails_ends_all(capfd, fn, status, message):
    before = multiprocessing.active_children()  # ranks of other tests
    started = time.monotonic()
    assert start(fn, (), 2) == status
    assert time.monotonic() - started < 30
    assert message in capfd.readouterr().err
    assert set(multiprocessing.active_children()) <= set(before)


def test_a_rank_that_dies_in_a_step_is_named(capfd, tmp_path):
    assert start(small_run, ("die", 0, 10.0, str(tmp_path)), 2) == 1
    assert capfd.readouterr().err == f"axialtrain: rank 0 on {HOST} died in step 3: SIGKILL\n"


def launched(call: str, *, ready: str, count: int, fork: bool = True) -> subprocess.Popen[str]:
    """start(`call`) in a process group of its own, once `count` lines `ready` were printed."""
    code = (
        "from launch.test_local import *; print('up', flush=True); "
        f"sys.exit(start({call}, fork={fork} and can_fork(), last=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": "tests", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    seen = 0
    while seen < count:
        seen += process.stdout.readline().count(ready)
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status and what it said, with nothing left of its group."""
    try:
        _, errors = process.communicate(timeout=30)
        for _ in range(50):  # multiprocessing's tracker ends when its parent has
            if not alive(process.pid):
                break
            time.sleep(0.1)
        assert not alive(process.pid)
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in errors
    return process.returncode, errors


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


FORKED = pytest.mark.parametrize("fork", [True, False], ids=["copies", "anew"])


@FORKED
def test_an_interrupt_ends_ranks_that_cannot_save(fork):
    process = launched("wait_long, (), 2", ready="waiting", count=2, fork=fork)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to everybody
    status, errors = ended(process)
    assert status == 130
    assert errors.count("interrupted by SIGINT: nothing was saved now") == 1


@FORKED
def test_interrupts_in_close_order_are_one(capfd, fork):
    """A terminal's and the launcher's reach a rank together; the second broke the end that the
    first had begun, with a traceback."""
    assert start(told_again_and_again, (), 2, fork=fork and can_fork()) == 130
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("fork", "to_all", "signals"),
    [
        (True, False, [signal.SIGTERM]),
        (True, True, [signal.SIGINT]),  # as a terminal sends it, and once more from the launcher
        (False, True, [signal.SIGINT]),
        (True, False, [signal.SIGUSR1, signal.SIGTERM]),  # Slurm's warning, and its end
    ],
    ids=["SIGTERM", "Ctrl-C", "Ctrl-C, anew", "Slurm"],
)
def test_ranks_that_are_told_to_end_save_and_ask_to_be_started_again(
    tmp_path, fork, to_all, signals
):
    process = launched(
        f"small_run, ('none', 0, 20.0, {str(tmp_path)!r}), 2", ready="there", count=2, fork=fork
    )
    for number in signals:
        (os.killpg if to_all else os.kill)(process.pid, number)
        time.sleep(0.2)  # two that are pending together have no order
    status, errors = ended(process)
    assert status == AGAIN
    assert errors.count(f"axialtrain: told to end by {signals[0].name}: saved step") == 1


def test_a_second_signal_ends_ranks_at_once(tmp_path):
    call = f"small_run, ('none', 0, 60.0, {str(tmp_path)!r}, True), 2"
    process = launched(call, ready="there", count=2)
    asked = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.5)  # two that are pending together are one
    os.kill(process.pid, signal.SIGTERM)
    status, errors = ended(process)
    assert time.monotonic() - asked < 10
    assert status == 128 + signal.SIGTERM
    assert "killed by a second signal after SIGTERM" in errors


@FORKED
def test_a_signal_while_ranks_begin_means_start_me_again(fork):
    process = launched("wait_long, (), 2", ready="up", count=1, fork=fork)
    time.sleep(0.05 if fork else 0.5)  # new ones import torch
    os.kill(process.pid, signal.SIGTERM)
    status, errors = ended(process)
    assert status == AGAIN
    assert "interrupted by SIGTERM: nothing was saved now" in errors


def test_a_signal_that_another_thread_gets_is_handed_on():
    before = len(multiprocessing.active_children())  # ranks of other tests

    def told() -> None:
        while len(multiprocessing.active_children()) < before + 2:
            time.sleep(0.1)
        time.sleep(1.0)  # the main thread waits for the ranks, in a system call
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    started = time.monotonic()
    thread = threading.Thread(target=told)
    thread.start()
    assert start(wait_long, (), 2) == AGAIN
    thread.join()
    assert time.monotonic() - started < 40


def test_copies_have_their_own_threads_and_random_numbers():
    """A copy of a process whose OpenMP threads are gone would wait for them; two copies that drew
    alike would, for instance, take the same temporary names."""
    code = (
        "from launch.test_local import *; fork = can_fork(); torch.randn(2**16).sum(); "
        "sys.exit(start(compute, (), 2, fork=fork))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        | {"PYTHONPATH": "tests"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    threads, names = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert threads == ("3", "3")
    assert len(set(names)) == 2


def test_threads_of_a_rank(monkeypatch):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    cores = len(os.sched_getaffinity(0))
    assert threads_each(None, 1, 7) == cores
    assert threads_each(None, 4 * cores, 7) == 1
    assert threads_each(3, 1, 7) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert threads_each(None, 1, 7) == 7
    assert threads_each(3, 1, 7) == 3


def test_who_started_us(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes_of_outer_launcher() is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes_of_outer_launcher() == 4
    monkeypatch.setenv("WORLD_SIZE", "four")
    with pytest.raises(ValueError, match="WORLD_SIZE='four': allowed is a whole number"):
        processes_of_outer_launcher()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"RANK": "3"}, True),  # left over from somewhere: there are no others
        ({"RANK": "0", "WORLD_SIZE": "4"}, True),
        ({"RANK": "3", "WORLD_SIZE": "4"}, False),
        ({"RANK": "three", "WORLD_SIZE": "4"}, True),  # which is what is said
    ],
)
def test_who_says_what_all_ranks_found(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert speaks() == expected


LATE = """
import os, signal, sys, time
from axialtrain.launch.errors import say, speaks, to_the_end
with to_the_end():
    if os.environ["RANK"] == "0":
        time.sleep(3)
    if speaks():
        say(ValueError("planted"))
    sys.exit(2)
"""


def test_what_all_ranks_found_is_said_where_rank_0_comes_late(tmp_path):
    """torchrun ends it as soon as another rank has ended, which says nothing."""
    (tmp_path / "late.py").write_text(LATE)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, str(tmp_path / "late.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("axialtrain: planted") == 1, done.stderr


def test_a_signal_that_waited_ends_the_process():
    code = (
        "from axialtrain.launch.errors import *\n"
        "with to_the_end():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('here', flush=True)\n"
        "print('there')"
    )
    for launcher, said in (({"RANK": "0", "WORLD_SIZE": "2"}, "here\n"), ({}, "")):
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=clean | launcher,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (-signal.SIGTERM, said)


EARLY = """
from axialtrain.launch.errors import *
with told_early():
    os.kill(os.getpid(), signal.{name})
    print("here", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_who_is_told_to_end_before_the_run_began_is_to_be_started_again(name):
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    for launcher, status in (({}, AGAIN), ({"WORLD_SIZE": "2"}, -signal.Signals[name])):
        done = subprocess.run(
            [sys.executable, "-c", EARLY.format(name=name)],
            env=clean | launcher,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout) == (status, "")
        assert (f"told to end by {name}, before the run began" in done.stderr) == (status > 0)


def test_the_handlers_of_a_run_stay_when_it_has_begun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with told_early():
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before
        with told_early():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("rank", "local", "said"),
    [
        ("0", "0", "axialtrain: planted\n"),
        ("4", "0", "axialtrain: rank 4: planted\n"),
        ("5", "1", ""),
    ],
    ids=["rank 0", "first of another host", "its second"],
)
def test_what_a_host_found_is_said_by_its_first_rank(monkeypatch, capfd, rank, local, said):
    for name, value in {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert say_by_host(ValueError("planted")) == 2
    assert capfd.readouterr().err == said
