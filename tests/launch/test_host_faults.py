"""What goes wrong between hosts: a cut cable, a bad line, a host that dies, with and without its
return. A run ends on every host and says why, or goes on to the weights of one undisturbed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed.host_runs import GIVEN, TORCHRUN, finished, said, start, torchrun, until
from distributed.hosts import Host, hosts
from killed_runs import assert_bit_equal, finish, losses, saved_step

STEPS = 24
TIMEOUT = 12.0  # s, launcher.timeout: of a collective, and of a rank's silence
BEATS = 6.0  # s, in which a rank tells where it stands, once at least, however busy the machine is
# A host that is silent for 3 s is no longer waited for, nor, at 1:2 hosts, one that might yet come.
SOON = "join_timeout=100,keep_alive_interval=1,last_call_timeout=2"

pytestmark = pytest.mark.slow


@pytest.fixture
def pair(tmp_path) -> Iterator[list[Host]]:
    (tmp_path / "hosts").mkdir()
    with hosts(2, tmp_path / "hosts") as made:
        yield made


@pytest.fixture(scope="module")
def given(small_shards) -> list[str]:
    return [*GIVEN, f"data.shards={small_shards}", f"train.steps={STEPS}"]


@pytest.fixture(scope="module")
def undisturbed(given, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(folder, *given, "mesh=1x2")
    return folder


def test_a_cut_cable_ends_the_run_on_both_hosts(pair, given, tmp_path):
    folder = tmp_path / "cut"
    arguments = [*given, "mesh=1x2", "train.steps=100000", f"launcher.timeout={TIMEOUT}"]
    with torchrun(pair, folder, *arguments) as runs:
        until(runs, lambda: runs[0].steps() >= 5, "step 5")
        time.sleep(BEATS)  # five steps fit between two of them
        pair[1].cut()
        cut = time.monotonic()
        for run in runs:
            assert run.wait() != 0
            assert time.monotonic() - cut < 5 * TIMEOUT, said(runs)
        assert (
            "axialtrain: rank 0: rank 1 on host1 is silent, last heard of in step" in runs[0].said
        )
        assert "axialtrain: rank 1: the launcher's store is gone" in runs[1].said


def test_a_bad_line_changes_no_weight(pair, given, undisturbed, tmp_path):
    """20 ms more in each direction, and one frame in a hundred lost, for some steps."""
    folder = tmp_path / "line"
    with torchrun(pair, folder, *given, "mesh=1x2", f"launcher.timeout={TIMEOUT}") as runs:
        until(runs, lambda: runs[0].steps() >= 3, "step 3")
        with pair[1].slow(delay=0.02, loss=0.01) as counts:
            before = runs[0].steps()
            until(runs, lambda: runs[0].steps() >= before + 8, "8 steps later")
        finished(runs)
    assert counts["forwarded"] > 500
    assert counts["lost"] > 0
    assert_bit_equal(folder, undisturbed)


def test_a_host_that_dies_and_comes_back(pair, given, undisturbed, tmp_path):
    folder = tmp_path / "back"
    arguments = [*given, "mesh=1x2", "checkpoint.every=3", "resume=auto"]
    arguments += [f"launcher.timeout={TIMEOUT}"]
    environment = {"MAX_RESTARTS": 1, "RDZV_CONF": SOON}
    with torchrun(pair, folder, *arguments, **environment) as runs:
        until(runs, lambda: runs[0].steps() >= 8, "step 8")
        pair[1].kill_all()
        again = {"NODES": 2, "PROCESSES": 1, "RENDEZVOUS": "host0", **environment}
        runs[1] = start(pair[1], TORCHRUN, folder, *arguments, **again)
        finished(runs)
        assert runs[0].said.count("going on from step") == 1
        assert 6 <= int(runs[0].said.split("going on from step ")[1].split()[0]) < STEPS
    assert_bit_equal(folder, undisturbed)


def test_a_host_that_dies_for_good(pair, given, tmp_path):
    """Those that are left take its images, too: the batch stays the same."""
    batch = [*given, "mesh=single", "train.batch=2", "train.micro_batch=1"]
    finish(tmp_path / "one", *batch)
    folder = tmp_path / "fewer"
    arguments = [*batch, "mesh.data=auto", "checkpoint.every=3", "resume=auto"]
    arguments += [f"launcher.timeout={TIMEOUT}"]
    environment = {"NODES": "1:2", "MAX_RESTARTS": 1, "RDZV_CONF": SOON}
    with torchrun(pair, folder, *arguments, **environment) as runs:
        until(runs, lambda: runs[0].steps() >= 8, "step 8")
        pair[1].kill_all()
        finished(runs[:1])
        assert runs[0].said.count("going on from step") == 1
    assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert saved_step(folder) == STEPS
