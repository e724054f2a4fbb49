"""launch/slurm.sbatch under a real Slurm: told to end, preempted, requeued, it ends with the weights
of the run that was never interrupted."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from killed_runs import SMALL, assert_bit_equal, finish, saved_step
from slurm_cluster import SCRIPT, Slurm, slurm
from system_tools import root

STEPS = 300
ONE_NODE = ["--nodes=1", "--cpus-per-task=2"]
TWO_NODES = ["--nodes=2", "--cpus-per-task=1"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(small_shards) -> list[str]:
    shards = f"data.shards={small_shards}"
    return [*SMALL, shards, f"train.steps={STEPS}", "mesh=1x2", "checkpoint.every=0"]


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "whole"
    finish(folder, *given)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Slurm]:
    root()
    with slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def trains(cluster: Slurm, job: int | str, folder: Path, more: int = 5) -> None:
    """Wait until it has taken `more` steps since it was saved. Those are in metrics.jsonl before."""
    wanted = saved_step(folder) + more
    cluster.until(lambda: steps(folder) >= wanted, f"job {job} is at step {wanted}")


def test_on_two_nodes_it_is_told_and_preempted_and_goes_on(cluster, given, whole):
    """No checkpoint but those that it saves when it is told: by SIGUSR1, as before the limit, and
    by Slurm, which needs its nodes for a job of higher priority."""
    job = cluster.submit(TWO_NODES, *given)
    folder = cluster.folder / "runs" / f"slurm-{job}"
    log = cluster.folder / f"slurm-{job}.out"
    trains(cluster, job, folder)
    cluster.call("scancel", "--signal=USR1", job)
    cluster.begin_now(job)
    first = saved_step(folder)
    assert 5 <= first == steps(folder) < STEPS
    said = log.read_text()
    assert said.count(f"told to end by SIGUSR1: Step {first} is saved in") == 1

    trains(cluster, job, folder)
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.out"]
    other = cluster.call("sbatch", "--parsable", *urgent, "--wrap", "true")
    cluster.begin_now(job)
    second = saved_step(folder)
    assert first < second == steps(folder) < STEPS
    said = log.read_text()
    assert "DUE TO PREEMPTION" in said
    assert said.count(f"told to end by SIGTERM: Step {second} is saved in") == 1

    cluster.until(lambda: cluster.state(job) in ("COMPLETED", "FAILED"), f"job {job} has ended")
    assert cluster.state(job) == "COMPLETED", cluster.said()
    assert cluster.state(other) == "COMPLETED"
    said = log.read_text()
    for step in (first, second):
        assert said.count(f"going on from step {step} of") == 1
    assert_bit_equal(folder, whole)


def test_the_elements_of_an_array_go_on_with_one_run(cluster, given, whole):
    """Of which the first is told by SIGTERM to end. On one node with two slots."""
    job = cluster.submit([*ONE_NODE, "--array=1-2%1"], *given)
    folder = cluster.folder / "runs" / f"slurm-{job}"
    trains(cluster, f"{job}_1", folder)
    cluster.call("scancel", "--signal=TERM", f"{job}_1")
    cluster.until(
        lambda: cluster.state(f"{job}_2") in ("COMPLETED", "FAILED"), "the second has ended"
    )
    assert cluster.state(f"{job}_2") == "COMPLETED", cluster.said()
    first, second = ((cluster.folder / f"slurm-{job}_{n}.out").read_text() for n in (1, 2))
    (step,) = re.findall(r"told to end by SIGTERM: Step (\d+) is saved", first)
    assert f"going on from step {step} of" in second
    assert 5 <= int(step) < STEPS
    assert "ExitCode=75:0" in cluster.call("scontrol", "show", "job", f"{job}_1")
    assert_bit_equal(folder, whole)


def test_a_wrong_key_fails_the_job_and_starts_nothing_again(cluster, given):
    job = cluster.submit([*ONE_NODE, "--export=ALL,MAX_RESTARTS=0"], *given, "train.stepz=3")
    cluster.until(lambda: cluster.state(job) == "FAILED", f"job {job} has failed")
    said = (cluster.folder / f"slurm-{job}.out").read_text()
    assert said.count("unknown key train.stepz") == 1
    assert "Restarts=0" in cluster.call("scontrol", "show", "job", job)


def test_the_script_is_short_and_asks_for_what_it_needs():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) < 60
    for line in ("--signal=USR1@300", "--requeue", "--open-mode=append"):
        assert f"\n#SBATCH {line}\n" in text
    assert socket.gethostname() not in text
