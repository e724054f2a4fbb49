"""A rank that is lost or hangs ends the run within its timeout, with its name, host and step."""

from __future__ import annotations

import ast
import atexit
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed.launcher import run_ranks
from distributed.model_ranks import left_alone_in_a_graph
from distributed.watch_ranks import apart, small_run, stopped_together
from torch.distributed import TCPStore

from axialtrain.launch.local import start
from axialtrain.mesh.collectives import Transfer
from axialtrain.train.beats import HANDLES_OF_ZERO, Beat, at_fault, in_step, position
from axialtrain.train.recorder import record_collectives
from axialtrain.train.watch import LOST, Watch, end_agent, from_collective

TIMEOUT = 3.0
HOST = socket.gethostname()
SCRIPT = Path(__file__).parents[1] / "distributed" / "watch_ranks.py"

waiting = Beat(0, "here", 1, count=5, step=7, where="loop.py:9 in _step", collective=True)


def readings(*beats: Beat | None, silent: tuple[int, ...] = ()) -> tuple[list, list]:
    """Two readings, in which the beats of all but `silent` have gone on."""
    ranked = [None if b is None else replace(b, rank=rank) for rank, b in enumerate(beats)]
    later = [b if b is None or b.rank in silent else replace(b, count=b.count + 3) for b in ranked]
    return ranked, later


@pytest.mark.parametrize(
    ("beats", "expected"),
    [
        (
            readings(waiting, waiting, waiting, silent=(1,)),
            "rank 1 on here is silent, last heard of in step 7, at loop.py:9 in _step",
        ),
        (readings(waiting, None), "rank 1 is silent: it never told where it stands"),
        (
            readings(waiting, waiting, replace(waiting, collective=False, where="read.py:1 in f")),
            "rank 2 on here, in step 7, at read.py:1 in f, outside of the collective that others "
            "wait in",
        ),
        (
            readings(waiting, replace(waiting, step=None), waiting),
            "rank 1 on here, before its first step, at loop.py:9 in _step, behind others",
        ),
        (readings(waiting, replace(waiting, gone=True)), "rank 1 on here has ended"),
        (
            readings(waiting, replace(waiting, asking=True, collective=False)),
            "every other rank has failed too",
        ),
        (
            readings(waiting, waiting),
            "rank 1 on here, in step 7, at loop.py:9 in _step, in a collective",
        ),
    ],
    ids=["silent", "never heard", "outside", "behind", "ended", "failed too", "all wait"],
)
def test_who_is_at_fault(beats, expected):
    assert at_fault(*beats, me=0) == expected


def test_a_long_list_is_cut():
    told = at_fault(*readings(*[waiting] * 20, silent=tuple(range(1, 20))), me=0)
    assert told.count("is silent") == 8
    assert told.endswith("; and 11 more")


def test_words_for_a_step():
    assert in_step(None) == "before its first step"
    assert in_step(0) == "in step 0"


def test_an_own_error_is_none_of_a_collective():
    try:
        raise RuntimeError("planted")
    except RuntimeError as error:
        assert not from_collective(error)
    assert not from_collective(ValueError("planted"))


class Late:
    """A collective under way that fails; where its rank stood meanwhile."""

    def wait(self) -> None:
        self.stood = position([])
        raise RuntimeError("planted")


def test_waiting_for_messages_sent_beside_is_waiting_in_a_collective():
    late = Late()
    with pytest.raises(RuntimeError, match="planted") as raised:
        Transfer(torch.zeros(1), torch.zeros(1), late).received()
    assert from_collective(raised.value)
    where, collective = late.stood
    assert where.startswith("axialtrain/mesh/collectives.py:")
    assert collective
    assert not position([])[1]


def test_waiting_for_what_zero_3_gathers_is_waiting_in_a_collective():
    [package] = importlib.util.find_spec("deepspeed").submodule_search_locations
    file = Path(package).parent / HANDLES_OF_ZERO
    handles = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    waiting = {"AllGatherHandle", "AllGatherCoalescedHandle", "AllReduceCoalescedHandle"}
    for node in handles:
        if node.name in waiting and "wait" in {getattr(part, "name", "") for part in node.body}:
            waiting.remove(node.name)
    assert not waiting
    names = {}
    exec(compile("def wait(): raise RuntimeError('planted')", str(file), "exec"), names)
    with pytest.raises(RuntimeError, match="planted") as raised:
        names["wait"]()
    assert from_collective(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_waiting_within_a_compiled_layer_is_waiting_in_a_collective(backward):
    found, _ = run_ranks(left_alone_in_a_graph, 2, timeout=100, backward=backward)
    known, waited, where = found
    assert known
    assert waited
    assert where.startswith("axialtrain/mesh/parallelize.py:")


SERVER = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True)
print(store.port, flush=True)
time.sleep(100)
"""


@pytest.mark.slow
def test_an_own_error_behind_a_store_that_is_deaf_ends_the_agent(monkeypatch):
    """As behind a cut cable: torchrun's agent of this host would wait for it, and say nothing."""
    registered, register = [], atexit.register

    def registering(what, *arguments, **options):
        if what is end_agent:
            return registered.append(what)
        return register(what, *arguments, **options)

    monkeypatch.setattr(atexit, "register", registering)
    monkeypatch.setattr("axialtrain.train.watch._store_is_here", lambda: False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=-1, text=True) as server:
        watch = None
        try:
            store = TCPStore("127.0.0.1", int(server.stdout.readline()))
            watch = Watch(store, 1, 2, timeout=60.0, folder=None)
            assert watch.failed(ValueError("planted")) is None
            assert registered == []  # it was told, and those who read it end
            server.send_signal(signal.SIGSTOP)
            assert watch.failed(ValueError("planted")) is None
            assert registered == [end_agent]
        finally:
            if watch is not None:
                watch.close()  # else its threads would end this process, soon
            server.kill()


def test_the_users_settings_of_the_recorder_win(monkeypatch, tmp_path):
    for name in (
        "TORCH_FR_BUFFER_SIZE",
        "TORCH_FR_DUMP_TEMP_FILE",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    record_collectives(tmp_path)
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ  # set under its old name
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "nccl-rank-")
    monkeypatch.delenv("TORCH_FR_DUMP_TEMP_FILE")  # ours, which monkeypatch does not know


@pytest.mark.parametrize(
    ("name", "restarts", "most", "ended"),
    [
        ("torchrun", 0, 0, True),
        ("torchrun", 2, 2, True),
        ("torchrun", 0, 2, False),
        ("a-shell", 0, 0, False),
    ],
)
def test_only_an_agent_that_starts_nothing_again_is_ended(monkeypatch, name, restarts, most, ended):
    with subprocess.Popen([sys.executable, "-S", "-c", "input()", name], stdin=-1) as parent:
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        end_agent()  # no torchrun started us
        for key, value in (("RUN_ID", "x"), ("RESTART_COUNT", restarts), ("MAX_RESTARTS", most)):
            monkeypatch.setenv(f"TORCHELASTIC_{key}", str(value))
        while name.encode() not in Path(f"/proc/{parent.pid}/cmdline").read_bytes():
            assert parent.poll() is None  # a moment after it began it has no command line yet
        end_agent()
        try:
            assert parent.wait(5 if ended else 0.3) == -signal.SIGKILL
        except subprocess.TimeoutExpired:
            assert not ended
        finally:
            parent.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "victim", "alone", "expected"),
    [
        ("stop", 0, False, f"rank 1: rank 0 on {HOST} is silent, last heard of in step 3, at "),
        ("stop", 1, True, f"rank 0: rank 1 on {HOST} is silent, last heard of in step 3, at "),
        ("hang", 1, False, f"rank 0: rank 1 on {HOST}, in step 3, at watch_ranks.py"),
    ],
    ids=["stopped", "stopped while others compute", "hangs"],
)
def test_a_rank_that_hangs_is_named(capfd, tmp_path, fault, victim, alone, expected):
    assert start(small_run, (fault, victim, TIMEOUT, str(tmp_path), alone), 2) == 1
    assert time.time() - (tmp_path / "there").stat().st_mtime < TIMEOUT + 15
    errors = capfd.readouterr().err
    assert errors.count(expected) == 1, errors
    assert last_collective(tmp_path, 1 - victim) == "gloo:all_reduce"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("stop", f"rank 0: rank 1 on {HOST} is silent, last heard of in step 3, at "),
        ("hang", f"rank 0: rank 1 on {HOST}, in step 3, at watch_ranks.py"),
    ],
    ids=["stopped", "hangs"],
)
def test_a_rank_that_hangs_is_named_by_one_that_waits_for_its_message(
    capfd, tmp_path, fault, expected
):
    assert start(small_run, (fault, 1, TIMEOUT, str(tmp_path), False, 500, True), 2) == 1
    errors = capfd.readouterr().err
    assert errors.count(expected) == 1, errors
    assert last_collective(tmp_path, 0) == "gloo:all_to_all"


def last_collective(folder: Path, rank: int) -> str:
    record = json.loads((folder / f"rank-{rank}.json").read_text())
    return record["entries"][-1]["profiling_name"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "victim", "expected"),
    [
        ("die", 1, f"rank 0: rank 1 on {HOST} is silent, last heard of in step 3"),
        ("fail", 0, f"rank 1: rank 0 on {HOST} failed in step 3: ZeroDivisionError: planted"),
    ],
    ids=["die 1", "fail 0"],
)
def test_a_rank_that_is_lost_under_torchrun_is_named(tmp_path, fault, victim, expected):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    arguments = [fault, str(victim), str(TIMEOUT), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f"axialtrain: {expected}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "others", "status"),
    [("stop", [], 2), ("stop", ["alone"], LOST), ("die", ["alone"], LOST)],
    ids=["stopped", "stopped while others compute", "killed while others compute"],
)
def test_the_rank_that_held_the_store_is_named(tmp_path, fault, others, status):
    """Without torchrun's store, rank 0 holds it: nobody can be asked any more."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_USE_AGENT_STORE"}
    arguments = [fault, "0", str(TIMEOUT), str(tmp_path), *others]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            env=clean
            | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, errors = ranks[1].communicate(timeout=80)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert ranks[1].returncode == status, errors
    assert "axialtrain: rank 1: the store is gone" in errors
    assert f"it was with rank 0 on {HOST}, in step 3" in errors


@pytest.mark.slow
def test_computing_ending_and_being_stopped_together_are_no_silence():
    assert run_ranks(apart, 3, timeout=60, timeout_of_watch=1.0) == [None] * 3
    assert run_ranks(stopped_together, 2, timeout=60, timeout_of_watch=1.0) == [None] * 2
